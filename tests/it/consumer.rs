//! The consumer on a real database and the log in Postgres: what is on the log is applied once, whoever stops, fails or is robbed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::Utc;
use diesel::sql_types::{Array, BigInt, Text};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use shopd::config::{Config, ConsumerConfig, Secret};
use shopd::db::{self, Conn, Db, DbError, Schema, sql};
use shopd::messaging::log::{PostgresLog, Record, SharedLog};
use shopd::messaging::{Consumer, Delivery, Handler, Keys, Poison, Received};
use shopd::shutdown::Shutdown;

use crate::support::books::count;
use crate::support::inside::until;
use crate::support::postgres;
use crate::support::shop::{PATIENCE, poll};

const TOPIC: &str = "order-payment-requests";

/// Writes down what it applies.
struct WriteDown {
    /// So many batches fail first, as if the database were away.
    failures: Arc<AtomicUsize>,
}

#[async_trait]
impl Handler for WriteDown {
    type Event = String;

    fn decode(&self, delivery: &Delivery) -> Result<String, Poison> {
        let value = delivery.value.as_deref().unwrap_or_default();
        let text = String::from_utf8(value.to_vec()).map_err(|error| Poison(error.to_string()))?;
        if text == "poison" { Err(Poison(text)) } else { Ok(text) }
    }

    fn keys(&self, event: &String) -> Keys {
        Keys { ordering: event.clone(), business: event.clone() }
    }

    async fn apply(&self, mut conn: &Conn, batch: &[Received<String>]) -> Result<(), DbError> {
        let values: Vec<&str> = batch.iter().map(|received| received.event.as_str()).collect();
        sql("insert into applied select unnest($1)").bind::<Array<Text>, _>(values).execute(&mut conn).await?;
        let tell = |left: usize| left.checked_sub(1);
        match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, tell) {
            // After the effect: only a roll-back keeps it from being there twice.
            Ok(_) => Err(DbError::Unavailable("told to fail".into())),
            Err(_) => Ok(()),
        }
    }
}

struct Bench {
    url: Secret,
    db: Db,
    log: SharedLog,
    config: Config,
}

impl Bench {
    async fn new() -> Self {
        let mut config = Config::default();
        config.database = postgres::config();
        config.kafka.fetch_wait = Duration::from_millis(300);
        let url = Secret::new(postgres::database("consumer").await);
        let db = Db::for_batches(&url, "test", &config.database).unwrap();
        db::migrate(&db, &[Schema::Payments, Schema::Log]).await.unwrap();
        let mut conn = db.get().await.unwrap();
        sql("create table applied (value text not null)").execute(&mut *conn).await.unwrap();
        let log: SharedLog =
            Arc::new(PostgresLog::new(Db::new(&url, "test", &config.database).unwrap(), &config.log, config.kafka.fetch_wait));
        log.create_topics(&[TOPIC], 3).await.unwrap();
        Self { url, db, log, config }
    }

    async fn append(&self, values: &[&str]) {
        let record = |value: &&str| Record {
            topic: TOPIC.into(),
            key: Some(Bytes::from((*value).to_owned())),
            value: Some(Bytes::from((*value).to_owned())),
            headers: Vec::new(),
            timestamp: Utc::now(),
        };
        self.log.append(values.iter().map(record).collect()).await.unwrap();
    }

    fn consume(&self, owner: &str, failures: usize) -> (Shutdown, tokio::task::JoinHandle<()>) {
        self.consume_from(self.db.clone(), owner, self.config.consumer.lease, failures)
    }

    /// In a process of its own, which hears what the others tell.
    fn consume_elsewhere(&self, owner: &str, lease: Duration) -> (Shutdown, tokio::task::JoinHandle<()>) {
        let db = Db::for_batches(&self.url, "test", &self.config.database).unwrap();
        self.consume_from(db, owner, lease, 0)
    }

    fn consume_from(&self, db: Db, owner: &str, lease: Duration, failures: usize) -> (Shutdown, tokio::task::JoinHandle<()>) {
        let stop = Shutdown::new();
        let handler = WriteDown { failures: Arc::new(AtomicUsize::new(failures)) };
        let config = ConsumerConfig { lease, ..self.config.consumer.clone() };
        let consumer = Consumer::new(db, self.log.clone(), TOPIC, owner.to_owned(), config, handler);
        (stop.clone(), tokio::spawn(consumer.run(stop)))
    }

    async fn applied(&self) -> i64 {
        count(&self.db, "select count(*) as n from applied").await
    }

