//! The one way into a database: over TLS, or plain, as its URL asks for.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, Config, Connection, Error, SimpleQueryMessage};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::PostgresTarget;
use crate::turns::share;

use super::dial::{self, Address, Late, Place, Stream};
use super::error::{self, DbError};
use super::line::{Above, Line, Traffic};
use super::watch::Peer;

/// libpq's name of the protocol, which a server asks for where TLS begins at once (`sslnegotiation=direct`).
const PROTOCOL: &[u8] = b"postgresql";

/// Which server this is, whatever address it has, and whether it is a primary: its postmaster's beginning, to the microsecond.
const WHO: &str = "select pg_postmaster_start_time(); show transaction_read_only";
const LATE: &str = "it did not let us in within its share of the time";

type Tls = <MakeRustlsConnect as MakeTlsConnect<Stream>>::TlsConnect;
type Driver = Connection<Line<Stream>, Line<<Tls as TlsConnect<Stream>>::Stream>>;

/// Cheap to clone; all connections of it share the sessions of TLS, and what is known of the URL's hosts.
#[derive(Clone)]
pub(super) struct Door {
    tls: MakeRustlsConnect,
    late: Arc<Late>,
    or_plain: bool,
}

/// A connection that was let in.
pub(super) struct Opened {
    pub client: Client,
    /// To be driven.
    pub driver: Driver,
    pub peer: Peer,
    pub traffic: Arc<Traffic>,
}

impl Door {
    /// Reads the certificates that the URL names.
    ///
    /// # Errors
    /// [`DbError::Defect`] where they cannot be used.
    pub fn new(target: &PostgresTarget) -> Result<Self, DbError> {
        let mut client = target.client().map_err(|problem| DbError::Defect(problem.to_string()))?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { tls: MakeRustlsConnect::new(client), late: Arc::default(), or_plain: target.tls.or_plain })
    }

    /// A connection as `config` describes it, to the first host that lets us in and is what the URL looks for. All of it within `bound`: each
    /// host has an even share of what is left, and each of its addresses an even share of that. One that used it up is tried last for a while.
    ///
    /// # Errors
    /// What each host said.
    pub async fn open(&self, config: &Config, bound: Duration) -> Result<Opened, Closed> {
        let until = Instant::now() + bound;
        let mut places = dial::places(config);
        self.late.behind(&mut places, Place::key);
        let mut closed = Closed::default();
        for (at, place) in places.iter().enumerate() {
            let late = closed.late;
            match self.open_at(place, config, share(until, places.len() - at), &mut closed).await {
                Some(opened) => {
                    self.late.forget(&place.key());
                    return Ok(opened);
                }
                None if closed.late > late => self.late.note(place.key()),
                None => {}
            }
        }
        Err(closed)
    }

    /// To the first of a host's addresses; what the others said is added.
    async fn open_at(&self, place: &Place, config: &Config, until: Instant, closed: &mut Closed) -> Option<Opened> {
        let mut addresses = match timeout_at(until, place.addresses(config)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                closed.add(format!("error connecting to server: {error}"));
                return None;
            }
            Err(_) => {
                closed.add_late();
                return None;
            }
        };
        self.late.behind(&mut addresses, Address::name);
        for (at, address) in addresses.iter().enumerate() {
            match timeout_at(share(until, addresses.len() - at), self.enter(address, &place.name, config)).await {
                Ok(Ok(opened)) => {
                    self.late.forget(&address.name());
                    return Some(opened);
                }
                Ok(Err(refused)) => {
                    if refused.is_an_answer() {
                        closed.answered.push(address.name());
                    }
                    closed.add(refused.to_string());
                }
                Err(_) => {
                    self.late.note(address.name());
                    closed.add_late();
                }
            }
        }
        None
    }

    /// With `sslmode=prefer` it is tried plain where TLS does not come about, or where the server lets this user in without it only, as
    /// libpq does.
    async fn enter(&self, address: &Address, name: &str, config: &Config) -> Result<Opened, Refused> {
        let mut plain = config.clone();
        plain.ssl_mode(SslMode::Disable);
        // As with libpq, what goes through a socket of this machine is not encrypted.
        let first = match self.knock(address, name, if address.is_local() { &plain } else { config }).await {
            Err(Refused::Server(error)) if self.or_plain && is_about_tls(&error) => error::text(&error),
            other => return other,
        };
        // Both count: which of them can be mended, the reader knows.
        self.knock(address, name, &plain).await.map_err(|second| match second.to_string() == first {
            true => second,
            false => Refused::Twice { first, second: Box::new(second) },
        })
    }

    async fn knock(&self, address: &Address, name: &str, config: &Config) -> Result<Opened, Refused> {
        let traffic = Arc::new(Traffic::default());
        let line = Line::new(address.dial(config).await?, traffic.clone());
        let Ok(tls) = MakeTlsConnect::<Stream>::make_tls_connect(&mut self.tls.clone(), name);
        let (client, mut driver) = config.connect_raw(line, Above(tls)).await?;
        let rows = driven(&mut driver, client.simple_query(WHO)).await?;
        let mut values = rows.iter().filter_map(|row| if let SimpleQueryMessage::Row(row) = row { row.get(0) } else { None });
        let (server, is_read_only) = (values.next().unwrap_or_default(), values.next() == Some("on"));
        match config.get_target_session_attrs() {
            TargetSessionAttrs::ReadWrite if is_read_only => {
                return Err(Refused::NotWanted("it does not allow writes: no primary"));
            }
            TargetSessionAttrs::ReadOnly if !is_read_only => return Err(Refused::NotWanted("it is not read only")),
            _ => {}
        }
        let peer = Peer { address: address.name(), server: server.into() };
        traffic.begin();
        Ok(Opened { client, driver, peer, traffic })
    }
}

