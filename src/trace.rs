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
        let version = lower_hex(&bytes[..2])?;
        let (high, low) = (lower_hex(&bytes[3..19])?, lower_hex(&bytes[19..35])?);
        let (span_id, flags) = (lower_hex(&bytes[36..52])?, lower_hex(&bytes[53..55])?);
        let trace_id = u128::from(high) << 64 | u128::from(low);
        let rest_ok = bytes.len() == 55 || (version != 0 && bytes[55] == b'-');
        (version != 0xff && rest_ok && trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id, flags: flags as u8 })
    }

    /// The same position, not to be recorded; whoever continues it does not either.
    #[must_use]
    pub fn unsampled(self) -> Self {
        Self { flags: self.flags & !1, ..self }
    }

    /// Whoever began the trace wants it recorded.
    pub fn is_sampled(&self) -> bool {
        self.flags & 1 == 1
    }

    /// Never 0.
    pub fn trace_bits(&self) -> u128 {
        self.trace_id
    }

    /// Never 0.
    pub fn span_bits(&self) -> u64 {
        self.span_id
    }

    /// 32 lower-case hexadecimal digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace_id)
    }

    /// The header's value.
    pub fn traceparent(&self) -> String {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], &self.trace_id.to_be_bytes());
        write_hex(&mut text[36..52], &self.span_id.to_be_bytes());
        text[54] = b'0' + (self.flags & 1);
        // Cannot fail: digits and hyphens.
        str::from_utf8(&text).expect("ASCII").to_owned()
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.traceparent())
    }
}

/// At most 16 digits.
fn lower_hex(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |number, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u64::from(digit))
    })
}

/// Two digits a byte.
fn write_hex(room: &mut [u8], bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (two, byte) in room.as_chunks_mut().0.iter_mut().zip(bytes) {
        *two = [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
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
    use proptest::prelude::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_valid_parent_is_continued_under_a_new_span() {
        let child = TraceContext::parse(PARENT).unwrap().child();
        assert_eq!(child.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(child.traceparent(), PARENT);
        assert_eq!(TraceContext::parse(PARENT).unwrap().traceparent(), PARENT);
    }

    #[test]
    fn a_malformed_parent_is_none() {
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
        }
    }

    proptest! {
        #[test]
        fn a_position_is_written_in_hexadecimal_and_read_back(trace_id in 1u128.., span_id in 1u64.., flags in 0u8..) {
            for (trace_id, span_id) in [(trace_id, span_id), (trace_id >> 64 | 1, span_id >> 32 | 1), (trace_id << 100 | 1 << 127, 1)] {
                let context = TraceContext { trace_id, span_id, flags };
                let text = context.traceparent();
                prop_assert_eq!(&text, &format!("00-{trace_id:032x}-{span_id:016x}-{:02x}", flags & 1));
                prop_assert_eq!(TraceContext::parse(&text), Some(TraceContext { flags: flags & 1, ..context }));
            }
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC{0,70}", at in 0usize..55, odd in any::<char>()) {
            let _ = TraceContext::parse(&text);
            let _ = TraceContext::parse(&format!("{}{odd}{}", &PARENT[..at], &PARENT[at + 1..]));
        }
    }

    #[test]
    fn a_later_version_is_read_by_its_first_fields() {
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings";
        assert_eq!(TraceContext::parse(later).unwrap().traceparent(), PARENT);
    }
}
