//! The rule for an order that was looked at again, three times: in orders, then in payments, then in orders. Pure.

use crate::orders::audit::OrderFact;
use crate::payments::audit::PaymentFact;

use super::compare::{Cross, Finding, REQUEST_LOST, RESULT_LOST, of_decision, of_end};

/// How far a record has come, as of the look at its reader's database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// In the outbox, beyond the relay's cursor.
    Unsent,
    /// On the log, where its reader has not come to.
    Unread,
    /// Its reader put it aside as a letter.
    Parked,
    /// Its reader has passed everything that was on the log.
    Passed,
    /// The same, and the sweeper asks again.
    AskedAgain,
}

/// What is known of one order.
#[derive(Debug)]
pub struct Sight<'a> {
    pub order_first: Option<&'a OrderFact>,
    pub payment: Option<&'a PaymentFact>,
    pub order_last: Option<&'a OrderFact>,
    /// Of an order that was not final at the first look.
    pub request: Progress,
    /// Of a decision.
    pub result: Progress,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Judgement {
    Agrees,
    Offends(Vec<Finding>),
    RequestInFlight(Progress),
    ResultInFlight(Progress),
}

/// Facts that are final break a rule or do not, whenever they were read: the order that is compared with a decision was read after
/// it, and the decision that is compared with an order's end after that end. What has not ended is on its way, or lost.
pub fn judge(sight: &Sight<'_>) -> Judgement {
    let mut findings = sight.order_first.map(|order| of_end(order, sight.payment)).unwrap_or_default();
    findings.extend(sight.payment.map(|payment| of_decision(payment, sight.order_last)).unwrap_or_default());
    if !findings.is_empty() {
        return Judgement::Offends(findings);
    }
    // Of one snapshot with the order's state: an order leaves the sweeper's hands only by its end.
    let asked_again = sight.order_last.is_some_and(|order| order.asked_again);
    let lost = |check: &'static Cross, detail: String| Judgement::Offends(vec![Finding { check, detail }]);
    match (sight.order_first, sight.payment, sight.order_last) {
        (_, _, Some(last)) if last.is_final() => Judgement::Agrees,
        (Some(_), None, _) => match sight.request {
            Progress::Passed if asked_again => Judgement::RequestInFlight(Progress::AskedAgain),
            Progress::Passed => lost(&REQUEST_LOST, "its request was sent, and its reader passed it without a decision".into()),
            on_its_way => Judgement::RequestInFlight(on_its_way),
        },
        (_, Some(payment), Some(_)) => match sight.result {
            Progress::Passed if asked_again => Judgement::ResultInFlight(Progress::AskedAgain),
            Progress::Passed => lost(&RESULT_LOST, format!("decided {}, and the order does not hear of it", payment.status)),
            on_its_way => Judgement::ResultInFlight(on_its_way),
        },
        // Another producer's decision on an order that orders never had, or nothing at all.
        (None, _, None) | (None, None, Some(_)) | (Some(_), Some(_), None) => Judgement::Agrees,
    }
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::{order, payment};
    use super::*;

    fn judged(first: Option<&OrderFact>, paid: Option<&PaymentFact>, last: Option<&OrderFact>, how: Progress) -> Judgement {
        judge(&Sight { order_first: first, payment: paid, order_last: last, request: how, result: how })
    }

    fn offence(judgement: Judgement) -> &'static str {
        match judgement {
            Judgement::Offends(findings) => findings[0].check.name,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_on_its_way_is_no_offence_and_what_its_reader_passed_is_lost() {
        let (new, paid) = (order("New"), payment());
        for how in [Progress::Unsent, Progress::Unread, Progress::Parked] {
            assert_eq!(judged(Some(&new), None, Some(&new), how), Judgement::RequestInFlight(how));
            assert_eq!(judged(Some(&new), Some(&paid), Some(&new), how), Judgement::ResultInFlight(how));
        }
        assert_eq!(offence(judged(Some(&new), None, Some(&new), Progress::Passed)), "request_lost");
        assert_eq!(offence(judged(Some(&new), Some(&paid), Some(&new), Progress::Passed)), "result_lost");
    }

    #[test]
    fn what_is_lost_and_will_be_asked_for_again_is_in_flight() {
        let (new, asked, paid) = (order("New"), OrderFact { asked_again: true, ..order("New") }, payment());
        let again = Progress::AskedAgain;
        assert_eq!(judged(Some(&new), None, Some(&asked), Progress::Passed), Judgement::RequestInFlight(again));
        assert_eq!(judged(Some(&new), Some(&paid), Some(&asked), Progress::Passed), Judgement::ResultInFlight(again));
        // Only the last look counts: by then it may have left the sweeper's hands.
        assert_eq!(offence(judged(Some(&asked), None, Some(&new), Progress::Passed)), "request_lost");
        assert_eq!(
            offence(judged(Some(&new), Some(&PaymentFact { amount: 6, ..payment() }), Some(&asked), Progress::Passed)),
            "payment_differs"
        );
    }

    #[test]
    fn an_order_that_ended_between_two_looks_agrees() {
        let (new, ended, paid) = (order("New"), order("Finished"), payment());
        assert_eq!(judged(Some(&new), None, Some(&ended), Progress::Passed), Judgement::Agrees);
        assert_eq!(judged(Some(&new), Some(&paid), Some(&ended), Progress::Passed), Judgement::Agrees);
        assert_eq!(judged(None, Some(&paid), Some(&new), Progress::Unread), Judgement::ResultInFlight(Progress::Unread));
    }

    #[test]
    fn final_facts_that_disagree_are_an_offence_whatever_is_on_its_way() {
        let (ended, new) = (order("Finished"), order("New"));
        assert_eq!(offence(judged(Some(&ended), None, Some(&ended), Progress::Unread)), "final_without_decision");
        assert_eq!(offence(judged(None, Some(&payment()), None, Progress::Unread)), "payment_without_order");
        let other = PaymentFact { amount: 6, ..payment() };
        assert_eq!(offence(judged(Some(&new), Some(&other), Some(&new), Progress::Unsent)), "payment_differs");
    }
}
