//! The sweeper on a real database: who is asked for again, when, and how often.

use std::collections::HashSet;
use std::time::Duration;

use diesel::sql_types::{Binary, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use shopd::contracts::PaymentRequested;
use shopd::db::sql;
use shopd::messaging::outbox::Reader;
use shopd::orders::{Sweep, Sweeper, Swept};
use uuid::Uuid;

use crate::audit::{audit, said};
use crate::support::books::count;
use crate::support::inside::{Inside, until};
use crate::support::shop::PATIENCE;

const AFTER: Duration = Duration::from_millis(200);
const LEASE: Duration = Duration::from_secs(3);

#[derive(diesel::QueryableByName, Debug, PartialEq)]
struct Row {
    #[diesel(sql_type = SqlUuid)]
    event_id: Uuid,
    #[diesel(sql_type = Text)]
    key: String,
    #[diesel(sql_type = Binary)]
    payload: Vec<u8>,
    #[diesel(sql_type = Text)]
    event_type: String,
    #[diesel(sql_type = Text)]
    source: String,
    #[diesel(sql_type = Text)]
    traceparent: String,
}

async fn outbox(shop: &Inside) -> Vec<Row> {
    let mut conn = shop.orders.get().await.unwrap();
    let rows = sql("select event_id, key, payload, event_type, source, traceparent from outbox_message order by xid, id, n");
    rows.load(&mut *conn).await.unwrap()
}

async fn run(shop: &Inside, statements: &str) {
    let mut conn = shop.orders.dedicated().await.unwrap();
    conn.batch_execute(statements).await.unwrap_or_else(|error| panic!("{error}: {statements}"));
}

/// What a relay does with a log that takes everything; the rows stay where they are.
async fn send(shop: &Inside) -> usize {
    let mut reader =
        Reader::acquire(&shop.orders, "relay", LEASE, true, &std::sync::Arc::default()).await.unwrap().expect("the outbox is free");
    let mut sent = 0;
    while let Some(page) = reader.page(10_000).await.unwrap() {
        sent += page.rows.len();
        reader.published(page).unwrap();
    }
    reader.save().await.unwrap();
    reader.release().await.unwrap();
    sent
}

/// Makes every order and every wait so much older.
async fn let_pass(shop: &Inside, seconds: u32) {
    run(
        shop,
        &format!(
            "update orders set created_at = created_at - interval '{seconds} s', updated_at = updated_at - interval '{seconds} s';
             update order_event set at = at - interval '{seconds} s';
             update order_retry set next_ask_at = next_ask_at - interval '{seconds} s';
             update sweep_cursor set swept_to = greatest(swept_to - interval '{seconds} s', 'epoch'),
                                     next_walk_at = '-infinity', next_sweep_at = '-infinity';"
        ),
    )
    .await;
}

/// One sweep, whether it is time or not.
async fn sweep(shop: &Inside, sweeper: &Sweeper) -> Swept {
    run(shop, "update sweep_cursor set next_walk_at = '-infinity', next_sweep_at = '-infinity'").await;
    sweeper.sweep().await.unwrap()
}

async fn end_all(shop: &Inside) {
    run(shop, "update orders set status = 'Finished', updated_at = clock_timestamp() where status = 'New'").await;
}

async fn in_retry(shop: &Inside) -> i64 {
    count(&shop.orders, "select count(*) as n from order_retry").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_without_a_result_is_asked_for_again_as_it_was_under_a_new_event_id() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(Duration::from_secs(30), 1_000);
    let id = shop.place("ann", 1).await[0];
    send(&shop).await;
    assert_eq!(sweep(&shop, &sweeper).await.found, 0, "it is given its time");
    let_pass(&shop, 60).await;
    let swept = sweep(&shop, &sweeper).await;
    assert_eq!((swept.found, swept.asked, swept.waiting), (1, 1, 1), "{swept:?}");
    let rows = outbox(&shop).await;
    let [first, again] = &rows[..] else { panic!("{rows:?}") };
    assert_ne!(first.event_id, again.event_id);
    assert_eq!((&first.key, &first.event_type, &first.source), (&again.key, &again.event_type, &again.source));
    assert_eq!(first.traceparent, again.traceparent, "it stays one trace");
    let (before, after) = (PaymentRequested::decode(&first.payload).unwrap(), PaymentRequested::decode(&again.payload).unwrap());
    assert_eq!(
        (before.order_id, &before.user_id, before.amount, &before.description),
        (id, &after.user_id, after.amount, &after.description)
    );
    #[derive(diesel::QueryableByName)]
    struct At {
        #[diesel(sql_type = Timestamptz)]
        created_at: chrono::DateTime<chrono::Utc>,
    }
    let mut conn = shop.orders.get().await.unwrap();
    let order: At = sql("select created_at from orders").get_result(&mut *conn).await.unwrap();
    assert_eq!(after.timestamp, order.created_at);
}

/// Red where one request that cannot be said fails all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_of_anothers_hand_that_cannot_be_asked_for_holds_up_no_other() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(Duration::from_secs(30), 1_000);
    let odd = shop.place("ann", 1).await[0];
    let well = shop.place("bob", 1).await[0];
    send(&shop).await;
    run(&shop, &format!("update orders set amount = 9000000000000000000 where id = '{odd}'")).await;
    let_pass(&shop, 60).await;
    let swept = sweep(&shop, &sweeper).await;
    assert_eq!((swept.found, swept.asked), (2, 1), "{swept:?}");
    let asked = outbox(&shop).await.pop().unwrap();
    assert_eq!(PaymentRequested::decode(&asked.payload).unwrap().order_id, well);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_is_not_asked_for_while_its_first_request_is_unsent_nor_while_its_repeat_is() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    shop.place("ann", 3).await;
    let_pass(&shop, 3_600).await;
    for _ in 0..3 {
        let swept = sweep(&shop, &sweeper).await;
        assert_eq!((swept.found, swept.asked, in_retry(&shop).await), (0, 0, 0), "an outage fills nothing: {swept:?}");
    }
    assert_eq!(send(&shop).await, 3);
    assert_eq!(sweep(&shop, &sweeper).await.asked, 3);
    for _ in 0..3 {
        let_pass(&shop, 3_600).await;
        assert_eq!(sweep(&shop, &sweeper).await.asked, 0, "the repeat has not left yet");
    }
    assert_eq!(send(&shop).await, 3);
    let_pass(&shop, 3_600).await;
    assert_eq!(sweep(&shop, &sweeper).await.asked, 3);
    assert_eq!(outbox(&shop).await.iter().map(|row| row.event_id).collect::<HashSet<_>>().len(), 9);
}

