//! One bounded pool of connections to one database, and the one transaction function.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use deadpool::managed::QueueMode;
use diesel_async::pooled_connection::deadpool::{Object, Pool};
use diesel_async::pooled_connection::{AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod};
use diesel_async::{AsyncConnection, AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};
use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_postgres::AsyncMessage;
use uuid::Uuid;

use crate::config::{DatabaseConfig, PostgresTarget, Secret};
use crate::faults;
use crate::telemetry;

use super::door::Door;
use super::error::{DbError, is_readable, messages_are_foreign};
use super::sql::sql;

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

/// After this silence a session's connection is probed, and again at the second interval until the server's timeout is over. A
/// host that is gone says nothing, and whoever waits for its answer would wait for hours.
const PROBE_AFTER: Duration = Duration::from_secs(5);
const PROBE_AGAIN: Duration = Duration::from_secs(2);

/// Times a transaction is tried when it lost a race (deadlock, serialization).
const ATTEMPTS_MAX: u32 = 3;

/// A database of ours; cheap to clone. Making one never waits and never fails because the server is away.
#[derive(Clone)]
pub struct Db {
    pool: Pool<AsyncPgConnection>,
    settings: Settings,
    /// Transactions run here, whoever asks: a caller that goes away must not drop one half-way.
    runtime: Handle,
    acquire_timeout: Duration,
    /// Names this handle and its clones in notifications.
    sender: Arc<str>,
}

#[derive(Clone)]
struct Settings {
    config: tokio_postgres::Config,
    door: Door,
    role: Arc<str>,
    connect_timeout: Duration,
    /// Set once connected: a session that begins with it is no primary's to a url that looks for one.
    read_only: bool,
}

impl Db {
    /// `role` becomes the sessions' `application_name`. Must be called inside the process's runtime.
    pub fn new(url: &Secret, role: &str, config: &DatabaseConfig) -> Result<Self, DbError> {
        Self::with(Settings::new(url, role, config)?, plans::LOOKUPS, config.pool_size_max, "requests")
    }

    /// The same database for a consumer's batches, with a small pool of its own.
    pub fn for_batches(url: &Secret, role: &str, config: &DatabaseConfig) -> Result<Self, DbError> {
        Self::with(Settings::new(url, role, config)?, plans::LOOKUPS, BATCH_POOL_SIZE, "batches")
    }

    /// The same database for an audit: sessions that only read, see one state of it in each transaction, plan by what the tables
    /// hold, and may take long over one statement.
    pub fn for_audits(url: &Secret, config: &DatabaseConfig) -> Result<Self, DbError> {
        let config = DatabaseConfig {
            statement_timeout: AUDIT_STATEMENT_TIMEOUT,
            idle_in_transaction_timeout: AUDIT_STATEMENT_TIMEOUT,
            ..config.clone()
        };
        let settings = Settings { read_only: true, ..Settings::new(url, "audit", &config)? };
        Self::with(settings, plans::AUDITS, AUDIT_POOL_SIZE, "audits")
    }

