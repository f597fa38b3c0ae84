//! Errors as RFC 9457 `application/problem+json`, with stable codes.
//!
//! A [`Problem`] has two audiences: its text goes to the client, its `cause` to the log and nowhere else. It is rendered by the
//! request-context middleware, which knows the instance and the trace id.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use actix_web::http::StatusCode;
use actix_web::http::header::HeaderValue;

use crate::db::DbError;
use crate::money::AmountError;

macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal, $status:literal, $title:literal;)+) => {
        /// Every error a client can meet. The list in docs/API.md is compared with this one by a test.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code { $($(#[doc = $doc])+ $name,)+ }

        impl Code {
            pub const ALL: &'static [Code] = &[$(Code::$name),+];

            /// Stable, snake_case.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text),+ }
            }

            pub fn status(self) -> StatusCode {
                let status = match self { $(Code::$name => $status),+ };
                // Cannot fail: the numbers are the literals below, each a valid status.
                StatusCode::from_u16(status).expect("a valid status")
            }

            /// The same text for every occurrence, as RFC 9457 asks.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title),+ }
            }

            /// When it is answered, for the documentation.
            pub fn meaning(self) -> &'static str {
                match self { $(Code::$name => concat!($($doc),+)),+ }
            }
        }
    };
}

codes! {
    /// An account for this user exists already.
    AccountExists = "account_exists", 409, "Account exists";
    /// No account exists for this user.
    AccountNotFound = "account_not_found", 404, "Account not found";
    /// No order has this id.
    OrderNotFound = "order_not_found", 404, "Order not found";
    /// An order with this id exists and differs in user, amount or description.
    OrderConflict = "order_conflict", 409, "Order conflict";
    /// The amount is zero or negative.
    AmountNotPositive = "amount_not_positive", 400, "Amount not positive";
    /// The amount has more than two decimals; it is never rounded.
    AmountPrecision = "amount_precision", 400, "Amount too precise";
    /// The amount is more than 9999999999.99, or the balance would be more than the books can hold.
    AmountTooLarge = "amount_too_large", 400, "Amount too large";
    /// The body is no JSON.
    InvalidJson = "invalid_json", 400, "Invalid JSON";
    /// A field, a parameter or the path breaks a rule; `errors` names which.
    InvalidRequest = "invalid_request", 400, "Invalid request";
    /// The order id is no UUID.
    InvalidOrderId = "invalid_order_id", 400, "Invalid order id";
    /// The body is larger than 64 KiB.
    PayloadTooLarge = "payload_too_large", 413, "Payload too large";
    /// The body is not `application/json`, or it is encoded (`Content-Encoding`).
    UnsupportedMediaType = "unsupported_media_type", 415, "Unsupported media type";
    /// The route exists, but not for this method; `Allow` lists those it has.
    MethodNotAllowed = "method_not_allowed", 405, "Method not allowed";
    /// There is no such route.
    RouteNotFound = "route_not_found", 404, "Route not found";
    /// The head of the request (its line and headers) is larger than 128 KiB (64 over HTTP/2) or has more than 96 headers (84 where the gateway passes it on).
    HeadTooLarge = "head_too_large", 431, "Request head too large";
    /// The head of the request did not arrive in time.
    RequestTimeout = "request_timeout", 408, "Request timeout";
    /// This `Idempotency-Key` was used with another body; nothing happened.
    IdempotencyMismatch = "idempotency_mismatch", 422, "Idempotency key reused";
    /// A request with this `Idempotency-Key` is still running; nothing happened, ask again.
    IdempotencyInProgress = "idempotency_in_progress", 409, "Request in progress";
    /// Too many requests; `Retry-After` says when to come back.
    RateLimited = "rate_limited", 429, "Too many requests";
    /// The service behind the gateway refused or broke the connection.
    UpstreamUnavailable = "upstream_unavailable", 503, "Upstream unavailable";
    /// The service behind the gateway did not answer in time.
    UpstreamTimeout = "upstream_timeout", 504, "Upstream timeout";
    /// The service cannot do its work now (its database is away, it is overloaded or it is stopping); try again, a POST under the same key or id: it may have been done.
    Unavailable = "unavailable", 503, "Service unavailable";
    /// A defect of ours; the log has its cause under the same trace id.
    Internal = "internal", 500, "Internal error";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A database that does not answer in time may do so later, what was asked of it included.
const UNAVAILABLE: &str =
    "The service cannot answer now. Try again; a POST under the same Idempotency-Key or order id, because it may have been done.";

/// One error answer.
#[derive(Debug)]
pub struct Problem {
    pub code: Code,
    /// For the client; fixed text where the status is 5xx.
    pub detail: Cow<'static, str>,
    /// By field or parameter, what is wrong with it.
    pub errors: BTreeMap<String, Vec<String>>,
    /// Seconds, for `Retry-After`.
    pub retry_after_s: Option<u32>,
    /// Further headers of the answer; names in lower case.
    pub headers: Vec<(&'static str, HeaderValue)>,
    /// For the log only.
    pub cause: Option<String>,
}

impl Problem {
    /// `detail` must be fit for the client.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: detail.into(), errors: BTreeMap::new(), retry_after_s: None, headers: Vec::new(), cause: None }
    }

    /// An `invalid_request` about one field or parameter.
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::new(Code::InvalidRequest, message.clone()).with_error(field, message)
    }

    #[must_use]
    pub fn with_error(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.errors.entry(field.into()).or_default().push(message.into());
        self
    }

    /// `cause` goes to the log, under the answer's trace id.
    #[must_use]
    pub fn caused_by(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Of a WebSocket's handshake: the answer names the version that is spoken here (RFC 6455, 4.2.2).
    #[must_use]
    pub fn of_handshake(mut self) -> Self {
        self.headers.push(("sec-websocket-version", HeaderValue::from_static("13")));
        self
    }

    /// A service that cannot work now.
    pub fn unavailable(cause: impl fmt::Display) -> Self {
        let mut problem = Self::new(Code::Unavailable, UNAVAILABLE).caused_by(cause);
        problem.retry_after_s = Some(1);
        problem
    }

    /// A defect.
    pub fn internal(cause: impl fmt::Display) -> Self {
        Self::new(Code::Internal, "Something went wrong here; the log has the cause under this traceId.").caused_by(cause)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for Problem {}

/// About the field `amount`.
impl From<AmountError> for Problem {
    fn from(error: AmountError) -> Self {
        let code = match error {
            AmountError::NotANumber => Code::InvalidRequest,
            AmountError::NotPositive => Code::AmountNotPositive,
            AmountError::Precision => Code::AmountPrecision,
            AmountError::TooLarge => Code::AmountTooLarge,
        };
        Self::new(code, error.to_string()).with_error("amount", error.to_string())
    }
}

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        if error.is_transient() { Self::unavailable(error) } else { Self::internal(error) }
    }
}

impl actix_web::ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.code.status()
    }
}
