//! What is put into a shop's databases and log by hand: every check finds what it is for, and nothing that is only on its way.

use super::*;

use shopd::messaging::log::partitioner::partition_of;
use uuid::Uuid;

use crate::support::history::order;

/// A user whose requests go to this one of two partitions.
fn user_of(partition: i32) -> String {
    (0..).map(|n| format!("x{n}")).find(|user| partition_of(user.as_bytes(), 2) == partition).expect("one of many")
}

fn order_row(id: &str, user: &str) -> String {
    format!(
        "insert into orders (id, user_id, amount, created_at, updated_at, traceparent) values ('{id}', '{user}', 5, t(1), t(1), '');
         insert into order_event (order_id, status, at, traceparent) values ('{id}', 'New', t(1), '');"
    )
}

fn outbox_row(topic: &str, key: &str, payload: &str) -> String {
    format!(
        "insert into outbox (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
         values (gen_random_uuid(), '{topic}', '{key}', convert_to('{payload}', 'UTF8'), '', '', '', '', t(1));"
    )
}

fn request(id: &str, user: &str) -> String {
    format!(r#"{{"OrderId":"{id}","UserId":"{user}","Amount":0.05,"Description":null,"Timestamp":"2026-01-01T00:00:00Z"}}"#)
}

/// Takes an order's end away.
fn wait_again(k: usize) -> String {
    format!(
        "update orders set status = 'New', failure_reason = null, updated_at = created_at where id = o({k});
         delete from order_event where order_id = o({k}) and status <> 'New';"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_check_finds_what_was_broken_by_hand_and_nothing_else() {
    let shop = History::new(200).await;
    let output = audit(&["--json"], &shop.env()).await;
    let (offenders, summary) = said(&output);
    assert_eq!((offenders, output.status.code()), (BTreeSet::new(), Some(0)), "{summary} {output:?}");
    let checks: BTreeSet<String> = summary["checks"].as_object().expect("checks").keys().cloned().collect();

    let lost = Uuid::from_u128(77).to_string();
    let (o, u) = (order, |n: usize| format!("u{n}"));
    // Check, offender, what breaks it in orders, what in payments.
    let breaks: Vec<(&str, String, String, String)> = vec![
        ("event_missing", o(1), "delete from order_event where order_id = o(1) and status = 'New'".into(), String::new()),
        ("event_missing", o(22), "update orders set accepted_xid = null, accepted_id = null where id = o(22)".into(), String::new()),
        ("event_missing", o(26), "update orders set accepted_id = null where id = o(26)".into(), String::new()),
        ("event_differs", o(24), "insert into order_event (order_id, status, at) values (o(24), 'New', t(24))".into(), String::new()),
        ("event_differs", o(2), "insert into order_event (order_id, status, at) values (o(2), 'Cancelled', t(2))".into(), String::new()),
        ("event_without_order", o(900), "insert into order_event (order_id, status, at) values (o(900), 'New', t(2))".into(), String::new()),
        (
            "order_odd",
            o(4),
            "update orders set updated_at = t(0) where id = o(4); update order_event set at = t(0) where order_id = o(4) and status <> 'New'"
                .into(),
            String::new(),
        ),
        ("final_without_decision", o(10), String::new(), "delete from payment where order_id = o(10)".into()),
        (
            "decision_differs",
            o(20),
            "update orders set failure_reason = 'account_not_found' where id = o(20);
             update order_event set failure_reason = 'account_not_found' where order_id = o(20) and status <> 'New'"
                .into(),
            String::new(),
        ),
        ("result_event_differs", o(5), "update order_event set event_id = 'x' where order_id = o(5) and status <> 'New'".into(), String::new()),
        ("payment_differs", o(6), "update orders set amount = 6 where id = o(6)".into(), String::new()),
        ("payment_without_order", o(7), "delete from orders where id = o(7); delete from order_event where order_id = o(7)".into(), String::new()),
        ("request_lost", lost.clone(), order_row(&lost, &user_of(0)), String::new()),
        ("result_lost", o(8), wait_again(8), String::new()),
        ("balance_not_ledger", u(1), String::new(), "update account set balance = balance + 1 where user_id = 'u1'".into()),
        (
            "balance_negative",
            u(2),
            String::new(),
            "alter table account drop constraint account_balance_check;
             alter table transfer drop constraint transfer_amount_check, drop constraint transfer_balance_after_check;
             delete from transfer where account_id = 3 and order_id is null;
             update transfer set balance_after = balance_after - 1000000000 where account_id = 3;
             update account set balance = balance - 1000000000 where id = 3"
                .into(),
        ),
        (
            "debited_twice",
            o(193),
            String::new(),
            "drop index transfer_by_order;
             insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
             select id, id, -1, 5, o(193), balance - 5, now() from account where user_id = 'u3';
             update account set balance = balance - 5 where user_id = 'u3'"
                .into(),
        ),
        (
            "debit_without_payment",
            o(901),
            String::new(),
            "insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
             select id, id, -1, 5, o(901), balance - 5, now() from account where user_id = 'u4';
             update account set balance = balance - 5 where user_id = 'u4'"
                .into(),
        ),
        (
            "payment_without_debit",
            o(30),
            "update orders set status = 'Finished', failure_reason = null where id = o(30);
             update order_event set status = 'Finished', failure_reason = null where order_id = o(30) and status <> 'New'"
                .into(),
            "update payment set status = 'Finished', failure_reason = null where order_id = o(30)".into(),
        ),
        (
            "debit_differs",
            o(15),
            "update orders set amount = 6 where id = o(15)".into(),
            "update payment set amount = 6 where order_id = o(15)".into(),
        ),
        (
            "ledger_chain",
            u(6),
            String::new(),
            "update transfer set balance_after = balance_after + 1 where account_id = 7 and id = (select max(id) from transfer where account_id = 7)"
                .into(),
        ),
        (
            "ledger_time",
            u(7),
            String::new(),
            "update transfer set created_at = t(0) where account_id = 8 and id = (select max(id) from transfer where account_id = 8)".into(),
        ),
        ("ledger_order", o(198), String::new(), "update payment set log_offset = 1, published_at = t(0) where order_id = o(198)".into()),
        (
            "account_twice",
            u(9),
            String::new(),
            "alter table account drop constraint account_user_id_key; insert into account (user_id) values ('u9')".into(),
        ),
    ];
    let broken: BTreeSet<String> = breaks.iter().map(|(check, ..)| (*check).to_owned()).collect();
    let mut without = checks;
    without.retain(|check| !check.starts_with("log_"));
    assert_eq!(broken, without, "each check has its negative control; those of the log come last");

    let mut expected = BTreeSet::new();
    for (check, id, in_orders, in_payments) in breaks {
        shop.in_orders(&in_orders).await;
        shop.in_payments(&in_payments).await;
        expected.insert((check.to_owned(), id));
        let output = audit(&["--json"], &shop.env()).await;
        let (found, summary) = said(&output);
        assert_eq!(found, expected, "after {check}: {summary}");
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(summary["ok"], false);
    }
    let (orders, payments) = ("/shopd/orders", "/shopd/payments");
    let result = |k: usize| format!(r#"{{"OrderId":"{}","Status":"Finished","FailureReason":null}}"#, o(k));
    for (check, id, topic, event_id, source, value) in [
        ("", "", "order-payment-requests", "x", "/else", request(&o(16), "u6")),
        ("log_request_differs", &*o(17), "order-payment-requests", "x", orders, request(&o(17), "u6")),
        ("log_request_differs", &*o(902), "order-payment-requests", "x", orders, request(&o(902), "u6")),
        ("", "", "payment-status-updates", "00000000-0000-7001-8000-000000000010", payments, result(16)),
        ("log_result_differs", &*o(17), "payment-status-updates", "y", payments, result(17)),
        ("log_result_differs", &*o(40), "payment-status-updates", "00000000-0000-7001-8000-000000000028", payments, result(40)),
        ("log_result_differs", &*o(902), "payment-status-updates", "z", payments, result(902)),
    ] {
        shop.last_record(topic, event_id, source, &value).await;
        if !check.is_empty() {
            expected.insert((check.to_owned(), id.to_owned()));
        }
        let (found, summary) = said(&audit(&["--json"], &shop.env()).await);
        assert_eq!(found, expected, "after {check} {id}: {summary}");
    }
    let people = audit(&[], &shop.env()).await;
    assert_eq!(people.status.code(), Some(1));
    let text = String::from_utf8_lossy(&people.stdout);
    for (check, id) in expected {
        assert!(text.lines().any(|line| line.contains(&check) && line.contains(&id)), "{check} {id}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_in_flight_is_counted_by_where_it_is_and_is_no_offence() {
    const REQUESTS: &str = "order-payment-requests";
    let shop = History::new(100).await;
    let (unsent, unread, parked) =
        (Uuid::from_u128(71).to_string(), Uuid::from_u128(72).to_string(), Uuid::from_u128(73).to_string());
    let (read, behind) = (user_of(0), user_of(1));
    // The relay has not come to the one, and the reader of partition 1 not to the other.
    shop.in_orders(&(order_row(&unsent, &read) + &outbox_row(REQUESTS, &read, &request(&unsent, &read)))).await;
    shop.in_orders(&order_row(&unread, &behind)).await;
    shop.in_orders(
        "with moved as (
             update shopd_log.partition p set next_offset = p.next_offset + 1 from shopd_log.topic t
              where t.id = p.topic_id and t.name = 'order-payment-requests' and p.partition = 1
          returning p.topic_id, p.next_offset - 1 as at)
         insert into shopd_log.record (topic_id, partition, \"offset\", headers, timestamp) select topic_id, 1, at, '', now() from moved",
    )
    .await;
    shop.in_orders(&order_row(&parked, &read)).await;
    shop.in_payments(&format!(
        "insert into dead_letter (topic, partition, log_offset, key, value, headers, reason, attempts)
         values ('{REQUESTS}', 0, 99, '{read}', convert_to('{}', 'UTF8'), '{{}}', 'it failed', 3)",
        request(&parked, &read)
    ))
    .await;
    shop.in_orders(&wait_again(11)).await;
    shop.in_payments(&outbox_row("payment-status-updates", &order(11), "{}")).await;
    // Another producer had an order decided that orders never had, and ended one that payments never saw.
    shop.in_payments("update payment set source = null where order_id = o(12)").await;
    shop.in_orders("delete from orders where id = o(12); delete from order_event where order_id = o(12)").await;
    shop.in_orders("update order_event set source = null, event_id = null where order_id = o(20) and status <> 'New'").await;
    shop.in_payments("delete from payment where order_id = o(20)").await;

    let output = audit(&["--json"], &shop.env()).await;
    let (offenders, summary) = said(&output);
    assert_eq!((offenders, output.status.code()), (BTreeSet::new(), Some(0)), "{summary}");
    let expected = serde_json::json!({"requestUnsent": 1, "requestUnread": 1, "resultUnsent": 1, "resultUnread": 0, "parked": 1, "askedAgain": 0});
    assert_eq!(summary["inFlight"], expected);
    assert_eq!(summary["otherProducers"], serde_json::json!({"orders": 1, "payments": 1}));

    // Once the relay has moved past the row and the reader past the end, without a decision, both wait for the sweeper, which has one
    // in hand and has still to come by the other.
    shop.in_orders(&format!("insert into order_retry (order_id, next_ask_at) values ('{unsent}', now() + interval '1 year')"))
        .await;
    shop.in_orders(&format!(
        "update orders set created_at = t(50), updated_at = t(50) where id = '{unread}';
         update order_event set at = t(50) where order_id = '{unread}';
         update sweep_cursor set swept_to = t(20)"
    ))
    .await;
    shop.in_orders("update outbox_cursor set snapshot = pg_current_snapshot()::text").await;
    shop.in_payments("update consumer_offset set next_offset = next_offset + 1 where partition = 1").await;
    let (offenders, summary) = said(&audit(&["--json"], &shop.env()).await);
    assert_eq!((offenders, summary["inFlight"]["askedAgain"].as_u64()), (BTreeSet::new(), Some(2)), "{summary}");
    // When nothing will ask any more, they are lost.
    shop.in_orders("delete from order_retry; update sweep_cursor set swept_to = now()").await;
    let (offenders, _) = said(&audit(&["--json"], &shop.env()).await);
    assert_eq!(offenders, [unsent, unread].map(|id| ("request_lost".to_owned(), id)).into());
}
