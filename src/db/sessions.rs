//! How a session with a database comes about, and what every one of ours has.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use tokio_postgres::{AsyncMessage, Client};

use crate::config::{DatabaseConfig, PostgresTarget, Secret};

use super::door::Door;
use super::error::{self, DbError, is_readable, messages_are_foreign};
use super::sql::sql;
use super::watch::{Dialed, Watch};

/// After this silence a session's connection is probed, and again at the second interval until the server's timeout is over. A
/// host that is gone says nothing, and whoever waits for its answer would wait for hours.
const PROBE_AFTER: Duration = Duration::from_secs(5);
const PROBE_AGAIN: Duration = Duration::from_secs(2);
/// So often a session that only listens asks whether the server is still there. Each time costs an idle process some 0.1 ms of CPU.
const ASK_AFTER: Duration = Duration::from_secs(10);

/// Cheap to clone; all sessions of it are watched together.
#[derive(Clone)]
pub(super) struct Sessions {
    config: tokio_postgres::Config,
    door: Door,
    watch: Arc<Watch>,
    pub role: Arc<str>,
    pub connect_timeout: Duration,
    /// In which a server answers whatever it is asked, or is asked whether it is there.
    silence_max: Duration,
    read_only: bool,
}

impl Sessions {
    pub fn new(url: &Secret, role: &str, limits: &DatabaseConfig) -> Result<Self, DbError> {
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
        let silence_max = limits.statement_timeout + limits.connect_timeout;
        config.keepalives_idle(PROBE_AFTER).keepalives_interval(PROBE_AGAIN).keepalives_retries(3);
        config.tcp_user_timeout(silence_max);
        let (connect_timeout, role) = (limits.connect_timeout, role.into());
        Ok(Self { config, door, watch: Arc::default(), role, connect_timeout, silence_max, read_only: false })
    }

    /// Sessions that cannot write. It is set once connected: one that begins with it is no primary's to a url that looks for one.
    pub fn read_only(self) -> Self {
        Self { read_only: true, ..self }
    }

    /// More of the server's settings for each session, as `-c name=value`.
    pub fn set(&mut self, options: &str) {
        let options = format!("{} {options}", self.config.get_options().unwrap_or_default());
        self.config.options(options);
    }

    pub fn database(&self) -> &str {
        self.config.get_dbname().unwrap_or_default()
    }

    /// Begins to watch the sessions, until the last clone of these is gone.
    pub fn keep_watch(&self, runtime: &Handle) {
        let (door, config, connect_timeout) = (self.door.clone(), self.config.clone(), self.connect_timeout);
        self.watch.start(runtime, self.silence_max, move || {
            let (door, config) = (door.clone(), config.clone());
            async move {
                match door.open(&config, connect_timeout).await {
                    Ok(opened) => Dialed::In(opened.peer),
                    Err(closed) => Dialed::Refused(closed.answered),
                }
            }
        });
    }

    /// A session that is spoken to directly, driven by the runtime that this runs in. `heard` gets the payload of each notification, and is
    /// dropped when the connection ends.
    pub async fn client(&self, heard: impl FnMut(&str) + Send + 'static) -> Result<Client, DbError> {
        self.in_time(self.open(heard)).await
    }

    async fn open(&self, mut heard: impl FnMut(&str) + Send + 'static) -> Result<Client, DbError> {
        let mut opened = self.door.open(&self.config, self.connect_timeout).await?;
        // Ends with the client. What ends it otherwise, the client's next statement says. It is watched as long.
        let watch = self.watch.clone();
        let driver = tokio::spawn(async move {
            let _watched = watch;
            loop {
                match poll_fn(|context| opened.driver.poll_message(context)).await {
                    Some(Ok(AsyncMessage::Notification(notification))) => heard(notification.payload()),
                    Some(Ok(_)) => {}
                    // Who waits hears only that it is closed.
                    Some(Err(error)) => break tracing::debug!(error = error::text(&error), "a connection to a database ended"),
                    None => break,
                }
            }
        });
        self.watch.add(opened.peer, opened.traffic, driver.abort_handle());
        Ok(opened.client)
    }

