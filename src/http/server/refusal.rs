//! What is answered to bytes that are no request: the framework refuses them with a bare status before any handler could. Here that becomes
//! problem+json, counted and logged like any other answer, and the connection ends after it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use actix_web::http::Method;
use bytes::Bytes;
use chrono::Utc;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use uuid::Uuid;

use super::super::context::{REQUEST_ID_HEADER, RequestContext};
use super::super::problem::{Code, Problem};
use super::super::{metrics, render};

/// A bare refusal is a status line, an empty length, `Connection` at most, and the date.
const BARE_BYTES_MAX: usize = 256;
/// What such a client still sends is taken in for so long and so much, so that closing does not destroy the answer on its way.
const LINGER_TIME_MAX: Duration = Duration::from_secs(2);
const LINGER_BYTES_MAX: usize = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    code: Code,
    detail: &'static str,
}

impl Refusal {
    pub(super) fn head_late() -> Self {
        Self { code: Code::RequestTimeout, detail: "The request's head did not arrive in time." }
    }

    fn malformed() -> Self {
        Self { code: Code::InvalidRequest, detail: "This is no request of HTTP/1.1." }
    }

    fn head_too_large() -> Self {
        Self { code: Code::HeadTooLarge, detail: "The request's head has more than 96 headers or 128 KiB." }
    }

    pub(super) fn record(&self, role: &'static str) {
        let status = self.code.status();
        // Nobody knows what was meant to be asked.
        metrics::request(role, &Method::default(), None, status, Duration::ZERO);
        tracing::debug!(role, status = status.as_u16(), code = self.code.as_str(), "not a request");
    }

    /// The whole answer as it goes over the wire.
    pub(super) fn text(&self) -> Bytes {
        let context = RequestContext::unasked();
        let answer = render::answer(&Problem::new(self.code, self.detail), &context, "/");
        let body = answer.body.unwrap_or_default();
        let status = self.code.status();
        let mut text = format!(
            "HTTP/1.1 {} {}\r\ncontent-length: {}\r\nconnection: close\r\n{REQUEST_ID_HEADER}: {}\r\ndate: {}\r\n",
            status.as_str(),
            status.canonical_reason().unwrap_or_default(),
            body.len(),
            Uuid::now_v7(),
            Utc::now().format("%a, %d %b %Y %H:%M:%S GMT"),
        );
        for (name, value) in &answer.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        text.push_str("\r\n");
        [text.as_bytes(), &body].concat().into()
    }
}

/// The bare refusal with which `written` ends, and where it begins. Ours have ids, and almost always a body.
pub(super) fn bare(written: &[u8]) -> Option<(usize, Refusal)> {
    if !written.ends_with(b"\r\n\r\n") {
        return None;
    }
    let tail = written.len().saturating_sub(BARE_BYTES_MAX);
    let at = tail + written[tail..].windows(7).rposition(|seven| seven == b"HTTP/1.")?;
    let head = std::str::from_utf8(&written[at..]).ok()?;
    if !head.contains("\r\ncontent-length: 0\r\n") || head.contains(REQUEST_ID_HEADER) {
        return None;
    }
    match head.get(9..12)? {
        "400" => Some((at, Refusal::malformed())),
        "431" => Some((at, Refusal::head_too_large())),
        _ => None,
    }
}

/// A refusal on its way, and the end of its connection.
pub(super) struct Sending {
    text: Bytes,
    is_shut: bool,
    left_bytes: usize,
    linger: Option<Pin<Box<Sleep>>>,
}

impl Sending {
    pub(super) fn new(refusal: &Refusal) -> Self {
        Self { text: refusal.text(), is_shut: false, left_bytes: LINGER_BYTES_MAX, linger: None }
    }

    /// Ready when the connection may close.
    pub(super) fn poll<T: AsyncRead + AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, socket: &mut T) -> Poll<io::Result<()>> {
        while !self.text.is_empty() {
            let written = ready!(Pin::new(&mut *socket).poll_write(cx, &self.text))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.text = self.text.slice(written..);
        }
        if !self.is_shut {
            ready!(Pin::new(&mut *socket).poll_shutdown(cx))?;
            self.is_shut = true;
        }
        let mut scratch = [0; 4096];
        while self.left_bytes > 0 {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *socket).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    self.left_bytes = self.left_bytes.saturating_sub(buf.filled().len());
                }
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => {
                    let linger = self.linger.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER_TIME_MAX)));
                    return linger.as_mut().poll(cx).map(Ok);
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_refusal_is_replaced_and_what_comes_before_it_stays() {
        let bare_400 =
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\ndate: Thu, 12 Jun 2025 10:11:12 GMT\r\n\r\n";
        assert_eq!(bare(bare_400), Some((0, Refusal::malformed())));
        let before = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: a\r\n\r\n{}";
        let both = [before.as_slice(), bare_400].concat();
        assert_eq!(bare(&both), Some((before.len(), Refusal::malformed())));
        for ours in [
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nx-request-id: a\r\n\r\n".as_slice(),
            b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\ndate: x\r\n\r\n",
            before,
            b"",
            b"\r\n\r\n",
        ] {
            assert_eq!(bare(ours), None, "{}", String::from_utf8_lossy(ours));
        }
    }

    #[test]
    fn a_refusal_is_a_whole_problem_and_says_that_the_connection_closes() {
        let text = String::from_utf8(Refusal::head_late().text().to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 408 Request Timeout\r\n") && head.contains("\r\nconnection: close"), "{head}");
        assert!(head.contains("\r\ncontent-type: application/problem+json"), "{head}");
        assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!((&body["code"], &body["status"]), (&"request_timeout".into(), &408.into()));
        assert_eq!(body["traceId"].as_str().unwrap().len(), 32);
    }
}
