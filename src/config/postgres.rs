//! What a database's URL says about the connection: the driver's own parameters, and those of libpq about TLS that it does not know
//! (`sslmode=verify-ca`, `verify-full`, `sslrootcert`, `sslcert`, `sslkey`). Pure; no mistake's text holds a part of the URL but a file's path.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use tokio_postgres::config::{Host, SslMode};

use crate::tls::{self, Identity, Roots, TlsError, Trust};

/// A database to connect to.
#[derive(Clone, Debug)]
pub struct PostgresTarget {
    /// With the `ssl_mode` that belongs to `tls`.
    pub config: tokio_postgres::Config,
    pub tls: PostgresTls,
}

/// What of TLS is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PostgresTls {
    /// Of no meaning where `config.ssl_mode` is `Disable`.
    pub trust: Trust,
    pub identity: Option<Identity>,
    /// A connection without TLS will do where one with it does not come about (`sslmode=prefer`).
    pub or_plain: bool,
}

const SHAPE: &str =
    "is no URL of the form postgres://user:password@host:port/name (special characters of a password are percent-encoded)";

/// The parameters that are taken out of the URL.
#[derive(Default)]
struct Asked {
    mode: Option<String>,
    root: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl PostgresTarget {
    /// # Errors
    /// What is wrong with the URL, as a text that follows the setting's name.
    pub fn read(url: &str) -> Result<Self, String> {
        let (url, asked) = split(url)?;
        // The parser's own message may quote the text, so it is not shown.
        let mut config: tokio_postgres::Config = url.parse().map_err(|_| SHAPE)?;
        let identity = match (asked.certificate, asked.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(Identity { certificate: certificate.into(), key: key.into() }),
            _ => return Err("has one of sslcert and sslkey; both are needed, or none".into()),
        };
        let (mode, trust) = trust(asked.mode.as_deref(), asked.root)?;
        // As with libpq, what goes through a socket of this machine is not encrypted, whatever was asked for.
        let is_local = config.get_hosts().iter().all(|host| matches!(host, Host::Unix(_)));
        config.ssl_mode(if is_local { SslMode::Disable } else { mode });
        Ok(Self { config, tls: PostgresTls { trust, identity, or_plain: mode == SslMode::Prefer } })
    }

    /// How TLS is spoken to it. Reads the files.
    ///
    /// # Errors
    /// As [`tls::client`].
    pub fn client(&self) -> Result<rustls::ClientConfig, TlsError> {
        match self.config.get_ssl_mode() {
            SslMode::Disable => tls::client(&Trust::Anyone, None),
            _ => tls::client(&self.tls.trust, self.tls.identity.as_ref()),
        }
    }
}

/// What libpq understands by `sslmode` and `sslrootcert`, but for what would quietly be less than was asked for.
fn trust(mode: Option<&str>, root: Option<String>) -> Result<(SslMode, Trust), String> {
    const SYSTEM: &str = "system";
    let is_system = root.as_deref() == Some(SYSTEM);
    let root = root.filter(|root| root != SYSTEM).map(|path| Roots::File(PathBuf::from(path)));
    let authorities = || root.clone().unwrap_or(Roots::System);
    match mode {
        // Anybody may have a certificate that the system's authorities signed; it is its name that counts.
        Some("prefer" | "require" | "verify-ca") if is_system => {
            Err("has sslrootcert=system; that needs sslmode=verify-full".into())
        }
        None if is_system => Ok((SslMode::Require, Trust::ChainAndName(Roots::System))),
        None | Some("prefer") if root.is_some() => {
            Err("has an sslrootcert that would not be heeded; ask for sslmode=verify-full, verify-ca or require".into())
        }
        Some("disable") => Ok((SslMode::Disable, Trust::Anyone)),
        None | Some("prefer") => Ok((SslMode::Prefer, Trust::Anyone)),
        Some("require") => Ok((SslMode::Require, root.map_or(Trust::Anyone, Trust::Chain))),
        Some("verify-ca") => Ok((SslMode::Require, Trust::Chain(authorities()))),
        Some("verify-full") => Ok((SslMode::Require, Trust::ChainAndName(authorities()))),
        Some(_) => Err("has an sslmode that is none of disable, prefer, require, verify-ca and verify-full".into()),
    }
}

/// The URL without the parameters about TLS, and these. Of one that comes twice the last counts, as everywhere in the URL.
fn split(url: &str) -> Result<(String, Asked), &'static str> {
    // A password may hold a question mark: like the driver, what is before the first @ is the user's.
    let after_user = url.find('@').map_or(0, |at| at + 1);
    let Some(query) = url[after_user..].find('?').map(|at| after_user + at) else { return Ok((url.to_owned(), Asked::default())) };
    let (mut asked, mut kept) = (Asked::default(), Vec::new());
    for parameter in url[query + 1..].split('&') {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let place = match name {
            "sslmode" => &mut asked.mode,
            "sslrootcert" => &mut asked.root,
            "sslcert" => &mut asked.certificate,
            "sslkey" => &mut asked.key,
            _ => {
                kept.push(parameter);
                continue;
            }
        };
        let value = percent_decode_str(value).decode_utf8().map_err(|_| SHAPE)?;
        *place = Some(value.into_owned()).filter(|value| !value.is_empty());
    }
    let rest = if kept.is_empty() { String::new() } else { format!("?{}", kept.join("&")) };
    Ok((format!("{}{rest}", &url[..query]), asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(parameters: &str) -> Result<(SslMode, PostgresTls), String> {
        let target = PostgresTarget::read(&format!("postgres://u:hunter2@h:5432/d{parameters}"))?;
        Ok((target.config.get_ssl_mode(), target.tls))
    }

    fn file() -> Roots {
        Roots::File("/etc/ca.pem".into())
    }

    #[test]
    fn sslmode_and_sslrootcert_mean_what_they_mean_to_libpq() {
        for (parameters, mode, trust) in [
            ("", SslMode::Prefer, Trust::Anyone),
            ("?sslmode=prefer", SslMode::Prefer, Trust::Anyone),
            ("?sslmode=", SslMode::Prefer, Trust::Anyone),
            ("?sslmode=disable&sslrootcert=/etc/ca.pem", SslMode::Disable, Trust::Anyone),
            ("?sslmode=require", SslMode::Require, Trust::Anyone),
            ("?sslmode=require&sslrootcert=/etc/ca.pem", SslMode::Require, Trust::Chain(file())),
            ("?sslmode=verify-ca", SslMode::Require, Trust::Chain(Roots::System)),
            ("?sslrootcert=%2Fetc%2Fca.pem&sslmode=verify-ca", SslMode::Require, Trust::Chain(file())),
            ("?sslmode=verify-full", SslMode::Require, Trust::ChainAndName(Roots::System)),
            ("?sslmode=verify-full&sslrootcert=/etc/ca.pem", SslMode::Require, Trust::ChainAndName(file())),
            ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, Trust::ChainAndName(Roots::System)),
            ("?sslrootcert=system", SslMode::Require, Trust::ChainAndName(Roots::System)),
            ("?sslmode=disable&sslmode=require", SslMode::Require, Trust::Anyone),
        ] {
            let (found, tls) = read(parameters).unwrap_or_else(|error| panic!("{parameters}: {error}"));
            assert_eq!((found, tls.trust, tls.or_plain), (mode, trust, mode == SslMode::Prefer), "{parameters}");
        }
        let (_, tls) = read("?sslmode=require&sslcert=/c.pem&sslkey=/k%20.pem").unwrap();
        assert_eq!(tls.identity, Some(Identity { certificate: "/c.pem".into(), key: "/k .pem".into() }));
    }

    #[test]
    fn what_would_quietly_be_less_than_was_asked_for_is_a_mistake() {
        for parameters in [
            "?sslmode=hunter2",
            "?sslmode=allow",
            "?sslmode=Require",
            "?sslrootcert=/etc/ca.pem",
            "?sslmode=prefer&sslrootcert=/etc/ca.pem",
            "?sslmode=require&sslrootcert=system",
            "?sslmode=verify-ca&sslrootcert=system",
            "?sslmode=require&sslcert=/c.pem",
            "?sslmode=require&sslkey=/k.pem",
            "?sslmode=require&sslcrl=/x",
            "?sslmode=%ff",
        ] {
            let problem = read(parameters).unwrap_err();
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn everything_else_of_the_url_reaches_the_driver() {
        let target =
            PostgresTarget::read("postgres://u:a?b=c@h:1/d?connect_timeout=3&sslmode=verify-full&options=-c%20x%3D1").unwrap();
        assert_eq!(target.config.get_password(), Some(&b"a?b=c"[..]));
        assert_eq!(target.config.get_options(), Some("-c x=1"));
        assert_eq!(target.config.get_connect_timeout(), Some(&std::time::Duration::from_secs(3)));
        assert_eq!(target.config.get_ssl_mode(), SslMode::Require);
        let bound = PostgresTarget::read("postgres://u@h/d?sslmode=require&channel_binding=require").unwrap();
        assert_eq!(bound.config.get_channel_binding(), tokio_postgres::config::ChannelBinding::Require);
    }

    #[test]
    fn a_socket_of_this_machine_is_never_encrypted() {
        for url in ["postgres://u@%2Ftmp%2Fs/d?sslmode=verify-full", "postgres:///d?host=/tmp/s"] {
            assert_eq!(PostgresTarget::read(url).unwrap().config.get_ssl_mode(), SslMode::Disable, "{url}");
        }
        assert_eq!(PostgresTarget::read("postgres://u@h/d?host=/tmp/s").unwrap().config.get_ssl_mode(), SslMode::Prefer);
    }
}
