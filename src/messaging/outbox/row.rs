//! A row of the outbox as the record that it becomes, made with few allocations: the texts of a row lie in one buffer, and what is the
//! same in every row is shared. Pure.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use chrono::{DateTime, SecondsFormat, SubsecRound, Utc};
use uuid::Uuid;

use crate::contracts::Envelope;
use crate::db::types::Xid;

use super::super::dead_letter::headers_from_json;
use super::super::log::Record;
use super::Message;

/// A message of the outbox, and what of it goes onto the log. Those of one row of the table have one position.
#[derive(Clone, Debug)]
pub struct Row {
    pub xid: Xid,
    pub id: i64,
    pub event_id: Uuid,
    pub record: Record,
}

impl Row {
    pub fn new(xid: Xid, id: i64, message: &Message) -> Self {
        Maker::default().row(&Columns {
            xid,
            id,
            event_id: message.event_id,
            topic: message.topic,
            key: &message.key,
            payload: Some(&message.payload),
            event_type: message.kind,
            source: message.source,
            traceparent: &message.traceparent,
            request_id: &message.request_id,
            created_at: message.created_at,
            raw_key: None,
            headers: None,
        })
    }

    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let part = |part: &Option<Bytes>| part.as_ref().map_or(0, Bytes::len);
        part(&self.record.key) + part(&self.record.value) + self.record.headers.iter().map(|(_, value)| value.len()).sum::<usize>()
    }
}

/// A message where it lies.
#[derive(Clone, Copy)]
pub(super) struct Columns<'r> {
    pub xid: Xid,
    pub id: i64,
    pub event_id: Uuid,
    pub topic: &'r str,
    pub key: &'r str,
    /// `None` only in a copy.
    pub payload: Option<&'r [u8]>,
    pub event_type: &'r str,
    pub source: &'r str,
    pub traceparent: &'r str,
    pub request_id: &'r str,
    pub created_at: DateTime<Utc>,
    /// Of a copy: its key.
    pub raw_key: Option<&'r [u8]>,
    /// Of a copy: all its headers, as JSON.
    pub headers: Option<&'r str>,
}

/// What a buffer is made for; one that is not used up goes on with the next row.
const BUFFER_BYTES: usize = 64 * 1024;

/// Makes the rows of a page.
pub(super) struct Maker {
    buffer: BytesMut,
    topic: Arc<str>,
    event_type: Bytes,
    source: Bytes,
    /// The text of a second: `2026-01-01T00:00:00.`
    second: (i64, String),
    now: DateTime<Utc>,
}

impl Default for Maker {
    fn default() -> Self {
        let (topic, second) = (Arc::from(""), (i64::MIN, String::new()));
        Self { buffer: BytesMut::new(), topic, event_type: Bytes::new(), source: Bytes::new(), second, now: Utc::now() }
    }
}

impl Maker {
    pub fn row(&mut self, columns: &Columns<'_>) -> Row {
        if *self.topic != *columns.topic {
            self.topic = Arc::from(columns.topic);
        }
        let record = match columns.headers {
            Some(headers) => self.copy(columns, headers),
            None => self.event(columns),
        };
        Row { xid: columns.xid, id: columns.id, event_id: columns.event_id, record }
    }

    /// A dead letter's copy.
    fn copy(&self, columns: &Columns<'_>, headers: &str) -> Record {
        Record {
            topic: self.topic.clone(),
            key: columns.raw_key.map(Bytes::copy_from_slice),
            value: columns.payload.map(Bytes::copy_from_slice),
            headers: headers_from_json(headers)
                .iter()
                .map(|(name, value)| (Cow::Owned(name.into_owned()), Bytes::copy_from_slice(value)))
                .collect(),
            timestamp: self.now,
        }
    }

