//! Connections to brokers that are spoken to by hand: secured and let in as `kafka.security_protocol` says.
//!
//! The client library makes its own in the same way. It tries one that is refused again and again, and its error then tells no more than
//! that; so before it is asked to connect, one is made here, whose error says what is wrong.

use std::io::{Error, ErrorKind, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::sasl::{self, Sasl};
use super::{LogError, raw};
use crate::config::KafkaConfig;
use crate::tls;
use crate::turns::share;

const API_VERSIONS: (i16, i16) = (18, 0);

/// A connection that may be spoken over.
pub(super) struct Dialed {
    /// To be flushed after each request.
    pub stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    /// The broker ends it at the next request after this (`connections.max.reauth.ms`).
    admitted_until: Option<Instant>,
}

impl Dialed {
    /// Whether another request may be sent over it; otherwise a new one is made in its place.
    pub fn is_admitted(&self) -> bool {
        self.admitted_until.is_none_or(|until| Instant::now() < until)
    }
}

/// What goes on top of a connection.
#[derive(Default)]
pub(super) struct Security {
    pub tls: Option<Arc<ClientConfig>>,
    pub sasl: Option<Sasl>,
}

/// Makes connections to brokers.
pub(super) struct Dialer {
    /// Or why none can be made.
    security: std::result::Result<Security, String>,
    /// In which a broker must answer (`kafka.request_timeout_ms`).
    within: Duration,
    /// The one of them that answered last.
    answered: Mutex<Option<String>>,
}

impl Dialer {
    /// Reads the certificates now. Where they cannot be used, making a connection fails.
    pub fn new(config: &KafkaConfig) -> Self {
        let sasl = Sasl::new(config);
        let security = config.tls().map(|tls| Security { tls: tls.map(Arc::new), sasl }).map_err(|error| error.to_string());
        Self { security, within: config.request_timeout, answered: Mutex::default() }
    }

    /// A connection to `broker` (`host:port`). Bounded by the caller; until then each of its addresses is connected to for an even share.
    ///
    /// # Errors
    /// `PermissionDenied` where another try does not help.
    pub async fn dial(&self, broker: &str, until: Instant) -> Result<Dialed> {
        let security = self.security.as_ref().map_err(|problem| Error::new(ErrorKind::PermissionDenied, problem.clone()))?;
        let stream = connect(broker, until).await?;
        stream.set_nodelay(true)?;
        let mut stream = match &security.tls {
            None => Either::Left(stream),
            Some(tls) => {
                let secured = TlsConnector::from(tls.clone()).connect(name(broker)?, stream).await;
                Either::Right(Box::new(secured.map_err(ended_or_refused)?))
            }
        };
        let admitted_until = match &security.sasl {
            None => None,
            Some(sasl) => {
                let lifetime = sasl::authenticate(&mut stream, sasl).await.map_err(final_if_refused)?;
                // With time for a request to arrive.
                lifetime.map(|lifetime| Instant::now() + lifetime.mul_f32(0.8))
            }
        };
        Ok(Dialed { stream, admitted_until })
    }

    /// These brokers one after the other, each with an even share of the time that is left: first the one that answered last, because one that is
    /// silent would cost its share each time.
    pub fn turns<'b>(&self, brokers: &'b [String]) -> Turns<'b> {
        let answered = self.answered().clone();
        // From the end, as they are taken.
        let mut brokers: Vec<&str> = brokers.iter().rev().map(String::as_str).collect();
        brokers.sort_by_key(|broker| answered.as_deref() == Some(*broker));
        Turns { brokers, until: self.until() }
    }

    /// When a broker that is asked now must have answered.
    pub fn until(&self) -> Instant {
        Instant::now() + self.within
    }

    /// What one of them answers in its turn.
    pub async fn in_turn<T>(&self, broker: &str, until: Instant, asked: impl Future<Output = Result<T>>) -> Result<T> {
        let answer = timeout_at(until, asked).await.unwrap_or_else(|_| Err(silent()));
        if answer.is_ok() {
            *self.answered() = Some(broker.to_owned());
        }
        answer
    }

    fn answered(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        // A poisoned name is still a name: nothing panics in the middle of a change of it.
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes sure that one of these brokers lets us in, where it may be otherwise; for the client library, which then does the same.
    ///
    /// # Errors
    /// Where none does: [`LogError::Refused`] if one of them says that it never will, else [`LogError::Unavailable`].
    pub async fn admitted_by_one_of(&self, brokers: &[String]) -> std::result::Result<&Security, LogError> {
        let security = self.security.as_ref().map_err(|problem| LogError::Defect(problem.clone()))?;
        if security.tls.is_none() && security.sasl.is_none() {
            return Ok(security);
        }
        let mut failed = LogError::Unavailable("no broker configured".into());
        let mut turns = self.turns(brokers);
        while let Some((broker, until)) = turns.next() {
            let asked = async {
                let mut connection = self.dial(broker, until).await?;
                // A broker that does not like our certificate says so when it is first spoken to.
                raw::ask(&mut connection.stream, API_VERSIONS, &[]).await.map_err(final_if_refused)
            };
            match self.in_turn(broker, until, asked).await {
                Ok(_) => return Ok(security),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    failed = LogError::Refused(format!("{broker}: {error}"))
                }
                Err(error) if failed.is_transient() => failed = LogError::Unavailable(format!("{broker}: {error}")),
                Err(_) => {}
            }
        }
        Err(failed)
    }
}

