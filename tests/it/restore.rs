//! Backup and restore, done: `pg_dump` of both databases under load at two moments, `pg_restore` into a cluster with another system
//! identifier, with the log kept or lost; and one database brought back to a point in time. `make restore-test` prints what it was.
//!
//! docs/OPERATIONS.md, "Backup and restore", says the same to who has to do it.

mod past;
mod point_in_time;

use std::collections::BTreeSet;
use std::time::Duration;

use shopd::db::Db;

use crate::audit::{audit, brief, said};
use crate::support::books::{connect, count, facts};
use crate::support::cluster::Cluster;
use crate::support::inside::until;
use crate::support::kafka;
use crate::support::shop::Four;
use past::{First, Held, POOR, Past, USERS};

/// Nobody asks again for what has no result.
const NO_SWEEP: (&str, &str) = ("SHOPD__ORDERS__SWEEP_AFTER_MS", "3600000");
const SWEEP_SOON: (&str, &str) = ("SHOPD__ORDERS__SWEEP_AFTER_MS", "1500");
/// Long enough for what is to happen without anybody's help.
const A_WHILE: Duration = Duration::from_secs(3);

/// A shop on what was restored.
struct Restored {
    shop: Four,
    orders: Db,
    payments: Db,
    /// As they came out of the dump.
    known: BTreeSet<String>,
    waited: BTreeSet<String>,
    ended: BTreeSet<String>,
    decided: BTreeSet<String>,
    /// Whose requests lie in the restored outbox, sent or not: they are sent.
    outboxed: BTreeSet<String>,
    _cluster: Cluster,
}

/// What an audit may name, as (check, order).
type Named = BTreeSet<(String, String)>;

fn named<'a>(check: &str, orders: impl IntoIterator<Item = &'a String>) -> Named {
    orders.into_iter().map(|order| (check.to_owned(), order.clone())).collect()
}

impl Restored {
    /// Both dumps into one new cluster; then the roles are started, with topics under `prefix`.
    async fn new(past: &Past, prefix: &str, more: &[(&str, &str)]) -> Self {
        let cluster = Cluster::new(&[]).await;
        assert_ne!(cluster.system_identifier().await, past.system_identifier, "another cluster");
        Self::within(cluster, past, prefix, more, "").await
    }

    /// `before` is done to the orders database before anything of the shop sees it.
    async fn within(cluster: Cluster, past: &Past, prefix: &str, more: &[(&str, &str)], before: &str) -> Self {
        let orders_url = cluster.restore("orders", &past.orders_dump).await;
        let payments_url = cluster.restore("payments", &past.payments_dump).await;
        if !before.is_empty() {
            cluster.ask("orders", before).await;
        }
        let (orders, payments) = (connect(&orders_url), connect(&payments_url));
        let known = set(&orders, "select id::text as fact from orders").await;
        let waited = set(&orders, "select id::text as fact from orders where status = 'New'").await;
        let ended = known.difference(&waited).cloned().collect();
        let decided = set(&payments, "select order_id::text as fact from payment").await;
        let requests = "select distinct convert_from(payload, 'UTF8')::jsonb->>'OrderId' as fact from outbox_message where topic = 'order-payment-requests'";
        let outboxed = set(&orders, requests).await;
        let shop = Four::start_with(&past.bootstrap, &orders_url, &payments_url, prefix, more).await;
        Self { shop, orders, payments, known, waited, ended, decided, outboxed, _cluster: cluster }
    }

    async fn until_all_end(&self) {
        until("every restored order ends", async || self.waiting().await == 0).await;
    }

    async fn waiting(&self) -> i64 {
        count(&self.orders, "select count(*) as n from orders where status = 'New'").await
    }

    /// Waits until payments has read whatever of `requests` is on the log.
    async fn until_decided(&self, requests: usize) {
        until("payments has read the log", async || {
            count(&self.payments, "select count(*) as n from payment").await == requests as i64
        })
        .await;
    }

    /// The audit says exactly this.
    async fn audited(&self, expected: &Named) {
        let output = audit(&["--json"], &self.shop.env).await;
        let (offenders, summary) = said(&output);
        assert_eq!(&offenders, expected, "{summary}");
        assert_eq!(output.status.code(), Some(i32::from(!expected.is_empty())));
        println!("  audit: {}", brief(&summary));
    }

    /// No order's end is another than clients were told before, and no account was charged otherwise.
    async fn ends_as_before(&self, past: &Past) {
        let ends = set(&self.orders, past::ENDS).await;
        assert!(ends.is_subset(&past.ends), "{:?}", ends.difference(&past.ends).collect::<Vec<_>>());
        assert_eq!(set(&self.payments, past::BALANCES).await, past.balances);
    }
}

