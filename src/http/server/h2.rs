//! HTTP/2 with prior knowledge (h2c), over the `h2` crate directly: the framework's own use of it has no bound on streams, resets,
//! header lists or time, and does not end with the server.
//!
//! The requests of a connection are futures of that connection and end with it; one that its client resets is dropped.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use actix_http::{Payload, Request, Response};
use actix_service::Service;
use actix_web::HttpResponse;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::error::PayloadError;
use actix_web::http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING, UPGRADE};
use actix_web::http::{Method, StatusCode, Version};
use bytes::Bytes;
use chrono::Utc;
use futures::Stream;
use futures::stream::{FuturesUnordered, StreamExt};
use h2::server::{Builder, SendResponse};
use h2::{Reason, RecvStream, SendStream};
use tokio::time::{Instant, sleep_until, timeout};

use super::super::problem::{Code, Problem};
use super::super::{metrics, render};
use super::exchange::Bounds;
use super::greeting::Greeted;

/// Requests of one connection at a time.
const STREAMS_MAX: u32 = 128;
/// Of one request, as HPACK counts them (RFC 9113, 6.5.2). What is larger is refused like any other request that is.
const HEADER_LIST_BYTES_MAX: usize = 64 * 1024;
/// What HPACK adds for each.
const HEADER_BYTES_BESIDE: usize = 32;
/// As many lines as the framework reads over HTTP/1.1.
const HEADERS_MAX: usize = 96;
/// What is larger than this is refused by the library: with a bare 431, before we hear of it.
const HEADER_LIST_BYTES_READ_MAX: u32 = 256 * 1024;
/// Bodies are at most 64 KiB; this is what a client may send of one before it is read.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// What is kept of one answer for a client that does not take it.
const SEND_BUFFER_BYTES_MAX: usize = 64 * 1024;
/// How many requests a client may take back beyond those that it let be answered.
const RESETS_MAX: u64 = 100;
/// A client that takes nothing of an answer for so long loses it; as on the socket.
const UNREAD_TIME_MAX: Duration = Duration::from_secs(30);
/// What a client has to take note that the connection ends.
const GOODBYE_TIME_MAX: Duration = Duration::from_secs(1);

/// Whose port it is, and what its clients must keep to.
#[derive(Clone, Copy)]
pub(super) struct Port {
    pub role: &'static str,
    pub inner: bool,
    pub bounds: Bounds,
}

/// How a stream ended.
enum Ended {
    Answered,
    TakenBack,
}

/// Serves the connection to its end: the client's, `stop`, or none of its requests within the bounds.
pub(super) async fn serve<S, B>(
    socket: Greeted,
    peer: Option<SocketAddr>,
    service: Rc<S>,
    port: Port,
    stop: impl Future<Output = ()>,
) -> Result<(), h2::Error>
where
    S: Service<Request>,
    S::Response: Into<Response<B>>,
    S::Error: Into<Response<BoxBody>>,
    B: MessageBody,
{
    let handshake = Builder::new()
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEADER_LIST_BYTES_READ_MAX)
        .initial_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .handshake::<_, Bytes>(socket);
    let Ok(connection) = timeout(port.bounds.head, handshake).await else { return Ok(()) };
    let mut connection = connection?;
    let mut streams = FuturesUnordered::new();
    let mut stop = pin!(stop);
    let mut until = pin!(sleep_until(Instant::now() + port.bounds.keep_alive));
    let (mut ending, mut answered, mut taken_back) = (false, 0_u64, 0_u64);
    loop {
        tokio::select! {
            () = &mut stop, if !ending => {
                connection.graceful_shutdown();
                ending = true;
                until.as_mut().reset(Instant::now() + GOODBYE_TIME_MAX);
            }
            accepted = connection.accept() => {
                let Some(accepted) = accepted else { return Ok(()) };
                let (request, answer) = accepted?;
                streams.push(exchange(service.clone(), peer, port, request, answer));
            }
            Some(ended) = streams.next(), if !streams.is_empty() => {
                match ended {
                    Ended::Answered => answered += 1,
                    Ended::TakenBack => taken_back += 1,
                }
                if taken_back > answered + RESETS_MAX && !ending {
                    tracing::debug!(?peer, taken_back, answered, "an HTTP/2 client takes back more than it asks");
                    connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    ending = true;
                }
                let time = if ending { GOODBYE_TIME_MAX } else { port.bounds.keep_alive };
                until.as_mut().reset(Instant::now() + time);
            }
            () = &mut until, if streams.is_empty() => {
                if ending {
                    return Ok(());
                }
                connection.graceful_shutdown();
                ending = true;
                until.as_mut().reset(Instant::now() + GOODBYE_TIME_MAX);
            }
        }
    }
}

