//! One bounded pool of connections to one database, and the one transaction function.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool::managed::QueueMode;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use diesel_async::{AsyncConnection, AsyncPgConnection, SimpleAsyncConnection};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::config::{DatabaseConfig, Secret};
use crate::faults;
use crate::telemetry;

use super::error::DbError;
use super::sessions::{Listening, Sessions};

pub type Conn = AsyncPgConnection;
pub type Pooled = Object<AsyncPgConnection>;

/// How a session's statements are planned. A prepared statement keeps its plan, and the first one may be made while a table is
/// still empty: what the planner thinks cheap then reads the whole table once it has grown (tried: with 65 000 orders, ending one
/// cost 46 us instead of 5, and more with every order).
mod plans {
    /// Every statement of ours finds its rows by an index of a table that may be of any size, row by row, and never joins the whole of
    /// one. So one plan does whatever the values are: left to itself the planner makes a new one each time for some statements, which takes
    /// longer than what is planned (0.7 ms for a look at 0.1 ms).
    pub const LOOKUPS: &str =
        "-c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c plan_cache_mode=force_generic_plan";
    /// Whole tables are joined: the planner knows best. Memory for its sorts, and never a write.
    pub const AUDITS: &str = "-c work_mem=32MB";
}

/// An audit's statement reads a whole table; while one database's is read, the other's transaction waits.
const AUDIT_STATEMENT_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// An audit takes its connections outside the pool; this is for the question whether it may begin.
const AUDIT_POOL_SIZE: usize = 1;

/// Connections for batches: one works, one stands by after a failure.
const BATCH_POOL_SIZE: usize = 2;

/// Times a transaction is tried when it lost a race (deadlock, serialization).
const ATTEMPTS_MAX: u32 = 3;

/// A database of ours; cheap to clone. Making one never waits and never fails because the server is away.
#[derive(Clone)]
pub struct Db {
    pool: Pool<AsyncPgConnection>,
    sessions: Sessions,
    /// Transactions run here, whoever asks: a caller that goes away must not drop one half-way.
    runtime: Handle,
    acquire_timeout: Duration,
    /// Names this handle and its clones in notifications.
    sender: Arc<str>,
}

impl Db {
    /// `role` becomes the sessions' `application_name`. Must be called inside the process's runtime.
    pub fn new(url: &Secret, role: &str, config: &DatabaseConfig) -> Result<Self, DbError> {
        Self::with(Sessions::new(url, role, config)?, plans::LOOKUPS, config.pool_size_max, "requests")
    }

    /// The same database for a consumer's batches, with a small pool of its own.
    pub fn for_batches(url: &Secret, role: &str, config: &DatabaseConfig) -> Result<Self, DbError> {
        Self::with(Sessions::new(url, role, config)?, plans::LOOKUPS, BATCH_POOL_SIZE, "batches")
    }

    /// The same database for an audit: sessions that only read, see one state of it in each transaction, plan by what the tables
    /// hold, and may take long over one statement.
    pub fn for_audits(url: &Secret, config: &DatabaseConfig) -> Result<Self, DbError> {
        let config = DatabaseConfig {
            statement_timeout: AUDIT_STATEMENT_TIMEOUT,
            idle_in_transaction_timeout: AUDIT_STATEMENT_TIMEOUT,
            ..config.clone()
        };
        Self::with(Sessions::new(url, "audit", &config)?.read_only(), plans::AUDITS, AUDIT_POOL_SIZE, "audits")
    }

