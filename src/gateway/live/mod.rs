//! An order's events over a WebSocket, fed from the service's event stream. The gateway resumes that stream where its replica ends,
//! so the client's connection outlives the replica.
//!
//! The socket ends when the stream says that nothing more can come: it is asked on from the last event, and answered 204.

mod sse;

use std::borrow::Cow;
use std::time::{Duration, Instant};

use actix_http::ws::{HandshakeError, verify_handshake};
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderMap, HeaderName, HeaderValue};
use actix_web::rt::spawn;
use actix_web::web::{Data, Payload};
use actix_web::{HttpRequest, HttpResponse};
use actix_ws::{AggregatedMessage, AggregatedMessageStream, CloseCode, CloseReason, Session};
use backon::{BackoffBuilder, ExponentialBuilder};
use futures::StreamExt;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::respond;
use super::routes::ServiceName;
use super::upstream::{Answer, AnswerBody, Chunks, Kind};
use super::worker::{self, Worker};
use crate::http::{Problem, RequestContext};
use sse::Parser;

/// How often the client is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// A client that was silent for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// For a client to take one frame: one that does not is dropped, and may resume.
const FRAME_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the stream is tried to be resumed.
const RESUME_TIME_MAX: Duration = Duration::from_secs(30);
/// Nothing a client says is of use.
const CLIENT_FRAME_BYTES_MAX: usize = 4_096;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// `rest` is the order's part of the path, raw.
///
/// # Errors
/// What the service answers where it has no such stream, 400 where the request is no upgrade, and the gateway's own.
pub async fn socket(
    worker: &Data<Worker>,
    rest: &str,
    req: &HttpRequest,
    context: &RequestContext,
    body: Payload,
) -> Result<HttpResponse, Problem> {
    let feed = Feed {
        target: format!("{}{rest}/events", ServiceName::Orders.inner_prefix()),
        context: context.clone(),
        last: req.headers().get(LAST_EVENT_ID).filter(|last| !last.is_empty()).cloned(),
    };
    // Before anything is opened for it.
    let no_upgrade =
        |error: HandshakeError| Problem::invalid("Upgrade", format!("This route is a WebSocket: {error}.")).of_handshake();
    verify_handshake(req.head()).map_err(no_upgrade)?;
    let first = feed.open(worker).await.map_err(|error| worker::problem(ServiceName::Orders, error))?;
    let chunks = match first {
        Answer { status: StatusCode::OK, body: AnswerBody::Stream { chunks, .. }, .. } => Some(chunks),
        // The client has seen the order's end: the socket says so by closing.
        Answer { status: StatusCode::NO_CONTENT, .. } => None,
        other => return Ok(respond::respond(other, &worker.gateway.0.stop)),
    };
    let (response, session, messages) = actix_ws::handle(req, body).map_err(Problem::internal)?;
    let messages = messages.max_frame_size(CLIENT_FRAME_BYTES_MAX).aggregate_continuations();
    spawn(Bridge { worker: worker.clone(), feed, session }.run(chunks, messages.max_continuation_size(CLIENT_FRAME_BYTES_MAX)));
    Ok(response)
}

/// The service's side: where its stream is, and how far it was read.
struct Feed {
    target: String,
    context: RequestContext,
    /// What the client has seen, by its own word at first.
    last: Option<HeaderValue>,
}

impl Feed {
    async fn open(&self, worker: &Worker) -> Result<Answer, super::upstream::UpstreamError> {
        let mut headers = HeaderMap::new();
        if let Some(last) = &self.last {
            headers.insert(LAST_EVENT_ID, last.clone());
        }
        let deadline = Instant::now() + worker.gateway.upstream_timeout();
        worker.get_with(ServiceName::Orders, &self.target, &headers, Kind::Stream, &self.context, deadline).await
    }

    /// Goes on behind the last event, at whichever replica; why the socket ends where that cannot be.
    async fn resume(&self, worker: &Worker) -> Result<Chunks, CloseReason> {
        let mut delays = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(20))
            .with_max_delay(Duration::from_secs(2))
            .with_jitter()
            .without_max_times()
            .build();
        let resumed = async {
            loop {
                match self.open(worker).await {
                    Ok(Answer { status: StatusCode::OK, body: AnswerBody::Stream { chunks, .. }, .. }) => return Ok(chunks),
                    Ok(Answer { status: StatusCode::NO_CONTENT, .. }) => return Err(CloseReason::from(CloseCode::Normal)),
                    Ok(answer) if answer.status.is_client_error() => {
                        return Err(reason(CloseCode::Policy, "the order is not there any more"));
                    }
                    Ok(_) | Err(_) => sleep(delays.next().unwrap_or(Duration::from_secs(2))).await,
                }
            }
        };
        let late = |_| reason(CloseCode::Again, "the service cannot be reached; resume later");
        timeout(RESUME_TIME_MAX, resumed).await.map_err(late)?
    }
}