async fn set(db: &Db, statement: &'static str) -> BTreeSet<String> {
    facts(db, statement).await.into_iter().collect()
}

/// Orders dumped at T1, payments after it; everything that was on its way at T1 is decided in between, and what was accepted after T1 too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_payments_dumped_after_orders_and_kafka_kept_every_order_ends_and_each_lost_one_is_named() {
    let past = Past::new(First::Orders, Held::BetweenTheDumps).await;
    let restored = Restored::new(&past, &past.prefix, &[NO_SWEEP]).await;
    assert!(restored.waited.len() >= 20, "{} orders waited in the dump", restored.waited.len());
    restored.until_all_end().await;
    // Payments reads on where its dump was: whatever was sent since is decided, also what orders has lost.
    restored.until_decided(past.accepted.len()).await;
    let all = past.ids();
    let lost: BTreeSet<String> = all.difference(&restored.known).cloned().collect();
    assert!(!lost.is_empty() && restored.known.is_subset(&all), "nothing is invented");
    println!(
        "payments after orders, Kafka kept: {} orders accepted, {} in the dump ({} of them waited, all final now), {} accepted after it",
        all.len(),
        restored.known.len(),
        restored.waited.len(),
        lost.len()
    );
    let of_lost: Named = named("payment_without_order", &lost).union(&named("log_request_differs", &lost)).cloned().collect();
    restored.audited(&of_lost).await;
    restored.ends_as_before(&past).await;

    // Whoever knows them brings them back: the same order again is answered with the decision that there is.
    for order in past.accepted.iter().filter(|order| lost.contains(&order.id.to_string())) {
        restored.shop.client.post("/api/OrdersProxy", &order.body()).await.expect(201);
    }
    restored.until_all_end().await;
    restored.audited(&Named::new()).await;
    restored.ends_as_before(&past).await;
    assert_eq!(set(&restored.orders, past::ENDS).await, past.ends, "all are back as they were");
}

/// Results that were sent after payments' dump are on the log before payments, restored, decides the same again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_after_both_dumps_is_decided_again_as_the_log_already_says() {
    let past = Past::new(First::Orders, Held::UntilBothAreDumped).await;
    let restored = Restored::new(&past, &past.prefix, &[NO_SWEEP]).await;
    let again = restored.waited.difference(&restored.decided).count();
    assert!(again >= 20, "{again} orders of the dump were decided only after both dumps");
    restored.until_all_end().await;
    restored.until_decided(past.accepted.len()).await;
    let lost: BTreeSet<String> = past.ids().difference(&restored.known).cloned().collect();
    println!("{again} orders decided after both dumps are decided again from the log, {} were accepted after the dump", lost.len());
    restored.audited(&named("payment_without_order", &lost).union(&named("log_request_differs", &lost)).cloned().collect()).await;
    restored.ends_as_before(&past).await;
}

/// Payments' dump is older: what orders knows as ended payments decides again from the log, alike; where it had money that was paid in after
/// its dump it cannot, and the audit names each of those.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_payments_dumped_before_orders_and_kafka_kept_the_log_is_decided_again_and_only_lost_deposits_differ() {
    let past = Past::new(First::Payments, Held::BetweenTheDumps).await;
    let restored = Restored::new(&past, &past.prefix, &[NO_SWEEP]).await;
    let decided_later = restored.ended.difference(&restored.decided).count();
    assert!(decided_later >= 20, "{decided_later} orders had ended whose decision is in no dump");
    restored.until_all_end().await;
    restored.until_decided(past.accepted.len()).await;
    let all = past.ids();
    let lost: BTreeSet<String> = all.difference(&restored.known).cloned().collect();
    let late: BTreeSet<String> = past.of_user(past::LATE);
    let late_known: BTreeSet<String> = late.intersection(&restored.known).cloned().collect();
    assert!(!late_known.is_empty(), "orders were paid of an account that only the lost deposits knew");
    println!(
        "payments before orders, Kafka kept: {decided_later} ended orders decided again; {} of an account opened after the dump differ; {} orders lost",
        late_known.len(),
        lost.len()
    );
    let mut expected = named("payment_without_order", &lost);
    expected.extend(named("log_request_differs", &lost));
    expected.extend(named("decision_differs", &late_known));
    expected.extend(named("log_result_differs", &late));
    restored.audited(&expected).await;
    let ends = set(&restored.orders, past::ENDS).await;
    assert!(ends.is_subset(&past.ends), "what had ended stays as it ended");
    let of_others = set(&restored.payments, past::BALANCES).await;
    assert_eq!(
        of_others,
        past.balances.iter().filter(|line| !line.starts_with(past::LATE)).cloned().collect(),
        "charged once each"
    );
}