    fn with(mut settings: Settings, plans: &str, pool_size: usize, kind: &'static str) -> Result<Self, DbError> {
        let options = format!("{} {plans}", settings.config.get_options().unwrap_or_default());
        settings.config.options(options);
        let (for_pool, runtime) = (settings.clone(), Handle::current());
        let acquire_timeout = settings.connect_timeout;
        let mut manager = ManagerConfig::<AsyncPgConnection>::default();
        manager.recycling_method = RecyclingMethod::Fast;
        manager.custom_setup = Box::new(move |_| {
            let (settings, runtime) = (for_pool.clone(), runtime.clone());
            // On the process's own runtime: a connection is driven where it was made, and must not end with the HTTP worker
            // that happened to ask for it first while others still use it.
            async move {
                let connected = runtime.spawn(async move { settings.connect().await }).await;
                let connected = connected.map_err(|error| DbError::Unavailable(error.to_string())).flatten();
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
        observe(&pool, &settings.role, settings.config.get_dbname().unwrap_or_default(), kind);
        let sender = Uuid::new_v4().to_string().into();
        Ok(Self { pool, settings, runtime: Handle::current(), acquire_timeout, sender })
    }

    /// A connection of the pool, within `database.connect_timeout_ms`.
    pub async fn get(&self) -> Result<Pooled, DbError> {
        match tokio::time::timeout(self.acquire_timeout, self.pool.get()).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(error)) => Err(DbError::Unavailable(error.to_string())),
            Err(_) => Err(DbError::Unavailable(format!("no connection within {} ms", self.acquire_timeout.as_millis()))),
        }
    }

    /// A connection of its own, outside the pool, for listening or migrating.
    pub async fn dedicated(&self) -> Result<AsyncPgConnection, DbError> {
        self.settings.connect().await
    }

    /// A connection of its own to be spoken to directly: several statements may be on their way at once, and rows are read where they lie.
    /// `wake` is signalled for every notification of others' on a channel that it listens to, and when it ends.
    pub async fn session(&self, wake: Arc<Notify>) -> Result<tokio_postgres::Client, DbError> {
        self.settings
            .in_time(async {
                let (client, mut connection) = self.settings.door.open(&self.settings.config).await?;
                let own = self.sender.clone();
                // Ends with the client. What ends it otherwise, the client's next statement says.
                self.runtime.spawn(async move {
                    while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                        if let AsyncMessage::Notification(notification) = message
                            && notification.payload() != &*own
                        {
                            wake.notify_one();
                        }
                    }
                    wake.notify_one();
                });
                Ok(client)
            })
            .await
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
        &self.settings.role
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

impl Settings {
    fn new(url: &Secret, role: &str, limits: &DatabaseConfig) -> Result<Self, DbError> {
        let target = PostgresTarget::read(url.expose());
        let target = target.map_err(|problem| DbError::Defect(format!("the database url {problem}")))?;
        let door = Door::new(&target)?;
        let mut config = target.config;
        let mut options = config.get_options().map(|o| format!("{o} ")).unwrap_or_default();
        for (name, value) in [
            ("statement_timeout", limits.statement_timeout),
            ("lock_timeout", limits.lock_timeout),
            ("idle_in_transaction_session_timeout", limits.idle_in_transaction_timeout),
        ] {
            options.push_str(&format!("-c {name}={} ", value.as_millis()));
        }
        // Plans of ours are short; compiling them costs more than they do. Each statement sees what is committed when it begins, whatever the
        // database has for its default: what drops a segment of the outbox looks into it again under its lock.
        options.push_str("-c jit=off -c default_transaction_isolation=read\\ committed");
        config.options(options);
        config.application_name(format!("shopd-{role}"));
        // One host after the other, all within the bound: the first may be one that is gone without a word.
        let hosts = u32::try_from(config.get_hosts().len()).unwrap_or(u32::MAX).max(1);
        config.connect_timeout(limits.connect_timeout / hosts);
        config.keepalives_idle(PROBE_AFTER).keepalives_interval(PROBE_AGAIN).keepalives_retries(3);
        config.tcp_user_timeout(limits.statement_timeout + limits.connect_timeout);
        Ok(Self { config, door, role: role.into(), connect_timeout: limits.connect_timeout, read_only: false })
    }

    async fn connect(&self) -> Result<AsyncPgConnection, DbError> {
        self.in_time(async {
            let (client, connection) = self.door.open(&self.config).await?;
            let conn = AsyncPgConnection::try_from_client_and_connection(client, connection).await;
            let mut conn = conn.map_err(|error| DbError::Unavailable(error.to_string()))?;
            speak_english(&mut conn).await?;
            if self.read_only {
                conn.batch_execute("set default_transaction_read_only = on").await?;
            }
            Ok(conn)
        })
        .await
    }

    async fn in_time<T>(&self, connect: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
        match tokio::time::timeout(self.connect_timeout, connect).await {
            Ok(result) => result,
            Err(_) => Err(DbError::Unavailable(format!("no connection within {} ms", self.connect_timeout.as_millis()))),
        }
    }
}

/// The driver hides an error's code, so errors are told apart by their texts: the session's must be the untranslated ones.
async fn speak_english(conn: &mut AsyncPgConnection) -> Result<(), DbError> {
    #[derive(diesel::QueryableByName)]
    struct Language {
        #[diesel(sql_type = diesel::sql_types::Text)]
        lc_messages: String,
    }
    let Language { lc_messages } = sql("select current_setting('lc_messages') as lc_messages").get_result(conn).await?;
    if is_readable(&lc_messages) {
        return Ok(());
    }
    // Only a superuser may, or who was granted it. Without: what only a text explains is tried again for ever, and parks nothing.
    if let Err(error) = conn.batch_execute("set lc_messages = 'C'").await
        && messages_are_foreign()
    {
        tracing::warn!(
            lc_messages,
            %error,
            "the server's messages are translated; no record that it refuses is parked for them. \
             Let it run `alter role ... set lc_messages = 'C'` for the role of the url"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_gone_without_a_word_is_noticed_within_seconds() {
        let url = Secret::new("postgres://user@127.0.0.1/name".to_owned());
        let settings = Settings::new(&url, "test", &crate::config::Config::default().database).unwrap();
        assert_eq!(settings.config.get_keepalives_idle(), PROBE_AFTER);
        assert_eq!(settings.config.get_keepalives_interval(), Some(PROBE_AGAIN));
        assert_eq!(settings.config.get_keepalives_retries(), Some(3));
    }

    /// 192.0.2.1 is an address that nobody may have, and that nothing answers from; where the system has no way to it at all it is refused
    /// at once, which is as good.
    #[tokio::test]
    async fn a_host_that_is_gone_without_a_word_leaves_time_for_the_one_behind_it() {
        let limits = DatabaseConfig { connect_timeout: Duration::from_secs(2), ..crate::config::Config::default().database };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("postgres://user@192.0.2.1:5432,127.0.0.1:{port}/name?target_session_attrs=read-write");
        let settings = Settings::new(&Secret::new(url), "test", &limits).unwrap();
        let connecting = tokio::spawn(async move { settings.connect().await.map(drop) });
        let reached = tokio::time::timeout(limits.connect_timeout, listener.accept()).await;
        assert!(reached.is_ok(), "the second host was not tried in time");
        connecting.abort();
    }
}