    fn event(&mut self, columns: &Columns<'_>) -> Record {
        if self.event_type != columns.event_type.as_bytes() {
            self.event_type = Bytes::copy_from_slice(columns.event_type.as_bytes());
        }
        if self.source != columns.source.as_bytes() {
            self.source = Bytes::copy_from_slice(columns.source.as_bytes());
        }
        let payload = columns.payload.unwrap_or_default();
        let texts = [columns.key.as_bytes(), payload, columns.traceparent.as_bytes(), columns.request_id.as_bytes()];
        let wanted = texts.iter().map(|text| text.len()).sum::<usize>() + uuid::fmt::Hyphenated::LENGTH + 32;
        if self.buffer.capacity() < wanted {
            self.buffer = BytesMut::with_capacity(wanted.max(BUFFER_BYTES));
        }
        texts.iter().for_each(|text| self.buffer.put_slice(text));
        self.buffer.put_slice(columns.event_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes());
        self.put_time(columns.created_at);
        let mut rest = self.buffer.split().freeze();
        let [key, value, traceparent, request_id] = texts.map(|text| rest.split_to(text.len()));
        let event_id = rest.split_to(uuid::fmt::Hyphenated::LENGTH);
        let [specversion, id, kind, source, time, content_type, trace, request] = Envelope::NAMES.map(Cow::Borrowed);
        Record {
            topic: self.topic.clone(),
            key: Some(key),
            value: columns.payload.is_some().then_some(value),
            headers: vec![
                (specversion, Bytes::from_static(Envelope::SPECVERSION)),
                (id, event_id),
                (kind, self.event_type.clone()),
                (source, self.source.clone()),
                (time, rest),
                (content_type, Bytes::from_static(Envelope::CONTENT_TYPE)),
                (trace, traceparent),
                (request, request_id),
            ],
            timestamp: self.now,
        }
    }

    /// As `to_rfc3339_opts(Micros, true)` has it, and most of that once a second.
    fn put_time(&mut self, time: DateTime<Utc>) {
        let second = time.timestamp();
        if self.second.0 != second {
            let whole = time.trunc_subsecs(0).to_rfc3339_opts(SecondsFormat::Secs, true);
            self.second = (second, whole.trim_end_matches('Z').to_owned() + ".");
        }
        self.buffer.put_slice(self.second.1.as_bytes());
        let mut micros = time.timestamp_subsec_micros().min(999_999);
        let mut digits = *b"000000Z";
        for digit in digits[..6].iter_mut().rev() {
            *digit = b'0' + (micros % 10) as u8;
            micros /= 10;
        }
        self.buffer.put_slice(&digits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_bear_the_envelopes_headers_whatever_lies_beside_them() {
        let mut maker = Maker::default();
        let mut expected = Vec::new();
        let mut rows = Vec::new();
        for n in 0..2_000_i64 {
            let at = DateTime::from_timestamp_micros(1_749_723_072_123_456 + n * 7_919_777).unwrap();
            let (key, payload) = (format!("user-{n}"), vec![b'x'; (n % 300) as usize]);
            let (trace, request, event_id) = (format!("00-{n:032x}"), format!("r-{n}"), Uuid::now_v7());
            let topic = if n % 7 == 0 { "t" } else { "u" };
            let (event_type, source) = (if n % 3 == 0 { "a" } else { "b" }, if n % 5 == 0 { "/a" } else { "/b" });
            let columns = Columns {
                xid: Xid(n as u64),
                id: n,
                event_id,
                topic,
                key: &key,
                payload: Some(&payload),
                event_type,
                source,
                traceparent: &trace,
                request_id: &request,
                created_at: at,
                raw_key: None,
                headers: None,
            };
            rows.push(maker.row(&columns));
            let headers = Envelope::headers(event_id, event_type, source, at, &trace, &request);
            expected.push((topic, key, payload, headers));
        }
        for (row, (topic, key, payload, headers)) in rows.iter().zip(expected) {
            let record = &row.record;
            assert_eq!(
                (&*record.topic, record.key.as_deref(), record.value.as_deref()),
                (topic, Some(key.as_bytes()), Some(&*payload))
            );
            let borne: Vec<_> = record.headers.iter().map(|(name, value)| (name.as_ref(), value.clone())).collect();
            assert_eq!(borne, headers);
        }
    }
}
