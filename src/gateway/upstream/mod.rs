//! Asking a service: one request, over as many of its replicas as it takes, within one deadline.
//!
//! [`retry`] decides what is asked again and where; [`attempt`] is one try. No repeat doubles an effect: a GET has none, and a POST
//! has a key under which the service does it once. May import the gateway's replicas only.

mod attempt;
mod batch;
mod connection;
mod deadline;
mod retry;

use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use actix_web::http::uri::PathAndQuery;
use actix_web::http::{Method, StatusCode};
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use tokio::time::sleep_until;

pub use attempt::{Answer, AnswerBody, Chunks};
use attempt::{Failure, attempt};
use batch::Batches;
use connection::Pool;
use deadline::Deadlines;
use retry::{Next, Outcome, Tries};

use super::forward::Travels;
use super::replicas::{Picked, Replicas, Seen};

/// Connections to the services; one of these a worker thread, neither `Send` nor shared.
pub struct Client(Rc<Ours>);

/// What the requests of a worker thread have in common.
struct Ours {
    pool: Pool,
    deadlines: Deadlines,
    batches: Batches,
}

/// A request as the service sees it.
pub struct Outgoing<'a> {
    pub method: Method,
    /// Raw.
    pub target: PathAndQuery,
    /// Writes the header lines; called for each try.
    pub headers: &'a dyn Fn(&mut BytesMut, Travels),
    pub body: Bytes,
    pub kind: Kind,
    /// How long the service is asked to wait on purpose.
    pub wait: Duration,
    /// It was sent before, and may be running.
    pub again: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It has an end soon.
    Plain,
    /// As `Plain`; its key is the gateway's own.
    OwnKey,
    /// Its answer may go on for ever.
    Stream,
}

/// Why there is no answer; the texts are for the log.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("unavailable: {0}")]
    Unavailable(String),
    #[error("late: {0}")]
    Timeout(String),
}

impl UpstreamError {
    fn at(self, base: &str) -> Self {
        match self {
            Self::Unavailable(cause) => Self::Unavailable(format!("{base}: {cause}")),
            Self::Timeout(cause) => Self::Timeout(format!("{base}: {cause}")),
        }
    }
}

impl Client {
    /// Call it on the thread that uses it, within its runtime.
    pub fn start() -> Self {
        Self(Rc::new(Ours { pool: Pool::default(), deadlines: Deadlines::start(), batches: Batches::default() }))
    }

    /// Asks until `deadline`. A try that can be repeated elsewhere gets half of the time that is left beside its wait on purpose.
    pub async fn send(&self, replicas: &Replicas, outgoing: &Outgoing<'_>, deadline: Instant) -> Result<Answer, UpstreamError> {
        replicas.deposit();
        let mut tried = Vec::new();
        let (made, mut waits) = (Cell::new(u32::from(outgoing.again)), 0);
        let mut last = Err(UpstreamError::Unavailable("no replica is configured".to_owned()));
        while let Some(picked) = replicas.pick(&tried) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            tried.push(picked.replica.id());
            let others = replicas.has_untried(&tried);
            let until = if others { deadline - left.saturating_sub(outgoing.wait) / 2 } else { deadline };
            // A try within this one, behind a batch that broke.
            let may_repeat = || {
                let may = replicas.may_repeat();
                made.set(made.get() + u32::from(may));
                may
            };
            let done = {
                let trying = pin!(attempt(&self.0, &picked.replica, outgoing, until, &may_repeat));
                let asked = self.0.deadlines.bound(until, trying);
                let asked = asked.map(|asked| asked.unwrap_or_else(|| Err(Failure::late("no answer"))));
                if others { unless_it_dies(asked, &picked, replicas, &tried).await } else { asked.await }
            };
            made.set(made.get() + 1);
            let made = made.get();
            let (outcome, seen) = judge(&done);
            replicas.see(&picked.replica, seen);
            let base = picked.replica.base();
            if let Err(failure) = &done {
                tracing::debug!(replica = base, cause = %failure.error, made, "a try failed");
            }
            // An answer, even one that says no, tells the client more than a try that got none. But not that a try of ours is still running: it
            // knows nothing of a key.
            let own_key = outgoing.kind == Kind::OwnKey;
            match done {
                Ok(_) if own_key && outcome == Outcome::InProgress => {
                    last = Err(UpstreamError::Timeout(format!("{base}: an earlier try is still running")));
                }
                Ok(answer) => last = Ok(answer),
                Err(failure) if last.is_err() => last = Err(failure.error.at(base)),
                Err(_) => {}
            }
            let tries = Tries { made, others, others_well: others && replicas.has_well(&tried), own_key, waits };
            match retry::next(outcome, tries) {
                Next::Stop => break,
                Next::Elsewhere { budgeted } => {
                    if budgeted && !replicas.may_repeat() {
                        metrics::counter!("shopd_gateway_retries_refused_total").increment(1);
                        break;
                    }
                }
                Next::After(wait) => {
                    let until = Instant::now() + wait;
                    if until >= deadline {
                        break;
                    }
                    drop(picked);
                    sleep_until(until.into()).await;
                    (waits, tried) = (waits + 1, Vec::new());
                }
            }
            metrics::counter!("shopd_gateway_retries_total").increment(1);
        }
        last
    }
}

/// A try, given up where the replica misses its checks and another one is well.
async fn unless_it_dies(
    asked: impl Future<Output = Result<Answer, Failure>>,
    picked: &Picked,
    replicas: &Replicas,
    tried: &[usize],
) -> Result<Answer, Failure> {
    let died = async {
        loop {
            picked.replica.died().await;
            if replicas.has_well(tried) {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        done = asked => done,
        () = died => Err(Failure::late("it misses its checks")),
    }
}

/// What a try came to, for the request and for the replica.
fn judge(done: &Result<Answer, Failure>) -> (Outcome, Seen) {
    match done {
        Ok(answer) => {
            let outcome = match answer.status {
                StatusCode::SERVICE_UNAVAILABLE => Outcome::Unavailable,
                StatusCode::CONFLICT if is_in_progress(answer) => Outcome::InProgress,
                _ => Outcome::Answered,
            };
            (outcome, Seen::Answered)
        }
        Err(failure) => match failure.seen {
            Seen::Refused => (Outcome::Refused, Seen::Refused),
            Seen::Late => (Outcome::Late, Seen::Late),
            _ => (Outcome::Broken, Seen::Broken),
        },
    }
}

fn is_in_progress(answer: &Answer) -> bool {
    #[derive(serde::Deserialize)]
    struct Coded<'a> {
        #[serde(borrow)]
        code: std::borrow::Cow<'a, str>,
    }
    let AnswerBody::Whole(body) = &answer.body else { return false };
    serde_json::from_slice::<Coded<'_>>(body).is_ok_and(|body| body.code == crate::http::Code::IdempotencyInProgress.as_str())
}
