//! Which web pages of other origins may use a port: the Fetch standard's CORS protocol, by the framework's own middleware.

use actix_cors::{Cors, CorsError};
use actix_web::Error;
use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::HeaderValue;
use actix_web::middleware::Next;

use super::context::RequestContext;
use super::problem::Problem;
use super::{names, render};

/// Of an answer, beside what pages may always read.
const EXPOSED: [&str; 12] = [
    "etag",
    "idempotent-replayed",
    "link",
    "location",
    "preference-applied",
    "ratelimit-limit",
    "ratelimit-policy",
    "ratelimit-remaining",
    "ratelimit-reset",
    "retry-after",
    "x-next-cursor",
    "x-request-id",
];
const PREFLIGHT_KEPT_S: usize = 3_600;

/// `origins` as browsers send them, or `*`. No credentials: there are none.
pub(super) fn layer(origins: &[String]) -> Cors {
    let cors = Cors::default()
        .allowed_methods([Method::GET, Method::HEAD, Method::POST, Method::OPTIONS])
        .allow_any_header()
        .expose_headers(EXPOSED)
        .max_age(PREFLIGHT_KEPT_S)
        // A page that may not read the answer is the browser's to stop; other clients send an origin, too.
        .block_on_origin_mismatch(false);
    match origins.iter().any(|origin| origin == "*") {
        true => cors.allow_any_origin().send_wildcard(),
        false => origins.iter().fold(cors, |cors, origin| cors.allowed_origin(origin)),
    }
}

/// Around [`layer`]: what that answers by itself, a preflight, has a request's id as everything else, and is a problem where it is refused.
pub(super) async fn refusals(
    req: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let id = RequestContext::of(req.headers(), false).request_id;
    let mut answered = next.call(req).await?.map_into_boxed_body();
    if let Ok(id) = HeaderValue::from_str(&id)
        && !answered.headers().contains_key(&names::REQUEST_ID)
    {
        answered.headers_mut().insert(names::REQUEST_ID.clone(), id);
    }
    let Some(error) = answered.response().error().and_then(|error| error.as_error::<CorsError>()) else { return Ok(answered) };
    let header = match error {
        CorsError::OriginNotAllowed | CorsError::MissingOrigin => "Origin",
        // Every header is allowed.
        _ => "Access-Control-Request-Method",
    };
    let problem = Problem::invalid(header, error.to_string());
    let (req, _) = answered.into_parts();
    // No page comes from another role.
    let response = render::refused(&problem, req.headers(), req.path(), false);
    Ok(ServiceResponse::new(req, response))
}
