//! What lies on the log, as far back as it keeps it: that our own records say what the databases hold. Reads from the log's start to
//! where its end was when this began.
//!
//! An order commits before its request is published and a decision before its result, so what is asked after a record was read is
//! there; no record of ours can be too early.

use std::collections::HashMap;

use uuid::Uuid;

use crate::contracts::{Envelope, ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES, PaymentRequested, PaymentStatusUpdated};
use crate::db::prefer_indexes;
use crate::messaging::log::{LogError, SharedLog, StoredRecord};
use crate::orders;
use crate::orders::audit::facts as orders_facts;
use crate::payments;
use crate::payments::audit::facts as payments_facts;

use super::compare::{of_request, of_result};
use super::report::Report;
use super::{Audit, AuditError, of_orders, of_payments};

/// Bytes of one fetch.
const FETCH_BYTES_MAX: i32 = 512 * 1024;

/// Every request of ours is an order's, and says what was ordered.
pub async fn requests(audit: &Audit, report: &mut Report) -> Result<(), AuditError> {
    let mut conn = audit.orders.dedicated().await.map_err(of_orders)?;
    prefer_indexes(&mut conn).await.map_err(of_orders)?;
    let mut pages = Pages::new(&audit.log, ORDER_PAYMENT_REQUESTS).await?;
    while let Some(records) = pages.next().await? {
        let requests: Vec<PaymentRequested> = records
            .iter()
            .filter(|record| Envelope::read(&record.headers).source.as_deref() == Some(orders::SOURCE))
            .filter_map(|record| PaymentRequested::decode(record.value.as_deref()?).ok())
            .collect();
        let ids: Vec<Uuid> = requests.iter().map(|request| request.order_id).collect();
        let facts = orders_facts(&mut conn, &ids).await.map_err(of_orders)?;
        let facts: HashMap<Uuid, _> = facts.into_iter().map(|order| (order.id, order)).collect();
        for request in &requests {
            if let Some(finding) = of_request(request, facts.get(&request.order_id)) {
                report.add(request.order_id, finding);
            }
        }
        report.records += records.len() as u64;
    }
    Ok(())
}

/// Every result of ours is the recorded decision, under its one event id.
pub async fn results(audit: &Audit, report: &mut Report) -> Result<(), AuditError> {
    let mut conn = audit.payments.dedicated().await.map_err(of_payments)?;
    prefer_indexes(&mut conn).await.map_err(of_payments)?;
    let mut pages = Pages::new(&audit.log, PAYMENT_STATUS_UPDATES).await?;
    while let Some(records) = pages.next().await? {
        let results: Vec<(PaymentStatusUpdated, Option<String>)> = records
            .iter()
            .map(|record| (record, Envelope::read(&record.headers)))
            .filter(|(_, envelope)| envelope.source.as_deref() == Some(payments::SOURCE))
            .filter_map(|(record, envelope)| {
                Some((PaymentStatusUpdated::decode(record.value.as_deref()?).ok()?, envelope.event_id))
            })
            .collect();
        let ids: Vec<Uuid> = results.iter().map(|(result, _)| result.order_id).collect();
        let facts = payments_facts(&mut conn, &ids).await.map_err(of_payments)?;
        let facts: HashMap<Uuid, _> = facts.into_iter().map(|payment| (payment.order_id, payment)).collect();
        for (result, event_id) in &results {
            if let Some(finding) = of_result(result, event_id.as_deref(), facts.get(&result.order_id)) {
                report.add(result.order_id, finding);
            }
        }
        report.records += records.len() as u64;
    }
    Ok(())
}

/// A topic's records, partition by partition.
struct Pages<'a> {
    log: &'a SharedLog,
    topic: &'static str,
    /// Partition, where to go on, and where it ended.
    left: Vec<(i32, i64, i64)>,
}

impl<'a> Pages<'a> {
    async fn new(log: &'a SharedLog, topic: &'static str) -> Result<Self, AuditError> {
        let mut left = Vec::new();
        // `migrate` makes the topics: one that is not there, or is hidden from this user, cannot be checked.
        for partition in 0..log.partitions(topic).await? {
            let (start, end) = log.bounds(topic, partition).await?;
            left.push((partition, start, end));
        }
        Ok(Self { log, topic, left })
    }

    /// The next records; may be none of them. `None` at the end.
    async fn next(&mut self) -> Result<Option<Vec<StoredRecord>>, AuditError> {
        while let Some((partition, from, end)) = self.left.last_mut() {
            if from >= end {
                self.left.pop();
                continue;
            }
            match self.log.fetch(self.topic, *partition, *from, FETCH_BYTES_MAX).await {
                // Offsets without records up to the end.
                Ok(fetched) if fetched.next_offset <= *from => *from = *end,
                Ok(fetched) => {
                    *from = fetched.next_offset;
                    return Ok(Some(fetched.records));
                }
                // Its oldest records were just dropped, or the topic was made anew.
                Err(LogError::OutOfRange { start, .. }) => *from = if start > *from { start } else { *end },
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }
}
