//! A batch of the gateway's: each of its requests is served as if it had come alone, layers and all, and the answers go out together.
//!
//! What it saves is the way: one write, one read and one wake-up for many requests instead of for each, which is half of what a small request
//! costs a service (ADR 15). A request with an answer that takes long holds up the others of its batch, so the gateway sends only such as
//! are answered by a commit that they share.

use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_http::h1::{Codec, Message, MessageType, Payload as H1Payload};
use actix_http::{Payload, Request, Response, ServiceConfig};
use actix_service::Service;
use actix_web::body::{self, BodySize, BoxBody, EitherBody, MessageBody};
use actix_web::dev::ServiceResponse;
use actix_web::http::header::{CONTENT_TYPE, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::{HttpMessage, HttpResponse};
use bytes::{Bytes, BytesMut};
use futures::future::{Either, LocalBoxFuture, MapOk, join_all};
use futures::{FutureExt, StreamExt, TryFutureExt};
use tokio::time::timeout;
use tokio_util::codec::{Decoder, Encoder};

use super::super::batch::{BATCH_ANSWERS, BATCH_COUNT_MAX, BATCH_PATH, BATCH_REQUEST_BYTES_MAX};
use super::super::problem::{Code, Problem};
use super::super::{metrics, names, render};
use super::exchange::Exchange;

/// The gateway writes a batch in one piece.
const ARRIVAL_TIME_MAX: Duration = Duration::from_secs(5);
const BATCH_BYTES_MAX: usize = BATCH_COUNT_MAX * BATCH_REQUEST_BYTES_MAX;
/// Of one answer; those to a POST are one document.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// A port's application, which takes batches where the port is behind the gateway.
pub(super) struct Batching<A> {
    pub app: Rc<A>,
    pub role: &'static str,
    pub inner: bool,
    /// One for all codecs: each would have a timer.
    pub config: ServiceConfig,
}

impl<A> Clone for Batching<A> {
    fn clone(&self) -> Self {
        Self { app: self.app.clone(), role: self.role, inner: self.inner, config: self.config.clone() }
    }
}

type Answer<B> = Response<EitherBody<B, Bytes>>;

impl<A, B> Service<Request> for Batching<A>
where
    A: Service<Request, Response = ServiceResponse<B>> + 'static,
    A::Error: Into<Response<BoxBody>>,
    B: MessageBody + 'static,
{
    type Response = Answer<B>;
    type Error = A::Error;
    type Future =
        Either<MapOk<A::Future, fn(ServiceResponse<B>) -> Answer<B>>, LocalBoxFuture<'static, Result<Answer<B>, A::Error>>>;

    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<Result<(), A::Error>> {
        self.app.poll_ready(cx)
    }

    fn call(&self, request: Request) -> Self::Future {
        if self.inner && request.path() == BATCH_PATH && request.method() == Method::POST {
            let this = self.clone();
            return Either::Right(
                async move { Ok(this.serve(request).await.map_body(|_, body| EitherBody::right(body))) }.boxed_local(),
            );
        }
        let asked_by_gateway = self.inner && request.headers().contains_key(&names::DEADLINE);
        let answer: fn(ServiceResponse<B>) -> Answer<B> = if asked_by_gateway { announced } else { plain };
        Either::Left(self.app.call(request).map_ok(answer))
    }
}

fn plain<B>(response: ServiceResponse<B>) -> Answer<B> {
    Response::from(response).map_body(|_, body| EitherBody::left(body))
}

fn announced<B>(response: ServiceResponse<B>) -> Answer<B> {
    let mut response = plain(response);
    response.headers_mut().insert(names::BATCH.clone(), HeaderValue::from_static("1"));
    response
}

impl<A> Batching<A> {
    async fn serve<B>(self, mut request: Request) -> Response<Bytes>
    where
        A: Service<Request, Response = ServiceResponse<B>>,
        A::Error: Into<Response<BoxBody>>,
        B: MessageBody + 'static,
    {
        // Until then the connection waits for us.
        let progress = request.conn_data::<Exchange>().cloned().map(Exchange::begin);
        let read = timeout(ARRIVAL_TIME_MAX, read(request.take_payload())).await.unwrap_or(Err("the batch did not arrive in time"));
        let mut codec = Codec::new(self.config.clone());
        let mut requests = match read.and_then(|bytes| requests(&mut codec, bytes)) {
            Ok(requests) => requests,
            Err(detail) => {
                progress.inspect(|progress| progress.closes());
                return self.refused(&request, detail);
            }
        };
        requests.iter_mut().for_each(|each| each.head_mut().peer_addr = request.peer_addr());
        let mut out = BytesMut::with_capacity(512 * requests.len());
        for answered in join_all(requests.into_iter().map(|each| self.app.call(each))).await {
            let response = match answered {
                Ok(response) => Response::from(response).map_into_boxed_body(),
                Err(error) => error.into(),
            };
            write(&mut codec, response, &mut out).await;
        }
        let mut response = Response::with_body(StatusCode::OK, out.freeze());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(BATCH_ANSWERS));
        response
    }

    fn refused(&self, request: &Request, detail: &'static str) -> Response<Bytes> {
        let problem = Problem::new(Code::InvalidRequest, detail);
        metrics::request(self.role, request.method(), None, problem.code.status(), Duration::ZERO);
        let refused: HttpResponse = render::unread(&problem, request.headers(), request.path(), self.inner);
        let refused: Response<BoxBody> = refused.into();
        // A problem's text is there whole.
        refused.map_body(|_, body| body.try_into_bytes().unwrap_or_default())
    }
}

