//! The rows of a page, for who follows an order: a span each, from when it was written to the log's acknowledgement.

use std::sync::Arc;
use std::time::SystemTime;

use crate::contracts::Envelope;
use crate::messaging::log::Record;
use crate::messaging::outbox::Row;
use crate::telemetry::{Span, Tracer, Work};
use crate::trace::TraceContext;

/// What is on its way to the log, of those whose traces are recorded.
pub(super) struct Sending {
    tracer: Tracer,
    began: SystemTime,
    together: usize,
    rows: Vec<One>,
}

struct One {
    topic: Arc<str>,
    event_id: String,
    written: SystemTime,
    parent: TraceContext,
    request_id: Option<String>,
}

impl Sending {
    pub fn begin(rows: &[Row]) -> Self {
        let (tracer, debugged) = (Tracer::of("relay"), tracing::enabled!(tracing::Level::DEBUG));
        let began = SystemTime::now();
        let wanted = |row: &Row| {
            // Before anything else of it is read: most are in traces that nobody records.
            let parent = parent(&row.record)?;
            (debugged || tracer.wants(&parent)).then(|| One::of(&row.record, parent, began))
        };
        let found = if tracer.is_on() || debugged { rows.iter().filter_map(wanted).collect() } else { Vec::new() };
        Self { tracer, began, together: rows.len(), rows: found }
    }

    pub fn acknowledged(self) {
        for One { topic, event_id, written, parent, request_id } in self.rows {
            let trace_id = parent.trace_id();
            tracing::debug!(%topic, event_id, request_id, trace_id, "a row is on the log");
            if !self.tracer.wants(&parent) {
                continue;
            }
            let mut span = Span::begun(format!("send {topic}"), Work::Producer, parent.child(), Some(parent.span_bits()), written)
                .event("publishing", self.began)
                .with("messaging.system", "kafka")
                .with("messaging.operation.type", "send")
                .with("messaging.destination.name", topic.to_string())
                .with("messaging.message.id", event_id)
                .with("messaging.batch.message_count", i64::try_from(self.together).unwrap_or(i64::MAX));
            if let Some(id) = request_id {
                span = span.with("shopd.request_id", id);
            }
            self.tracer.record(span);
        }
    }
}

/// The span of who wrote it; `None` of what is in no trace.
fn parent(record: &Record) -> Option<TraceContext> {
    let (_, value) = record.headers.iter().find(|(name, _)| name == "traceparent")?;
    TraceContext::parse(std::str::from_utf8(value).ok()?)
}

impl One {
    fn of(record: &Record, parent: TraceContext, now: SystemTime) -> Self {
        let headers = record.headers.iter().map(|(name, value)| (name.to_string(), value.to_vec())).collect();
        let Envelope { event_id, time, request_id, .. } = Envelope::read(&headers);
        let written = time.map_or(now, SystemTime::from).min(now);
        Self { topic: record.topic.clone(), event_id: event_id.unwrap_or_default(), written, parent, request_id }
    }
}
