//! What became of a record, for who follows it: a span each, from when it was received to the commit.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::batch::Batch;
use super::delivery::{Delivery, Position};
use super::handler::Handler;
use super::postgres::Written;
use crate::telemetry::{Span, Tracer, Work};

/// The record is dealt with: `fate` says why it was not applied, where it was not. `applying` is when its transaction began.
pub(super) fn record(
    tracer: Tracer,
    delivery: &Delivery,
    business_key: Option<String>,
    batch_records: usize,
    applying: SystemTime,
    fate: Option<String>,
) {
    let Position { topic, partition, offset } = &delivery.position;
    let parent = delivery.envelope.trace.map(|parent| parent.span_bits());
    let mut span = Span::begun(format!("process {topic}"), Work::Consumer, delivery.trace, parent, delivery.received_at)
        .event("applying", applying)
        .with("messaging.system", "kafka")
        .with("messaging.operation.type", "process")
        .with("messaging.destination.name", topic.to_string())
        .with("messaging.destination.partition.id", partition.to_string())
        .with("messaging.kafka.offset", *offset)
        .with("messaging.batch.message_count", i64::try_from(batch_records).unwrap_or(i64::MAX));
    if let Some(id) = &delivery.envelope.event_id {
        span = span.with("messaging.message.id", id.clone());
    }
    if let Some(id) = &delivery.envelope.request_id {
        span = span.with("shopd.request_id", id.clone());
    }
    if let Some(key) = business_key {
        span = span.with("messaging.message.conversation_id", key);
    }
    tracer.record(match fate {
        Some(reason) => span.failed(reason),
        None => span,
    });
}

/// All records of a batch that was committed; those beyond a stop come again.
pub(super) fn record_batch<H: Handler>(
    tracer: Tracer,
    handler: &H,
    batch: &Arc<Batch<H::Event>>,
    written: &Written,
    applying: SystemTime,
) {
    if !tracer.is_on() {
        return;
    }
    let fates: HashMap<(i32, i64), String> = written
        .letters
        .iter()
        .map(|(state, position, reason)| ((position.partition, position.offset), format!("{state} {reason}").trim_end().to_owned()))
        .collect();
    let received = batch.received.iter().map(|one| (&one.delivery, Some(&one.event)));
    let poisoned = batch.poisoned.iter().map(|(delivery, _)| (delivery, None));
    let together = batch.received.len();
    for (delivery, event) in received.chain(poisoned).filter(|(delivery, _)| tracer.wants(&delivery.trace)) {
        let Position { partition, offset, .. } = delivery.position;
        if written.stops.get(&partition).is_some_and(|stop| offset >= *stop) {
            continue;
        }
        let key = event.map(|event| handler.keys(event).business);
        record(tracer, delivery, key, together, applying, fates.get(&(partition, offset)).cloned());
    }
}