/// Who is asked next, and until when.
pub(super) struct Turns<'b> {
    brokers: Vec<&'b str>,
    until: Instant,
}

impl<'b> Turns<'b> {
    pub fn next(&mut self) -> Option<(&'b str, Instant)> {
        let until = share(self.until, self.brokers.len());
        self.brokers.pop().map(|broker| (broker, until))
    }
}

async fn connect(broker: &str, until: Instant) -> Result<TcpStream> {
    let addresses: Vec<_> = lookup_host(broker).await?.collect();
    let mut failed = Error::new(ErrorKind::NotFound, "its name has no address");
    for (at, address) in addresses.iter().enumerate() {
        match timeout_at(share(until, addresses.len() - at), TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => failed = error,
            Err(_) => failed = silent(),
        }
    }
    Err(failed)
}

fn silent() -> Error {
    Error::new(ErrorKind::TimedOut, "it does not answer")
}

/// What the broker's certificate must be for.
fn name(broker: &str) -> Result<ServerName<'static>> {
    let host = broker.rsplit_once(':').map_or(broker, |(host, _port)| host);
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    ServerName::try_from(host.to_owned()).map_err(|error| Error::new(ErrorKind::InvalidInput, format!("{host}: {error}")))
}

/// Of a handshake. A broker that does not speak TLS ends it without a word, as one does that is about to end.
fn ended_or_refused(error: Error) -> Error {
    match error.kind() {
        ErrorKind::UnexpectedEof => Error::new(error.kind(), "it ended the handshake; perhaps it does not speak TLS there"),
        _ => final_if_refused(error),
    }
}

fn final_if_refused(error: Error) -> Error {
    match tls::refusal(&error) {
        Some(refusal) => Error::new(ErrorKind::PermissionDenied, refusal),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_brokers_name_is_its_host_whatever_that_is() {
        for (broker, expected) in
            [("kafka-1.example:9093", "kafka-1.example"), ("10.0.0.1:9093", "10.0.0.1"), ("[::1]:9093", "::1")]
        {
            assert_eq!(name(broker).unwrap().to_str(), expected);
        }
        assert!(name("a b:9093").is_err());
    }

    /// Red where the first one may use up all of the time.
    #[tokio::test]
    async fn one_that_says_nothing_leaves_time_for_who_may_let_us_in() {
        let listen = || async { tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap() };
        let (mute, gone) = (listen().await, listen().await);
        let brokers = [&mute, &gone].map(|listener| listener.local_addr().unwrap().to_string());
        drop(gone);
        let within = Duration::from_secs(1);
        let sasl = Sasl::new(&KafkaConfig {
            security_protocol: crate::config::SecurityProtocol::SaslPlaintext,
            sasl_username: Some("u".into()),
            sasl_password: Some(crate::config::Secret::new("p")),
            ..crate::config::Config::default().kafka
        });
        assert!(sasl.is_some(), "else nobody is asked");
        let dialer = Dialer { security: Ok(Security { tls: None, sasl }), within, answered: Mutex::default() };
        let asked = tokio::time::timeout(within * 10, dialer.admitted_by_one_of(&brokers)).await.expect("in time");
        let Err(LogError::Unavailable(cause)) = asked else { panic!("nobody lets us in") };
        assert!(cause.starts_with(&brokers[1]), "{cause}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_not_used_again_when_its_time_is_over() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = || async { Either::Left(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap()) };
        assert!(Dialed { stream: stream().await, admitted_until: None }.is_admitted());
        let until = Dialed { stream: stream().await, admitted_until: Some(Instant::now() + Duration::from_secs(1)) };
        assert!(until.is_admitted());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!until.is_admitted());
    }
}