/// The same with an empty Kafka: nothing is left to decide from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_payments_dumped_before_orders_and_kafka_lost_each_order_without_its_decision_is_named() {
    let past = Past::new(First::Payments, Held::BetweenTheDumps).await;
    let restored = Restored::new(&past, &kafka::prefix(), &[SWEEP_SOON]).await;
    // What its segment of the outbox still held is sent again, and so decided.
    let lost: BTreeSet<String> = restored
        .ended
        .iter()
        .filter(|order| !restored.decided.contains(*order) && !restored.outboxed.contains(*order))
        .cloned()
        .collect();
    assert!(lost.len() >= 20, "{} orders had ended whose decision is in no dump", lost.len());
    let debits = "select coalesce(sum(amount), 0)::bigint as n from transfer where order_id is not null";
    let before = count(&restored.payments, debits).await;
    restored.until_all_end().await;
    until("nothing is asked for any more", async || count(&restored.orders, "select count(*) as n from order_retry").await == 0)
        .await;
    let asked: BTreeSet<&String> =
        restored.waited.union(&restored.outboxed).filter(|order| !restored.decided.contains(*order)).collect();
    restored.until_decided(restored.decided.len() + asked.len()).await;
    println!(
        "payments before orders, Kafka lost: {} decisions lost, {} orders waited and ended",
        lost.len(),
        restored.waited.len()
    );
    restored.audited(&named("final_without_decision", &lost)).await;
    // Nothing is made up for them: what was charged since is what waited, or was in the outbox.
    let charged = count(&restored.payments, debits).await - before;
    assert!(charged <= asked.len() as i64 * 100, "{charged} minor units for {} orders of 1.00", asked.len());
    let decided = set(&restored.payments, "select order_id::text as fact from payment").await;
    assert_eq!(decided, restored.decided.iter().chain(asked).cloned().collect());
}

/// Payments' dump is younger, Kafka is empty: what waited is asked for again, and what payments alone knows is named.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_payments_dumped_after_orders_and_kafka_lost_the_sweeper_heals_and_decisions_on_lost_orders_are_named() {
    let past = Past::new(First::Orders, Held::BetweenTheDumps).await;
    let restored = Restored::new(&past, &kafka::prefix(), &[SWEEP_SOON]).await;
    let lost: BTreeSet<String> = restored.decided.difference(&restored.known).cloned().collect();
    assert!(!lost.is_empty());
    restored.until_all_end().await;
    println!(
        "payments after orders, Kafka lost: {} waited and ended, {} decisions on orders that the dump does not have",
        restored.waited.len(),
        lost.len()
    );
    restored.audited(&named("payment_without_order", &lost)).await;
    let ends = set(&restored.orders, past::ENDS).await;
    let of_poor = |ends: &BTreeSet<String>| ends.iter().filter(|end| end.contains(POOR)).cloned().collect::<BTreeSet<_>>();
    assert!(of_poor(&ends).is_subset(&of_poor(&past.ends)));
    assert!(ends.is_subset(&past.ends), "what is decided is decided");
}

/// With an empty Kafka and no sweeper only the restored outbox can bring what waited in it to its end. Its transactions' ids are another
/// cluster's: the control takes away that the relay knows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_publishes_what_waited_in_a_restored_outbox_because_it_knows_another_cluster() {
    let past = Past::new(First::Orders, Held::UntilBothAreDumped).await;
    let blind = Cluster::new(&[]).await;
    let forged = format!("update outbox_cursor set system_identifier = '{}'", blind.system_identifier().await);
    let control = Restored::within(blind, &past, &kafka::prefix(), &[NO_SWEEP], &forged).await;
    tokio::time::sleep(A_WHILE).await;
    assert!(control.waiting().await >= 20, "ids of another cluster are not read as this one's");
    drop(control);

    let restored = Restored::new(&past, &kafka::prefix(), &[NO_SWEEP]).await;
    restored.until_all_end().await;
    assert!(restored.shop.relay.log().contains("came from another cluster"), "{}", restored.shop.relay.log());
    println!("{} orders ended by the restored outboxes alone", restored.waited.len());
    restored.audited(&Named::new()).await;
    // And the shop goes on.
    for user in USERS {
        let id = crate::scenario::place(&restored.shop.client, user, "0.5").await;
        restored.shop.client.ended(&id).await;
    }
}
