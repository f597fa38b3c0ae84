//! Which web pages of other origins may use a port: the Fetch standard's CORS protocol, by the framework's own middleware.

use actix_cors::Cors;
use actix_web::http::Method;

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
