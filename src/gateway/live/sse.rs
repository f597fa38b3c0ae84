//! Reads a stream of server-sent events (the HTML standard, 9.2.6) as it arrives: pure.

/// One event; a stream's comments and empty events are left out.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Event {
    /// `message` where none was named.
    pub name: String,
    pub data: String,
    /// The last one that was given, of this event or an earlier one.
    pub id: Option<String>,
}

/// An event larger than this is none of ours.
const EVENT_BYTES_MAX: usize = 256 * 1024;

/// The stream is no event stream of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an event is too large or no UTF-8")]
pub struct Unreadable;

#[derive(Default)]
pub struct Parser {
    /// What came of a line so far.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed behind it ends no other line.
    after_return: bool,
    name: String,
    data: Option<String>,
    id: Option<String>,
}

impl Parser {
    /// Takes what arrived; the events that it completes.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Event>, Unreadable> {
        let mut events = Vec::new();
        for &byte in bytes {
            let was_return = std::mem::replace(&mut self.after_return, byte == b'\r');
            match byte {
                b'\n' if was_return => {}
                b'\n' | b'\r' => events.extend(self.end_line()?),
                _ => self.line.push(byte),
            }
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > EVENT_BYTES_MAX {
                return Err(Unreadable);
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Result<Option<Event>, Unreadable> {
        let line = String::from_utf8(std::mem::take(&mut self.line)).map_err(|_| Unreadable)?;
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            let name = if name.is_empty() { "message".to_owned() } else { name };
            return Ok(self.data.take().map(|data| Event { name, data, id: self.id.clone() }));
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            "event" => self.name = value.to_owned(),
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            // `retry`, and comments, whose field is empty.
            _ => {}
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = "retry: 1000\n\nid: 1-2\ndata: {\"a\":1}\n\n: keep-alive\n\nevent: dropped\r\ndata:x\r\ndata\r\n\r\nid\ndata: é\r\rdata: cut";

    fn event(name: &str, data: &str, id: &str) -> Event {
        Event { name: name.into(), data: data.into(), id: Some(id.into()) }
    }

    proptest! {
        #[test]
        fn events_are_the_same_however_the_stream_was_cut(cuts in proptest::collection::vec(0..STREAM.len(), 0..20)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut parser = Parser::default();
            let pieces = cuts.windows(2).map(|cut| &STREAM.as_bytes()[cut[0]..cut[1]]);
            let events: Vec<Event> = pieces.flat_map(|piece| parser.feed(piece).unwrap()).collect();
            prop_assert_eq!(events, [event("message", "{\"a\":1}", "1-2"), event("dropped", "x\n", "1-2"), event("message", "é", "")]);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Parser::default().feed(&bytes);
        }
    }

    #[test]
    fn what_never_ends_is_refused() {
        let mut parser = Parser::default();
        let fed = (0..EVENT_BYTES_MAX / 1_000 + 1).map(|_| parser.feed(&[b'x'; 1_000])).find(Result::is_err);
        assert_eq!(fed, Some(Err(Unreadable)));
        let mut parser = Parser::default();
        let fed = (0..EVENT_BYTES_MAX / 100 + 1)
            .map(|_| parser.feed(format!("data: {}\n", "x".repeat(100)).as_bytes()))
            .find(Result::is_err);
        assert_eq!(fed, Some(Err(Unreadable)));
        assert_eq!(Parser::default().feed(b"data: \xff\n\n"), Err(Unreadable));
    }
}
