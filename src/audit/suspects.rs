//! Orders whose two sides do not agree: looked at again, set by set, in short snapshots of their own.
//!
//! A round looks at orders, at the log's ends, at payments, at the log's ends, at orders. A request that was sent before the log's
//! end was read lies below that end; a reader that has passed that end has had it, so what it left no trace of is lost, however
//! young or old it is. Readers are given a little time to come there; what they have not passed then is on its way.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures::future::try_join_all;
use uuid::Uuid;

use crate::contracts::{ORDER_PAYMENT_REQUESTS, PAYMENT_STATUS_UPDATES, PaymentRequested, PaymentStatusUpdated};
use crate::db::types::Xid;
use crate::db::{Conn, DbError, begin_snapshot, end_snapshot, prefer_indexes};
use crate::messaging::log::SharedLog;
use crate::messaging::log::partitioner::partition_of;
use crate::messaging::{letters, next_offsets, outbox};
use crate::orders::audit::{self as orders, OrderFact};
use crate::payments::audit::{self as payments, PaymentFact};

use super::compare::{Finding, REQUEST_LOST, RESULT_LOST};
use super::judge::{Judgement, Progress, Sight, judge};
use super::report::Report;
use super::{Audit, AuditError, of_orders, of_payments};

/// Orders looked at together.
const SUSPECTS_MAX: usize = 1_000;
/// How often one is looked at again while its record is before its reader.
const ROUND_INTERVAL: Duration = Duration::from_millis(100);
/// Rounds that wait, in one audit. Only precision depends on it: what is on its way then is reported as that.
const WAITS_MAX: u32 = 50;

/// A partition and an offset in it.
type Mark = (i32, i64);

/// An order on its second and further looks.
#[derive(Debug)]
struct Suspect {
    id: Uuid,
    /// Its request lies below this.
    request: Option<Mark>,
    /// Its result lies below this.
    result: Option<Mark>,
}

pub struct Suspects<'a> {
    log: &'a SharedLog,
    orders: Conn,
    payments: Conn,
    waiting: Vec<Suspect>,
    waits_left: u32,
}

/// A look at orders.
struct OrdersSeen {
    facts: HashMap<Uuid, OrderFact>,
    /// How far results are read.
    read: HashMap<i32, i64>,
    /// Whose results are letters.
    parked: HashSet<Uuid>,
    unsent: HashSet<Uuid>,
}

/// A look at payments.
struct PaymentsSeen {
    facts: HashMap<Uuid, PaymentFact>,
    /// How far requests are read.
    read: HashMap<i32, i64>,
    /// Whose requests are letters.
    parked: HashSet<Uuid>,
    unsent: HashSet<Uuid>,
}

impl<'a> Suspects<'a> {
    pub async fn new(audit: &'a Audit) -> Result<Self, AuditError> {
        let mut orders = audit.orders.dedicated().await.map_err(of_orders)?;
        prefer_indexes(&mut orders).await.map_err(of_orders)?;
        let mut payments = audit.payments.dedicated().await.map_err(of_payments)?;
        prefer_indexes(&mut payments).await.map_err(of_payments)?;
        Ok(Self { log: &audit.log, orders, payments, waiting: Vec::new(), waits_left: WAITS_MAX })
    }

    pub fn add(&mut self, id: Option<Uuid>) {
        self.waiting.extend(id.map(|id| Suspect { id, request: None, result: None }));
    }

    /// Enough to be looked at.
    pub fn are_many(&self) -> bool {
        self.waiting.len() >= SUSPECTS_MAX
    }