    pub async fn connection(&self) -> Result<AsyncPgConnection, DbError> {
        self.in_time(async {
            let conn = AsyncPgConnection::try_from(self.open(|_| {}).await?).await;
            let mut conn = conn.map_err(|error| DbError::Unavailable(error.to_string()))?;
            speak_english(&mut conn).await?;
            if self.read_only {
                conn.batch_execute("set default_transaction_read_only = on").await?;
            }
            Ok(conn)
        })
        .await
    }

    /// Hears the notifications of `channel` from here on.
    pub async fn listen(&self, channel: &str, mut heard: impl FnMut(&str) + Send + 'static) -> Result<Listening, DbError> {
        let (alive, ended) = oneshot::channel::<()>();
        let heard = move |payload: &str| {
            let _ends_with_this = &alive;
            heard(payload);
        };
        self.in_time(async {
            let client = self.open(heard).await?;
            client.batch_execute(&format!("listen {channel}")).await?;
            Ok(Listening { client, ended })
        })
        .await
    }

    async fn in_time<T>(&self, connect: impl Future<Output = Result<T, DbError>>) -> Result<T, DbError> {
        match timeout(self.connect_timeout, connect).await {
            Ok(result) => result,
            Err(_) => Err(DbError::Unavailable(format!("no connection within {} ms", self.connect_timeout.as_millis()))),
        }
    }
}

/// A session that hears a channel as long as it lives.
pub struct Listening {
    client: Client,
    ended: oneshot::Receiver<()>,
}

impl Listening {
    /// Returns when the connection has ended. Asks the server now and then: one that hangs would be listened to for ever.
    pub async fn ended(mut self) {
        loop {
            tokio::select! {
                _ = &mut self.ended => return,
                () = sleep(ASK_AFTER) => {}
            }
            if self.client.check_connection().await.is_err() {
                return;
            }
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
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_server_that_is_gone_without_a_word_is_noticed_within_seconds() {
        let url = Secret::new("postgres://user@127.0.0.1/name".to_owned());
        let sessions = Sessions::new(&url, "test", &crate::config::Config::default().database).unwrap();
        let config = sessions.config;
        assert!(config.get_keepalives());
        let (again, times) = (config.get_keepalives_interval().unwrap(), config.get_keepalives_retries().unwrap());
        let noticed = config.get_keepalives_idle() + again * times;
        assert!(noticed <= Duration::from_secs(15), "after {noticed:?}");
    }

    /// 192.0.2.1 is an address that nobody may have, and that nothing answers from; where the system has no way to it at all it is refused
    /// at once, which is as good. The other one takes the connection and never says a word, as a server whose processes stand still.
    #[tokio::test]
    async fn a_host_that_says_nothing_leaves_time_for_the_one_behind_it() {
        let limits = DatabaseConfig { connect_timeout: Duration::from_secs(3), ..crate::config::Config::default().database };
        let (mute, listener) = tokio::join!(TcpListener::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
        let (mute, listener) = (mute.unwrap(), listener.unwrap());
        let (mute_port, port) = (mute.local_addr().unwrap().port(), listener.local_addr().unwrap().port());
        let url =
            format!("postgres://user@192.0.2.1:5432,127.0.0.1:{mute_port},127.0.0.1:{port}/name?target_session_attrs=read-write");
        let sessions = Sessions::new(&Secret::new(url), "test", &limits).unwrap();
        let connecting = tokio::spawn(async move { sessions.connection().await.map(drop) });
        let reached = timeout(limits.connect_timeout, listener.accept()).await;
        assert!(reached.is_ok(), "the last host was not tried in time");
        connecting.abort();
    }
}
