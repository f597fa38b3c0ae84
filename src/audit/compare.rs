//! The rule where the two databases meet: what an order and its decision must agree in. Pure.
//!
//! Rows of other producers are left out: anyone who can write to a topic can end an order that payments never saw, or have one
//! decided that orders never had.

use crate::contracts::{Outcome, PaymentRequested, PaymentStatusUpdated};
use crate::orders;
use crate::orders::audit::OrderFact;
use crate::payments;
use crate::payments::audit::PaymentFact;

/// A check that needs both databases.
#[derive(Debug, PartialEq, Eq)]
pub struct Cross {
    pub name: &'static str,
    pub promise: &'static str,
}

/// Every check that needs both databases.
pub const CROSS: [&Cross; 9] = [
    &FINAL_WITHOUT_DECISION,
    &DECISION_DIFFERS,
    &RESULT_EVENT_DIFFERS,
    &PAYMENT_DIFFERS,
    &PAYMENT_WITHOUT_ORDER,
    &REQUEST_LOST,
    &RESULT_LOST,
    &LOG_REQUEST_DIFFERS,
    &LOG_RESULT_DIFFERS,
];

/// An order ended that payments never decided.
pub const FINAL_WITHOUT_DECISION: Cross = Cross { name: "final_without_decision", promise: "S4" };
/// An order ended otherwise than payments decided, which is final.
pub const DECISION_DIFFERS: Cross = Cross { name: "decision_differs", promise: "S7" };
/// What ended an order was not its decision's own event.
pub const RESULT_EVENT_DIFFERS: Cross = Cross { name: "result_event_differs", promise: "S14" };
/// Payments decided on another amount or user.
pub const PAYMENT_DIFFERS: Cross = Cross { name: "payment_differs", promise: "S4" };
/// Payments decided on an order that was never accepted.
pub const PAYMENT_WITHOUT_ORDER: Cross = Cross { name: "payment_without_order", promise: "S6" };
/// A request is neither in the outbox, nor before its reader, nor a letter, and nothing was decided.
pub const REQUEST_LOST: Cross = Cross { name: "request_lost", promise: "L1" };
/// The same of a result: decided, and the order does not hear of it.
pub const RESULT_LOST: Cross = Cross { name: "result_lost", promise: "L1" };

/// A request of ours on the log is no order's, or says something else.
pub const LOG_REQUEST_DIFFERS: Cross = Cross { name: "log_request_differs", promise: "S6" };
/// A result of ours on the log is not the decision, or bears another event id than the decision's one.
pub const LOG_RESULT_DIFFERS: Cross = Cross { name: "log_result_differs", promise: "S14" };

/// What is wrong, and how.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    pub check: &'static Cross,
    pub detail: String,
}

fn finding(check: &'static Cross, detail: String) -> Finding {
    Finding { check, detail }
}

/// Ended by a record that is not payments'. An order without its event is not excused by that.
pub fn ended_by_another(order: &OrderFact) -> bool {
    order.is_final() && order.has_event && order.source.as_deref() != Some(payments::SOURCE)
}

pub fn requested_by_another(payment: &PaymentFact) -> bool {
    payment.source.as_deref() != Some(orders::SOURCE)
}

/// Nothing to look at again.
pub fn agree(order: Option<&OrderFact>, payment: Option<&PaymentFact>) -> bool {
    order.is_none_or(|order| order.is_final() && of_end(order, payment).is_empty())
        && payment.is_none_or(|payment| of_decision(payment, order).is_empty())
}

/// What is wrong with an order's end. `payment` must not have been read before `order`.
pub fn of_end(order: &OrderFact, payment: Option<&PaymentFact>) -> Vec<Finding> {
    if !order.is_final() || ended_by_another(order) {
        return Vec::new();
    }
    let end = |status: &str, reason: Option<&str>| reason.map_or_else(|| status.to_owned(), |reason| format!("{status} {reason}"));
    let ended = end(&order.status, order.failure_reason.as_deref());
    let Some(payment) = payment else {
        return vec![finding(&FINAL_WITHOUT_DECISION, format!("{ended}, never decided"))];
    };
    let decided = end(&payment.status, payment.failure_reason.as_deref());
    if ended != decided {
        return vec![finding(&DECISION_DIFFERS, format!("ended {ended}, decided {decided}"))];
    }
    let event = order.result_event_id.as_deref();
    if order.has_event && event != Some(payment.result_event_id.to_string().as_str()) {
        let detail = format!("ended by event {}, decided as {}", event.unwrap_or("without id"), payment.result_event_id);
        return vec![finding(&RESULT_EVENT_DIFFERS, detail)];
    }
    Vec::new()
}