/// One request and its answer.
async fn exchange<S, B>(
    service: Rc<S>,
    peer: Option<SocketAddr>,
    port: Port,
    request: http::Request<RecvStream>,
    mut answer: SendResponse<Bytes>,
) -> Ended
where
    S: Service<Request>,
    S::Response: Into<Response<B>>,
    S::Error: Into<Response<BoxBody>>,
    B: MessageBody,
{
    let is_head = request.method() == http::Method::HEAD;
    let is_too_large = request.headers().len() > HEADERS_MAX || header_list_bytes(&request) > HEADER_LIST_BYTES_MAX;
    let Some(request) = incoming(request, peer) else {
        answer.send_reset(Reason::PROTOCOL_ERROR);
        return Ended::TakenBack;
    };
    if is_too_large {
        return send(head_too_large(&request, port).into(), answer, is_head).await;
    }
    let handled = service.call(request);
    let response = tokio::select! {
        response = handled => response,
        _ = poll_fn(|cx| answer.poll_reset(cx)) => return Ended::TakenBack,
    };
    match response {
        Ok(response) => send(response.into(), answer, is_head).await,
        Err(error) => send(error.into(), answer, is_head).await,
    }
}

/// In the framework's types, which are those of an earlier version of `http`. `None` of what that does not take; both read the same grammar.
fn incoming(request: http::Request<RecvStream>, peer: Option<SocketAddr>) -> Option<Request> {
    let (parts, body) = request.into_parts();
    let payload = match body.is_end_stream() {
        true => Payload::None,
        false => {
            let body: Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> = Box::pin(Body(body));
            Payload::from(body)
        }
    };
    let mut request = Request::with_payload(payload);
    let head = request.head_mut();
    head.uri = parts.uri.to_string().try_into().ok()?;
    head.method = Method::from_bytes(parts.method.as_str().as_bytes()).ok()?;
    head.version = Version::HTTP_2;
    head.peer_addr = peer;
    for (name, value) in &parts.headers {
        let name = HeaderName::from_bytes(name.as_str().as_bytes()).ok()?;
        head.headers.append(name, HeaderValue::from_bytes(value.as_bytes()).ok()?);
    }
    Some(request)
}

/// As HPACK counts them, with those that begin with a colon.
fn header_list_bytes(request: &http::Request<RecvStream>) -> usize {
    let (method, uri) = (request.method().as_str(), request.uri());
    let own = [
        (":method", method),
        (":scheme", uri.scheme_str().unwrap_or_default()),
        (":authority", uri.authority().map_or("", |authority| authority.as_str())),
        (":path", uri.path_and_query().map_or("", |path| path.as_str())),
    ];
    let own = own.iter().map(|(name, value)| name.len() + value.len());
    let lines = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len());
    own.chain(lines).map(|bytes| bytes + HEADER_BYTES_BESIDE).sum()
}

fn head_too_large(request: &Request, port: Port) -> HttpResponse {
    let problem = Problem::new(Code::HeadTooLarge, "The request's head has more than 96 headers or 64 KiB.");
    metrics::request(port.role, request.method(), None, problem.code.status(), Duration::ZERO);
    tracing::debug!(role = port.role, code = problem.code.as_str(), "not a request");
    render::refused(&problem, &request.head().headers, request.uri().path(), port.inner)
}

