//! What the settings about Kafka's security may be, and what of them goes together.

use std::path::PathBuf;

use super::kinds::{Kind, Raw};
use super::mistakes::shown;
use super::{KafkaConfig, SaslMechanism, Secret, SecurityProtocol};
use crate::tls::{self, Identity, Roots, TlsError, Trust};

impl SecurityProtocol {
    const ALL: [Self; 4] = [Self::Plaintext, Self::Ssl, Self::SaslPlaintext, Self::SaslSsl];

    /// As Kafka writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plaintext => "PLAINTEXT",
            Self::Ssl => "SSL",
            Self::SaslPlaintext => "SASL_PLAINTEXT",
            Self::SaslSsl => "SASL_SSL",
        }
    }

    pub fn has_tls(self) -> bool {
        matches!(self, Self::Ssl | Self::SaslSsl)
    }

    pub fn has_sasl(self) -> bool {
        matches!(self, Self::SaslPlaintext | Self::SaslSsl)
    }
}

impl SaslMechanism {
    const ALL: [Self; 3] = [Self::Plain, Self::ScramSha256, Self::ScramSha512];

    /// As Kafka writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

impl KafkaConfig {
    /// How TLS is spoken to the brokers; `None` where it is not. Reads the files.
    ///
    /// # Errors
    /// As [`tls::client`].
    pub fn tls(&self) -> Result<Option<rustls::ClientConfig>, TlsError> {
        if !self.security_protocol.has_tls() {
            return Ok(None);
        }
        let identity = match (&self.ssl_certificate_file, &self.ssl_key_file) {
            (Some(certificate), Some(key)) => Some(Identity { certificate: certificate.clone(), key: key.clone() }),
            _ => None,
        };
        tls::client(&Trust::ChainAndName(self.roots()), identity.as_ref()).map(Some)
    }

    fn roots(&self) -> Roots {
        self.ssl_ca_file.clone().map_or(Roots::System, Roots::File)
    }

    /// What of the security's settings is missing or does not go together, by its key.
    pub(super) fn contradictions(&self) -> Vec<(&'static str, String)> {
        let protocol = self.security_protocol.as_str();
        let files = [
            ("kafka.ssl_ca_file", self.ssl_ca_file.is_some()),
            ("kafka.ssl_certificate_file", self.ssl_certificate_file.is_some()),
            ("kafka.ssl_key_file", self.ssl_key_file.is_some()),
        ];
        let passwords =
            [("kafka.sasl_username", self.sasl_username.is_some()), ("kafka.sasl_password", self.sasl_password.is_some())];
        let mut found = Vec::new();
        for (key, is_given) in passwords {
            match (self.security_protocol.has_sasl(), is_given) {
                (true, false) => found.push((key, format!("is not configured, and kafka.security_protocol {protocol} needs it"))),
                // Otherwise whoever forgot the protocol would believe that it is used.
                (false, true) => {
                    found.push((key, format!("is configured, and kafka.security_protocol {protocol} does not use it")))
                }
                _ => {}
            }
        }
        if !self.security_protocol.has_tls() {
            let unused = files.into_iter().filter(|(_, is_given)| *is_given);
            found.extend(
                unused.map(|(key, _)| (key, format!("is configured, and kafka.security_protocol {protocol} does not use it"))),
            );
            return found;
        }
        let [_, certificate, key] = files;
        for ((one, is_given), (other, other_is)) in [(certificate, key), (key, certificate)] {
            if !is_given && other_is {
                found.push((one, format!("is not configured, but {other} is; both are needed, or none")));
            }
        }
        if found.is_empty()
            && let Err(error) = self.tls()
        {
            let of = |file: &Option<PathBuf>| matches!(&error, TlsError::File { path, .. } if file.as_ref() == Some(path));
            let key = match () {
                () if of(&self.ssl_certificate_file) => "kafka.ssl_certificate_file",
                () if of(&self.ssl_key_file) => "kafka.ssl_key_file",
                () => "kafka.ssl_ca_file",
            };
            found.push((key, error.to_string()));
        }
        found
    }
}

/// One of several words, in any case.
fn one_of<T: Copy>(raw: &Raw, all: &[T], name: fn(T) -> &'static str) -> Result<T, String> {
    let text = raw.text()?.trim();
    let found = all.iter().copied().find(|one| name(*one).eq_ignore_ascii_case(text));
    found.ok_or_else(|| format!("{} is none of {}", shown(text), names(all, name)))
}

fn names<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> String {
    all.iter().map(|one| name(*one)).collect::<Vec<_>>().join(", ")
}

/// How brokers are spoken to.
pub(super) struct Protocol;

impl Kind<SecurityProtocol> for Protocol {
    fn parse(&self, raw: &Raw) -> Result<SecurityProtocol, String> {
        one_of(raw, &SecurityProtocol::ALL, SecurityProtocol::as_str)
    }

    fn show(&self, value: &SecurityProtocol) -> String {
        value.as_str().into()
    }

