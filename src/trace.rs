//! W3C trace context (<https://www.w3.org/TR/trace-context/>): one order is one trace over HTTP, outbox, broker and inbox.
//!
//! A pure value; HTTP and messaging carry it. May import nothing of ours.

use std::fmt;

/// A position in a trace: the `traceparent` of version 00.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

impl TraceContext {
    /// A new trace, sampled.
    pub fn new_root() -> Self {
        Self { trace_id: nonzero_u128(), span_id: nonzero_u64(), flags: 1 }
    }

    /// Continues the caller's trace, or begins one where the header is absent or malformed (as the standard asks).
    pub fn continue_from(header: Option<&str>) -> Self {
        header.and_then(Self::parse).map_or_else(Self::new_root, |parent| parent.child())
    }

    /// The same trace, the next span.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: nonzero_u64(), ..self }
    }

    /// Reads a `traceparent`; a later version is read by its first four fields.
    pub fn parse(header: &str) -> Option<Self> {
        let header = header.trim();
        let bytes = header.as_bytes();
        if !header.is_ascii() || bytes.len() < 55 || bytes[2] != b'-' || bytes[35] != b'-' || bytes[52] != b'-' {
            return None;
        }
        let lower_hex = |s: &str| s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let (version, trace, span, flags) = (&header[..2], &header[3..35], &header[36..52], &header[53..55]);
        if ![version, trace, span, flags].into_iter().all(lower_hex) || version == "ff" {
            return None;
        }
        let rest_ok = if version == "00" { bytes.len() == 55 } else { bytes.len() == 55 || bytes[55] == b'-' };
        let trace_id = u128::from_str_radix(trace, 16).ok()?;
        let span_id = u64::from_str_radix(span, 16).ok()?;
        let flags = u8::from_str_radix(flags, 16).ok()?;
        (rest_ok && trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id, flags })
    }

    /// 32 lower-case hexadecimal digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace_id)
    }

    /// The header's value.
    pub fn traceparent(&self) -> String {
        let mut text = String::with_capacity(55);
        text.push_str("00-");
        push_hex(&mut text, &self.trace_id.to_be_bytes());
        text.push('-');
        push_hex(&mut text, &self.span_id.to_be_bytes());
        text.push_str(if self.flags & 1 == 1 { "-01" } else { "-00" });
        text
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.traceparent())
    }
}

/// Made for every message twice: the formatter takes ten times as long.
fn push_hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)]);
        text.push(DIGITS[usize::from(byte & 15)]);
    }
}

fn nonzero_u128() -> u128 {
    rand::random::<u128>().max(1)
}

fn nonzero_u64() -> u64 {
    rand::random::<u64>().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_valid_parent_is_continued_under_a_new_span() {
        let child = TraceContext::continue_from(Some(PARENT));
        assert_eq!(child.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(child.traceparent(), PARENT);
        assert_eq!(TraceContext::parse(PARENT).unwrap().traceparent(), PARENT);
    }

    #[test]
    fn a_malformed_parent_begins_a_new_trace() {
        for bad in [
            "",
            "garbage",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "00-4bf92f3577b34da6a3ce929d0e0e473é-00f067aa0ba902b7-0",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
            assert_eq!(TraceContext::continue_from(Some(bad)).traceparent().len(), 55);
        }
    }

    #[test]
    fn a_later_version_is_read_by_its_first_fields() {
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings";
        assert_eq!(TraceContext::parse(later).unwrap().traceparent(), PARENT);
    }
}
