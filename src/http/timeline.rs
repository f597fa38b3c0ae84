//! The timeline of one order: what each service knows of its hops, and the rule that makes one list of them.
//!
//! Services answer their own hops at [`INNER`], a port behind the gateway; whoever asks both merges. Amounts pass through as their text.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

/// Where a service answers its [`Part`].
pub const INNER: &str = "/internal/timeline/{orderId}";

/// One step of an order on its way.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    pub name: HopName,
    #[serde(with = "micros")]
    pub at: DateTime<Utc>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<i32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_before: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_after: Option<Box<RawValue>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HopName {
    /// Orders took it.
    Accepted,
    /// A message was written in the commit of its cause.
    Outbox,
    /// The broker has the record.
    Topic,
    /// The other service read it.
    Inbox,
    /// Payments decided, and moved the money where there was enough.
    Ledger,
    Finished,
    Cancelled,
}

impl Hop {
    pub fn new(name: HopName, at: DateTime<Utc>) -> Self {
        Self { name, at, topic: None, partition: None, offset: None, balance_before: None, balance_after: None }
    }

    /// A record's place.
    #[must_use]
    pub fn on(self, topic: impl Into<String>, partition: i32, offset: i64) -> Self {
        Self { topic: Some(topic.into()), partition: Some(partition), offset: Some(offset), ..self }
    }
}

/// What one service knows, in the order in which it happened there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    pub order_id: Uuid,
    pub trace_id: Option<String>,
    pub hops: Vec<Hop>,
}

impl Part {
    /// Of orders': a result was read, so somebody has decided.
    pub fn has_a_result(&self) -> bool {
        self.hops.iter().any(|hop| matches!(hop.name, HopName::Topic | HopName::Inbox | HopName::Finished | HopName::Cancelled))
    }
}

/// What clients see.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Timeline {
    pub order_id: Uuid,
    pub trace_id: Option<String>,
    pub hops: Vec<TimedHop>,
}

super::openapi::named_schema!(Timeline, "Timeline");

/// A [`Hop`] with the milliseconds since the one before; the members' order is part of what clients see.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TimedHop {
    pub name: HopName,
    #[serde(with = "micros")]
    pub at: DateTime<Utc>,
    pub ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_before: Option<Box<RawValue>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance_after: Option<Box<RawValue>>,
}

/// One list: payments' hops stand behind the request that orders wrote, before the result that orders read. What is not known, or
/// has not happened, is left out.
///
/// Brokers keep whole milliseconds and machines' clocks differ, so a time that would lie before the hop's predecessor is that one's.
pub fn merge(orders: Part, payments: Option<Part>) -> Timeline {
    let Part { order_id, trace_id, hops } = orders;
    let ours = hops.iter().take_while(|hop| matches!(hop.name, HopName::Accepted | HopName::Outbox)).count();
    let (theirs, their_trace) = payments.map_or((Vec::new(), None), |part| (part.hops, part.trace_id));
    let mut hops = hops;
    let result = hops.split_off(ours);
    hops.extend(theirs);
    hops.extend(result);
    let mut before = hops.first().map_or(DateTime::UNIX_EPOCH, |hop| hop.at);
    let timed = |hop: Hop| {
        let at = hop.at.max(before);
        // Whole microseconds, so at most three decimals.
        let ms = (at - before).num_microseconds().unwrap_or(i64::MAX) as f64 / 1_000.0;
        before = at;
        let Hop { name, topic, partition, offset, balance_before, balance_after, .. } = hop;
        TimedHop { name, at, ms, topic, partition, offset, balance_before, balance_after }
    };
    Timeline { order_id, trace_id: trace_id.or(their_trace), hops: hops.into_iter().map(timed).collect() }
}

/// RFC 3339 with six fraction digits.
mod micros {
    use chrono::{DateTime, Utc};
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(at: &DateTime<Utc>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&crate::http::timestamp(*at))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<DateTime<Utc>, D::Error> {
        DateTime::<Utc>::deserialize(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(micros: i64) -> DateTime<Utc> {
        DateTime::from_timestamp_micros(1_750_000_000_000_000 + micros).unwrap()
    }

    fn part(hops: Vec<Hop>) -> Part {
        Part { order_id: Uuid::from_u128(7), trace_id: None, hops }
    }

    fn names(timeline: &Timeline) -> Vec<HopName> {
        timeline.hops.iter().map(|hop| hop.name).collect()
    }

    #[test]
    fn the_hops_of_both_services_are_one_list_whose_times_never_run_backwards() {
        use HopName::*;
        let orders = part(vec![
            Hop::new(Accepted, at(1_500)),
            Hop::new(Outbox, at(1_500)),
            Hop::new(Topic, at(9_000)).on("r", 1, 7),
            Hop::new(Inbox, at(9_700)),
            Hop::new(Finished, at(11_001)),
        ]);
        let mut payments = part(vec![
            Hop::new(Topic, at(1_000)).on("q", 2, 5),
            Hop::new(Inbox, at(2_250)),
            Hop::new(Ledger, at(3_000)),
            Hop::new(Outbox, at(3_000)),
        ]);
        payments.trace_id = Some("t".into());
        let merged = merge(orders.clone(), Some(payments));
        assert_eq!(names(&merged), [Accepted, Outbox, Topic, Inbox, Ledger, Outbox, Topic, Inbox, Finished]);
        assert_eq!(merged.hops.iter().map(|hop| hop.ms).collect::<Vec<_>>(), [0.0, 0.0, 0.0, 0.75, 0.75, 0.0, 6.0, 0.7, 1.301]);
        assert!(merged.hops.windows(2).all(|pair| pair[0].at <= pair[1].at));
        assert_eq!(merged.trace_id.as_deref(), Some("t"));
        assert_eq!(names(&merge(orders, None)), [Accepted, Outbox, Topic, Inbox, Finished]);
        let under_way = part(vec![Hop::new(Accepted, at(0)), Hop::new(Outbox, at(0))]);
        let decided = part(vec![Hop::new(Topic, at(1)), Hop::new(Inbox, at(2)), Hop::new(Ledger, at(3)), Hop::new(Outbox, at(3))]);
        assert_eq!(names(&merge(under_way, Some(decided))), [Accepted, Outbox, Topic, Inbox, Ledger, Outbox]);
    }

    #[test]
    fn a_part_passes_between_services_with_its_amounts_as_they_were_written() {
        let mut hop = Hop::new(HopName::Ledger, at(1)).on("q", 2, 5);
        hop.balance_before = Some(RawValue::from_string("9007199254740993.07".into()).unwrap());
        let text = serde_json::to_string(&part(vec![hop])).unwrap();
        let read: Part = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        let merged = serde_json::to_string(&merge(read, None)).unwrap();
        assert!(merged.contains(r#""at":"2025-06-15T15:06:40.000001Z","ms":0.0,"topic":"q","#), "{merged}");
        assert!(merged.contains(r#""balanceBefore":9007199254740993.07}"#), "{merged}");
    }
}
