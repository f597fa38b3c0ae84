//! TLS of the connections that shopd makes, to its databases and to Kafka: whom it trusts, and with what certificate it says who it is.
//! Keys are exchanged and records sealed by rustls with ring. May import nothing of ours.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

/// Whose certificates are believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// Those that the system trusts; `SSL_CERT_FILE` and `SSL_CERT_DIR` name others.
    System,
    /// The certificates of a PEM file, and no others.
    File(PathBuf),
}

/// What a server's certificate must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Anything: what is said cannot be overheard, but whoever stands between may be who answers.
    Anyone,
    /// Signed by one of these, whatever name it is for.
    Chain(Roots),
    /// Signed by one of these and for the name that was connected to.
    ChainAndName(Roots),
}

/// A client's certificate with those that lead to its authority, and its key, each a PEM file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// Why no connection can be secured with these settings; one line that names the file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    #[error("the system has no certificates of authorities; name a file of them")]
    NoSystemRoots,
    #[error("{0}")]
    Refused(String),
}

/// What every refusal's text begins with, so that it is known wherever an error has become a text.
pub const REFUSED: &str = "no TLS with the server";

/// How a client with this trust and identity speaks TLS. Reads the files now: a change of them needs a new start.
///
/// # Errors
/// A file that cannot be read, holds nothing of its kind, or a certificate and a key that do not belong together.
pub fn client(trust: &Trust, identity: Option<&Identity>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError::Refused(error.to_string()))?;
    let config = match trust {
        Trust::ChainAndName(roots) => config.with_root_certificates(self::roots(roots)?),
        Trust::Chain(roots) => {
            let verifier = Chain { roots: self::roots(roots)?, algorithms };
            config.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
        }
        Trust::Anyone => config.dangerous().with_custom_certificate_verifier(Arc::new(Anyone { algorithms })),
    };
    let Some(identity) = identity else { return Ok(config.with_no_client_auth()) };
    let wrong = |error: rustls::Error| TlsError::File { path: identity.certificate.clone(), problem: error.to_string() };
    config.with_client_auth_cert(certificates(&identity.certificate)?, key(&identity.key)?).map_err(wrong)
}

fn roots(roots: &Roots) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    match roots {
        Roots::System => {
            // Some of a system's may be broken; those that are not count.
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if store.is_empty() { Err(TlsError::NoSystemRoots) } else { Ok(store) }
        }
        Roots::File(path) => {
            for certificate in certificates(path)? {
                let added = store.add(certificate);
                added.map_err(|error| TlsError::File { path: path.clone(), problem: error.to_string() })?;
            }
            Ok(store)
        }
    }
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let found = found.map_err(|error| unreadable(path, error))?;
    if found.is_empty() { Err(unreadable(path, "it holds no certificate in PEM")) } else { Ok(found) }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use rustls::pki_types::pem::Error;
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        Error::NoItemsFound => unreadable(path, "it holds no private key in PEM that is not encrypted"),
        other => unreadable(path, other),
    })
}

fn unreadable(path: &Path, problem: impl std::fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), problem: format!("cannot be used: {problem}").replace('\n', " ") }
}

/// What an error says about TLS that no other try mends, beginning with [`REFUSED`]; `None` where it is about something else.
pub fn refusal(error: &(dyn StdError + 'static)) -> Option<String> {
    use rustls::{AlertDescription as Alert, CertificateError as Certificate, Error};
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            return refusal(inner);
        }
        next = error.source();
        let Some(error) = error.downcast_ref::<rustls::Error>() else { continue };
        let why = match error {
            Error::InvalidCertificate(Certificate::UnknownIssuer) => {
                "nobody who is trusted signed its certificate; name the file of its authority's".to_owned()
            }
            Error::InvalidCertificate(problem) => format!("its certificate is wrong ({problem})"),
            Error::InvalidMessage(_) => "it does not speak TLS there".to_owned(),
            Error::PeerIncompatible(problem) => format!("nothing that both speak ({problem:?})"),
            Error::AlertReceived(
                alert @ (Alert::CertificateRequired
                | Alert::BadCertificate
                | Alert::UnsupportedCertificate
                | Alert::CertificateRevoked
                | Alert::CertificateExpired
                | Alert::CertificateUnknown
                | Alert::UnknownCA
                | Alert::AccessDenied),
            ) => format!("it refuses the client's certificate, or asks for one ({alert:?})"),
            Error::AlertReceived(alert @ (Alert::HandshakeFailure | Alert::ProtocolVersion)) => {
                format!("it refuses ({alert:?})")
            }
            _ => return None,
        };
        return Some(format!("{REFUSED}: {why}"));
    }
    None
}

/// The chain counts, the name does not.
#[derive(Debug)]
struct Chain {
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Chain {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, self.algorithms.all)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Nothing counts. Not even the handshake's signature is looked at: it would say that the server has the key of a certificate that anybody
/// may have made, and servers have certificates of old versions that cannot be read here.
#[derive(Debug)]
struct Anyone {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    /// A certificate that signed itself, and its key.
    fn made() -> (tempfile::NamedTempFile, tempfile::NamedTempFile) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        (file(&made.cert.pem()), file(&made.signing_key.serialize_pem()))
    }

    #[test]
    fn a_file_that_holds_nothing_of_its_kind_is_named() {
        let (certificate, key) = made();
        let (_, other_key) = made();
        let path = |file: &tempfile::NamedTempFile| file.path().to_owned();
        let trust = |path| Trust::ChainAndName(Roots::File(path));
        assert!(client(&trust(path(&certificate)), None).is_ok());
        let good = Identity { certificate: path(&certificate), key: path(&key) };
        assert!(client(&Trust::Anyone, Some(&good)).is_ok());

        let empty = file("no PEM");
        let broken = file("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        for (wrong, file) in [
            (client(&trust("/nowhere/ca.pem".into()), None), Path::new("/nowhere/ca.pem")),
            (client(&trust(path(&empty)), None), empty.path()),
            (client(&Trust::Chain(Roots::File(path(&broken))), None), broken.path()),
            (client(&trust(path(&key)), None), key.path()),
            (client(&Trust::Anyone, Some(&Identity { key: path(&certificate), ..good.clone() })), certificate.path()),
            (client(&Trust::Anyone, Some(&Identity { certificate: path(&key), ..good.clone() })), key.path()),
            (client(&Trust::Anyone, Some(&Identity { key: path(&other_key), ..good.clone() })), certificate.path()),
        ] {
            let said = wrong.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(said.starts_with(&format!("{}: ", file.display())) && !said.contains('\n'), "{said}");
        }
    }

    #[test]
    fn a_refusal_is_found_in_whatever_carries_it() {
        let wrong = || rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let carried = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, wrong()));
        for error in [&carried as &(dyn StdError + 'static), &wrong()] {
            let said = refusal(error).unwrap();
            assert!(said.starts_with(REFUSED) && said.contains("signed its certificate"), "{said}");
        }
        // These may pass.
        assert_eq!(refusal(&io::Error::from(io::ErrorKind::ConnectionReset)), None);
        assert_eq!(refusal(&rustls::Error::HandshakeNotComplete), None);
    }
}
