//! Errors as they leave: every [`Problem`], and whatever error the framework made itself, becomes one `application/problem+json`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::http::header::{ALLOW, CONTENT_TYPE, HeaderMap, HeaderValue};
use actix_web::http::{ConnectionType, Method, StatusCode};
use actix_web::{HttpResponse, ResponseError};
use bytes::Bytes;
use serde::Serialize;

use super::context::RequestContext;
use super::names;
use super::problem::{Code, Problem};
use super::reply::Answer;

pub const PROBLEM_JSON: &str = "application/problem+json";

/// The members in the order in which clients see them.
#[derive(Serialize)]
struct Body<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    detail: &'a str,
    instance: &'a str,
    code: &'a str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    errors: &'a BTreeMap<String, Vec<String>>,
    #[serde(rename = "traceId")]
    trace_id: String,
}

/// A known route was asked with a method it does not have.
#[derive(Debug, thiserror::Error)]
#[error("method not allowed; allowed: {allow}")]
pub struct MethodNotAllowed {
    /// The header's text.
    pub allow: String,
}

impl ResponseError for MethodNotAllowed {
    fn status_code(&self) -> StatusCode {
        Code::MethodNotAllowed.status()
    }
}

/// A resource's `default_service`: `OPTIONS` is answered with what is allowed, any other method with 405 and the same. `HEAD` is
/// allowed wherever `GET` is, `OPTIONS` everywhere.
pub fn only(methods: &[Method]) -> actix_web::Route {
    let mut names: Vec<&str> = methods.iter().map(Method::as_str).collect();
    if methods.contains(&Method::GET) && !methods.contains(&Method::HEAD) {
        names.push("HEAD");
    }
    if !methods.contains(&Method::OPTIONS) {
        names.push("OPTIONS");
    }
    let allow = names.join(", ");
    actix_web::web::to(move |asked: Method| {
        let allow = allow.clone();
        async move {
            match asked {
                Method::OPTIONS => Ok(HttpResponse::NoContent().insert_header((ALLOW, allow)).finish()),
                _ => Err(MethodNotAllowed { allow }),
            }
        }
    })
}

/// Leaves an answer that is no error, or that has a body and so explains itself, as it is.
pub(super) fn problem_of(
    response: HttpResponse<BoxBody>,
    context: &RequestContext,
    instance: impl FnOnce() -> String,
) -> HttpResponse<BoxBody> {
    let status = response.status();
    if status.as_u16() < 400 {
        return response;
    }
    let instance = &*instance();
    let Some(error) = response.error() else {
        let bare = matches!(response.body().size(), BodySize::None | BodySize::Sized(0));
        return if bare && !response.headers().contains_key(CONTENT_TYPE) {
            render(&of_status(status, None), context, instance)
        } else {
            response
        };
    };
    if let Some(problem) = error.as_error::<Problem>() {
        return render(problem, context, instance);
    }
    let allow = error.as_error::<MethodNotAllowed>().map(|e| e.allow.clone());
    let mut rendered = render(&of_status(status, Some(error.to_string())), context, instance);
    if let Some(allow) = allow.and_then(|allow| HeaderValue::from_str(&allow).ok()) {
        rendered.headers_mut().insert(ALLOW, allow);
    }
    rendered
}

/// An error that the framework made, by its status.
fn of_status(status: StatusCode, cause: Option<String>) -> Problem {
    match status.as_u16() {
        404 => Problem::new(Code::RouteNotFound, "There is no such route."),
        405 => Problem::new(Code::MethodNotAllowed, "This route does not have this method."),
        413 => Problem::new(Code::PayloadTooLarge, "The body is larger than 64 KiB."),
        415 => Problem::new(Code::UnsupportedMediaType, "The body must be application/json and not encoded."),
        400..=499 => Problem::new(Code::InvalidRequest, "The request could not be read."),
        503 => Problem::unavailable(cause.unwrap_or_else(|| "no cause given".to_owned())),
        _ => Problem::internal(cause.unwrap_or_else(|| "no cause given".to_owned())),
    }
}

/// The answer itself; the problem's cause goes to the log.
fn render(problem: &Problem, context: &RequestContext, instance: &str) -> HttpResponse<BoxBody> {
    log_cause(problem, context);
    answer(problem, context, instance).respond(None)
}

