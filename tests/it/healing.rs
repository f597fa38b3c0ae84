//! What the log loses heals without hands, on real Kafka and on the log in Postgres: every order ends, and nobody pays twice.

use std::collections::BTreeSet;
use std::time::Duration;

use diesel::sql_types::Text;
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use rskafka::client::ClientBuilder;
use shopd::contracts::TOPICS;
use shopd::db::{Db, sql};
use shopd::embedded;
use shopd::messaging::log::{KafkaLog, Log};

use crate::audit::{audit, said};
use crate::scenario::place;
use crate::support::books::{connect, count};
use crate::support::inside::{Inside, PARTITIONS, REQUESTS, RESULTS, done, until};
use crate::support::shop::{All, Client, Four, Process};
use crate::support::{kafka, postgres};

/// Long enough for what is not lost to end without being asked for.
const AFTER: Duration = Duration::from_millis(1_500);

#[derive(diesel::QueryableByName)]
struct Fact {
    #[diesel(sql_type = Text)]
    fact: String,
}

async fn facts(db: &Db, statement: &'static str) -> BTreeSet<String> {
    let mut conn = db.get().await.expect("a connection");
    let facts: Vec<Fact> = sql(statement).load(&mut *conn).await.expect(statement);
    facts.into_iter().map(|fact| fact.fact).collect()
}

/// Nothing offends; how many are to be asked for again.
async fn audited(shop: &Inside) -> u64 {
    let (offenders, summary) = said(&audit(&["--json"], &shop.env()).await);
    assert_eq!(offenders, BTreeSet::new(), "{summary}");
    summary["inFlight"]["askedAgain"].as_u64().expect("a number")
}

/// Each decision has one result event, whoever asked how often (S14).
async fn assert_one_result_each(shop: &Inside) {
    let ends = "select order_id || ' ' || event_id as fact from order_event where status <> 'New'";
    let decisions = "select order_id || ' ' || result_event_id as fact from payment";
    assert_eq!(facts(&shop.orders, ends).await, facts(&shop.payments, decisions).await);
}

/// What Kafka does on `kafka-topics --delete`, and somebody by hand in Postgres.
async fn delete_topic(shop: &Inside, topic: &str) {
    let kafka = &shop.config.kafka;
    if kafka.bootstrap_servers.is_empty() {
        let mut conn = shop.orders.dedicated().await.unwrap();
        let statement = format!(
            "delete from shopd_log.record using shopd_log.topic t where t.id = topic_id and t.name = '{topic}';
             delete from shopd_log.partition using shopd_log.topic t where t.id = topic_id and t.name = '{topic}';
             delete from shopd_log.topic where name = '{topic}';"
        );
        conn.batch_execute(&statement).await.expect("deleted");
        return;
    }
    let client = ClientBuilder::new(kafka.bootstrap_servers.clone()).build().await.expect("a client");
    let controller = client.controller_client().expect("a controller");
    controller.delete_topic(format!("{}{topic}", kafka.topic_prefix), 5_000).await.expect("deleted");
}

/// The topic, which held some records, empty. A broker that has not heard of the deletion yet still shows the old one for a moment.
async fn make_anew(shop: &Inside, topic: &str) {
    delete_topic(shop, topic).await;
    until("the topic is made anew", async || {
        let mut bounds = Vec::new();
        if shop.log.create_topics(&TOPICS, PARTITIONS).await.is_ok() {
            for partition in 0..PARTITIONS {
                bounds.push(shop.log.bounds(topic, partition).await);
            }
        }
        bounds == vec![Ok((0, 0)); PARTITIONS as usize]
    })
    .await;
}

