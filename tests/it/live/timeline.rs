//! An order's way as both services tell it.

use shopd::http::timeline::{HopName, merge};
use shopd::orders::Orders;
use shopd::payments::Payments;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_timeline_tells_every_hop_of_a_paid_and_of_a_cancelled_order() {
    let inside = Inside::on_kafka().await;
    inside.account("alice", 150).await;
    let ids = inside.place("alice", 2).await;
    let orders = Orders::new(inside.orders.clone(), shopd::db::Notifier::local([]));
    let payments = Payments::new(inside.payments.clone());
    let fresh = merge(orders.timeline(ids[0]).await.unwrap().unwrap(), None);
    assert_eq!(fresh.hops.iter().map(|hop| hop.name).collect::<Vec<_>>(), [HopName::Accepted, HopName::Outbox]);
    assert!(payments.timeline(ids[0]).await.unwrap().is_none());
    let parts = [inside.relay("orders"), inside.relay("payments"), inside.payments(), inside.orders()];
    until("both end", async || inside.waiting().await == 0).await;
    for (id, last, balances) in [(ids[0], "finished", Some((1.5, 0.5))), (ids[1], "cancelled", None)] {
        let of_orders = orders.timeline(id).await.unwrap().unwrap();
        assert!(of_orders.trace_id.is_some());
        let merged = merge(of_orders, payments.timeline(id).await.unwrap());
        let json: Value = serde_json::to_value(&merged).unwrap();
        let hops = json["hops"].as_array().unwrap();
        let names: Vec<_> = hops.iter().map(|hop| hop["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["accepted", "outbox", "topic", "inbox", "ledger", "outbox", "topic", "inbox", last]);
        let times: Vec<_> = hops.iter().map(|hop| hop["at"].as_str().unwrap()).collect();
        assert!(times.is_sorted(), "{times:?}");
        assert!(hops.iter().all(|hop| hop["ms"].as_f64().unwrap() >= 0.0));
        for (at, topic) in [(2, "order-payment-requests"), (6, "payment-status-updates")] {
            assert_eq!(hops[at]["topic"], topic);
            assert!(hops[at]["partition"].is_i64() && hops[at]["offset"].is_i64());
        }
        let ledger = (hops[4]["balanceBefore"].as_f64(), hops[4]["balanceAfter"].as_f64());
        assert_eq!(ledger, balances.map_or((None, None), |(before, after)| (Some(before), Some(after))));
    }
    for part in parts {
        part.stop().await;
    }
}