    fn with(mut sessions: Sessions, plans: &str, pool_size: usize, kind: &'static str) -> Result<Self, DbError> {
        sessions.set(plans);
        let (for_pool, runtime) = (sessions.clone(), Handle::current());
        let acquire_timeout = sessions.connect_timeout;
        let mut manager = ManagerConfig::<AsyncPgConnection>::default();
        manager.recycling_method = RecyclingMethod::Fast;
        manager.custom_setup = Box::new(move |_| {
            let (sessions, runtime) = (for_pool.clone(), runtime.clone());
            // On the process's own runtime: a connection is driven where it was made, and must not end with the HTTP worker
            // that happened to ask for it first while others still use it.
            async move {
                let connected = on(&runtime, async move { sessions.connection().await }).await;
                connected.map_err(|error| diesel::ConnectionError::BadConnection(error.to_string()))
            }
            .boxed()
        });
        let manager = AsyncDieselConnectionManager::new_with_config("", manager);
        // The one that was used last: its server process has the plans and pages at hand, the others sleep.
        let pool = Pool::builder(manager)
            .max_size(pool_size)
            .queue_mode(QueueMode::Lifo)
            .build()
            .map_err(|error| DbError::Defect(format!("connection pool: {error}")))?;
        observe(&pool, &sessions.role, sessions.database(), kind);
        sessions.keep_watch(&Handle::current());
        let sender = Uuid::new_v4().to_string().into();
        Ok(Self { pool, sessions, runtime: Handle::current(), acquire_timeout, sender })
    }

    /// A connection of the pool, within `database.connect_timeout_ms`.
    pub async fn get(&self) -> Result<Pooled, DbError> {
        match tokio::time::timeout(self.acquire_timeout, self.pool.get()).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(error)) => Err(DbError::Unavailable(error.to_string())),
            Err(_) => Err(DbError::Unavailable(format!("no connection within {} ms", self.acquire_timeout.as_millis()))),
        }
    }

    /// A connection of its own, outside the pool, for what takes long.
    pub async fn dedicated(&self) -> Result<AsyncPgConnection, DbError> {
        self.sessions.connection().await
    }

    /// A connection of its own to be spoken to directly: several statements may be on their way at once, and rows are read where they lie.
    /// `wake` is signalled for every notification of others' on a channel that it listens to, and when it ends.
    pub async fn session(&self, wake: Arc<Notify>) -> Result<tokio_postgres::Client, DbError> {
        let (own, sessions) = (self.sender.clone(), self.sessions.clone());
        let armed = Arc::new(AtomicBool::new(false));
        let ended = WokenAtEnd(wake, armed.clone());
        let heard = move |payload: &str| {
            if *payload != *own {
                ended.0.notify_one();
            }
        };
        let client = on(&self.runtime, async move { sessions.client(heard).await }).await?;
        // One that never came about wakes nobody.
        armed.store(true, Ordering::Release);
        if client.is_closed() {
            return Err(DbError::Unavailable("the connection ended at once".into()));
        }
        Ok(client)
    }

    /// A connection of its own that hears `channel`, from when this returns. `heard` gets each notification's payload.
    pub async fn listen(&self, channel: &'static str, heard: impl FnMut(&str) + Send + 'static) -> Result<Listening, DbError> {
        let sessions = self.sessions.clone();
        on(&self.runtime, async move { sessions.listen(channel, heard).await }).await
    }

    /// Runs `work` in one transaction, in a task of its own: a caller that is cancelled cannot leave it half-way with its
    /// connection back in the pool. A deadlock or a serialization failure is tried again; nothing of it was committed.
    ///
    /// # Errors
    /// [`DbError::Unavailable`] also where the fate of the COMMIT is unknown: the caller's work must bear repetition.
    pub async fn transaction<R, E, F>(&self, work: F) -> Result<R, E>
    where
        F: for<'c> Fn(&'c mut Conn) -> BoxFuture<'c, Result<R, E>> + Send + Sync + 'static,
        R: Send + 'static,
        E: From<DbError> + From<diesel::result::Error> + Retry + Send + 'static,
    {
        let db = self.clone();
        let task = self.runtime.spawn(async move {
            let mut attempt = 1;
            loop {
                let mut conn = db.get().await?;
                let done = conn.transaction(async |conn| {
                    let done = work(conn).await?;
                    faults::point!("db.before_commit").map_err(DbError::from)?;
                    Ok(done)
                });
                let done: Result<R, E> = done.await;
                if done.is_ok() {
                    faults::point!("db.after_commit").map_err(DbError::from)?;
                }
                match done {
                    Err(error) if attempt < ATTEMPTS_MAX && error.lost_a_race() => attempt += 1,
                    other => return other,
                }
            }
        });
        match task.await {
            Ok(result) => result,
            Err(error) => Err(DbError::Defect(format!("transaction task: {error}")).into()),
        }
    }

    /// Answers at all, within `timeout`.
    pub async fn ping(&self, timeout: Duration) -> Result<(), DbError> {
        let ping = async { self.get().await?.batch_execute("select 1").await.map_err(DbError::from) };
        match tokio::time::timeout(timeout, ping).await {
            Ok(result) => result,
            Err(_) => Err(DbError::Unavailable(format!("no answer within {} ms", timeout.as_millis()))),
        }
    }

    /// Of the process that uses it.
    pub fn role(&self) -> &str {
        &self.sessions.role
    }

    /// Whose notifications are those of this handle and its clones.
    pub fn sender(&self) -> &str {
        &self.sender
    }

    /// The process's runtime.
    pub fn runtime(&self) -> &Handle {
        &self.runtime
    }
}

