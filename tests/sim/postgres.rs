//! A Postgres, as much of one as these tables need: transaction ids and snapshots, row locks, transactions that stay open, commits
//! whose fate the client does not learn, sessions that end, and a crash that loses what was not committed, ids included.

mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shopd::db::DbError;
use tokio::sync::Notify;

use crate::kafka::Kafka;
use crate::tables::Tables;
use crate::world::{Guard, Process, World};

/// As configured by default.
const IDLE_IN_TRANSACTION_MS: u64 = 2_000;
const REAPING: Duration = Duration::from_millis(200);

pub use transaction::Tx;

/// What is locked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Offset(i32),
    Order(u128),
    Payment(u128),
    Account(String),
    Answer(u64),
    Sweep,
}

/// What happens to the next commits that write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Committed, and the client hears nothing of it.
    AnswerLost,
    /// Rolled back by the server.
    Refused,
    /// Open for so many more milliseconds.
    Slow(u64),
}

struct Transaction {
    xid: Option<u64>,
    locks: Vec<Key>,
    process: u32,
    /// Set while the server waits for the client.
    ends_ms: Option<u64>,
}

pub struct State {
    up: bool,
    incarnation: u64,
    next_transaction: u64,
    next_xid: u64,
    /// The highest transaction id that a crash does not forget.
    durable_xid: u64,
    latest_completed: u64,
    next_id: i64,
    transactions: BTreeMap<u64, Transaction>,
    open: BTreeSet<u64>,
    locks: BTreeMap<Key, u64>,
    fates: Vec<Fate>,
    pub tables: Tables,
}

/// One database server with one service's database.
#[derive(Clone)]
pub struct Postgres {
    pub world: World,
    pub kafka: Kafka,
    number: u32,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    listeners: Arc<Mutex<Vec<Arc<Notify>>>>,
}

fn away(why: &str) -> DbError {
    DbError::Unavailable(why.into())
}

impl Postgres {
    pub fn start(world: World, kafka: Kafka, number: u32) -> Self {
        let state = State {
            up: true,
            incarnation: 0,
            next_transaction: 0,
            next_xid: 10,
            durable_xid: 9,
            latest_completed: 9,
            next_id: 1,
            transactions: BTreeMap::new(),
            open: BTreeSet::new(),
            locks: BTreeMap::new(),
            fates: Vec::new(),
            tables: Tables::new(),
        };
        let listeners = Arc::default();
        let db = Self { world, kafka, number, state: Arc::new(Mutex::new(state)), changed: Arc::new(Notify::new()), listeners };
        tokio::spawn(db.clone().reap());
        db
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// LISTEN on the outbox; once is enough.
    pub fn listen(&self, wake: Arc<Notify>) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if !listeners.iter().any(|known| Arc::ptr_eq(known, &wake)) {
            listeners.push(wake);
        }
    }