async fn requests_lost_by_retention(shop: Inside) {
    shop.account("ann", 1_000_000).await;
    let (_relays, _orders, payments) = ((shop.relay("orders"), shop.relay("payments")), shop.orders(), shop.payments());
    shop.place("ann", 20).await;
    until("they end", async || shop.waiting().await == 0).await;
    payments.stop().await;
    shop.place("ann", 30).await;
    shop.until_on_the_log(REQUESTS, 50).await;
    shop.drop_records(REQUESTS).await;
    shop.place("ann", 10).await;
    shop.until_on_the_log(REQUESTS, 60).await;
    // The negative control: without the sweeper, what was dropped never ends.
    let _payments = shop.payments();
    until("the others end", async || shop.waiting().await <= 30).await;
    tokio::time::sleep(AFTER).await;
    assert_eq!(shop.waiting().await, 30);
    assert_eq!(audited(&shop).await, 30, "the sweeper has still to come by");
    let sweeper = shop.sweep(AFTER);
    let took = shop.until_healed().await;
    println!("healed {took:?} after the sweeper began");
    assert_eq!(count(&shop.payments, "select balance as n from account").await, 1_000_000 - 60 * 100);
    assert!(shop.ends(REQUESTS).await.iter().sum::<i64>() >= 90, "what was lost was asked for again");
    assert_one_result_each(&shop).await;
    sweeper.stop().await;
    assert_eq!(audited(&shop).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_kafka_dropped_before_they_were_read_are_asked_for_again() {
    requests_lost_by_retention(Inside::on_kafka().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_the_log_in_postgres_dropped_before_they_were_read_are_asked_for_again() {
    requests_lost_by_retention(Inside::on_postgres().await).await;
}

async fn results_lost(shop: Inside, whole_topic: bool) {
    shop.account("ann", 1_000_000).await;
    shop.account("bob", 50).await;
    let (_relays, _payments) = ((shop.relay("orders"), shop.relay("payments")), shop.payments());
    shop.place("ann", 20).await;
    shop.place("bob", 3).await;
    shop.until_on_the_log(RESULTS, 23).await;
    if whole_topic {
        make_anew(&shop, RESULTS).await;
    } else {
        shop.drop_records(RESULTS).await;
    }
    // What was decided stays decided, whatever is asked later (S7).
    let bob = shopd::payments::Payments::new(shop.payments.clone());
    let user = shopd::user_id::UserId::new("bob").unwrap();
    done(bob.deposit(user, shopd::money::Amount::from_minor(100_000).unwrap(), None).await).unwrap();
    let _orders = shop.orders();
    let _sweeper = shop.sweep(AFTER);
    shop.until_healed().await;
    assert_eq!(count(&shop.orders, "select count(*) as n from orders where status = 'Cancelled' and user_id = 'bob'").await, 3);
    assert_eq!(count(&shop.payments, "select count(*) as n from transfer where order_id is not null").await, 20);
    assert_one_result_each(&shop).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_that_kafka_dropped_before_they_were_read_are_repeated_as_they_were() {
    results_lost(Inside::on_kafka().await, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_that_the_log_in_postgres_dropped_before_they_were_read_are_repeated_as_they_were() {
    results_lost(Inside::on_postgres().await, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_on_a_topic_that_was_deleted_and_made_anew_are_repeated_as_they_were() {
    results_lost(Inside::on_kafka().await, true).await;
}

/// All keys are one user's, so one partition: with more records on the new topic than were read of the old one nobody can see that it
/// is another, and the consumer goes on in its middle.
async fn requests_on_a_topic_made_anew(shop: Inside, then: usize, running: bool) {
    shop.account("ann", 1_000_000).await;
    let (_relays, _orders, mut payments) = ((shop.relay("orders"), shop.relay("payments")), shop.orders(), Some(shop.payments()));
    shop.place("ann", 20).await;
    until("they end", async || shop.waiting().await == 0).await;
    if !running {
        payments.take().unwrap().stop().await;
        shop.place("ann", 10).await;
        shop.until_on_the_log(REQUESTS, 30).await;
    }
    make_anew(&shop, REQUESTS).await;
    shop.place("ann", then).await;
    shop.until_on_the_log(REQUESTS, then as i64).await;
    payments.get_or_insert_with(|| shop.payments());
    let _sweeper = shop.sweep(AFTER);
    shop.until_healed().await;
    let paid = 20 + then as i64 + if running { 0 } else { 10 };
    assert_eq!(count(&shop.payments, "select balance as n from account").await, 1_000_000 - paid * 100);
    if !running {
        // What lay on the old topic unread, and what lies on the new one before the old offset.
        let skipped = if then > 20 { 20 } else { 0 };
        assert!(shop.ends(REQUESTS).await.iter().sum::<i64>() >= then as i64 + 10 + skipped);
    }
    assert_one_result_each(&shop).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_made_anew_with_fewer_records_than_were_read_is_read_from_its_start() {
    requests_on_a_topic_made_anew(Inside::on_kafka().await, 5, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_made_anew_with_more_records_than_were_read_loses_no_order() {
    requests_on_a_topic_made_anew(Inside::on_kafka().await, 60, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_made_anew_under_a_running_consumer_is_read_on() {
    requests_on_a_topic_made_anew(Inside::on_kafka().await, 5, true).await;
}

/// Nobody makes them again but the relay.
async fn topics_deleted(shop: Inside) {
    shop.account("ann", 1_000_000).await;
    let (_relays, _orders, payments) = ((shop.relay("orders"), shop.relay("payments")), shop.orders(), shop.payments());
    shop.place("ann", 20).await;
    until("they end", async || shop.waiting().await == 0).await;
    payments.stop().await;
    shop.place("ann", 5).await;
    shop.until_on_the_log(REQUESTS, 25).await;
    for topic in TOPICS {
        delete_topic(&shop, topic).await;
    }
    let _payments = shop.payments();
    shop.place("ann", 5).await;
    let _sweeper = shop.sweep(AFTER);
    let took = shop.until_healed().await;
    println!("healed after {took:?}");
    assert_eq!(count(&shop.payments, "select balance as n from account").await, 1_000_000 - 30 * 100);
    assert_one_result_each(&shop).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_that_somebody_deleted_on_kafka_are_made_anew() {
    topics_deleted(Inside::on_kafka().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn topics_that_somebody_deleted_in_postgres_are_made_anew() {
    topics_deleted(Inside::on_postgres().await).await;
}

/// As after a restore of the services' databases to another cluster's log.
async fn offsets_out_of_range(shop: Inside) {
    shop.account("ann", 1_000_000).await;
    let relays = (shop.relay("orders"), shop.relay("payments"));
    let (orders, payments) = (shop.orders(), shop.payments());
    shop.place("ann", 20).await;
    until("they end", async || shop.waiting().await == 0).await;
    orders.stop().await;
    payments.stop().await;
    for db in [&shop.orders, &shop.payments] {
        let mut conn = db.get().await.unwrap();
        sql("update consumer_offset set next_offset = 1000000").execute(&mut *conn).await.unwrap();
    }
    shop.place("ann", 10).await;
    let (_orders, _payments, _relays) = (shop.orders(), shop.payments(), relays);
    let _sweeper = shop.sweep(AFTER);
    shop.until_healed().await;
    assert_eq!(count(&shop.payments, "select balance as n from account").await, 1_000_000 - 30 * 100);
    assert_one_result_each(&shop).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offset_beyond_kafkas_end_begins_at_its_start_and_every_repeat_is_harmless() {
    offsets_out_of_range(Inside::on_kafka().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offset_beyond_the_end_of_the_log_in_postgres_begins_at_its_start_and_every_repeat_is_harmless() {
    offsets_out_of_range(Inside::on_postgres().await).await;
}

/// Of a counter, all its labels together.
async fn counted(process: &Process, role: &str, name: &str) -> f64 {
    let metrics = Client::new(process.address(role).await).get("/metrics").await.expect(200).text;
    let values =
        metrics.lines().filter(|line| line.starts_with(name)).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    values.sum()
}

fn lines(process: &Process, level: &str, text: &str) -> usize {
    process.log().lines().filter(|line| line.contains(level) && line.contains(text)).count()
}

/// The same with real processes: what healed says so, in one line an incident and on a counter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healing_says_so_in_the_log_and_on_the_metrics() {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let bootstrap = kafka::shared().await;
    let mut shop = Four::start(&bootstrap, &orders, &payments, &kafka::prefix()).await;
    let mut config = kafka::config(&bootstrap);
    config.topic_prefix = shop.prefix().to_owned();
    let log = KafkaLog::new(&config);
    shop.env.push(("SHOPD__ORDERS__SWEEP_AFTER_MS".into(), "1500".into()));
    shop.crash("orders").await;
    Client::new(shop.orders.address("orders").await).ready().await;
    until("the gateway finds it again", async || shop.client.get("/api/OrdersProxy?userId=ann").await.status == 200).await;
    shop.client.account("ann", "1000").await;
    let first = place(&shop.client, "ann", "1").await;
    shop.client.ended(&first).await;

    shop.payments.kill().await;
    let mut lost = Vec::new();
    for _ in 0..5 {
        lost.push(place(&shop.client, "ann", "1").await);
    }
    let partitions = log.partitions(REQUESTS).await.unwrap();
    let ends = async || {
        let mut ends = Vec::new();
        for partition in 0..partitions {
            ends.push(log.bounds(REQUESTS, partition).await.unwrap().1);
        }
        ends
    };
    until("they are sent", async || ends().await.iter().sum::<i64>() >= 6).await;
    for (partition, end) in (0..).zip(ends().await) {
        log.delete_records_before(REQUESTS, partition, end).await.unwrap();
    }
    shop.crash("payments").await;
    for id in &lost {
        assert_eq!(shop.client.ended(id).await["status"], "Finished");
    }
    let (orders, payments) = (connect(&orders), connect(&payments));
    crate::support::books::assert_balanced(&orders, &payments).await;
    until("nothing is asked for any more", async || count(&orders, "select count(*) as n from order_retry").await == 0).await;

    assert_eq!(lines(&shop.payments, "ERROR", "the offset is not on the log"), 1, "{}", shop.payments.log());
    assert!(counted(&shop.payments, "payments", "shopd_consumer_offset_resets_total").await >= 1.0);
    let warned = lines(&shop.orders, "WARN", "asked for again");
    assert!((1..5).contains(&warned), "one line an incident: {}", shop.orders.log());
    assert!(counted(&shop.orders, "orders", "shopd_orders_reasked_total").await >= 5.0);
    until("its end is told", async || lines(&shop.orders, "INFO", "has its result") == warned).await;
    assert_eq!(counted(&shop.orders, "orders", "shopd_orders_without_result").await, 0.0);

    let client = ClientBuilder::new(vec![bootstrap]).build().await.unwrap();
    client.controller_client().unwrap().delete_topic(format!("{}{REQUESTS}", shop.prefix()), 5_000).await.unwrap();
    let after = place(&shop.client, "ann", "1").await;
    assert_eq!(shop.client.ended(&after).await["status"], "Finished");
    assert_eq!(lines(&shop.relay, "ERROR", "it was made anew"), 1, "{}", shop.relay.log());
    assert_eq!(counted(&shop.relay, "relay", "shopd_relay_topics_made_total").await, 1.0);
}

/// `shopd all` sweeps, too; with its defaults an order that is long overdue waits for the next sweep.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shop_on_nothing_at_all_asks_again_for_an_order_whose_request_is_gone() {
    let shop = All::start(postgres::own_dir()).await;
    shop.client.account("ann", "10").await;
    let attached = embedded::attach(&embedded::Options::new(&shop.dir)).await.expect("the running server");
    let orders = connect(attached.url("shopd_orders").expose());
    let mut conn = orders.dedicated().await.unwrap();
    let id = uuid::Uuid::now_v7();
    conn.batch_execute(&format!(
        "insert into orders (id, user_id, amount, created_at, updated_at, traceparent)
         select '{id}', 'ann', 250, at, at, '' from (select clock_timestamp() - interval '30 s' as at) t;
         insert into order_event (order_id, status, at, traceparent) select id, 'New', created_at, '' from orders where id = '{id}';"
    ))
    .await
    .unwrap();
    assert_eq!(shop.client.ended(&id.to_string()).await["status"], "Finished");
    assert_eq!(shop.client.balance("ann").await, "7.5");
}