/// Whether an order is in a state that it does not leave. One that says it in another way is found out by the end of its stream.
fn is_final(order: &str) -> bool {
    #[derive(serde::Deserialize)]
    struct Order<'o> {
        #[serde(borrow)]
        status: Cow<'o, str>,
    }
    serde_json::from_str::<Order<'_>>(order).is_ok_and(|order| matches!(&*order.status, "Finished" | "Cancelled"))
}

fn stopping() -> CloseReason {
    reason(CloseCode::Away, "the gateway is stopping; resume elsewhere")
}

fn reason(code: CloseCode, text: &str) -> CloseReason {
    CloseReason { code, description: Some(text.to_owned()) }
}

struct Bridge {
    worker: Data<Worker>,
    feed: Feed,
    session: Session,
}

impl Bridge {
    async fn run(mut self, chunks: Option<Chunks>, messages: AggregatedMessageStream) {
        metrics::gauge!("shopd_gateway_sockets").increment(1.0);
        let ended = match chunks {
            Some(chunks) => self.pass_on(chunks, messages).await,
            None => Some(CloseCode::Normal.into()),
        };
        if let Some(reason) = ended {
            // A client that does not read does not hear why either.
            let _ = timeout(FRAME_TIME_MAX, self.session.close(Some(reason))).await;
        }
        metrics::gauge!("shopd_gateway_sockets").decrement(1.0);
    }

    /// Until either side ends; why, where the client is still there to hear it.
    async fn pass_on(&mut self, mut chunks: Chunks, mut messages: AggregatedMessageStream) -> Option<CloseReason> {
        let stop = self.worker.gateway.0.stop.clone();
        let mut stopped = std::pin::pin!(stop.stopped());
        let mut pings = interval(PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut parser = Parser::default();
        loop {
            tokio::select! {
                biased;
                () = &mut stopped => return Some(stopping()),
                message = messages.next() => match message {
                    Some(Ok(AggregatedMessage::Ping(bytes))) => {
                        heard = Instant::now();
                        timeout(FRAME_TIME_MAX, self.session.pong(&bytes)).await.ok()?.ok()?;
                    }
                    Some(Ok(AggregatedMessage::Close(_))) => return Some(CloseCode::Normal.into()),
                    Some(Ok(_)) => heard = Instant::now(),
                    Some(Err(_)) => return Some(reason(CloseCode::Protocol, "a frame could not be read")),
                    None => return None,
                },
                _ = pings.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return Some(reason(CloseCode::Away, "nothing was heard"));
                    }
                    timeout(FRAME_TIME_MAX, self.session.ping(b"")).await.ok()?.ok()?;
                }
                chunk = chunks.next() => {
                    let events = chunk.and_then(Result::ok).map(|chunk| parser.feed(&chunk));
                    let mut is_over = false;
                    match events {
                        Some(Ok(events)) => for event in events {
                            // Any other name is about the stream itself: it ends, and goes on elsewhere.
                            if event.name == "message" {
                                let is_final = is_final(&event.data);
                                let sent = timeout(FRAME_TIME_MAX, self.session.text(event.data)).await;
                                let Ok(sent) = sent else { return Some(reason(CloseCode::Again, "too slow; resume")) };
                                sent.ok()?;
                                if is_final {
                                    return Some(CloseCode::Normal.into());
                                }
                                let id = event.id.filter(|id| !id.is_empty());
                                self.feed.last = id.and_then(|id| HeaderValue::from_str(&id).ok());
                            } else {
                                is_over = true;
                            }
                        },
                        Some(Err(_)) | None => is_over = true,
                    }
                    if is_over {
                        let resumed = tokio::select! {
                            biased;
                            () = &mut stopped => Err(stopping()),
                            resumed = self.feed.resume(&self.worker) => resumed,
                        };
                        chunks = match resumed {
                            Ok(chunks) => chunks,
                            Err(reason) => return Some(reason),
                        };
                        parser = Parser::default();
                    }
                }
            }
        }
    }
}
