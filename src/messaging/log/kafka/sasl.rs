//! Saying who we are on a connection that is spoken to by hand: SaslHandshake and SaslAuthenticate, with the mechanisms of the crate that the
//! client library uses as well.

use std::io::{Error, ErrorKind, Result};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use rsasl::prelude::{Mechname, SASLClient, SASLConfig};
use rskafka::client::{Credentials, SaslConfig};
use tokio::io::{AsyncRead, AsyncWrite};

use super::raw;
use crate::config::{KafkaConfig, SaslMechanism, Secret};

const HANDSHAKE: (i16, i16) = (17, 1);
const AUTHENTICATE: (i16, i16) = (36, 1);

const UNSUPPORTED_MECHANISM: i16 = 33;
/// The listener knows no SASL.
const ILLEGAL_STATE: i16 = 34;
const AUTHENTICATION_FAILED: i16 = 58;

/// No mechanism of ours has more.
const STEPS_MAX: usize = 8;
/// Of a broker's own words.
const REASON_CHARS_MAX: usize = 300;

/// Who we are to the brokers.
pub(super) struct Sasl {
    mechanism: SaslMechanism,
    username: String,
    password: Secret,
}

impl Sasl {
    /// `None` where the protocol has no SASL.
    pub fn new(config: &KafkaConfig) -> Option<Self> {
        config.security_protocol.has_sasl().then(|| Self {
            mechanism: config.sasl_mechanism,
            username: config.sasl_username.clone().unwrap_or_default(),
            password: config.sasl_password.clone().unwrap_or_else(|| Secret::new("")),
        })
    }

    pub fn for_the_client_library(&self) -> SaslConfig {
        let credentials = Credentials::new(self.username.clone(), self.password.expose().to_owned());
        match self.mechanism {
            SaslMechanism::Plain => SaslConfig::Plain(credentials),
            SaslMechanism::ScramSha256 => SaslConfig::ScramSha256(credentials),
            SaslMechanism::ScramSha512 => SaslConfig::ScramSha512(credentials),
        }
    }
}

/// Says who we are; how long that holds, where the broker bounds it.
///
/// # Errors
/// `PermissionDenied` where the broker does not want us, or does not know the password itself. No text holds the password.
pub(super) async fn authenticate(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), sasl: &Sasl) -> Result<Option<Duration>> {
    let mechanism = sasl.mechanism.as_str();
    let mut body = Vec::new();
    raw::put_string(&mut body, mechanism);
    let mut answer = raw::ask(stream, HANDSHAKE, &body).await?;
    let (error, offered) = offered(&mut answer).ok_or_else(|| unreadable("handshake"))?;
    match error {
        0 => {}
        UNSUPPORTED_MECHANISM => return Err(refused(format!("it does not know {mechanism}, but {}", offered.join(", ")))),
        ILLEGAL_STATE => return Err(refused("it asks for no password there".into())),
        error => return Err(Error::other(format!("the broker answered a SASL handshake with error {error}"))),
    }

    let config = SASLConfig::with_credentials(None, sasl.username.clone(), sasl.password.expose().to_owned());
    let session = config.and_then(|config| {
        // Both names are among rsasl's own.
        let name = Mechname::parse(mechanism.as_bytes()).map_err(|_| rsasl::prelude::SASLError::NoSharedMechanism)?;
        SASLClient::new(config).start_suggested(&[name])
    });
    let mut session = session.map_err(|error| refused(format!("{mechanism}: {error}")))?;
    let (mut said, mut lifetime) = (None::<Bytes>, None);
    for _ in 0..STEPS_MAX {
        let mut ours = Vec::new();
        let state = session.step(said.as_deref(), &mut ours);
        // Also where the broker's last word does not prove that it knows the password.
        let state = state.map_err(|error| refused(format!("{mechanism}: {error}")))?;
        if state.has_sent_message() {
            let mut body = Vec::new();
            body.put_i32(ours.len() as i32);
            body.put_slice(&ours);
            let mut answer = raw::ask(stream, AUTHENTICATE, &body).await?;
            let answer = authenticated(&mut answer).ok_or_else(|| unreadable("message"))?;
            match answer.error {
                0 => {}
                AUTHENTICATION_FAILED => return Err(refused(answer.reason)),
                error => {
                    return Err(Error::other(format!("the broker answered a SASL message with error {error}: {}", answer.reason)));
                }
            }
            said = Some(answer.said);
            lifetime = u64::try_from(answer.lifetime_ms).ok().filter(|ms| *ms > 0).map(Duration::from_millis);
        }
        if state.is_finished() {
            return Ok(lifetime);
        }
    }
    Err(refused(format!("{mechanism}: it does not come to an end")))
}

