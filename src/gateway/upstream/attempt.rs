//! One try at one replica: from the request's first byte to an answer that is whole, or long.

use std::fmt::Display;
use std::pin::Pin;
use std::time::{Duration, Instant};

use actix_web::HttpMessage;
use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode, Version};
use awc::error::{ConnectError, SendRequestError};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde::de::IgnoredAny;
use tokio::time::timeout;

use super::deadline::Deadlines;
use super::{Outgoing, UpstreamError};
use crate::gateway::replicas::{Replica, Seen};
use crate::http::DEADLINE_HEADER;

/// An answer up to this size is read whole before any of it is passed on, so that a broken one can still be asked for again.
const WHOLE_BYTES_MAX: usize = 256 * 1024;

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

/// How one try failed.
pub struct Failure {
    pub seen: Seen,
    pub error: UpstreamError,
}

impl Failure {
    fn refused(cause: impl Display) -> Self {
        Self { seen: Seen::Refused, error: UpstreamError::Unavailable(cause.to_string()) }
    }

    fn broken(cause: impl Display) -> Self {
        Self { seen: Seen::Broken, error: UpstreamError::Unavailable(cause.to_string()) }
    }

    pub fn late(cause: &str) -> Self {
        Self { seen: Seen::Late, error: UpstreamError::Timeout(cause.to_owned()) }
    }
}

/// Asks `replica` and waits until `until`, which the service is told.
pub async fn attempt(
    client: &awc::Client,
    deadlines: &Deadlines,
    replica: &Replica,
    outgoing: &Outgoing<'_>,
    until: Instant,
) -> Result<Answer, Failure> {
    let asked = deadlines.bound(until, ask(client, replica, outgoing, until)).await;
    asked.unwrap_or_else(|| Err(Failure::late("no answer")))
}

async fn ask(client: &awc::Client, replica: &Replica, outgoing: &Outgoing<'_>, until: Instant) -> Result<Answer, Failure> {
    let uri = replica.uri(outgoing.target.clone()).map_err(Failure::refused)?;
    let mut request = client.request(outgoing.method.clone(), uri).no_decompress();
    (outgoing.headers)(request.headers_mut());
    let left_ms = until.saturating_duration_since(Instant::now()).as_millis().max(1) as u64;
    request.headers_mut().insert(HeaderName::from_static(DEADLINE_HEADER), HeaderValue::from(left_ms));
    // Without a body no length is named where the method needs none.
    let sent = match outgoing.body.is_empty() && outgoing.method == Method::GET {
        true => request.send(),
        false => request.send_body(outgoing.body.clone()),
    };
    let response = sent.await.map_err(failure)?;
    let status = response.status();
    if status.is_informational() {
        return Err(Failure::broken(format_args!("{status} is no answer")));
    }
    // The client library takes an answer without a length for an empty one, where only the connection's end would end it.
    let named = [header::CONTENT_LENGTH, header::TRANSFER_ENCODING].iter().any(|name| response.headers().contains_key(name));
    let is_unframed = !named && response.version() == Version::HTTP_11;
    let mut headers = HeaderMap::new();
    let mut response = response.map_body(|head, payload| {
        std::mem::swap(&mut headers, &mut head.headers);
        payload
    });
    let payload = response.take_payload();
    let body = match status {
        // They have no body, whatever length they name.
        StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED => AnswerBody::Whole(Bytes::new()),
        _ if is_unframed => return Err(Failure::broken("nothing says where its answer ends")),
        _ => read(payload, &headers, until).await?,
    };
    Ok(Answer { status, headers, body })
}

/// Only what failed before the request was written proves that it was not sent.
fn failure(error: SendRequestError) -> Failure {
    match error {
        SendRequestError::Timeout => Failure::late("no answer"),
        SendRequestError::Connect(ConnectError::Disconnected) => Failure::broken("closed before it answered"),
        SendRequestError::Connect(error) => Failure::refused(error),
        SendRequestError::Url(error) => Failure::refused(error),
        other => Failure::broken(format_args!("broke before it answered: {other}")),
    }
}

async fn read(mut payload: Payload, headers: &HeaderMap, until: Instant) -> Result<AnswerBody, Failure> {
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
    let length = text(header::CONTENT_LENGTH).and_then(|value| value.trim().parse::<u64>().ok());
    let content_type = text(header::CONTENT_TYPE).unwrap_or_default();
    if content_type.starts_with("text/event-stream") {
        return Ok(AnswerBody::Stream { length: None, chunks: Box::pin(payload) });
    }
    let mut whole = Whole::Nothing;
    while let Some(chunk) = payload.next().await {
        whole.add(chunk.map_err(|error| Failure::broken(format_args!("broke in its answer: {error}")))?);
        if whole.len() > WHOLE_BYTES_MAX {
            let idle_max = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
            return Ok(AnswerBody::Stream { length, chunks: rest_of(whole.freeze(), payload, length, idle_max) });
        }
    }
    let whole = whole.freeze();
    // The client library ends a body that was cut off as if it were whole, so that is looked for here: by its length, and where
    // it came in chunks, by what it means.
    let is_plain_json = || content_type.contains("json") && !headers.contains_key(header::CONTENT_ENCODING);
    let is_cut = match length {
        Some(length) => length != whole.len() as u64,
        None => !whole.is_empty() && is_plain_json() && serde_json::from_slice::<IgnoredAny>(&whole).is_err(),
    };
    if is_cut {
        return Err(Failure::broken("closed in the middle of its answer"));
    }
    Ok(AnswerBody::Whole(whole))
}

/// A body as it gathers: most come in one piece, which is not copied.
enum Whole {
    Nothing,
    One(Bytes),
    Many(BytesMut),
}

impl Whole {
    fn add(&mut self, chunk: Bytes) {
        match self {
            Self::Nothing => *self = Self::One(chunk),
            Self::One(first) => {
                let mut many = BytesMut::with_capacity(first.len() + chunk.len());
                many.extend_from_slice(first);
                many.extend_from_slice(&chunk);
                *self = Self::Many(many);
            }
            Self::Many(many) => many.extend_from_slice(&chunk),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::One(one) => one.len(),
            Self::Many(many) => many.len(),
        }
    }

    fn freeze(self) -> Bytes {
        match self {
            Self::Nothing => Bytes::new(),
            Self::One(one) => one,
            Self::Many(many) => many.freeze(),
        }
    }
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