/// The answer to a request that does not come as far as the layer that gives every answer its id.
pub(super) fn refused(problem: &Problem, headers: &HeaderMap, path: &str, inner: bool) -> HttpResponse<BoxBody> {
    let context = RequestContext::of(headers, inner);
    let mut response = render(problem, &context, &context.public_path(path));
    if let Ok(id) = HeaderValue::from_str(&context.request_id) {
        response.headers_mut().insert(names::REQUEST_ID.clone(), id);
    }
    response
}

/// As [`refused`], of a request that goes no further than the server; closes the connection, because its body is still to come.
pub(super) fn unread(problem: &Problem, headers: &HeaderMap, path: &str, inner: bool) -> HttpResponse<BoxBody> {
    let mut response = refused(problem, headers, path, inner);
    response.head_mut().set_connection_type(ConnectionType::Close);
    response
}

/// A problem as it is sent, to whoever asked for `instance`.
pub(super) fn answer(problem: &Problem, context: &RequestContext, instance: &str) -> Answer {
    let status = problem.code.status();
    let body = Body {
        r#type: format!("urn:shopd:problem:{}", problem.code),
        title: problem.code.title(),
        status: status.as_u16(),
        detail: &problem.detail,
        instance,
        code: problem.code.as_str(),
        errors: &problem.errors,
        trace_id: context.trace.trace_id(),
    };
    // Texts always serialize; an answer without a body would still be that status.
    let body = serde_json::to_vec(&body).ok().map(Bytes::from);
    let mut answer = Answer { status, headers: Vec::new(), body };
    answer.set("content-type", PROBLEM_JSON);
    if let Some(seconds) = problem.retry_after_s {
        answer.set("retry-after", seconds.to_string());
    }
    for (name, value) in &problem.headers {
        answer.set(name, value.to_str().unwrap_or_default().to_owned());
    }
    answer
}

fn log_cause(problem: &Problem, context: &RequestContext) {
    let (code, trace_id) = (problem.code.as_str(), context.trace.trace_id());
    let cause = problem.cause.as_deref();
    if !problem.code.status().is_server_error() {
        if let Some(cause) = cause {
            tracing::info!(code, trace_id, cause, "request refused");
        }
        return;
    }
    let cause = cause.unwrap_or("no cause given");
    if INCIDENTS.begins(code, cause, Instant::now()) {
        tracing::warn!(code, trace_id, cause, "request failed");
    } else {
        tracing::info!(code, trace_id, cause, "request failed, as before");
    }
}

static INCIDENTS: Incidents = Incidents(Mutex::new(None));

/// A cause that has been quiet for so long begins a new incident.
const QUIET: Duration = Duration::from_secs(60);
const INCIDENTS_MAX: usize = 256;

/// The causes seen lately, so that a repeated one warns once an incident.
struct Incidents(Mutex<Option<HashMap<String, Instant>>>);

impl Incidents {
    fn begins(&self, code: &str, cause: &str, now: Instant) -> bool {
        // Ports, ids and durations differ between two occurrences of one cause.
        let key: String = code.chars().chain(cause.chars().filter(|c| !c.is_ascii_digit()).take(200)).collect();
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = guard.get_or_insert_default();
        if seen.len() >= INCIDENTS_MAX {
            seen.retain(|_, at| now.duration_since(*at) < QUIET);
        }
        if seen.len() >= INCIDENTS_MAX && !seen.contains_key(&key) {
            return false;
        }
        seen.insert(key, now).is_none_or(|at| now.duration_since(at) >= QUIET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_cause_is_one_warning_an_incident() {
        let incidents = Incidents(Mutex::new(None));
        let begin = Instant::now();
        assert!(incidents.begins("unavailable", "port 1 refused", begin));
        assert!(!incidents.begins("unavailable", "port 2 refused", begin + QUIET / 2));
        assert!(!incidents.begins("unavailable", "port 3 refused", begin + QUIET), "it was never quiet for long");
        assert!(incidents.begins("internal", "port 1 refused", begin));
        assert!(incidents.begins("unavailable", "port 1 refused", begin + QUIET * 3));
    }

    #[test]
    fn the_causes_remembered_are_bounded() {
        let incidents = Incidents(Mutex::new(None));
        let begin = Instant::now();
        let name = |n: usize| char::from_u32(0x4e00 + n as u32).unwrap().to_string();
        for n in 0..INCIDENTS_MAX {
            assert!(incidents.begins("x", &name(n), begin));
        }
        assert!(!incidents.begins("x", &name(INCIDENTS_MAX), begin));
        assert!(incidents.begins("x", &name(INCIDENTS_MAX), begin + QUIET));
    }
}
