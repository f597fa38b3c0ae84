//! A service's answer as the client gets it: its headers, its body whole or as a stream, compressed where that is worth it.

use actix_http::encoding::Encoder;
use actix_web::body::{BodySize, BodyStream, BoxBody, MessageBody, None as NoBody, SizedStream};
use actix_web::http::StatusCode;
use actix_web::http::header::{self, AcceptEncoding, ContentEncoding, Encoding, Header, HeaderMap, HeaderValue};
use actix_web::{HttpRequest, HttpResponse};
use futures::StreamExt;

use super::forward;
use super::upstream::{Answer, AnswerBody, Chunks};
use crate::shutdown::Shutdown;

/// Below this an encoding saves less than a packet.
const COMPRESSED_BYTES_MIN: u64 = 1_024;
const SUPPORTED: [Encoding; 4] = [Encoding::brotli(), Encoding::zstd(), Encoding::gzip(), Encoding::identity()];

/// A stream without a length ends when `stop` does: its client asks elsewhere.
pub fn respond(answer: Answer, stop: &Shutdown) -> HttpResponse {
    let mut response = HttpResponse::new(answer.status);
    let bodyless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&answer.status);
    *response.headers_mut() = forward::answer(answer.headers);
    match answer.body {
        AnswerBody::Whole(_) if bodyless => response.set_body(BoxBody::new(NoBody::new())),
        AnswerBody::Whole(bytes) => response.set_body(BoxBody::new(bytes)),
        AnswerBody::Stream { length: Some(length), chunks } => response.set_body(BoxBody::new(SizedStream::new(length, chunks))),
        AnswerBody::Stream { length: None, chunks } => response.set_body(BoxBody::new(BodyStream::new(until(chunks, stop)))),
    }
}

fn until(chunks: Chunks, stop: &Shutdown) -> Chunks {
    let stop = stop.clone();
    Box::pin(chunks.take_until(Box::pin(async move { stop.stopped().await })))
}

/// Encodes the body as the client accepts it, where it is text of some size and nobody has encoded it yet. What was encoded bears a weak tag,
/// and so does the 304 that confirms a copy of it.
pub fn compress(req: &HttpRequest, mut response: HttpResponse) -> HttpResponse {
    if response.status() == StatusCode::NOT_MODIFIED && holds_weak(req.headers(), response.headers()) {
        weaken(response.headers_mut());
    }
    if !is_worth_it(req.headers(), &response) {
        return response;
    }
    let accepted = AcceptEncoding::parse(req).ok().and_then(|accepted| accepted.negotiate(SUPPORTED.iter()));
    let encoding = match accepted {
        Some(Encoding::Known(encoding)) if encoding != ContentEncoding::Identity => encoding,
        _ => {
            vary(response.headers_mut());
            return response;
        }
    };
    response = response.map_body(|head, body| {
        weaken(&mut head.headers);
        vary(&mut head.headers);
        let varied = head.headers.get(header::VARY).cloned();
        let encoded = BoxBody::new(Encoder::response(encoding, head, body));
        // The library writes its own.
        if let Some(varied) = varied {
            head.headers.insert(header::VARY, varied);
        }
        encoded
    });
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response
}

fn is_worth_it(asked: &HeaderMap, response: &HttpResponse) -> bool {
    let headers = response.headers();
    let large = match response.body().size() {
        BodySize::Sized(bytes) => bytes >= COMPRESSED_BYTES_MIN,
        BodySize::Stream => true,
        BodySize::None => false,
    };
    let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
    large
        && asked.contains_key(header::ACCEPT_ENCODING)
        && !headers.contains_key(header::CONTENT_ENCODING)
        && response.status() != StatusCode::PARTIAL_CONTENT
        && !text(header::CACHE_CONTROL).contains("no-transform")
        && is_text(text(header::CONTENT_TYPE))
}

/// An event must not wait in an encoder for the next one.
fn is_text(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    essence != "text/event-stream" && (essence.starts_with("text/") || essence.ends_with("json") || essence.ends_with("javascript"))
}

fn vary(headers: &mut HeaderMap) {
    let has = headers
        .get_all(header::VARY)
        .any(|value| value.to_str().is_ok_and(|text| text.to_ascii_lowercase().contains("accept-encoding")));
    if !has {
        headers.append(header::VARY, HeaderValue::from_static("accept-encoding"));
    }
}

