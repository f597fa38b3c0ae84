//! A transaction as its client drives it: round trips, locks, writes that show with the commit, and a commit whose fate may stay unknown.

use std::time::Duration;

use shopd::db::DbError;
use shopd::db::types::Xid;
use shopd::messaging::Message;
use shopd::messaging::outbox::Row;

use super::{Fate, IDLE_IN_TRANSACTION_MS, Key, Postgres, away};
use crate::tables::{Tables, passed};
use crate::world::Process;

/// As configured by default.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

type Write = Box<dyn FnOnce(&mut Tables) + Send>;

/// An open transaction. A client that gives it up rolls it back; one that is frozen or dead does not even do that.
pub struct Tx {
    pub db: Postgres,
    process: Process,
    id: u64,
    incarnation: u64,
    writes: Vec<Write>,
}

impl Drop for Tx {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Tx {
    pub(super) fn new(db: &Postgres, process: &Process, id: u64) -> Self {
        Self { db: db.clone(), process: process.clone(), id, incarnation: db.incarnation(), writes: Vec::new() }
    }

    fn alive(&self) -> Result<(), DbError> {
        self.db.is_up(Some(self.incarnation))?;
        if self.db.state().transactions.contains_key(&self.id) { Ok(()) } else { Err(away("the transaction was ended")) }
    }

    fn waits_for_client(&self, waits: bool) {
        let ends_ms = waits.then(|| self.db.world.now_ms() + IDLE_IN_TRANSACTION_MS);
        if self.db.incarnation() == self.incarnation
            && let Some(transaction) = self.db.state().transactions.get_mut(&self.id)
        {
            transaction.ends_ms = ends_ms;
        }
    }

    /// The next statements reach the server. Ends with [`Self::answer`].
    pub async fn arrive(&mut self) -> Result<(), DbError> {
        self.waits_for_client(true);
        self.process.gate().await;
        self.db.world.network().await;
        self.alive()?;
        self.waits_for_client(false);
        Ok(())
    }

    /// The server answers, and waits for the client again; an error has ended the transaction.
    pub async fn answer<T>(&mut self, done: Result<T, DbError>) -> Result<T, DbError> {
        match &done {
            Ok(_) => {
                self.waits_for_client(true);
                self.process.trap(&self.db.world);
            }
            Err(_) => self.abort(),
        }
        self.db.world.network().await;
        self.process.gate().await;
        done
    }

    pub fn abort(&self) {
        if self.db.incarnation() == self.incarnation {
            self.db.end(self.id);
        }
    }

    /// Waits for a lock as the server does.
    pub async fn lock(&mut self, key: Key) -> Result<(), DbError> {
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            let changed = self.db.changed.notified();
            self.alive()?;
            {
                let state = &mut *self.db.state();
                match state.locks.get(&key) {
                    Some(holder) if *holder == self.id => return Ok(()),
                    Some(_) => {}
                    None => {
                        state.locks.insert(key.clone(), self.id);
                        if let Some(transaction) = state.transactions.get_mut(&self.id) {
                            transaction.locks.push(key);
                        }
                        return Ok(());
                    }
                }
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                self.db.world.tell(self.process.number(), "lock timeout", [0; 3]);
                return Err(away("lock timeout"));
            }
        }
    }

    /// Given with the first write.
    pub fn xid(&mut self) -> Result<u64, DbError> {
        self.db.assign(self.id).ok_or_else(|| away("the transaction was ended"))
    }

    /// Applied when the transaction commits.
    pub fn write(&mut self, write: impl FnOnce(&mut Tables) + Send + 'static) {
        self.writes.push(Box::new(write));
    }

    /// `insert into outbox`: ids are given now, and seen by others after the commit. Returns the last row's position.
    pub fn append(&mut self, messages: Vec<Message>) -> Result<(u64, i64), DbError> {
        let xid = self.xid()?;
        let mut last = (xid, 0);
        for message in messages {
            let id = {
                let mut state = self.db.state();
                state.next_id += 1;
                state.next_id
            };
            last = (xid, id);
            let db = self.db.clone();
            self.write(move |tables| {
                let behind = passed(&tables.cursor.cursor, (xid, id));
                db.world.check(!behind, || {
                    format!("S13: outbox row ({xid}, {id}) commits behind the cursor {:?}", tables.cursor.cursor)
                });
                tables.outbox.insert((xid, id), Row::new(Xid(xid), id, &message));
            });
        }
        Ok(last)
    }

    /// # Errors
    /// [`DbError::Unavailable`] also where the fate is unknown.
    pub async fn commit(mut self) -> Result<(), DbError> {
        self.arrive().await?;
        let done = self.commit_there().await;
        self.answer(done).await
    }

    async fn commit_there(&mut self) -> Result<(), DbError> {
        let world = self.db.world.clone();
        let wrote = !self.writes.is_empty();
        let fate = if wrote { self.db.state().fates.pop() } else { None };
        let slow = match fate {
            Some(Fate::Slow(ms)) => ms,
            _ if world.chance(30) => world.pick(1..400),
            _ => 0,
        };
        if slow > 0 {
            tokio::time::sleep(Duration::from_millis(slow)).await;
            self.alive()?;
        }
        if fate == Some(Fate::Refused) {
            return Err(away("the server refused the commit"));
        }
        if wrote {
            let xid = self.xid()?;
            let mut state = self.db.state();
            state.durable_xid = state.durable_xid.max(xid);
            for write in self.writes.drain(..) {
                write(&mut state.tables);
            }
        }
        self.db.end(self.id);
        world.tell(self.process.number(), "commit", [i64::from(self.db.number), self.id as i64, i64::from(wrote)]);
        match fate {
            Some(Fate::AnswerLost) => Err(away("the connection broke during the commit")),
            _ => Ok(()),
        }
    }
}
