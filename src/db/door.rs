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