    async fn until_applied(&self, records: i64) -> Duration {
        let since = Instant::now();
        while self.applied().await < records {
            assert!(since.elapsed() < PATIENCE, "{} of {records} are applied", self.applied().await);
            poll().await;
        }
        since.elapsed()
    }

    async fn until_owned(&self, owner: &str, partitions: i64) -> Duration {
        let since = Instant::now();
        loop {
            let mut conn = self.db.get().await.unwrap();
            let owned =
                sql("select partition from consumer_offset where owner = $1").bind::<Text, _>(owner).execute(&mut conn).await;
            if owned.unwrap() as i64 == partitions {
                return since.elapsed();
            }
            assert!(since.elapsed() < PATIENCE, "{owner} does not own {partitions}");
            poll().await;
        }
    }

    /// Takes all partitions from their owner for an hour, while it has a batch of `values` in hand: no heartbeat can tell it before.
    async fn rob(&self, values: &[&str]) {
        let mut robber = self.db.dedicated().await.unwrap();
        let robbery = "begin; update consumer_offset set owner = 'robber', epoch = epoch + 1,
                                                         lease_until = clock_timestamp() + interval '1 hour'";
        robber.batch_execute(robbery).await.unwrap();
        self.append(values).await;
        let in_hand = "select count(*) as n from pg_stat_activity
                        where datname = current_database() and wait_event_type = 'Lock' and query like '%advance_offsets%'";
        until("a batch in hand", async || count(&self.db, in_hand).await > 0).await;
        robber.batch_execute("commit").await.unwrap();
    }

