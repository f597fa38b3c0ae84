//! Server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>): their framing, the answer that carries them,
//! and the comments that keep it alive.

use std::convert::Infallible;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::body::BoxBody;
use actix_web::http::header::{self, HeaderMap};
use actix_web::{HttpRequest, HttpResponse, Responder};
use bytes::Bytes;
use futures::Stream;
use paperclip::actix::OperationModifier;
use paperclip::v2::models::{DefaultOperationRaw, DefaultSchemaRaw, Either, Response};
use paperclip::v2::schema::Apiv2Schema;
use tokio::time::{Instant, Sleep, sleep};

use super::problem::Problem;

pub const EVENT_STREAM: &str = "text/event-stream";
pub const LAST_EVENT_ID: &str = "Last-Event-ID";
/// A stream that has nothing to say for so long says that it is there, and a WebSocket asks its peer.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(20);
/// After which time a client comes back.
const RETRY: &[u8] = b"retry: 1000\n\n";
const KEEP_ALIVE: &[u8] = b": keep-alive\n\n";

/// Whether an answer is a stream of events, which goes on for as long as somebody listens.
pub fn is_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|content_type| content_type.starts_with(EVENT_STREAM))
}

/// An event with its id, and where in it `data` is. Neither may hold a line break.
pub fn event(id: &str, data: &str) -> (Bytes, Range<usize>) {
    let head = format!("id: {id}\ndata: ");
    let range = head.len()..head.len() + data.len();
    (Bytes::from(head + data + "\n\n"), range)
}

/// An event of another type than `message`; it has no id, so a client comes back with that of the event before.
pub fn named(name: &str, data: &str) -> Bytes {
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}

/// A stream of events, or that none will come any more: a client stops coming back at 204.
pub enum Events {
    Stream(Frames),
    Over,
}

pub type Frames = Pin<Box<dyn Stream<Item = Bytes>>>;

impl Responder for Events {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        match self {
            Self::Over => HttpResponse::NoContent().insert_header(("cache-control", "no-store")).finish(),
            Self::Stream(frames) => HttpResponse::Ok()
                .insert_header(("content-type", EVENT_STREAM))
                .insert_header(("cache-control", "no-store"))
                // Proxies of nginx's kind would hold events back otherwise.
                .insert_header(("x-accel-buffering", "no"))
                .streaming(Paced::new(frames)),
        }
    }
}

/// The request's `Last-Event-ID`, where it has one that is not empty.
pub fn last_event_id<T: std::str::FromStr>(req: &HttpRequest) -> Result<Option<T>, Problem> {
    let mut values = req.headers().get_all(LAST_EVENT_ID);
    let Some(value) = values.next().filter(|value| !value.is_empty()) else { return Ok(None) };
    let read = value.to_str().ok().and_then(|text| text.parse().ok()).filter(|_| values.next().is_none());
    read.map(Some).ok_or_else(|| Problem::invalid(LAST_EVENT_ID, "Last-Event-ID is no id of an event of ours."))
}

/// The frames, with a comment where there is none for a while.
struct Paced {
    frames: Frames,
    began: bool,
    quiet: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(frames: Frames) -> Self {
        Self { frames, began: false, quiet: Box::pin(sleep(HEARTBEAT_INTERVAL)) }
    }
}

impl Stream for Paced {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if !std::mem::replace(&mut self.began, true) {
            return Poll::Ready(Some(Ok(Bytes::from_static(RETRY))));
        }
        let next = match self.frames.as_mut().poll_next(cx) {
            Poll::Ready(next) => next,
            Poll::Pending => {
                if self.quiet.as_mut().poll(cx).is_pending() {
                    return Poll::Pending;
                }
                Some(Bytes::from_static(KEEP_ALIVE))
            }
        };
        self.quiet.as_mut().reset(Instant::now() + HEARTBEAT_INTERVAL);
        Poll::Ready(next.map(Ok))
    }
}

impl Apiv2Schema for Events {}

impl OperationModifier for Events {
    fn update_response(op: &mut DefaultOperationRaw) {
        let schema = DefaultSchemaRaw { data_type: Some(super::openapi::DataType::String), ..DefaultSchemaRaw::default() };
        let answer = Response { description: Some("OK".into()), schema: Some(schema), ..Response::default() };
        op.responses.insert("200".into(), Either::Right(answer));
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[test]
    fn an_event_is_framed_as_the_standard_says() {
        let (frame, data) = event("9-4~3", r#"{"a":1}"#);
        assert_eq!(frame, "id: 9-4~3\ndata: {\"a\":1}\n\n");
        assert_eq!(frame.slice(data), r#"{"a":1}"#);
        assert_eq!(named("dropped", "{}"), "event: dropped\ndata: {}\n\n");
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_stream_says_that_it_is_there() {
        let (to, from) = futures::channel::mpsc::channel::<Bytes>(1);
        let mut paced = Paced::new(Box::pin(from));
        let mut next = async || paced.next().await.map(Result::unwrap);
        let began = Instant::now();
        assert_eq!(next().await.unwrap(), RETRY);
        assert_eq!((next().await.unwrap().as_ref(), began.elapsed().as_secs()), (KEEP_ALIVE, HEARTBEAT_INTERVAL.as_secs()));
        to.clone().try_send(Bytes::from_static(b"x")).unwrap();
        assert_eq!(next().await.unwrap(), "x");
        assert_eq!((next().await.unwrap().as_ref(), began.elapsed().as_secs()), (KEEP_ALIVE, 2 * HEARTBEAT_INTERVAL.as_secs()));
        drop(to);
        assert_eq!(next().await, None);
    }
}