/// On the process's own runtime, whoever asks.
async fn on<T: Send + 'static>(
    runtime: &Handle,
    work: impl Future<Output = Result<T, DbError>> + Send + 'static,
) -> Result<T, DbError> {
    let done = runtime.spawn(work).await;
    done.map_err(|error| DbError::Unavailable(error.to_string())).flatten()
}

/// Whoever reads over a connection is woken when it ends, and hears of that from its next statement.
struct WokenAtEnd(Arc<Notify>, Arc<AtomicBool>);

impl Drop for WokenAtEnd {
    fn drop(&mut self) {
        if self.1.load(Ordering::Acquire) {
            self.0.notify_one();
        }
    }
}

/// The pool's figures, whenever the metrics are asked for.
fn observe(pool: &Pool<AsyncPgConnection>, role: &str, database: &str, kind: &'static str) {
    let labels = [("role", role.to_owned()), ("database", database.to_owned()), ("pool", kind.to_owned())];
    let pool = pool.weak();
    telemetry::observe(move || {
        let Some(pool) = pool.upgrade() else { return false };
        let (status, [role, database, kind]) = (pool.status(), labels.clone());
        for (state, connections) in [("idle", status.available), ("busy", status.size.saturating_sub(status.available))] {
            let labels = [role.clone(), database.clone(), kind.clone(), ("state", state.to_owned())];
            metrics::gauge!("shopd_db_pool_connections", &labels).set(connections as f64);
        }
        metrics::gauge!("shopd_db_pool_connections_max", &labels).set(status.max_size as f64);
        metrics::gauge!("shopd_db_pool_waiting", &labels).set(status.waiting as f64);
        true
    });
}

/// Bound on what one request asks of the database: the contract lets a client wait ten seconds for its 503. The timeouts of the
/// server's sessions do not help where the server itself has stopped.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(9);

/// `work` within nine seconds. A transaction goes on in its own task all the same, so its fate is unknown then.
///
/// # Errors
/// [`DbError::Unavailable`] where it takes longer.
pub fn in_time<R, E: From<DbError>>(work: impl Future<Output = Result<R, E>>) -> impl Future<Output = Result<R, E>> {
    let late = || DbError::Unavailable(format!("no answer within {} ms", ANSWER_TIME_MAX.as_millis()));
    // No `async fn`: it would hold `work` twice, as its argument and as what it awaits, and every reader's future with it.
    tokio::time::timeout(ANSWER_TIME_MAX, work).map(move |done| done.unwrap_or_else(|_| Err(late().into())))
}

/// Which errors of a transaction mean that it lost a race and may be tried again at once.
pub trait Retry {
    fn lost_a_race(&self) -> bool;
}

impl Retry for DbError {
    fn lost_a_race(&self) -> bool {
        match self {
            Self::Unavailable(text) => text.contains("deadlock detected") || text.contains("could not serialize"),
            Self::Duplicate(_) => true,
            Self::Fenced(_) | Self::Defect(_) => false,
        }
    }
}