    async fn assert_each_once(&self, records: i64) {
        assert_eq!(self.applied().await, records);
        assert_eq!(count(&self.db, "select count(distinct value) as n from applied").await, records);
    }
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|n| format!("{prefix}{n}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_fails_for_a_while_is_applied_once_when_it_can_be() {
    let bench = Bench::new().await;
    let values = names("v", 200);
    bench.append(&values.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (stop, task) = bench.consume("one", 4);
    bench.until_applied(200).await;
    stop.stop();
    task.await.unwrap();
    bench.assert_each_once(200).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_kept_with_its_offset_and_its_neighbours_are_applied() {
    let bench = Bench::new().await;
    bench.append(&["before", "poison", "after"]).await;
    let (stop, task) = bench.consume("one", 0);
    bench.until_applied(2).await;
    stop.stop();
    task.await.unwrap();
    bench.assert_each_once(2).await;
    assert_eq!(count(&bench.db, "select count(*) as n from dead_letter where reason = 'poison' and key = 'poison'").await, 1);
    assert_eq!(count(&bench.db, "select sum(next_offset)::bigint as n from consumer_offset").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_a_topics_partitions_evenly_and_one_that_ends_hands_its_own_on_at_once() {
    let bench = Bench::new().await;
    // Heartbeats are a quarter of a lease apart. The second's are a minute: in this test it takes nothing but what it is told of.
    let (quick, slow) = (bench.config.consumer.lease, Duration::from_secs(240));
    let (first_stop, first) = bench.consume_elsewhere("first", quick);
    bench.append(&["a"]).await;
    bench.until_applied(1).await;
    bench.until_owned("first", 3).await;
    let (second_stop, second) = bench.consume_elsewhere("second", slow);
    bench.until_owned("second", 1).await;
    bench.until_owned("first", 2).await;
    let (third_stop, third) = bench.consume_elsewhere("third", quick);
    for owner in ["first", "second", "third"] {
        bench.until_owned(owner, 1).await;
    }
    let more = names("m", 200);
    bench.append(&more.iter().map(String::as_str).collect::<Vec<_>>()).await;
    bench.until_applied(201).await;
    third_stop.stop();
    third.await.unwrap();
    first_stop.stop();
    first.await.unwrap();
    assert!(bench.until_owned("second", 3).await < Duration::from_secs(15));
    assert_eq!(count(&bench.db, "select count(*) as n from consumer_member").await, 1, "who left does not count");
    bench.append(&["c"]).await;
    bench.until_applied(202).await;
    second_stop.stop();
    second.await.unwrap();
    bench.assert_each_once(202).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_was_robbed_of_its_lease_commits_nothing() {
    let bench = Bench::new().await;
    let (stop, task) = bench.consume("robbed", 0);
    bench.append(&["a"]).await;
    bench.until_applied(1).await;
    bench.rob(&["b", "c", "d", "e"]).await;
    // Long enough for its heartbeat to notice, and for the batch that it had in hand.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(2) {
        assert_eq!(bench.applied().await, 1, "the fence let something through");
        poll().await;
    }
    sql("update consumer_offset set owner = null").execute(&mut *bench.db.get().await.unwrap()).await.unwrap();
    bench.until_applied(5).await;
    stop.stop();
    task.await.unwrap();
    bench.assert_each_once(5).await;
}

/// The negative control of the test above: without the fence the robbed worker's batch does commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_epoch_in_the_compare_and_set_a_robbed_worker_commits() {
    let bench = Bench::new().await;
    let unfenced = "alter function advance_offsets rename to fenced_advance_offsets;
                    create function advance_offsets(text, int[], bigint[], bigint[], bigint[], bigint) returns void language sql
                    as $$ update consumer_offset c set next_offset = m.n from (select unnest($2) as p, unnest($4) as n) m
                    where c.topic = $1 and c.partition = m.p $$";
    bench.db.dedicated().await.unwrap().batch_execute(unfenced).await.unwrap();
    let (stop, task) = bench.consume("robbed", 0);
    bench.append(&["a"]).await;
    bench.until_applied(1).await;
    bench.rob(&["b", "c", "d", "e"]).await;
    bench.until_applied(2).await;
    let robbed = "select count(*) as n from consumer_offset where owner = 'robber' and lease_until > clock_timestamp()";
    assert_eq!(count(&bench.db, robbed).await, 3, "it was nobody else's any more: then this shows nothing");
    stop.stop();
    task.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offset_moves_only_from_where_the_batch_began_and_under_its_own_epoch() {
    let bench = Bench::new().await;
    let mut conn = bench.db.get().await.unwrap();
    sql("insert into consumer_offset (topic, partition, next_offset, epoch) values ('t', 0, 5, 7), ('t', 1, 5, 7)")
        .execute(&mut *conn)
        .await
        .unwrap();
    // One alone goes another way than several.
    let advance = |from: &[i64], epoch: &[i64]| {
        sql("select advance_offsets('t', (array[0, 1])[1:cardinality($1)], $1, (array[9, 9]::bigint[])[1:cardinality($1)], $2, 1000)")
            .bind::<Array<BigInt>, _>(from.to_vec())
            .bind::<Array<BigInt>, _>(epoch.to_vec())
    };
    let odd: [(&[i64], &[i64]); 7] =
        [(&[5, 4], &[7, 7]), (&[4, 5], &[7, 7]), (&[5, 5], &[7, 6]), (&[5, 5], &[8, 7]), (&[4], &[7]), (&[5], &[6]), (&[5], &[8])];
    for (from, epoch) in odd {
        let error = DbError::from(advance(from, epoch).execute(&mut *conn).await.unwrap_err());
        assert!(matches!(error, DbError::Fenced(_)), "{error}");
        assert_eq!(count(&bench.db, "select sum(next_offset)::bigint as n from consumer_offset where topic = 't'").await, 10);
    }
    advance(&[5, 5], &[7, 7]).execute(&mut *conn).await.unwrap();
    let again = DbError::from(advance(&[5, 5], &[7, 7]).execute(&mut *conn).await.unwrap_err());
    assert!(matches!(again, DbError::Fenced(_)), "the same batch does not move twice");
    sql("update consumer_offset set next_offset = 5 where topic = 't' and partition = 0").execute(&mut *conn).await.unwrap();
    advance(&[5], &[7]).execute(&mut *conn).await.unwrap();
    let again = DbError::from(advance(&[5], &[7]).execute(&mut *conn).await.unwrap_err());
    assert!(matches!(again, DbError::Fenced(_)), "nor does that of one partition");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_offset_that_is_no_longer_on_the_log_goes_on_where_the_log_begins() {
    let bench = Bench::new().await;
    let values = names("old", 30);
    bench.append(&values.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut dropped = 0;
    for partition in 0..3 {
        let (start, end) = bench.log.bounds(TOPIC, partition).await.unwrap();
        bench.log.delete_records_before(TOPIC, partition, end).await.unwrap();
        dropped += end - start;
    }
    assert_eq!(dropped, 30);
    bench.append(&["new"]).await;
    let (stop, task) = bench.consume("one", 0);
    bench.until_applied(1).await;
    // And one that lies beyond its end, as after a topic was made anew.
    stop.stop();
    task.await.unwrap();
    let mut conn = bench.db.get().await.unwrap();
    sql("update consumer_offset set next_offset = 1000000").execute(&mut *conn).await.unwrap();
    let (stop, task) = bench.consume("one", 0);
    bench.append(&["newer"]).await;
    let since = Instant::now();
    while count(&bench.db, "select count(*) as n from applied where value = 'newer'").await == 0 {
        assert!(since.elapsed() < PATIENCE);
        poll().await;
    }
    stop.stop();
    task.await.unwrap();
}
