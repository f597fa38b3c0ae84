//! One try at one replica: from the request's first byte to an answer that is whole, or long.

use std::fmt::Display;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_http::ResponseHead;
use actix_web::error::PayloadError;
use actix_web::http::header::{self, HeaderMap};
use actix_web::http::{Method, StatusCode};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt, TryStreamExt, stream};
use serde::de::IgnoredAny;
use tokio::time::timeout;

use super::batch::{self, Carried};
use super::connection::{Broken, Connection, Pool};
use super::{Kind, Ours, Outgoing, UpstreamError};
use crate::gateway::forward::{Travels, line};
use crate::gateway::replicas::{Replica, Seen};
use crate::http::{BATCH_LINES_MAX, BATCH_REQUEST_BYTES_MAX, DEADLINE_HEADER, names, sse};

/// Room for a request's head; it grows where that is too little.
pub const HEAD_BYTES: usize = 1_024;
/// An answer up to this size is read whole before any of it is passed on, so that a broken one can still be asked for again.
const WHOLE_BYTES_MAX: usize = 256 * 1024;

/// What an answer's way back may take, on a busy machine.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(250);

/// A stream that says nothing for so long has lost its service, whose heartbeats come three times in it: it ends, and the client goes on elsewhere.
const STREAM_SILENCE_MAX: Duration = sse::HEARTBEAT_INTERVAL.saturating_mul(3);

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
#[derive(Clone)]
pub struct Failure {
    pub seen: Seen,
    pub error: UpstreamError,
}

impl Failure {
    /// No connection came about. One that says nothing to that does not answer either.
    fn refused(cause: io::Error) -> Self {
        let error = match cause.kind() {
            io::ErrorKind::TimedOut => UpstreamError::Timeout(format!("no connection: {cause}")),
            _ => UpstreamError::Unavailable(cause.to_string()),
        };
        Self { seen: Seen::Refused, error }
    }

    pub fn broken(cause: impl Display) -> Self {
        Self { seen: Seen::Broken, error: UpstreamError::Unavailable(cause.to_string()) }
    }

    pub fn late(cause: &str) -> Self {
        Self { seen: Seen::Late, error: UpstreamError::Timeout(cause.to_owned()) }
    }
}

/// Asks `replica`, which is told that it has until `until`; whoever calls waits no longer. `may_repeat` is asked before a request goes that may
/// have been done.
pub async fn attempt(
    ours: &Rc<Ours>,
    replica: &Arc<Replica>,
    outgoing: &Outgoing<'_>,
    until: Instant,
    may_repeat: &dyn Fn() -> bool,
) -> Result<Answer, Failure> {
    let may_join = outgoing.method == Method::POST && outgoing.kind != Kind::Stream && outgoing.wait.is_zero();
    let together = (may_join && replica.is_busy_with_batches()).then(|| written(replica, outgoing, Travels::Together, until));
    if let Some(request) = together.filter(|request| fits(request)) {
        match batch::join(ours, replica, outgoing.target.path(), request.freeze(), until).await {
            Carried::Answered(answer) => return Ok(answer),
            Carried::Failed(failure) => return Err(failure),
            Carried::Broke(failure) if !may_repeat() => return Err(failure),
            Carried::Broke(_) => metrics::counter!("shopd_gateway_retries_total").increment(1),
            Carried::Alone => {}
        }
    }
    // With the time that is left by now.
    let (pool, request) = (&ours.pool, written(replica, outgoing, Travels::Alone, until));
    let (mut connection, head) = match outgoing.kind {
        Kind::Stream => ask_anew(pool, replica, &request).await?,
        _ => ask_kept(pool, replica, &request).await?,
    };
    if may_join && head.headers.contains_key(&names::BATCH) {
        replica.takes_batches(true);
    }
    let length = head.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let content_type = head.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let status = head.status;
    let body = match sse::is_stream(&head.headers) {
        true => AnswerBody::Stream { length: None, chunks: rest_of(None, connection, STREAM_SILENCE_MAX) },
        false => {
            let mut whole = Whole::Nothing;
            loop {
                match connection.chunk().await.map_err(Failure::broken)? {
                    Some(chunk) => whole.add(chunk),
                    None => {
                        let whole = whole.freeze();
                        let is_plain_json =
                            || content_type.contains("json") && !head.headers.contains_key(header::CONTENT_ENCODING);
                        // Only what it means tells whether it is whole, where nothing else does.
                        if connection.until_close && is_plain_json() && serde_json::from_slice::<IgnoredAny>(&whole).is_err() {
                            return Err(Failure::broken(Broken::Cut));
                        }
                        pool.put(replica, connection);
                        break AnswerBody::Whole(whole);
                    }
                }
                if whole.len() > WHOLE_BYTES_MAX {
                    let idle_max = until.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
                    let chunks = rest_of(Some(whole.freeze()), connection, idle_max);
                    break AnswerBody::Stream { length, chunks };
                }
            }
        }
    };
    Ok(Answer { status, headers: head.headers, body })
}