/// What is wrong with a decision. `order` must not have been read before `payment`.
pub fn of_decision(payment: &PaymentFact, order: Option<&OrderFact>) -> Vec<Finding> {
    if requested_by_another(payment) {
        return Vec::new();
    }
    let decided = format!("decided {} minor units of {}", payment.amount, payment.user_id);
    let Some(order) = order else { return vec![finding(&PAYMENT_WITHOUT_ORDER, decided)] };
    if payment.amount != order.amount || payment.user_id != order.user_id {
        return vec![finding(&PAYMENT_DIFFERS, format!("{decided}, ordered {} of {}", order.amount, order.user_id))];
    }
    Vec::new()
}

/// What is wrong with a request of ours on the log.
pub fn of_request(request: &PaymentRequested, order: Option<&OrderFact>) -> Option<Finding> {
    let (amount, user) = (request.amount.minor(), request.user_id.as_str());
    let detail = match order {
        Some(order) if order.amount == amount && order.user_id == user => return None,
        Some(order) => format!("asked for {amount} of {user}, ordered {} of {}", order.amount, order.user_id),
        None => format!("asked for {amount} of {user}, never ordered"),
    };
    Some(finding(&LOG_REQUEST_DIFFERS, detail))
}

/// What is wrong with a result of ours on the log.
pub fn of_result(result: &PaymentStatusUpdated, event_id: Option<&str>, payment: Option<&PaymentFact>) -> Option<Finding> {
    let said = match result.outcome {
        Outcome::Finished => "Finished",
        Outcome::Cancelled => "Cancelled",
        Outcome::Pending => "nothing final",
    };
    let event = event_id.unwrap_or("without id");
    let detail = match payment {
        None => format!("said {said}, never decided"),
        Some(payment) if payment.status != said || payment.failure_reason != result.failure_reason => {
            format!("said {said}, decided {}", payment.status)
        }
        Some(payment) if event != payment.result_event_id.to_string() => {
            format!("event {event}, decided as {}", payment.result_event_id)
        }
        Some(_) => return None,
    };
    Some(finding(&LOG_RESULT_DIFFERS, detail))
}

#[cfg(test)]
pub mod tests {
    use uuid::Uuid;

    use super::*;

    pub fn order(status: &str) -> OrderFact {
        OrderFact {
            id: Uuid::from_u128(1),
            user_id: "u".into(),
            amount: 5,
            status: status.into(),
            failure_reason: None,
            has_event: true,
            source: (status != "New").then(|| payments::SOURCE.into()),
            result_event_id: (status != "New").then(|| Uuid::from_u128(2).to_string()),
            xid: None,
            asked_again: false,
        }
    }

    pub fn payment() -> PaymentFact {
        PaymentFact {
            order_id: Uuid::from_u128(1),
            user_id: "u".into(),
            amount: 5,
            status: "Finished".into(),
            failure_reason: None,
            source: Some(orders::SOURCE.into()),
            result_event_id: Uuid::from_u128(2),
            xid: None,
        }
    }

    fn names(order: Option<&OrderFact>, payment: Option<&PaymentFact>) -> Vec<&'static str> {
        let ends = order.map(|order| of_end(order, payment)).unwrap_or_default();
        let decisions = payment.map(|payment| of_decision(payment, order)).unwrap_or_default();
        ends.into_iter().chain(decisions).map(|finding| finding.check.name).collect()
    }

    #[test]
    fn each_disagreement_has_its_name() {
        let (ended, decided) = (order("Finished"), payment());
        assert!(agree(Some(&ended), Some(&decided)));
        assert_eq!(names(Some(&ended), None), ["final_without_decision"]);
        assert_eq!(names(Some(&order("Cancelled")), Some(&decided)), ["decision_differs"]);
        assert_eq!(names(None, Some(&decided)), ["payment_without_order"]);
        assert_eq!(names(Some(&ended), Some(&PaymentFact { amount: 6, ..payment() })), ["payment_differs"]);
        assert_eq!(names(Some(&ended), Some(&PaymentFact { user_id: "v".into(), ..payment() })), ["payment_differs"]);
        let other_event = OrderFact { result_event_id: None, ..order("Finished") };
        assert_eq!(names(Some(&other_event), Some(&decided)), ["result_event_differs"]);
    }

    #[test]
    fn an_order_that_has_not_ended_is_looked_at_again_and_breaks_no_rule() {
        assert!(!agree(Some(&order("New")), Some(&payment())) && !agree(Some(&order("New")), None));
        assert!(names(Some(&order("New")), Some(&payment())).is_empty());
    }

    #[test]
    fn what_other_producers_wrote_is_no_offence() {
        let ended = OrderFact { source: None, result_event_id: None, ..order("Cancelled") };
        assert!(agree(Some(&ended), None) && agree(Some(&ended), Some(&payment())));
        let asked = PaymentFact { source: Some("/else".into()), amount: 9, ..payment() };
        assert!(agree(None, Some(&asked)) && agree(Some(&order("Finished")), Some(&asked)));
        // An end without its event is not one of another producer's.
        assert_eq!(
            names(Some(&OrderFact { has_event: false, source: None, ..order("Finished") }), None),
            ["final_without_decision"]
        );
    }
}