/// The negative control of the test above: where unsent counts as sent, a backlog is asked for at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_look_at_the_relays_cursor_an_unsent_backlog_is_asked_for() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    shop.place("ann", 3).await;
    let_pass(&shop, 3_600).await;
    run(&shop, "update outbox_cursor set snapshot = pg_current_snapshot()::text").await;
    assert_eq!(sweep(&shop, &sweeper).await.asked, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeats_come_further_and_further_apart_and_stop_when_the_order_ends() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(Duration::from_secs(20), 1_000);
    shop.place("ann", 1).await;
    let_pass(&shop, 30).await;
    let mut asked_at = Vec::new();
    for second in (0..1_000).step_by(10) {
        send(&shop).await;
        if sweep(&shop, &sweeper).await.asked > 0 {
            asked_at.push(second);
        }
        let_pass(&shop, 10).await;
    }
    let gaps: Vec<i32> = asked_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.windows(2).all(|pair| pair[0] < pair[1]) && gaps.len() >= 4, "{asked_at:?}");
    assert!((20..=40).contains(&gaps[0]), "{asked_at:?}");
    end_all(&shop).await;
    let swept = sweep(&shop, &sweeper).await;
    assert_eq!((swept.asked, swept.ended, swept.waiting, in_retry(&shop).await), (0, 1, 0, 0), "long before it is due");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cap_holds_for_all_replicas_together_and_the_oldest_come_first() {
    let shop = Inside::on_postgres().await;
    let ids = shop.place("ann", 300).await;
    send(&shop).await;
    let_pass(&shop, 60).await;
    // Twenty a second in sweeps of 100 ms: two each.
    const TWO_EACH: Duration = Duration::from_millis(100);
    let replicas = [shop.sweeper(AFTER, 20), shop.sweeper(AFTER, 20), shop.sweeper(AFTER, 20)];
    let began = std::time::Instant::now();
    let mut asked = 0;
    while began.elapsed() < Duration::from_secs(2) || asked < 4 {
        assert!(began.elapsed() < PATIENCE, "{asked} asked for");
        let swept = futures::future::join_all(replicas.iter().map(Sweep::sweep)).await;
        asked += swept.into_iter().map(|swept| swept.unwrap().asked).sum::<u64>();
        tokio::task::yield_now().await;
    }
    let elapsed = began.elapsed();
    assert!(asked <= 2 * (elapsed.as_millis() / TWO_EACH.as_millis() + 2) as u64, "{asked} in {elapsed:?}");
    let repeats: Vec<Uuid> =
        outbox(&shop).await[300..].iter().map(|row| PaymentRequested::decode(&row.payload).unwrap().order_id).collect();
    assert_eq!(repeats.len() as u64, asked);
    // Found by one walk they are due at one time, and then by id, which grows with the time: nobody twice, nobody passed over.
    assert_eq!(repeats, ids[..repeats.len()], "the oldest, in their order");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_sweeps_holds_up_no_other() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    shop.place("ann", 1).await;
    send(&shop).await;
    let_pass(&shop, 60).await;
    let mut other = shop.orders.dedicated().await.unwrap();
    let begin = "begin; set local idle_in_transaction_session_timeout = 0; select from sweep_cursor for update";
    other.batch_execute(begin).await.unwrap();
    // One that waited for the other would fail by its `lock_timeout`.
    let swept = tokio::time::timeout(Duration::from_secs(20), sweeper.sweep()).await.expect("at once").unwrap();
    assert_eq!(swept.asked, 0);
    other.batch_execute("rollback").await.unwrap();
    assert_eq!(sweeper.sweep().await.unwrap().asked, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_is_committed_late_is_found_and_one_beyond_the_bound_is_the_audits() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    let late = |id: u128, seconds: u32| {
        format!(
            "insert into orders (id, user_id, amount, created_at, updated_at, traceparent)
             select '{}', 'ann', 100, at, at, '' from (select clock_timestamp() - interval '{seconds} s' as at) t;
             insert into order_event (order_id, status, at, traceparent)
             select id, 'New', created_at, '' from orders where id = '{0}';",
            Uuid::from_u128(id)
        )
    };
    shop.place("ann", 1).await;
    send(&shop).await;
    let_pass(&shop, 1).await;
    assert_eq!(sweep(&shop, &sweeper).await.asked, 1, "the walk has come to here");
    end_all(&shop).await; // its own repeat would be due in a moment
    run(&shop, &late(1, 19)).await;
    run(&shop, &late(2, 60)).await;
    send(&shop).await;
    assert_eq!(sweep(&shop, &sweeper).await.asked, 1);
    assert_eq!(
        count(&shop.orders, "select count(*) as n from order_retry where order_id = '00000000-0000-0000-0000-000000000001'").await,
        1
    );
    let (offenders, summary) = said(&audit(&["--json"], &shop.env()).await);
    let lost: Vec<&str> = offenders.iter().filter(|(check, _)| check == "request_lost").map(|(_, id)| id.as_str()).collect();
    assert_eq!(lost, ["00000000-0000-0000-0000-000000000002"], "{summary}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_dump_and_restore_orders_of_the_other_cluster_count_as_sent() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    shop.place("ann", 2).await;
    let_pass(&shop, 60).await;
    run(&shop, "update orders set accepted_xid = '9000000000000000000'").await;
    assert_eq!(sweep(&shop, &sweeper).await.asked, 2);
}

/// A shop's past costs a sweep nothing after the first time, and a sweep that is not due next to nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_past_is_walked_once_in_bounded_steps() {
    let shop = Inside::on_postgres().await;
    let sweeper = shop.sweeper(AFTER, 1_000);
    // Its statements are planned, for good, while there is nothing yet.
    for _ in 0..8 {
        sweep(&shop, &sweeper).await;
    }
    let orders = std::env::var("SHOPD_TEST_SWEEP_ORDERS").ok().and_then(|n| n.parse().ok()).unwrap_or(250_000);
    run(
        &shop,
        &format!(
            "set statement_timeout = 0;
             insert into orders (id, user_id, amount, status, created_at, updated_at, traceparent)
             select gen_random_uuid(), 'u' || k % 1000, 5, case when k % 10000 = 0 then 'New' else 'Finished' end, at, at, ''
               from (select k, clock_timestamp() - interval '1 day' + k * interval '50 ms' as at from generate_series(1, {orders}) k) k;
             insert into order_event (order_id, status, at, traceparent) select id, 'New', created_at, '' from orders;
             update sweep_cursor set swept_to = 'epoch';"
        ),
    )
    .await;
    send(&shop).await;
    let (mut looked, mut sweeps, mut found, mut longest) = (0, 0, 0, Duration::ZERO);
    let mut first = None;
    while looked < orders {
        let began = std::time::Instant::now();
        let swept = sweep(&shop, &sweeper).await;
        longest = longest.max(began.elapsed());
        assert!(swept.looked > 0 && swept.looked <= 100_000, "{swept:?}");
        first.get_or_insert(swept);
        (looked, sweeps, found) = (looked + swept.looked, sweeps + 1, found + swept.found);
    }
    assert_eq!((looked, found), (orders, orders / 10_000));
    assert!(longest < Duration::from_secs(20), "{longest:?}");
    let again = sweep(&shop, &sweeper).await;
    assert_eq!(again.looked, 0, "{again:?}");
    let began = std::time::Instant::now();
    for _ in 0..100 {
        assert_eq!(sweeper.sweep().await.unwrap().looked, 0);
    }
    println!("{orders} orders in {sweeps} sweeps, the longest {longest:?}; a look before its time {:?}", began.elapsed() / 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweepers_loop_heals_and_ends_when_it_is_told() {
    let shop = Inside::on_postgres().await;
    shop.place("ann", 5).await;
    send(&shop).await;
    let part = shop.sweep(AFTER);
    until("all are asked for", async || count(&shop.orders, "select count(*) as n from order_retry where asks > 0").await == 5)
        .await;
    end_all(&shop).await;
    until("all are forgotten", async || in_retry(&shop).await == 0).await;
    tokio::time::timeout(Duration::from_secs(20), part.stop()).await.expect("it ends at once");
}