fn refused(why: String) -> Error {
    Error::new(ErrorKind::PermissionDenied, why)
}

fn unreadable(to: &str) -> Error {
    Error::other(format!("an answer to a SASL {to} that cannot be read"))
}

/// The error, and what the broker knows.
fn offered(answer: &mut Bytes) -> Option<(i16, Vec<String>)> {
    let error = answer.try_get_i16().ok()?;
    let mut offered = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        offered.push(raw::string(answer)?);
    }
    Some((error, offered))
}

struct Authenticated {
    error: i16,
    reason: String,
    said: Bytes,
    /// 0: without an end.
    lifetime_ms: i64,
}

fn authenticated(answer: &mut Bytes) -> Option<Authenticated> {
    let error = answer.try_get_i16().ok()?;
    let reason = raw::string(answer)?;
    let reason = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_CHARS_MAX).collect();
    let length = usize::try_from(answer.try_get_i32().ok()?).unwrap_or_default();
    let said = (length <= answer.len()).then(|| answer.split_to(length))?;
    Some(Authenticated { error, reason, said, lifetime_ms: answer.try_get_i64().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_answer_ends_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(bytes);
            let _ = (offered(&mut bytes.clone()), authenticated(&mut bytes.clone()));
        }
    }

    /// A broker that answers each request with the next of these bodies.
    async fn broker(mut stream: tokio::io::DuplexStream, answers: Vec<Vec<u8>>) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        for body in answers {
            let mut request = vec![0; stream.read_u32().await.unwrap() as usize];
            stream.read_exact(&mut request).await.unwrap();
            stream.write_u32(body.len() as u32 + 4).await.unwrap();
            stream.write_i32(1).await.unwrap();
            stream.write_all(&body).await.unwrap();
        }
    }

    fn handshake(error: i16, offers: &[&str]) -> Vec<u8> {
        let mut body = Vec::new();
        body.put_i16(error);
        body.put_i32(offers.len() as i32);
        offers.iter().for_each(|offer| raw::put_string(&mut body, offer));
        body
    }

    fn answer(error: i16, reason: &str, said: &[u8], lifetime_ms: i64) -> Vec<u8> {
        let mut body = Vec::new();
        body.put_i16(error);
        raw::put_string(&mut body, reason);
        body.put_i32(said.len() as i32);
        body.put_slice(said);
        body.put_i64(lifetime_ms);
        body
    }

    async fn authenticate_with(mechanism: SaslMechanism, answers: Vec<Vec<u8>>) -> Result<Option<Duration>> {
        let (mut ours, theirs) = tokio::io::duplex(4096);
        let sasl = Sasl { mechanism, username: "shop".into(), password: Secret::new("hunter2") };
        let (result, ()) = tokio::join!(
            async move {
                let result = authenticate(&mut ours, &sasl).await;
                drop(ours);
                result
            },
            broker(theirs, answers)
        );
        result
    }

    #[tokio::test]
    async fn a_broker_that_lets_us_in_may_say_for_how_long() {
        let plain = |lifetime_ms| vec![handshake(0, &["PLAIN"]), answer(0, "", b"", lifetime_ms)];
        assert_eq!(authenticate_with(SaslMechanism::Plain, plain(0)).await.unwrap(), None);
        assert_eq!(authenticate_with(SaslMechanism::Plain, plain(1_500)).await.unwrap(), Some(Duration::from_millis(1_500)));
    }

    #[tokio::test]
    async fn a_refusal_says_why_and_never_the_password() {
        for (answers, said) in [
            (vec![handshake(UNSUPPORTED_MECHANISM, &["PLAIN", "GSSAPI"])], "it does not know SCRAM-SHA-256, but PLAIN, GSSAPI"),
            (vec![handshake(ILLEGAL_STATE, &[])], "it asks for no password there"),
            (vec![handshake(0, &[]), answer(AUTHENTICATION_FAILED, "invalid\ncredentials", b"", 0)], "invalid credentials"),
            // It takes any password, and proves nothing.
            (vec![handshake(0, &[]), answer(0, "", b"r=x,s=c2FsdA==,i=4096", 0)], "SCRAM-SHA-256: "),
        ] {
            let error = authenticate_with(SaslMechanism::ScramSha256, answers).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::PermissionDenied);
            let text = format!("{error:?} {error}");
            assert!(text.contains(said) && !text.contains("hunter2"), "{text}");
        }
        let strange = authenticate_with(SaslMechanism::Plain, vec![handshake(7, &[])]).await.unwrap_err();
        assert_ne!(strange.kind(), ErrorKind::PermissionDenied);
    }
}
