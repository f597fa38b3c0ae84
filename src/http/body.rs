//! Request bodies: at most 64 KiB of plain JSON, in bounded time. What is refused unread is drained by the outermost layer.

use std::time::Duration;

use actix_web::dev::Payload;
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use actix_web::{FromRequest, HttpRequest};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::future::LocalBoxFuture;

use super::problem::{Code, Problem};

/// The largest body, bytes.
pub const BODY_BYTES_MAX: usize = 64 * 1024;
/// How long a client may take to send it.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

/// What a route reads from its body.
pub trait ReadBody: Sized {
    /// `body` need not be JSON.
    fn read(body: &[u8]) -> Result<Self, Problem>;
}

/// A JSON route's body, read; `bytes` are the client's own.
pub struct Json<T> {
    pub value: T,
    pub bytes: Bytes,
}

impl<T: ReadBody> FromRequest for Json<T> {
    type Error = Problem;
    type Future = LocalBoxFuture<'static, Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let refused = refusal(req.headers());
        let payload = payload.take();
        Box::pin(async move {
            if let Some(problem) = refused {
                return Err(problem);
            }
            let bytes = arrived(payload).await?;
            // ASP.NET skips a byte order mark.
            let value = T::read(bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes))?;
            Ok(Self { value, bytes })
        })
    }
}

/// The body of a route that needs none: whatever it says is ignored, but the rules of every body hold; `bytes` are the client's own.
pub struct Ignored {
    pub bytes: Bytes,
}

impl FromRequest for Ignored {
    type Error = Problem;
    type Future = LocalBoxFuture<'static, Result<Self, Problem>>;

    fn from_request(req: &HttpRequest, payload: &mut Payload) -> Self::Future {
        let refused = encoded(req.headers()).or_else(|| announced_too_large(req.headers()));
        let payload = payload.take();
        Box::pin(async move {
            if let Some(problem) = refused {
                return Err(problem);
            }
            arrived(payload).await.map(|bytes| Self { bytes })
        })
    }
}

fn encoded(headers: &HeaderMap) -> Option<Problem> {
    let mut encodings = headers.get_all(CONTENT_ENCODING);
    let plain = |value: &HeaderValue| value.to_str().is_ok_and(|text| text.trim().eq_ignore_ascii_case("identity"));
    let refusal = || Problem::new(Code::UnsupportedMediaType, "The body must not be encoded (Content-Encoding).");
    encodings.any(|value| !plain(value)).then(refusal)
}

fn announced_too_large(headers: &HeaderMap) -> Option<Problem> {
    let length = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u64>().ok());
    length.filter(|length| *length > BODY_BYTES_MAX as u64).map(|_| too_large())
}

/// What the headers alone already say against a JSON body.
fn refusal(headers: &HeaderMap) -> Option<Problem> {
    if let Some(problem) = encoded(headers) {
        return Some(problem);
    }
    let content_type = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    if !content_type.is_some_and(is_json) {
        return Some(Problem::new(Code::UnsupportedMediaType, "The body must be application/json in UTF-8."));
    }
    announced_too_large(headers)
}

/// `application/json`, `text/json` or `application/*+json`; a charset only where it is UTF-8.
fn is_json(content_type: &str) -> bool {
    let mut parts = content_type.split(';');
    let essence = parts.next().unwrap_or_default().trim().to_ascii_lowercase();
    let suffixed = |s: &str| s.strip_suffix("+json").is_some_and(|name| !name.is_empty() && !name.contains('/'));
    let json =
        ["application/json", "text/json"].contains(&essence.as_str()) || essence.strip_prefix("application/").is_some_and(suffixed);
    json && parts.filter_map(|p| p.split_once('=')).all(|(name, value)| {
        let utf8 = || ["utf-8", "utf8"].iter().any(|u| value.trim().trim_matches('"').eq_ignore_ascii_case(u));
        !name.trim().eq_ignore_ascii_case("charset") || utf8()
    })
}

/// The whole body, within its bounds.
async fn arrived(payload: Payload) -> Result<Bytes, Problem> {
    let late = |_| Problem::invalid("body", "The body did not arrive in time.");
    tokio::time::timeout(BODY_TIME_MAX, collect(payload)).await.map_err(late)?
}

async fn collect(mut payload: Payload) -> Result<Bytes, Problem> {
    let mut body = BytesMut::new();
    while let Some(chunk) = payload.next().await {
        let broken = |error| Problem::invalid("body", "The body did not arrive whole.").caused_by(error);
        let chunk = chunk.map_err(broken)?;
        if body.len() + chunk.len() > BODY_BYTES_MAX {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

pub(super) fn too_large() -> Problem {
    Problem::new(Code::PayloadTooLarge, "The body is larger than 64 KiB.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_several_names_and_one_charset() {
        for good in [
            "application/json",
            "Application/JSON; charset=utf-8",
            "text/json",
            "application/problem+json",
            "application/json; charset=\"UTF-8\"; x=y",
        ] {
            assert!(is_json(good), "{good}");
        }
        for bad in ["", "text/plain", "application/+json", "application/json; charset=utf-16", "text/x+json", "application/jsonx"] {
            assert!(!is_json(bad), "{bad}");
        }
    }
}
