//! Pages of a list: `limit`, an opaque cursor, and where the next page is.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use super::context::RequestContext;
use super::extract::Params;
use super::problem::Problem;
use super::reply::Reply;

pub const LIMIT_DEFAULT: i64 = 100;
pub const LIMIT_MAX: i64 = 500;

/// The first byte of every cursor; another number is another format.
const VERSION: u8 = 1;

/// `limit`, 1..=500, 100 where it is absent.
pub fn limit(params: &Params) -> Result<i64, Problem> {
    let Some(text) = params.get("limit") else { return Ok(LIMIT_DEFAULT) };
    let number = Some(text).filter(|t| t.bytes().all(|b| b.is_ascii_digit())).and_then(|t| t.parse().ok());
    number
        .filter(|n| (1..=LIMIT_MAX).contains(n))
        .ok_or_else(|| Problem::invalid("limit", format!("limit must be a whole number from 1 to {LIMIT_MAX}.")))
}

/// A position as clients carry it.
pub fn cursor_of<const N: usize>(position: [u8; N]) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&position);
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

/// The position in `cursor`; `read` refuses what is none.
pub fn cursor<const N: usize, T>(params: &Params, read: impl FnOnce([u8; N]) -> Option<T>) -> Result<Option<T>, Problem> {
    let Some(text) = params.get("cursor") else { return Ok(None) };
    let position = || {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (version, position) = bytes.split_first()?;
        read(position.try_into().ok().filter(|_| *version == VERSION)?)
    };
    let invalid = || Problem::invalid("cursor", "cursor must be one that a page of this list named as its next.");
    position().map(Some).ok_or_else(invalid)
}

/// Names the next page in `Link` and `X-Next-Cursor`, through the port that was asked; `path` is our own.
pub fn with_next<T>(reply: Reply<T>, context: &RequestContext, path: &str, params: &Params, next: Option<String>) -> Reply<T> {
    let Some(next) = next else { return reply };
    let target = context.public_path(&format!("{path}?{}", params.with("cursor", &next)));
    reply.header("link", format!("<{target}>; rel=\"next\"")).header("x-next-cursor", next)
}