    fn limits(&self) -> String {
        names(&SecurityProtocol::ALL, SecurityProtocol::as_str)
    }
}

/// How a password is shown to a broker.
pub(super) struct Mechanism;

impl Kind<SaslMechanism> for Mechanism {
    fn parse(&self, raw: &Raw) -> Result<SaslMechanism, String> {
        one_of(raw, &SaslMechanism::ALL, SaslMechanism::as_str)
    }

    fn show(&self, value: &SaslMechanism) -> String {
        value.as_str().into()
    }

    fn limits(&self) -> String {
        names(&SaslMechanism::ALL, SaslMechanism::as_str)
    }
}

/// The path of a file in PEM; whether it holds what it should is looked at by the roles that use it.
pub(super) struct PemFile;

impl Kind<Option<PathBuf>> for PemFile {
    fn parse(&self, raw: &Raw) -> Result<Option<PathBuf>, String> {
        match raw.text()? {
            "" => Err("is empty; leave it out where there is no such file".into()),
            path => Ok(Some(path.into())),
        }
    }

    fn show(&self, value: &Option<PathBuf>) -> String {
        value.as_ref().map(|path| path.display().to_string()).unwrap_or_default()
    }

    fn limits(&self) -> String {
        "path of a PEM file".into()
    }
}

/// A user's name.
pub(super) struct Name;

impl Kind<Option<String>> for Name {
    fn parse(&self, raw: &Raw) -> Result<Option<String>, String> {
        text(raw).map(Some)
    }

    fn show(&self, value: &Option<String>) -> String {
        value.clone().unwrap_or_default()
    }

    fn limits(&self) -> String {
        "text without control characters".into()
    }
}

/// A password; nothing of it is ever shown.
pub(super) struct Password;

impl Kind<Option<Secret>> for Password {
    fn parse(&self, raw: &Raw) -> Result<Option<Secret>, String> {
        text(raw).map(Secret::new).map(Some)
    }

    fn show(&self, value: &Option<Secret>) -> String {
        if value.is_some() { "<secret>".into() } else { String::new() }
    }

    fn limits(&self) -> String {
        "text without control characters".into()
    }
}

fn text(raw: &Raw) -> Result<String, String> {
    match raw.text()? {
        "" => Err("is empty".into()),
        text if text.chars().any(char::is_control) => Err("has a control character in it".into()),
        text => Ok(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Raw {
        Raw::Text(text.into())
    }

    fn sasl() -> KafkaConfig {
        KafkaConfig {
            security_protocol: SecurityProtocol::SaslPlaintext,
            sasl_username: Some("shop".into()),
            sasl_password: Some(Secret::new("hunter2")),
            ..crate::config::Config::default().kafka
        }
    }

    fn keys(config: &KafkaConfig) -> Vec<&'static str> {
        config.contradictions().into_iter().map(|(key, _)| key).collect()
    }

    #[test]
    fn protocols_and_mechanisms_are_called_as_kafka_calls_them() {
        assert_eq!(Protocol.parse(&raw("SASL_SSL")), Ok(SecurityProtocol::SaslSsl));
        assert_eq!(Protocol.parse(&raw(" sasl_ssl ")), Ok(SecurityProtocol::SaslSsl));
        assert_eq!(Mechanism.parse(&raw("SCRAM-SHA-256")), Ok(SaslMechanism::ScramSha256));
        assert!(Protocol.parse(&raw("TLS")).unwrap_err().ends_with("is none of PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"));
        assert!(Mechanism.parse(&raw("GSSAPI")).is_err());
        let problem = Password.parse(&raw("hunter2\n")).unwrap_err();
        assert!(!problem.contains("hunter2"), "{problem}");
    }

    #[test]
    fn what_a_protocol_needs_must_be_there_and_what_it_does_not_use_must_not() {
        assert_eq!(keys(&crate::config::Config::default().kafka), Vec::<&str>::new());
        assert_eq!(keys(&sasl()), Vec::<&str>::new());
        assert_eq!(keys(&KafkaConfig { sasl_username: None, ..sasl() }), ["kafka.sasl_username"]);
        assert_eq!(keys(&KafkaConfig { sasl_password: None, ..sasl() }), ["kafka.sasl_password"]);
        let plain = KafkaConfig { security_protocol: SecurityProtocol::Plaintext, ssl_ca_file: Some("/ca".into()), ..sasl() };
        assert_eq!(keys(&plain), ["kafka.sasl_username", "kafka.sasl_password", "kafka.ssl_ca_file"]);
        let ssl = KafkaConfig { security_protocol: SecurityProtocol::SaslSsl, ssl_ca_file: Some("/nowhere/ca".into()), ..sasl() };
        assert_eq!(keys(&ssl), ["kafka.ssl_ca_file"]);
        assert_eq!(keys(&KafkaConfig { ssl_key_file: Some("/key".into()), ..ssl.clone() }), ["kafka.ssl_certificate_file"]);
        assert_eq!(keys(&KafkaConfig { ssl_certificate_file: Some("/c".into()), ..ssl.clone() }), ["kafka.ssl_key_file"]);
        assert!(ssl.contradictions()[0].1.starts_with("/nowhere/ca: cannot be used: "), "{:?}", ssl.contradictions());
    }
}
