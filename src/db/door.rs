//! The one way into a database: over TLS, or plain, as its URL asks for.

use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Config, Connection, Error, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::PostgresTarget;

use super::error::{self, DbError};

/// libpq's name of the protocol, which a server asks for where TLS begins at once (`sslnegotiation=direct`).
const PROTOCOL: &[u8] = b"postgresql";

type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// Cheap to clone; all connections of it share the sessions of TLS.
#[derive(Clone)]
pub(super) struct Door {
    tls: MakeRustlsConnect,
    or_plain: bool,
}

impl Door {
    /// Reads the certificates that the URL names.
    ///
    /// # Errors
    /// [`DbError::Defect`] where they cannot be used.
    pub fn new(target: &PostgresTarget) -> Result<Self, DbError> {
        let mut client = target.client().map_err(|problem| DbError::Defect(problem.to_string()))?;
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Self { tls: MakeRustlsConnect::new(client), or_plain: target.tls.or_plain })
    }

    /// A connection as `config` describes it. Bounded by the caller.
    ///
    /// With `sslmode=prefer` it is tried plain where TLS does not come about, or where the server lets this user in without it only, as
    /// libpq does.
    pub async fn open(&self, config: &Config) -> Result<(Client, Connection<Socket, Stream>), DbError> {
        let first = match config.connect(self.tls.clone()).await {
            Err(error) if self.or_plain && is_about_tls(&error) => error,
            other => return Ok(other?),
        };
        let mut plain = config.clone();
        plain.ssl_mode(SslMode::Disable);
        match plain.connect(self.tls.clone()).await {
            Ok(connected) => Ok(connected),
            Err(second) => {
                // Both count: which of them can be mended, the reader knows.
                let (first, second) = (error::text(&first), error::text(&second));
                Err(DbError::Unavailable(if first == second { first } else { format!("{first}; without TLS: {second}") }))
            }
        }
    }
}

/// Its handshake failed, or `pg_hba.conf` has no entry for this user with it.
fn is_about_tls(error: &Error) -> bool {
    // The driver has no name for it.
    error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) || error.to_string().starts_with("error performing TLS")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

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
            let error = Door::new(&target).unwrap().open(&target.config).await.err().unwrap();
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