    /// Looks at all that wait until each is judged, and writes down what it is.
    pub async fn settle(&mut self, report: &mut Report) -> Result<(), AuditError> {
        while !self.waiting.is_empty() {
            let rest = self.waiting.split_off(self.waiting.len().min(SUSPECTS_MAX));
            let mut round = std::mem::replace(&mut self.waiting, rest);
            loop {
                let may_wait = self.waits_left > 0;
                round = self.look(round, may_wait, report).await?;
                if round.is_empty() {
                    break;
                }
                self.waits_left -= 1;
                tokio::time::sleep(ROUND_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// One round; returns those whose record is still before its reader, if they `may_wait`.
    async fn look(&mut self, mut round: Vec<Suspect>, may_wait: bool, report: &mut Report) -> Result<Vec<Suspect>, AuditError> {
        let ids: Vec<Uuid> = round.iter().map(|suspect| suspect.id).collect();
        let first = look_at_orders(&mut self.orders, &ids).await.map_err(of_orders)?;
        let waits_for_request = |suspect: &Suspect| {
            first.facts.get(&suspect.id).is_some_and(|order| !order.is_final() && !first.unsent.contains(&suspect.id))
        };
        if round.iter().any(|suspect| suspect.request.is_none() && waits_for_request(suspect)) {
            let ends = ends(self.log, ORDER_PAYMENT_REQUESTS).await?;
            for suspect in round.iter_mut().filter(|suspect| waits_for_request(suspect)) {
                let user = first.facts.get(&suspect.id).map_or("", |order| order.user_id.as_str());
                suspect.request.get_or_insert_with(|| mark(&ends, user));
            }
        }

        let users: Vec<&str> = first.facts.values().map(|order| order.user_id.as_str()).collect();
        let paid = look_at_payments(&mut self.payments, &ids, &users).await.map_err(of_payments)?;
        let waits_for_result = |suspect: &Suspect| {
            let ended = first.facts.get(&suspect.id).is_some_and(OrderFact::is_final);
            paid.facts.contains_key(&suspect.id) && !paid.unsent.contains(&suspect.id) && !ended
        };
        if round.iter().any(|suspect| suspect.result.is_none() && waits_for_result(suspect)) {
            let ends = ends(self.log, PAYMENT_STATUS_UPDATES).await?;
            for suspect in round.iter_mut().filter(|suspect| waits_for_result(suspect)) {
                let key = suspect.id.to_string();
                suspect.result.get_or_insert_with(|| mark(&ends, &key));
            }
        }

        let last = look_at_orders(&mut self.orders, &ids).await.map_err(of_orders)?;
        let mut again = Vec::new();
        for suspect in round {
            let id = suspect.id;
            let sight = Sight {
                order_first: first.facts.get(&id),
                payment: paid.facts.get(&id),
                order_last: last.facts.get(&id),
                request: progress(first.unsent.contains(&id), suspect.request, &paid.read, paid.parked.contains(&id)),
                result: progress(paid.unsent.contains(&id), suspect.result, &last.read, last.parked.contains(&id)),
            };
            match judge(&sight) {
                Judgement::Agrees => {}
                Judgement::RequestInFlight(Progress::Unread) | Judgement::ResultInFlight(Progress::Unread) if may_wait => {
                    again.push(suspect);
                }
                Judgement::RequestInFlight(progress) => report.request_in_flight(progress),
                Judgement::ResultInFlight(progress) => report.result_in_flight(progress),
                Judgement::Offends(findings) => {
                    let user = last.facts.get(&id).map_or("", |order| order.user_id.as_str());
                    for finding in findings {
                        self.accuse(&suspect, user, finding, (&paid.read, &last.read), report).await?;
                    }
                }
            }
        }
        Ok(again)
    }

    /// Writes an offence down; one that says something is lost only after the last that could have it was asked.
    async fn accuse(
        &mut self,
        suspect: &Suspect,
        user: &str,
        finding: Finding,
        (requests_read, results_read): (&HashMap<i32, i64>, &HashMap<i32, i64>),
        report: &mut Report,
    ) -> Result<(), AuditError> {
        let id = suspect.id;
        if *finding.check == REQUEST_LOST {
            let rows = outbox::unsent_by_anyone(&mut self.orders, ORDER_PAYMENT_REQUESTS, &[user]).await.map_err(of_orders)?;
            if requested(rows.iter().map(|row| row.payload.as_slice())).contains(&id) {
                report.request_in_flight(Progress::Unsent);
                return Ok(());
            }
            if self.is_beyond_the_end(ORDER_PAYMENT_REQUESTS, suspect.request, requests_read).await? {
                report.request_in_flight(Progress::Unread);
                return Ok(());
            }
        }
        if *finding.check == RESULT_LOST {
            let key = id.to_string();
            let rows = outbox::unsent_by_anyone(&mut self.payments, PAYMENT_STATUS_UPDATES, &[&key]).await.map_err(of_payments)?;
            if !rows.is_empty() {
                report.result_in_flight(Progress::Unsent);
                return Ok(());
            }
            if self.is_beyond_the_end(PAYMENT_STATUS_UPDATES, suspect.result, results_read).await? {
                report.result_in_flight(Progress::Unread);
                return Ok(());
            }
        }
        report.add(id, finding);
        Ok(())
    }

    /// The topic was made anew and its reader has not found that out: it has passed nothing of what is there.
    async fn is_beyond_the_end(&self, topic: &str, mark: Option<Mark>, read: &HashMap<i32, i64>) -> Result<bool, AuditError> {
        let Some((partition, _)) = mark else { return Ok(false) };
        let (_, end) = self.log.bounds(topic, partition).await?;
        Ok(read.get(&partition).is_some_and(|read| *read > end))
    }
}

/// `mark`, below which the record lies, is known where it was sent.
fn progress(unsent: bool, mark: Option<Mark>, read: &HashMap<i32, i64>, parked: bool) -> Progress {
    match mark {
        // Parked first: who put it aside has passed it.
        _ if parked => Progress::Parked,
        None if unsent => Progress::Unsent,
        Some((partition, end)) if read.get(&partition).copied().unwrap_or(0) >= end => Progress::Passed,
        _ => Progress::Unread,
    }
}

/// The end of every partition, by number.
async fn ends(log: &SharedLog, topic: &str) -> Result<Vec<i64>, AuditError> {
    let partitions = log.partitions(topic).await?;
    try_join_all((0..partitions).map(|partition| async move { Ok(log.bounds(topic, partition).await?.1) })).await
}

fn mark(ends: &[i64], key: &str) -> Mark {
    let partition = partition_of(key.as_bytes(), i32::try_from(ends.len()).unwrap_or(i32::MAX));
    (partition, usize::try_from(partition).ok().and_then(|at| ends.get(at)).copied().unwrap_or(0))
}

async fn look_at_orders(conn: &mut Conn, ids: &[Uuid]) -> Result<OrdersSeen, DbError> {
    begin_snapshot(conn).await?;
    let facts = orders::facts(conn, ids).await?;
    let waiting: Vec<&OrderFact> = facts.iter().filter(|order| !order.is_final()).collect();
    let xids: Vec<Xid> = waiting.iter().filter_map(|order| order.xid).collect();
    let users: Vec<&str> = waiting.iter().map(|order| order.user_id.as_str()).collect();
    let unsent = outbox::unsent(conn, ORDER_PAYMENT_REQUESTS, &xids, &users).await?;
    let read = next_offsets(conn, PAYMENT_STATUS_UPDATES).await?;
    let keys: Vec<String> = waiting.iter().map(|order| order.id.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let parked = letters(conn, PAYMENT_STATUS_UPDATES, &keys).await?;
    end_snapshot(conn).await?;
    let parked = parked.iter().filter_map(|value| PaymentStatusUpdated::decode(value).ok()).map(|result| result.order_id).collect();
    let unsent = requested(unsent.iter().map(|row| row.payload.as_slice()));
    Ok(OrdersSeen { facts: facts.into_iter().map(|order| (order.id, order)).collect(), read, parked, unsent })
}

async fn look_at_payments(conn: &mut Conn, ids: &[Uuid], users: &[&str]) -> Result<PaymentsSeen, DbError> {
    begin_snapshot(conn).await?;
    let facts = payments::facts(conn, ids).await?;
    let xids: Vec<Xid> = facts.iter().filter_map(|payment| payment.xid).collect();
    let keys: Vec<String> = facts.iter().map(|payment| payment.order_id.to_string()).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let unsent = outbox::unsent(conn, PAYMENT_STATUS_UPDATES, &xids, &keys).await?;
    let read = next_offsets(conn, ORDER_PAYMENT_REQUESTS).await?;
    let parked = letters(conn, ORDER_PAYMENT_REQUESTS, users).await?;
    end_snapshot(conn).await?;
    let unsent = unsent.iter().filter_map(|row| Uuid::parse_str(&row.key).ok()).collect();
    let parked = requested(parked.iter().map(Vec::as_slice));
    Ok(PaymentsSeen { facts: facts.into_iter().map(|payment| (payment.order_id, payment)).collect(), read, parked, unsent })
}

/// Whose payment these values ask for.
fn requested<'v>(values: impl Iterator<Item = &'v [u8]>) -> HashSet<Uuid> {
    values.filter_map(|value| PaymentRequested::decode(value).ok()).map(|request| request.order_id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_passed_where_its_reader_has_come_to_the_end_that_it_lies_below() {
        let read = HashMap::from([(3, 10)]);
        assert_eq!(progress(false, Some((3, 10)), &read, false), Progress::Passed);
        assert_eq!(progress(false, Some((3, 11)), &read, false), Progress::Unread);
        assert_eq!(progress(false, Some((4, 1)), &read, false), Progress::Unread);
        assert_eq!(progress(true, None, &read, false), Progress::Unsent);
        assert_eq!(progress(false, Some((3, 10)), &read, true), Progress::Parked);
        // Sent only after the log's end was read, or decided after the first look.
        assert_eq!(progress(false, None, &read, false), Progress::Unread);
    }
}