    /// NOTIFY.
    pub fn notify(&self) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|wake| wake.notify_one());
    }

    /// `idle_in_transaction_session_timeout`.
    async fn reap(self) {
        loop {
            tokio::time::sleep(REAPING).await;
            let now = self.world.now_ms();
            let late: Vec<u64> = {
                let state = self.state();
                let late = |t: &Transaction| t.ends_ms.is_some_and(|ends| ends <= now);
                state.transactions.iter().filter(|(_, t)| late(t)).map(|(id, _)| *id).collect()
            };
            for id in late {
                self.world.tell(self.number, "transaction ended for its silence", [id as i64, 0, 0]);
                self.end(id);
            }
        }
    }

    /// Roll-back, or the last act of a commit.
    fn end(&self, id: u64) {
        let mut state = self.state();
        let Some(transaction) = state.transactions.remove(&id) else { return };
        if let Some(xid) = transaction.xid {
            state.open.remove(&xid);
            state.latest_completed = state.latest_completed.max(xid);
        }
        for key in transaction.locks {
            state.locks.remove(&key);
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// The server learns at once that a client's sockets are closed.
    pub fn disconnected(&self, process: &Process) {
        let gone: Vec<u64> = {
            let state = self.state();
            let gone = |t: &Transaction| t.process == process.number() && t.ends_ms.is_some();
            state.transactions.iter().filter(|(_, t)| gone(t)).map(|(id, _)| *id).collect()
        };
        gone.into_iter().for_each(|id| self.end(id));
    }

    /// Everything open is lost; and ids that were given but are not on the disk are given again.
    pub fn crash(&self) {
        let (low, high) = {
            let state = self.state();
            (state.durable_xid + 1, state.next_xid + 1)
        };
        let next_xid = self.world.pick(low..high);
        let mut state = self.state();
        self.world.tell(self.number, "database crashes; next and forgotten id", [next_xid as i64, state.next_xid as i64, 0]);
        state.up = false;
        state.incarnation += 1;
        state.transactions.clear();
        state.open.clear();
        state.locks.clear();
        state.next_xid = next_xid;
        state.latest_completed = next_xid - 1;
        drop(state);
        self.changed.notify_waiters();
    }

    pub fn recover(&self) {
        self.state().up = true;
    }

    pub fn fate(&self, fate: Fate, times: u64) {
        let mut state = self.state();
        for _ in 0..times {
            state.fates.push(fate);
        }
    }

    pub fn calm(&self) {
        self.state().fates.clear();
    }

    /// A session of `process`, over which later statements go.
    pub fn incarnation(&self) -> u64 {
        self.state().incarnation
    }

    pub fn is_up(&self, incarnation: Option<u64>) -> Result<(), DbError> {
        let state = self.state();
        match incarnation {
            _ if !state.up => Err(away("the server is away")),
            Some(mine) if mine != state.incarnation => Err(away("the session has ended")),
            _ => Ok(()),
        }
    }

    /// `pg_current_snapshot()`
    pub fn snapshot(&self) -> String {
        let state = self.state();
        let xmax = state.latest_completed + 1;
        let mut open: Vec<u64> = state.open.range(..xmax).copied().collect();
        if !self.world.holds(Guard::CursorSnapshot) {
            open.clear();
        }
        let xmin = open.first().copied().unwrap_or(xmax);
        let open: Vec<String> = open.iter().map(u64::to_string).collect();
        format!("{xmin}:{xmax}:{}", open.join(","))
    }

    /// A single statement that only reads, or that locks what it writes only for the moment.
    pub async fn statement<T>(&self, process: &Process, work: impl FnOnce(&mut State) -> Result<T, DbError>) -> Result<T, DbError> {
        process.gate().await;
        self.world.network().await;
        let done = self.is_up(None).and_then(|()| work(&mut self.state()));
        self.world.network().await;
        process.gate().await;
        done
    }

    pub async fn begin(&self, process: &Process) -> Result<Tx, DbError> {
        process.gate().await;
        self.world.network().await;
        self.is_up(None)?;
        let mut state = self.state();
        state.next_transaction += 1;
        let id = state.next_transaction;
        state.transactions.insert(id, Transaction { xid: None, locks: Vec::new(), process: process.number(), ends_ms: None });
        drop(state);
        Ok(Tx::new(self, process, id))
    }

    /// A transaction of somebody else's, with an id of its own, that stays open.
    pub fn hold_open(&self, ms: u64) {
        let mut state = self.state();
        state.next_transaction += 1;
        let id = state.next_transaction;
        state.transactions.insert(id, Transaction { xid: None, locks: Vec::new(), process: u32::MAX, ends_ms: None });
        let incarnation = state.incarnation;
        drop(state);
        self.assign(id);
        let db = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            if db.incarnation() == incarnation {
                db.end(id);
            }
        });
    }

    fn assign(&self, id: u64) -> Option<u64> {
        let state = &mut *self.state();
        let transaction = state.transactions.get_mut(&id)?;
        if transaction.xid.is_none() {
            transaction.xid = Some(state.next_xid);
            state.open.insert(state.next_xid);
            state.next_xid += 1;
        }
        transaction.xid
    }
}

impl State {
    pub fn is_locked(&self, key: &Key) -> bool {
        self.locks.contains_key(key)
    }

    /// A statement that commits by itself and writes uses up a transaction id, which is on the disk then.
    pub fn autocommit(&mut self) {
        self.latest_completed = self.latest_completed.max(self.next_xid);
        self.durable_xid = self.durable_xid.max(self.next_xid);
        self.next_xid += 1;
    }
}
