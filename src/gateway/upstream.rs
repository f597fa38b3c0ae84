//! Asking a service: one request, over as many of its replicas as it may safely be tried on, within one deadline.
//!
//! A GET may be repeated, so a refused, broken or late attempt goes on at the next replica. Anything else is repeated only where
//! the connection was refused, because then nothing was sent. May import the gateway's replicas only.

use std::fmt::Display;
use std::pin::Pin;
use std::time::Duration;

use actix_web::HttpMessage;
use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use actix_web::http::header::{self, HeaderMap};
use actix_web::http::{Method, StatusCode};
use awc::error::{ConnectError, SendRequestError};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde::de::IgnoredAny;
use tokio::time::{Instant, timeout, timeout_at};

use super::replicas::Replicas;

/// Below the services' keep-alive (75 s), so that it is always us who end an idle connection.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// A replica whose host does not even answer the handshake.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// Requests in flight of one worker thread; more wait for their turn within their deadline.
const IN_FLIGHT_MAX: usize = 4_096;
/// An answer up to this size is read whole before any of it is passed on, so that a broken one can still be asked for again.
const WHOLE_BYTES_MAX: usize = 256 * 1024;

/// Connections to the services; one of these a worker thread, neither `Send` nor shared.
pub struct Client {
    pooled: awc::Client,
    /// Keeps nothing: a request after a broken one must not meet a second connection that the service has closed meanwhile.
    fresh: awc::Client,
}

/// A request as the service sees it.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub method: Method,
    /// Path and query, raw.
    pub target: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: AnswerBody,
}

pub enum AnswerBody {
    Whole(Bytes),
    /// Too large to hold, or without an end; an error in it must break the connection to the client. `length` where it is known.
    Stream {
        length: Option<u64>,
        chunks: Chunks,
    },
}

pub type Chunks = Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>>;

/// Why there is no answer; the texts are for the log.
#[derive(Clone, Debug, thiserror::Error)]
pub enum UpstreamError {
    #[error("unavailable: {0}")]
    Unavailable(String),
    #[error("late: {0}")]
    Timeout(String),
}

impl UpstreamError {
    fn at(self, base: &str) -> Self {
        match self {
            Self::Unavailable(cause) => Self::Unavailable(format!("{base}: {cause}")),
            Self::Timeout(cause) => Self::Timeout(format!("{base}: {cause}")),
        }
    }
}

/// How one attempt failed.
struct Failure {
    sent: Sent,
    error: UpstreamError,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// Provably: there was no connection.
    No,
    /// It may or may not have been processed.
    Maybe,
}

impl Failure {
    fn not_sent(cause: impl Display) -> Self {
        Self { sent: Sent::No, error: UpstreamError::Unavailable(cause.to_string()) }
    }

    fn broken(cause: impl Display) -> Self {
        Self { sent: Sent::Maybe, error: UpstreamError::Unavailable(cause.to_string()) }
    }

    fn late(sent: Sent) -> Self {
        Self { sent, error: UpstreamError::Timeout("no answer".to_owned()) }
    }
}

impl Default for Client {
    fn default() -> Self {
        Self::new()
    }
}

impl Client {
    pub fn new() -> Self {
        let client = |idle: Duration| {
            let connector = awc::Connector::new().timeout(CONNECT_TIME_MAX).conn_keep_alive(idle).limit(IN_FLIGHT_MAX);
            // Every wait here has a deadline of its own.
            awc::Client::builder().connector(connector).disable_timeout().disable_redirects().no_default_headers().finish()
        };
        Self { pooled: client(IDLE_MAX), fresh: client(Duration::ZERO) }
    }