/// Whether the client's copy is one that was encoded here: its tag is the service's, made weak.
fn holds_weak(asked: &HeaderMap, answered: &HeaderMap) -> bool {
    let tag = answered.get(header::ETAG).and_then(|tag| tag.to_str().ok());
    let mut lists = asked.get_all(header::IF_NONE_MATCH).filter_map(|list| list.to_str().ok());
    tag.is_some_and(|tag| lists.any(|list| list.contains(&format!("W/{tag}"))))
}

/// Other bytes are another representation: the tag names the state, no longer the bytes.
fn weaken(headers: &mut HeaderMap) {
    let weak = headers.get(header::ETAG).and_then(|tag| tag.to_str().ok()).filter(|tag| !tag.starts_with("W/"));
    if let Some(weak) = weak.and_then(|tag| HeaderValue::from_str(&format!("W/{tag}")).ok()) {
        headers.insert(header::ETAG, weak);
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    fn compressed(accept: &str, content_type: &str, bytes: usize) -> HttpResponse {
        let req = TestRequest::default().insert_header((header::ACCEPT_ENCODING, accept)).to_http_request();
        let body = "x".repeat(bytes);
        compress(&req, HttpResponse::Ok().insert_header((header::ETAG, "\"1\"")).content_type(content_type).body(body))
    }

    fn encoding(response: &HttpResponse) -> &str {
        response.headers().get(header::CONTENT_ENCODING).map_or("", |value| value.to_str().unwrap())
    }

    #[test]
    fn what_is_text_and_large_is_encoded_as_the_client_likes_it_best() {
        for (accept, expected) in
            [("gzip", "gzip"), ("br;q=0.1, zstd", "zstd"), ("br, gzip", "br"), ("identity", ""), ("x, *;q=0", "")]
        {
            let response = compressed(accept, "application/json", 2_000);
            assert_eq!(encoding(&response), expected, "{accept}");
            let headers = response.headers();
            assert_eq!(headers.get_all(header::VARY).count(), 1, "{accept}");
            assert_eq!(headers.get(header::ETAG).unwrap(), if expected.is_empty() { "\"1\"" } else { "W/\"1\"" });
        }
    }

    #[test]
    fn a_copy_that_was_encoded_is_confirmed_under_the_tag_that_it_has() {
        for (held, expected) in
            [("W/\"1\"", "W/\"1\""), ("\"2\", W/\"1\"", "W/\"1\""), ("\"1\"", "\"1\""), ("*", "\"1\""), ("W/\"2\"", "\"1\"")]
        {
            let req = TestRequest::default().insert_header((header::IF_NONE_MATCH, held)).to_http_request();
            let answer = HttpResponse::NotModified().insert_header((header::ETAG, "\"1\"")).finish();
            assert_eq!(compress(&req, answer).headers().get(header::ETAG).unwrap(), expected, "{held}");
        }
    }

    #[test]
    fn what_is_small_encoded_no_text_or_a_stream_of_events_is_left_alone() {
        assert_eq!(encoding(&compressed("gzip", "application/json", 1_000)), "");
        assert_eq!(encoding(&compressed("gzip", "image/png", 2_000)), "");
        assert_eq!(encoding(&compressed("gzip", "text/event-stream", 2_000)), "");
        let req = TestRequest::default().insert_header((header::ACCEPT_ENCODING, "gzip")).to_http_request();
        let done =
            HttpResponse::Ok().insert_header((header::CONTENT_ENCODING, "br")).content_type("text/html").body("x".repeat(2_000));
        assert_eq!(encoding(&compress(&req, done)), "br");
        let plain = TestRequest::default().to_http_request();
        let response = compress(&plain, HttpResponse::Ok().content_type("text/html").body("x".repeat(2_000)));
        assert_eq!(encoding(&response), "");
    }

    #[actix_web::test]
    async fn what_was_encoded_is_smaller() {
        let body = actix_web::body::to_bytes(compressed("br", "text/plain", 20_000).into_body()).await.unwrap();
        assert!(body.len() < 200, "{}", body.len());
    }
}
