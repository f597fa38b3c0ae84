//! How requests travel as one between the gateway and a service: the requests of a batch stand one behind the other in its body, their
//! answers in the same order in its answer's (RFC 9112, 10.2: `application/http`). What both sides must agree on.

/// Where a service takes one, by POST, at a port behind the gateway.
pub const BATCH_PATH: &str = "/internal/batch";
/// A service says with its answers to the gateway's requests that it takes batches; no other is sent any.
pub const BATCH_HEADER: &str = "x-shopd-batch";
/// `Content-Type` of what is asked and of what is answered.
pub const BATCH_REQUESTS: &str = "application/http; msgtype=request";
pub const BATCH_ANSWERS: &str = "application/http; msgtype=response";
/// Requests of one batch at most; each is a POST.
pub const BATCH_COUNT_MAX: usize = 64;
/// Of one request in a batch, head and body.
pub const BATCH_REQUEST_BYTES_MAX: usize = 4 * 1024;
/// Of one request in a batch; a head may have 96 headers.
pub const BATCH_LINES_MAX: usize = 80;
