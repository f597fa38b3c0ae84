//! `Idempotency-Key`: the key, a hash of the body and the answer are stored in the transaction of the effect (S9, S11).
//!
//! Owns the table `idempotency_key` of every service's database. A service's committer asks a [`Plan`] what of its batch is
//! due, does that, and stores the answers before it commits: three statements a batch, and none where nobody sent a key.
//!
//! A stamp names one request of a client over all the times that the gateway tries it. A repeat with the stored answer's own stamp is
//! such a try: its client has not been answered yet, so it is told nothing of a replay. May import config and db.

mod header;
mod plan;
mod prune;
mod store;

pub(super) use header::KEY_CHARS_MAX;
pub use header::{IDEMPOTENCY_KEY, IDEMPOTENCY_KEY_HEADER, IdempotencyKey, OwnIdempotencyKey, REPLAYED};
pub use plan::Plan;
pub use prune::{keep_pruned, prune};
pub use store::{Record, store};

use std::fmt;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::problem::{Code, Problem};
use super::reply::{Answer, Reply};
use crate::db::DbError;

/// A key, where it counts, and what was asked under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Method and path: the same text elsewhere is another key.
    pub scope: String,
    pub text: String,
    /// SHA-256 of the body's bytes as the client sent them.
    pub body_hash: [u8; 32],
    /// Names the request over all its tries; `None` where it did not come through the gateway.
    pub stamp: Option<Uuid>,
}

impl Key {
    pub fn new(scope: impl Into<String>, text: impl Into<String>, body: &[u8]) -> Self {
        Self { scope: scope.into(), text: text.into(), body_hash: Sha256::digest(body).into(), stamp: None }
    }

    #[must_use]
    pub fn stamped(self, stamp: Option<Uuid>) -> Self {
        Self { stamp, ..self }
    }

    /// An answer that was made for `stamp` is this request's own.
    fn is_of(&self, stamp: Option<Uuid>) -> bool {
        self.stamp.is_some() && self.stamp == stamp
    }

    /// The number of its advisory lock; two keys that share one only refuse each other while both are running.
    fn lock(&self) -> i64 {
        let mut hash = Sha256::new();
        // Neither holds a control character, so this is no other pair's text.
        for part in [self.scope.as_bytes(), b"\n", self.text.as_bytes()] {
            hash.update(part);
        }
        let [a, b, c, d, e, f, g, h, ..] = <[u8; 32]>::from(hash.finalize());
        i64::from_be_bytes([a, b, c, d, e, f, g, h])
    }

    fn id(&self) -> (&str, &str) {
        (&self.text, &self.scope)
    }
}

/// A key with how the result of its request is answered: the answer must be known before the commit that stores it.
pub struct Keyed<R> {
    pub key: Key,
    answer: Arc<dyn Fn(&R) -> Answer + Send + Sync>,
}

impl<R> Keyed<R> {
    pub fn new(key: Key, answer: impl Fn(&R) -> Answer + Send + Sync + 'static) -> Self {
        Self { key, answer: Arc::new(answer) }
    }
}

impl<R> Clone for Keyed<R> {
    fn clone(&self) -> Self {
        Self { key: self.key.clone(), answer: self.answer.clone() }
    }
}

impl<R> fmt::Debug for Keyed<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.fmt(f)
    }
}

/// What came of a request that may have had a key.
#[derive(Clone, Debug)]
pub enum Settled<R> {
    /// It had none, or its answer is none to be stored (a 5xx).
    Done(R),
    /// As it is stored under the key; a replay says so in its headers, another try of the same request does not.
    Answered(Answer),
    /// The key was used with another body; nothing happened.
    Mismatch,
    /// A request with this key is running elsewhere; nothing happened.
    InProgress,
}

impl<R> Settled<R> {
    /// The answer to the client; `reply` must be what the key's answer was made with.
    pub fn reply<T>(self, reply: impl FnOnce(R) -> Result<Reply<T>, Problem>) -> Result<Reply<T>, Problem> {
        match self {
            Self::Done(result) => reply(result),
            Self::Answered(answer) => Ok(answer.into()),
            Self::Mismatch => Err(Problem::new(Code::IdempotencyMismatch, "This Idempotency-Key was used with another body.")),
            Self::InProgress => {
                Err(Problem::new(Code::IdempotencyInProgress, "A request with this Idempotency-Key is still running; ask again."))
            }
        }
    }
}

/// The database did not do it; never stored.
impl<T, E: From<DbError>> From<DbError> for Settled<Result<T, E>> {
    fn from(error: DbError) -> Self {
        Self::Done(Err(error.into()))
    }
}