/// Why nobody let us in.
#[derive(Debug, Default)]
pub(super) struct Closed {
    refusals: Vec<String>,
    /// The addresses of those who refused us by themselves.
    pub answered: Vec<Arc<str>>,
    /// How many used up their share of the time.
    late: usize,
}

impl Closed {
    /// Several that say the same say it once.
    fn add(&mut self, refusal: String) {
        if !self.refusals.contains(&refusal) {
            self.refusals.push(refusal);
        }
    }

    fn add_late(&mut self) {
        self.late += 1;
        self.add(LATE.to_owned());
    }
}

impl From<Closed> for DbError {
    fn from(closed: Closed) -> Self {
        Self::Unavailable(closed.refusals.join("; "))
    }
}

/// Why a server is not the one.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("error connecting to server: {0}")]
    Io(#[from] std::io::Error),
    #[error("{}", error::text(.0))]
    Server(#[from] Error),
    #[error("{0}")]
    NotWanted(&'static str),
    #[error("{first}; without TLS: {second}")]
    Twice { first: String, second: Box<Refused> },
}

impl Refused {
    /// A living server said so, of itself and not of its part: one that is no primary is not waited for.
    fn is_an_answer(&self) -> bool {
        match self {
            Self::Server(error) => error.code().is_some(),
            Self::Twice { second, .. } => second.is_an_answer(),
            Self::Io(_) | Self::NotWanted(_) => false,
        }
    }
}

/// What is asked over a connection that nobody drives yet.
async fn driven<T>(driver: &mut Driver, asked: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let mut asked = pin!(asked);
    poll_fn(|context| {
        while let Poll::Ready(Some(message)) = driver.poll_message(context) {
            message?;
        }
        asked.as_mut().poll(context)
    })
    .await
}

/// Its handshake failed, or `pg_hba.conf` has no entry for this user with it.
fn is_about_tls(error: &Error) -> bool {
    // The driver has no name for it.
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) || error.to_string().starts_with("error performing TLS")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::tls;

    const ASKS_FOR_TLS: u32 = 80_877_103;
    const BEGINS_PLAIN: u32 = 196_608;

    /// A server that says `answer` when it is asked for TLS, then nothing of any protocol.
    struct Server {
        port: u16,
        /// What each connection was used for.
        heard: Arc<Mutex<Vec<u32>>>,
    }

    impl Server {
        async fn start(answer: u8) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let server = Self { port: listener.local_addr().unwrap().port(), heard: Arc::default() };
            let heard = server.heard.clone();
            tokio::spawn(async move {
                while let Ok((mut stream, _)) = listener.accept().await {
                    while let Some(code) = message(&mut stream).await {
                        heard.lock().unwrap().push(code);
                        let reply: &[u8] = if code == ASKS_FOR_TLS { &[answer] } else { b"" };
                        if stream.write_all(reply).await.is_err() || code == BEGINS_PLAIN {
                            break;
                        }
                        if answer == b'S' {
                            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
                            break;
                        }
                    }
                }
            });
            server
        }

        /// Why it could not be connected to, and what it heard.
        async fn open(&self, parameters: &str) -> (String, Vec<u32>) {
            let target = PostgresTarget::read(&format!("postgres://u@127.0.0.1:{}/d?{parameters}", self.port)).unwrap();
            let opened = Door::new(&target).unwrap().open(&target.config, Duration::from_secs(20)).await;
            let error = DbError::from(opened.err().unwrap());
            (error.to_string(), std::mem::take(&mut *self.heard.lock().unwrap()))
        }
    }

    /// The code of the next message of those that have no letter before them.
    async fn message(stream: &mut TcpStream) -> Option<u32> {
        let length = stream.read_u32().await.ok()?;
        let code = stream.read_u32().await.ok()?;
        stream.read_exact(&mut vec![0; (length as usize).checked_sub(8)?]).await.ok()?;
        Some(code)
    }

    #[tokio::test]
    async fn a_server_without_tls_is_spoken_to_plain_only_where_that_will_do() {
        let server = Server::start(b'N').await;
        assert_eq!(server.open("").await.1, [ASKS_FOR_TLS, BEGINS_PLAIN]);
        assert_eq!(server.open("sslmode=disable").await.1, [BEGINS_PLAIN]);
        let (error, heard) = server.open("sslmode=require").await;
        assert!(error.contains("server does not support TLS"), "{error}");
        assert_eq!(heard, [ASKS_FOR_TLS]);
    }

    #[tokio::test]
    async fn where_tls_does_not_come_about_it_is_tried_plain_only_where_that_will_do() {
        let server = Server::start(b'S').await;
        let (error, heard) = server.open("").await;
        assert!(error.contains(tls::REFUSED) && error.contains("; without TLS: "), "{error}");
        assert_eq!(heard, [ASKS_FOR_TLS, BEGINS_PLAIN]);
        let (error, heard) = server.open("sslmode=require").await;
        assert!(error.contains(tls::REFUSED) && !error.contains("without TLS"), "{error}");
        assert_eq!(heard, [ASKS_FOR_TLS]);
    }
}
