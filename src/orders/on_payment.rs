//! What a payment's result does to its order. `settle` is the rule, pure; [`OnPayment`] applies it.

use std::collections::HashSet;

use crate::contracts::{Outcome, PaymentStatusUpdated};
use crate::db::{Conn, DbError, Notifier};
use crate::messaging::{Delivery, Fence, Handler, Keys, Poison, Received};
use async_trait::async_trait;

use super::ends::Ends;
use super::order::{FailureReason, OrderStatus};
use super::store::{self, Ending};

/// The first final result of each order; what is not final changes nothing, and what comes later is too late (S5, S7).
pub fn settle(results: &[Received<PaymentStatusUpdated>]) -> Vec<Ending> {
    let mut seen = HashSet::with_capacity(results.len());
    let ending = |result: &Received<PaymentStatusUpdated>| {
        let status = match result.event.outcome {
            Outcome::Pending => return None,
            Outcome::Finished => OrderStatus::Finished,
            Outcome::Cancelled => OrderStatus::Cancelled,
        };
        let reason = result.event.failure_reason.as_deref().filter(|_| status == OrderStatus::Cancelled);
        seen.insert(result.event.order_id).then(|| Ending {
            order_id: result.event.order_id,
            status,
            // A reason of another producer's that we do not know is left out, not stored.
            failure_reason: reason.and_then(FailureReason::parse),
            position: result.delivery.position.clone(),
            envelope: result.delivery.envelope.clone(),
            published_at: result.delivery.published_at,
            received_at: result.delivery.received_at,
        })
    };
    results.iter().filter_map(ending).collect()
}

/// Repeats of orders that have ended, and orders of another producer that orders never had.
fn count(endings: &[Ending], ended: usize) {
    metrics::counter!("shopd_orders_results_without_effect_total").increment((endings.len() - ended) as u64);
}

/// Of so many at most all come back where one is waited for; of more those are read.
const RETURNED_MAX: usize = 64;

/// The handler of `payment-status-updates`.
pub struct OnPayment {
    notifier: Notifier,
    ends: Ends,
}

impl OnPayment {
    /// After every batch, who waits in this process for one of its orders is told by `ends`, and everybody else by `notifier`.
    pub fn new(notifier: Notifier, ends: Ends) -> Self {
        Self { notifier, ends }
    }
}

#[async_trait]
impl Handler for OnPayment {
    type Event = PaymentStatusUpdated;

    fn decode(&self, delivery: &Delivery) -> Result<PaymentStatusUpdated, Poison> {
        let value = delivery.value.as_deref().ok_or_else(|| Poison("the record has no value".into()))?;
        PaymentStatusUpdated::decode(value).map_err(|error| Poison(error.to_string()))
    }

    /// The first final result of an order counts.
    fn keys(&self, event: &PaymentStatusUpdated) -> Keys {
        let order = event.order_id.to_string();
        Keys { ordering: order.clone(), business: order }
    }

    async fn apply(&self, conn: &Conn, batch: &[Received<PaymentStatusUpdated>]) -> Result<(), DbError> {
        let endings = settle(batch);
        if endings.is_empty() {
            return Ok(());
        }
        count(&endings, store::end(conn, &endings).await?);
        Ok(())
    }

    /// Where one of them is waited for, the orders come back as they ended: who waits is not kept waiting for another round trip.
    async fn apply_at_once(
        &self,
        conn: &Conn,
        fence: &Fence<'_>,
        batch: &[Received<PaymentStatusUpdated>],
    ) -> Result<bool, DbError> {
        let endings = settle(batch);
        if endings.is_empty() {
            return Ok(false);
        }
        let returned = endings.len() <= RETURNED_MAX && self.ends.is_awaited(endings.iter().map(|ending| ending.order_id));
        let ended = if returned {
            let (ended, orders) = self.notifier.committing(conn, batch.len(), store::end_and_return(conn, fence, &endings)).await?;
            self.ends.hand_out(orders);
            ended
        } else {
            self.notifier.committing(conn, batch.len(), store::end_at_once(conn, fence, &endings)).await?
        };
        count(&endings, ended);
        Ok(true)
    }

    fn tell(&self, batch: &[Received<PaymentStatusUpdated>]) {
        self.ends.tell(batch.iter().map(|one| one.event.order_id));
        for one in batch.iter().filter(|_| tracing::enabled!(tracing::Level::DEBUG)) {
            let PaymentStatusUpdated { order_id, outcome, .. } = &one.event;
            let (request_id, trace_id) = (one.delivery.envelope.request_id.as_deref(), one.delivery.trace.trace_id());
            tracing::debug!(%order_id, ?outcome, request_id, trace_id, "a payment's result was applied");
        }
    }

    fn committed(&self, records: usize) {
        self.notifier.committed(records);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use uuid::Uuid;

    fn result(order: u128, outcome: Outcome, reason: Option<&str>, offset: i64) -> Received<PaymentStatusUpdated> {
        Received {
            event: PaymentStatusUpdated { order_id: Uuid::from_u128(order), outcome, failure_reason: reason.map(String::from) },
            delivery: Delivery::at(0, offset),
        }
    }

    #[test]
    fn a_result_that_is_not_final_changes_nothing() {
        assert!(settle(&[result(1, Outcome::Pending, None, 0)]).is_empty());
    }

    #[test]
    fn an_unknown_reason_is_left_out_and_a_finished_order_has_none() {
        let endings = settle(&[
            result(1, Outcome::Cancelled, Some("bad weather"), 0),
            result(2, Outcome::Finished, Some("insufficient_funds"), 1),
            result(3, Outcome::Cancelled, Some("insufficient_funds"), 2),
        ]);
        let reasons: Vec<_> = endings.iter().map(|e| e.failure_reason).collect();
        assert_eq!(reasons, [None, None, Some(FailureReason::InsufficientFunds)]);
    }

    proptest! {
        #[test]
        fn the_first_final_result_of_an_order_counts(results in proptest::collection::vec((0u128..5, 0u8..3), 0..30)) {
            let results: Vec<_> = results.iter().enumerate().map(|(at, (order, outcome))| {
                let outcome = [Outcome::Pending, Outcome::Finished, Outcome::Cancelled][usize::from(*outcome)];
                result(*order, outcome, None, at as i64)
            }).collect();
            let endings = settle(&results);
            for order in (0..5).map(Uuid::from_u128) {
                let first = results.iter().find(|r| r.event.order_id == order && r.event.outcome != Outcome::Pending);
                let ending: Vec<_> = endings.iter().filter(|e| e.order_id == order).collect();
                prop_assert_eq!(ending.len(), usize::from(first.is_some()));
                if let (Some(first), Some(ending)) = (first, ending.first()) {
                    prop_assert_eq!(first.delivery.position.offset, ending.position.offset);
                    prop_assert_eq!(first.event.outcome == Outcome::Finished, ending.status == OrderStatus::Finished);
                }
            }
        }
    }
}