struct Body(RecvStream);

impl Stream for Body {
    type Item = Result<Bytes, PayloadError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let stream = &mut self.get_mut().0;
        let Some(chunk) = ready!(stream.poll_data(cx)) else { return Poll::Ready(None) };
        // What was read makes room for more.
        let chunk = chunk.and_then(|chunk| stream.flow_control().release_capacity(chunk.len()).map(|()| chunk));
        Poll::Ready(Some(chunk.map_err(|error| PayloadError::Io(std::io::Error::other(error)))))
    }
}

async fn send<B: MessageBody>(response: Response<B>, mut answer: SendResponse<Bytes>, is_head: bool) -> Ended {
    let (response, body) = response.into_parts();
    let size = body.size();
    let is_empty = is_head || size.is_eof();
    let Ok(mut stream) = answer.send_response(head(&response, size), is_empty) else { return Ended::TakenBack };
    if is_empty {
        return Ended::Answered;
    }
    let mut body = pin!(body);
    loop {
        let next = tokio::select! {
            next = poll_fn(|cx| body.as_mut().poll_next(cx)) => next,
            _ = poll_fn(|cx| stream.poll_reset(cx)) => return Ended::Answered,
        };
        let sent = match next {
            Some(Ok(chunk)) => chunk_out(&mut stream, chunk).await,
            Some(Err(_)) => Err(Reason::INTERNAL_ERROR),
            None => {
                // Fails only where the client has gone.
                let _ = stream.send_data(Bytes::new(), true);
                return Ended::Answered;
            }
        };
        if let Err(reason) = sent {
            stream.send_reset(reason);
            return Ended::Answered;
        }
    }
}

/// Sends a chunk as the client's window allows.
async fn chunk_out(stream: &mut SendStream<Bytes>, mut chunk: Bytes) -> Result<(), Reason> {
    while !chunk.is_empty() {
        stream.reserve_capacity(chunk.len().min(SEND_BUFFER_BYTES_MAX));
        let capacity = timeout(UNREAD_TIME_MAX, poll_fn(|cx| stream.poll_capacity(cx))).await;
        match capacity {
            Ok(Some(Ok(capacity))) => {
                let part = chunk.split_to(capacity.min(chunk.len()));
                stream.send_data(part, false).map_err(|_| Reason::CANCEL)?;
            }
            Ok(_) | Err(_) => return Err(Reason::CANCEL),
        }
    }
    Ok(())
}

fn head(response: &Response<()>, size: BodySize) -> http::Response<()> {
    let mut head = http::Response::new(());
    // Every status is one to both.
    *head.status_mut() = http::StatusCode::from_u16(response.status().as_u16()).unwrap_or(http::StatusCode::INTERNAL_SERVER_ERROR);
    *head.version_mut() = http::Version::HTTP_2;
    let headers = head.headers_mut();
    for (name, value) in response.headers() {
        // Of HTTP/1's connections (RFC 9113, 8.2.2); the length is the body's own.
        let hop =
            [CONNECTION, TRANSFER_ENCODING, UPGRADE].contains(name) || ["keep-alive", "proxy-connection"].contains(&name.as_str());
        let own = name == CONTENT_LENGTH && !matches!(size, BodySize::Stream | BodySize::None);
        if !hop && !own {
            let name = http::HeaderName::from_bytes(name.as_str().as_bytes());
            let value = http::HeaderValue::from_bytes(value.as_bytes());
            // Every header is one to both.
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
    }
    if let BodySize::Sized(length) = size
        && ![StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&response.status())
    {
        headers.insert(http::header::CONTENT_LENGTH, length.into());
    }
    if !headers.contains_key(http::header::DATE) {
        let now = Utc::now().format("%a, %d %b %Y %H:%M:%S GMT").to_string();
        // Only visible ASCII.
        if let Ok(now) = http::HeaderValue::try_from(now) {
            headers.insert(http::header::DATE, now);
        }
    }
    head
}