    /// Asks until `deadline`. An attempt that can be repeated elsewhere gets half of the time that is left.
    pub async fn send(&self, replicas: &Replicas, outgoing: &Outgoing, deadline: Instant) -> Result<Answer, UpstreamError> {
        let repeatable = outgoing.method == Method::GET;
        let mut last = UpstreamError::Unavailable("no replica is configured".to_owned());
        let mut attempts = replicas.order(std::time::Instant::now());
        let mut next = 0;
        while let Some(&replica) = attempts.get(next) {
            let client = if next == 0 { &self.pooled } else { &self.fresh };
            next += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let base = replicas.base(replica);
            let until = if repeatable && next < attempts.len() { deadline - left / 2 } else { deadline };
            let failure = match attempt(client, base, outgoing, until).await {
                Ok(answer) => {
                    replicas.restore(replica);
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            let is_broken = failure.sent == Sent::Maybe && matches!(failure.error, UpstreamError::Unavailable(_));
            last = failure.error.at(base);
            if is_broken {
                // A kept connection may just have been closed; the replica itself may be well.
                if repeatable && next == 1 {
                    attempts.push(replica);
                }
            } else {
                // One that is late is left out too, lest every other request wait for it.
                replicas.eject(replica, std::time::Instant::now());
                tracing::info!(replica = base, cause = %last, "a replica is asked last for a moment");
            }
            if !repeatable && failure.sent == Sent::Maybe {
                break;
            }
        }
        Err(last)
    }
}

async fn attempt(client: &awc::Client, base: &str, outgoing: &Outgoing, until: Instant) -> Result<Answer, Failure> {
    let mut request = client.request(outgoing.method.clone(), format!("{base}{}", outgoing.target)).no_decompress();
    *request.headers_mut() = outgoing.headers.clone();
    let sent = request.send_body(outgoing.body.clone());
    let mut response = timeout_at(until, sent).await.map_err(|_| Failure::late(Sent::Maybe))?.map_err(failure)?;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = match status {
        // They have no body, whatever length they name.
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => AnswerBody::Whole(Bytes::new()),
        _ => read(response.take_payload(), &headers, until).await?,
    };
    Ok(Answer { status, headers, body })
}

/// Only what failed before the request was written proves that it was not sent.
fn failure(error: SendRequestError) -> Failure {
    match error {
        SendRequestError::Timeout => Failure::late(Sent::Maybe),
        SendRequestError::Connect(ConnectError::Disconnected) => Failure::broken("closed before it answered"),
        SendRequestError::Connect(ConnectError::Timeout) => Failure::late(Sent::No),
        SendRequestError::Connect(error) => Failure::not_sent(error),
        SendRequestError::Url(error) => Failure::not_sent(error),
        other => Failure::broken(format_args!("broke before it answered: {other}")),
    }
}

async fn read(mut payload: Payload, headers: &HeaderMap, until: Instant) -> Result<AnswerBody, Failure> {
    let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    let length = text(header::CONTENT_LENGTH).and_then(|value| value.trim().parse::<u64>().ok());
    let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
    if content_type.starts_with("text/event-stream") {
        return Ok(AnswerBody::Stream { length: None, chunks: Box::pin(payload) });
    }
    let mut whole = BytesMut::new();
    loop {
        match timeout_at(until, payload.next()).await.map_err(|_| Failure::late(Sent::Maybe))? {
            Some(Ok(chunk)) => whole.extend_from_slice(&chunk),
            Some(Err(error)) => return Err(Failure::broken(format_args!("broke in its answer: {error}"))),
            None => break,
        }
        if whole.len() > WHOLE_BYTES_MAX {
            let idle_max = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
            return Ok(AnswerBody::Stream { length, chunks: rest_of(whole.freeze(), payload, length, idle_max) });
        }
    }
    // The client library ends a body that was cut off as if it were whole, so that is looked for here: by its length, and where
    // it came in chunks, by what it means.
    let is_plain_json = content_type.contains("json") && !headers.contains_key(header::CONTENT_ENCODING);
    let is_cut = match length {
        Some(length) => length != whole.len() as u64,
        None => is_plain_json && !whole.is_empty() && serde_json::from_slice::<IgnoredAny>(&whole).is_err(),
    };
    if is_cut {
        return Err(Failure::broken("closed in the middle of its answer"));
    }
    Ok(AnswerBody::Whole(whole.freeze()))
}

/// What was read already and what is still to come, each chunk within `idle_max`; it fails where it ends short of its `length`.
fn rest_of(first: Bytes, payload: Payload, length: Option<u64>, idle_max: Duration) -> Chunks {
    let left = length.map(|length| length.saturating_sub(first.len() as u64));
    let rest = stream::try_unfold((payload, left), move |(mut payload, left)| async move {
        let late = |_| PayloadError::Io(std::io::ErrorKind::TimedOut.into());
        match timeout(idle_max, payload.next()).await.map_err(late)?.transpose()? {
            Some(chunk) => {
                let left = left.map(|left| left.saturating_sub(chunk.len() as u64));
                Ok(Some((chunk, (payload, left))))
            }
            None if left.is_some_and(|left| left > 0) => Err(PayloadError::Incomplete(None)),
            None => Ok(None),
        }
    });
    Box::pin(stream::once(async { Ok(first) }).chain(rest.into_stream()))
}