/// Small enough for a batch, and of so few lines that nobody's batch is refused for its head.
fn fits(request: &[u8]) -> bool {
    request.len() <= BATCH_REQUEST_BYTES_MAX && request.iter().filter(|byte| **byte == b'\n').count() <= BATCH_LINES_MAX
}

/// On a kept connection where there is one.
pub async fn ask_kept(pool: &Pool, replica: &Replica, request: &[u8]) -> Result<(Connection, ResponseHead), Failure> {
    if let Some(mut kept) = pool.take(replica) {
        match kept.ask(request, &pool.config).await {
            Ok(head) => return Ok((kept, head)),
            // It was just being closed, as idle ones are. That says nothing about the replica.
            Err(Broken::Closed(_)) => {}
            Err(error) => return Err(Failure::broken(error)),
        }
    }
    ask_anew(pool, replica, request).await
}

async fn ask_anew(pool: &Pool, replica: &Replica, request: &[u8]) -> Result<(Connection, ResponseHead), Failure> {
    let mut connection = Connection::open(replica).await.map_err(Failure::refused)?;
    let head = connection.ask(request, &pool.config).await.map_err(Failure::broken)?;
    Ok((connection, head))
}

/// What a service hears of the time that is left: a little less, so that its own answer, that it could not do it in time, is here before nobody
/// waits for it any more. Told all of it, the two ends would race, and a client would hear 503 or 504 by chance.
fn told(left: Duration) -> Duration {
    left - (left / 10).min(ANSWER_TIME_MAX)
}

/// The whole request as it goes over the wire.
fn written(replica: &Replica, outgoing: &Outgoing<'_>, travels: Travels, until: Instant) -> BytesMut {
    let mut out = BytesMut::with_capacity(HEAD_BYTES + outgoing.body.len());
    out.put_slice(outgoing.method.as_str().as_bytes());
    out.put_u8(b' ');
    out.put_slice(outgoing.target.as_str().as_bytes());
    out.put_slice(b" HTTP/1.1\r\n");
    line(&mut out, "host", replica.authority().as_bytes());
    (outgoing.headers)(&mut out, travels);
    let left_ms = told(until.saturating_duration_since(Instant::now())).as_millis().max(1);
    line(&mut out, DEADLINE_HEADER, left_ms.to_string().as_bytes());
    if !outgoing.body.is_empty() || outgoing.method != Method::GET {
        line(&mut out, "content-length", outgoing.body.len().to_string().as_bytes());
    }
    out.put_slice(b"\r\n");
    out.put_slice(&outgoing.body);
    out
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

/// What was read already and what is still to come, each piece within `idle_max`; it fails where it ends short of what was announced.
fn rest_of(first: Option<Bytes>, connection: Connection, idle_max: Duration) -> Chunks {
    let rest = stream::try_unfold(connection, move |mut connection| async move {
        let io = |error: Broken| PayloadError::Io(std::io::Error::other(error));
        let late = |_| PayloadError::Io(std::io::ErrorKind::TimedOut.into());
        let chunk = timeout(idle_max, connection.chunk()).await.map_err(late)?;
        Ok(chunk.map_err(io)?.map(|chunk| (chunk, connection)))
    });
    Box::pin(stream::iter(first.map(Ok)).chain(rest.into_stream()))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::time;

    use super::*;
    use crate::gateway::replicas::Replicas;

    #[test]
    fn a_service_hears_of_a_little_less_than_is_left_so_that_its_own_answer_comes_in_time() {
        for (left, heard) in [(10_000, 9_750), (5_000, 4_750), (1_000, 900), (10, 9), (1, 0), (0, 0)] {
            assert_eq!(told(Duration::from_millis(left)).as_millis(), heard, "{left}");
        }
    }

    /// Red where a stream has no bound: a service whose process stands still would hold it for ever.
    #[actix_web::test]
    async fn a_stream_whose_service_says_nothing_any_more_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let replicas = Replicas::new(&[format!("http://{}", listener.local_addr().unwrap())]).unwrap();
        let (pool, replica) = (Pool::default(), replicas.pick(&[]).unwrap().replica.clone());
        let service = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            stream
        };
        let (_silent, asked) = tokio::join!(service, ask_anew(&pool, &replica, b"GET / HTTP/1.1\r\n\r\n"));
        let (connection, _) = asked.unwrap_or_else(|_| panic!("a head"));
        time::pause();
        let began = time::Instant::now();
        let mut chunks = rest_of(None, connection, STREAM_SILENCE_MAX);
        let ended = time::timeout(STREAM_SILENCE_MAX * 2, chunks.next()).await.expect("its end");
        assert!(ended.unwrap().is_err());
        assert_eq!(began.elapsed().as_secs(), STREAM_SILENCE_MAX.as_secs());
    }
}
