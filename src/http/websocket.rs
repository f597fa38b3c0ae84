//! A WebSocket that only tells (RFC 6455): its handshake, its frames, and whether its peer is still there. What a client says is not
//! listened to, but for pings and its goodbye.

use std::future::{Future, Ready, ready};
use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::Payload;
use actix_web::{FromRequest, HttpRequest, HttpResponse, Responder, web};
use actix_ws::{CloseCode, CloseReason, Message, MessageStream, Session};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use tokio::time::{Instant, interval_at};

use super::openapi::{Documented, RawOperation, Schema};
use super::problem::Problem;
use super::sse::HEARTBEAT_INTERVAL;

/// What a client may send in one frame.
const FRAME_BYTES_MAX: usize = 4 * 1024;
/// A peer that was silent for so many heartbeats is gone.
const SILENT_HEARTBEATS_MAX: u32 = 3;

/// What is sent; a stream that ends closes normally.
pub enum Telling {
    /// UTF-8.
    Text(Bytes),
    /// The last one.
    Close(Closing, &'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// 1000: all is said.
    Normal,
    /// 1001: the server stops.
    Away,
    /// 1013: come back.
    TryAgain,
}

/// A request that asks for a WebSocket. An extractor, which refuses any other.
pub struct Handshake {
    answer: HttpResponse,
    session: Session,
    messages: MessageStream,
}

impl FromRequest for Handshake {
    type Error = Problem;
    type Future = Ready<Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let refused = |error: actix_web::Error| {
            Problem::invalid("Upgrade", "This route speaks WebSocket: it needs the headers of RFC 6455's handshake.")
                .caused_by(error)
                .of_handshake()
        };
        let body = web::Payload::from_request(req, payload).into_inner();
        let begun = body.and_then(|body| actix_ws::handle(req, body));
        ready(begun.map_err(refused).map(|(answer, session, messages)| Self {
            answer,
            session,
            messages: messages.max_frame_size(FRAME_BYTES_MAX),
        }))
    }
}

/// 101, and then what is told.
pub struct WebSocket(HttpResponse);

impl Handshake {
    pub fn tell(self, telling: impl Stream<Item = Telling> + 'static) -> WebSocket {
        let Self { answer, session, messages } = self;
        let driver = Box::pin(drive(session, messages, Box::pin(telling)));
        WebSocket(answer.map_body(|_, frames| BoxBody::new(Driven { driver: Some(driver), frames })))
    }
}

impl Responder for WebSocket {
    type Body = BoxBody;

    fn respond_to(self, _: &HttpRequest) -> HttpResponse {
        self.0
    }
}

async fn drive(mut session: Session, mut messages: MessageStream, mut telling: Pin<Box<dyn Stream<Item = Telling>>>) {
    let mut heartbeat = interval_at(Instant::now() + HEARTBEAT_INTERVAL, HEARTBEAT_INTERVAL);
    let mut heard = Instant::now();
    let reason = loop {
        let sent = tokio::select! {
            message = messages.recv() => {
                heard = Instant::now();
                match message {
                    Some(Ok(Message::Ping(payload))) => session.pong(&payload).await,
                    Some(Ok(Message::Close(_))) | None => break close(CloseCode::Normal, ""),
                    Some(Ok(_)) => Ok(()),
                    Some(Err(_)) => break close(CloseCode::Protocol, "unreadable or too large"),
                }
            }
            told = telling.next() => match told {
                Some(Telling::Text(text)) => match bytestring::ByteString::try_from(text) {
                    Ok(text) => session.text(text).await,
                    Err(_) => break close(CloseCode::Error, ""),
                },
                Some(Telling::Close(Closing::Normal, why)) => break close(CloseCode::Normal, why),
                Some(Telling::Close(Closing::Away, why)) => break close(CloseCode::Away, why),
                Some(Telling::Close(Closing::TryAgain, why)) => break close(CloseCode::Again, why),
                None => break close(CloseCode::Normal, ""),
            },
            _ = heartbeat.tick() => {
                if heard.elapsed() >= HEARTBEAT_INTERVAL * SILENT_HEARTBEATS_MAX {
                    break close(CloseCode::Away, "silent");
                }
                session.ping(b"").await
            }
        };
        if sent.is_err() {
            return;
        }
    };
    let _ = session.close(Some(reason)).await;
}

fn close(code: CloseCode, why: &'static str) -> CloseReason {
    CloseReason { code, description: (!why.is_empty()).then(|| why.to_owned()) }
}

/// The answer's body: its frames, and what makes them. One is not without the other, so nothing outlives the connection.
struct Driven<F> {
    driver: Option<Pin<Box<F>>>,
    frames: BoxBody,
}

impl<F: Future<Output = ()>> MessageBody for Driven<F> {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        if let Some(driver) = &mut self.driver
            && driver.as_mut().poll(cx).is_ready()
        {
            self.driver = None;
        }
        Pin::new(&mut self.frames).poll_next(cx)
    }
}

impl Schema for Handshake {}
impl Documented for Handshake {}
impl Schema for WebSocket {}

impl Documented for WebSocket {
    fn update_response(op: &mut RawOperation) {
        super::sse::Events::update_response(op);
    }
}
