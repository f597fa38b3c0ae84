//! `Expect: 100-continue`: a body that is announced too large is refused before it is sent; any other is asked for at once.

use std::future::{Ready, ready};

use actix_http::{Request, Response};
use actix_web::body::BoxBody;
use actix_web::http::header::CONTENT_LENGTH;
use actix_web::{HttpMessage, HttpResponse};

use super::super::body::{BODY_BYTES_MAX, too_large};
use super::super::{metrics, render};
use super::exchange::Exchange;

/// The request itself, whose body will be sent; or the answer to it.
pub(super) fn expect(request: Request, role: &'static str, inner: bool) -> Ready<Result<Request, Response<BoxBody>>> {
    let length = request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_none_or(|length| length <= BODY_BYTES_MAX as u64) {
        return ready(Ok(request));
    }
    request.conn_data::<Exchange>().inspect(|exchange| exchange.closes());
    let problem = too_large();
    metrics::request(role, request.method(), None, problem.code.status(), std::time::Duration::ZERO);
    let refused: HttpResponse = render::unread(&problem, request.headers(), request.uri().path(), inner);
    ready(Err(refused.into()))
}