async fn read(mut payload: Payload) -> Result<BytesMut, &'static str> {
    let mut bytes = BytesMut::new();
    while let Some(chunk) = payload.next().await {
        bytes.extend_from_slice(&chunk.map_err(|_| "the batch did not arrive whole")?);
        if bytes.len() > BATCH_BYTES_MAX {
            return Err("the batch is too large");
        }
    }
    Ok(bytes)
}

/// The requests that stand in `bytes`, all of them whole.
fn requests(codec: &mut Codec, mut bytes: BytesMut) -> Result<Vec<Request>, &'static str> {
    const MALFORMED: &str = "the batch holds what is no request";
    let mut requests = Vec::new();
    while !bytes.is_empty() {
        let Ok(Some(Message::Item(mut request))) = codec.decode(&mut bytes) else { return Err(MALFORMED) };
        // A POST has an end, and its answer a body whatever it is.
        if request.method() != Method::POST || codec.message_type() == MessageType::Stream {
            return Err("a batch is of POSTs");
        }
        let mut body = Bytes::new();
        while codec.message_type() == MessageType::Payload {
            match codec.decode(&mut bytes) {
                Ok(Some(Message::Chunk(Some(chunk)))) if body.is_empty() => body = chunk,
                Ok(Some(Message::Chunk(Some(chunk)))) => body = [body, chunk].concat().into(),
                Ok(Some(Message::Chunk(None))) => {}
                _ => return Err(MALFORMED),
            }
        }
        if !body.is_empty() {
            let (_, mut payload) = H1Payload::create(true);
            payload.unread_data(body);
            request = request.replace_payload(Payload::H1 { payload }).0;
        }
        requests.push(request);
        if requests.len() > BATCH_COUNT_MAX {
            return Err("the batch holds too many requests");
        }
    }
    if requests.is_empty() { Err("the batch is empty") } else { Ok(requests) }
}

/// Writes an answer as it would have gone out alone.
async fn write(codec: &mut Codec, response: Response<BoxBody>, out: &mut BytesMut) {
    let (head, body) = response.into_parts();
    let is_bodyless = body.size() == BodySize::None;
    let whole = match body.try_into_bytes() {
        Ok(whole) => Some(whole),
        Err(body) => body::to_bytes_limited(body, ANSWER_BYTES_MAX).await.ok().and_then(Result::ok),
    };
    let (head, body) = match whole {
        Some(whole) => (head, whole),
        None => (Response::with_body(StatusCode::INTERNAL_SERVER_ERROR, ()), Bytes::new()),
    };
    let size = if is_bodyless { BodySize::None } else { BodySize::Sized(body.len() as u64) };
    let messages = [Some(Message::Item((head, size))), (!body.is_empty()).then(|| Message::Chunk(Some(body)))];
    for message in messages.into_iter().flatten() {
        // Writing to memory does not fail.
        let written = codec.encode(message, out);
        debug_assert!(written.is_ok(), "{written:?}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &[u8]) -> Result<Vec<(String, String, Bytes)>, &'static str> {
        // A service of dates needs the framework's runtime.
        actix_web::rt::System::new().block_on(async {
            let mut codec = Codec::new(ServiceConfig::default());
            let mut all = Vec::new();
            for mut request in requests(&mut codec, BytesMut::from(text))? {
                let body = read(request.take_payload()).await?.freeze();
                let name = request.headers().get("x-name").map(|value| value.to_str().unwrap().to_owned());
                all.push((request.path().to_owned(), name.unwrap_or_default(), body));
            }
            Ok(all)
        })
    }

    fn text(name: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("POST /api/{name} HTTP/1.1\r\nhost: x\r\nx-name: {name}\r\ncontent-length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_batch_is_read_as_it_was_written_and_a_cut_one_not_at_all(
            all in proptest::collection::vec(("[a-z]{1,8}", proptest::collection::vec(any::<u8>(), 0..40)), 1..=BATCH_COUNT_MAX),
            cut in any::<prop::sample::Index>(),
        ) {
            let written: Vec<Vec<u8>> = all.iter().map(|(name, body)| text(name, body)).collect();
            let whole = written.concat();
            let read = parsed(&whole).unwrap();
            let expected: Vec<_> =
                all.iter().map(|(name, body)| (format!("/api/{name}"), name.clone(), Bytes::from(body.clone()))).collect();
            prop_assert_eq!(read, expected);
            // At a boundary it is a smaller batch.
            let at = cut.index(whole.len());
            let mut end = 0;
            let is_boundary = written.iter().any(|each| { end += each.len(); end == at });
            prop_assert_eq!(parsed(&whole[..at]).is_ok(), is_boundary);
        }
    }

    #[test]
    fn a_batch_is_bounded_and_of_posts() {
        let one = text("a", b"1");
        assert_eq!(parsed(&one.repeat(BATCH_COUNT_MAX)).unwrap().len(), BATCH_COUNT_MAX);
        assert_eq!(parsed(&one.repeat(BATCH_COUNT_MAX + 1)), Err("the batch holds too many requests"));
        assert_eq!(parsed(b""), Err("the batch is empty"));
        assert_eq!(parsed(b"GET /api/a HTTP/1.1\r\nhost: x\r\n\r\n"), Err("a batch is of POSTs"));
        assert_eq!(parsed(b"HEAD /api/a HTTP/1.1\r\nhost: x\r\n\r\n"), Err("a batch is of POSTs"));
        assert_eq!(parsed(&[one.as_slice(), b"nonsense\r\n\r\n"].concat()), Err("the batch holds what is no request"));
        let chunked = b"POST /api/a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n1\r\nb\r\n0\r\n\r\n";
        assert_eq!(parsed(chunked).unwrap()[0].2, "ab");
    }
}
