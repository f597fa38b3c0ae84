//! Dead letters on a real database and the log in Postgres: what keeps failing holds up its own key, in order, and nobody else.

mod copies;
mod operators;
mod races;
mod shop;
mod unreadable;

use std::collections::HashMap;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use diesel::sql_types::{Array, Text, Timestamptz};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use serde_json::{Value, json};
use shopd::config::{Config, Secret};
use shopd::db::{self, Conn, Db, DbError, Schema, sql};
use shopd::messaging::log::{PostgresLog, Record, SharedLog};
use shopd::messaging::outbox::Reader;
use shopd::messaging::{Consumer, Delivery, Handler, Keys, Poison, Reach, Received};
use shopd::relay::{Copies, publish_batch};
use shopd::shutdown::Shutdown;

use crate::support::books::count;
use crate::support::postgres;
use crate::support::shop::{PATIENCE, poll};

const TOPIC: &str = "order-payment-requests";
/// Of the three partitions: 0, 1 and 2.
const PARTITIONS: i32 = 3;

/// Writes down what it applies. A value is `key:name`; the name is what a repeat is known by.
struct WriteDown {
    /// So many batches fail first, as if the database were away.
    failures: Arc<AtomicUsize>,
}

#[async_trait]
impl Handler for WriteDown {
    type Event = String;

    fn decode(&self, delivery: &Delivery) -> Result<String, Poison> {
        let value = delivery.value.as_deref().unwrap_or_default();
        let text = std::str::from_utf8(value).map_err(|error| Poison(error.to_string()))?;
        if text.contains(':') { Ok(text.to_owned()) } else { Err(Poison("no colon".into())) }
    }

    fn keys(&self, event: &String) -> Keys {
        let (key, name) = event.split_once(':').expect("decoded");
        Keys { ordering: key.to_owned(), business: name.to_owned() }
    }

    async fn apply(&self, mut conn: &Conn, batch: &[Received<String>]) -> Result<(), DbError> {
        assert!(batch.iter().all(|one| !one.event.ends_with(":panic")), "told to panic");
        sql("insert into applied (value, published_at) select unnest($1), unnest($2)")
            .bind::<Array<Text>, _>(batch.iter().map(|one| one.event.as_str()).collect::<Vec<_>>())
            .bind::<Array<Timestamptz>, _>(batch.iter().map(|one| one.delivery.published_at).collect::<Vec<_>>())
            .execute(&mut conn)
            .await?;
        match self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => Err(DbError::Unavailable("told to fail".into())),
            Err(_) => Ok(()),
        }
    }
}

struct Bench {
    db: Db,
    log: SharedLog,
    config: Config,
    env: Vec<(String, String)>,
}

#[derive(diesel::QueryableByName)]
struct Line {
    #[diesel(sql_type = Text)]
    value: String,
}

impl Bench {
    async fn new() -> Self {
        let mut config = Config::default();
        config.database = postgres::config();
        config.kafka.fetch_wait = Duration::from_millis(300);
        config.consumer.lease = Duration::from_millis(1_000);
        let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
        let env = [("ORDERS", &orders), ("PAYMENTS", &payments)]
            .map(|(role, url)| (format!("SHOPD__{role}__DATABASE_URL"), url.clone()))
            .to_vec();
        let (orders, payments) = (Secret::new(orders), Secret::new(payments));
        db::migrate(&Db::new(&orders, "test", &config.database).unwrap(), &[Schema::Orders]).await.unwrap();
        let db = Db::for_batches(&payments, "test", &config.database).unwrap();
        db::migrate(&db, &[Schema::Payments, Schema::Log]).await.unwrap();
        let log: SharedLog =
            Arc::new(PostgresLog::new(Db::new(&payments, "test", &config.database).unwrap(), &config.log, config.kafka.fetch_wait));
        log.create_topics(&[TOPIC, "order-payment-requests.dlq"], PARTITIONS).await.unwrap();
        let bench = Self { db, log, config, env };
        bench
            .run(
                "create table applied (id bigint generated always as identity, value text not null, published_at timestamptz not null,
                                       at timestamptz not null default clock_timestamp());
                 create table refused (value text primary key, code text not null default 'P0001', message text not null default 'not this one');
                 create function refuse() returns trigger language plpgsql as $$
                 declare why refused;
                 begin
                     select * into why from refused r where r.value = new.value;
                     if found then raise exception using errcode = why.code, message = why.message; end if;
                     return new;
                 end $$;
                 create trigger refuse before insert on applied for each row execute function refuse();",
            )
            .await;
        bench
    }

    async fn run(&self, statements: &str) {
        self.db.get().await.unwrap().batch_execute(statements).await.unwrap_or_else(|error| panic!("{error}: {statements}"));
    }

    /// Keyed by what stands before the colon.
    async fn append(&self, values: &[&str]) {
        let record = |value: &&str| Record {
            topic: TOPIC.into(),
            key: Some(Bytes::from(value.split(':').next().unwrap_or_default().to_owned())),
            value: Some(Bytes::from((*value).to_owned())),
            headers: vec![("ce_id".into(), Bytes::from((*value).to_owned()))],
            timestamp: Utc::now(),
        };
        self.log.append(values.iter().map(record).collect()).await.unwrap();
    }

    fn consume(&self, owner: &str, failures: usize) -> (Shutdown, tokio::task::JoinHandle<()>) {
        let stop = Shutdown::new();
        let handler = WriteDown { failures: Arc::new(AtomicUsize::new(failures)) };
        let consumer =
            Consumer::new(self.db.clone(), self.log.clone(), TOPIC, owner.to_owned(), self.config.consumer.clone(), handler);
        (stop.clone(), tokio::spawn(consumer.run(stop)))
    }

    /// Waits until the statement answers `n`.
    async fn until(&self, statement: &'static str, n: i64) {
        let since = Instant::now();
        loop {
            let now = count(&self.db, statement).await;
            if now == n {
                return;
            }
            assert!(since.elapsed() < PATIENCE, "{now}, not {n}: {statement}; {:?}", self.letters().await);
            poll().await;
        }
    }

    async fn letters(&self) -> Vec<String> {
        self.lines("select state || ' ' || coalesce(convert_from(value, 'UTF8'), '') || ' ' || attempts || ' ' || reason as value from dead_letter order by partition, log_offset").await
    }

    async fn applied(&self, key: &str) -> Vec<String> {
        let all = self.lines("select value from applied order by id").await;
        all.into_iter().filter(|value| value.split(':').next() == Some(key)).collect()
    }

    async fn lines(&self, statement: &'static str) -> Vec<String> {
        let mut conn = self.db.get().await.unwrap();
        let lines: Vec<Line> = sql(statement).load(&mut *conn).await.unwrap();
        lines.into_iter().map(|line| line.value).collect()
    }

    async fn dlq(&self, arguments: &[&str]) -> Output {
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_shopd"));
        command.arg("dlq").args(arguments).args(["--log", "json"]).envs(self.env.iter().cloned());
        command.output().await.expect("the program")
    }

    /// Everything that waits in the outbox goes out.
    async fn relay(&self) {
        let mut reader = Reader::acquire(&self.db, "relay", Duration::from_secs(5), true, &Arc::default())
            .await
            .unwrap()
            .expect("a free outbox");
        while let shopd::relay::Step::Published(_) =
            publish_batch(&mut reader, &*self.log, 100, 1, &Reach::default(), &mut Copies::default(), &Shutdown::new())
                .await
                .unwrap()
        {}
        reader.release().await.unwrap();
    }

    async fn copies(&self) -> Vec<shopd::messaging::log::StoredRecord> {
        let mut copies = Vec::new();
        for partition in 0..PARTITIONS {
            let (start, end) = self.log.bounds("order-payment-requests.dlq", partition).await.unwrap();
            if end > start {
                let fetched = self.log.fetch("order-payment-requests.dlq", partition, start, 64 << 20).await.unwrap();
                copies.extend(fetched.records);
            }
        }
        copies
    }
}

fn lines(output: &Output) -> Vec<Value> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {output:?}"))).collect()
}

fn names(key: &str, range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| format!("{key}:{n}")).collect()
}

fn texts(values: &[String]) -> Vec<&str> {
    values.iter().map(String::as_str).collect()
}

async fn end((stop, task): (Shutdown, tokio::task::JoinHandle<()>)) {
    stop.stop();
    task.await.unwrap();
}

/// The 99th percentile of the time from the log to the table, for all keys but `ann`, in milliseconds.
async fn p99(poison: bool) -> i64 {
    let bench = Bench::new().await;
    if poison {
        bench.run("insert into refused values ('ann:0')").await;
    }
    let consumer = bench.consume("one", 0);
    bench.append(&["warm:up"]).await;
    bench.until("select count(*) as n from applied", 1).await;
    let began = Instant::now();
    for round in 0..100 {
        let mut values: Vec<String> = (0..100).map(|k| format!("user{k}:{round}")).collect();
        values.insert(50, format!("ann:{round}"));
        bench.append(&texts(&values)).await;
        tokio::time::sleep_until((began + Duration::from_millis(20 * (round + 1))).into()).await;
    }
    let good = "select count(*) as n from applied where value like 'user%'";
    bench.until(good, 10_000).await;
    let p99 = count(
        &bench.db,
        "select (extract(epoch from percentile_disc(0.99) within group (order by at - published_at)) * 1000)::bigint as n
           from applied where value like 'user%'",
    )
    .await;
    if poison {
        assert_eq!(bench.applied("ann").await, Vec::<String>::new(), "nothing of the key overtakes its head");
        bench.until("select count(*) as n from dead_letter where state = 'waiting'", 99).await;
        bench.run("delete from refused").await;
        let output = bench.dlq(&["redrive", "--key", "ann", "--json"]).await;
        assert!(output.status.success(), "{output:?}");
        bench.until("select count(*) as n from dead_letter", 0).await;
    } else {
        bench.until("select count(*) as n from applied", 10_101).await;
    }
    assert_eq!(bench.applied("ann").await, names("ann", 0..100));
    end(consumer).await;
    p99
}

/// Red where only what the database refuses is looked for: the batch would be tried for ever, whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_over_which_its_handler_panics_is_parked_and_its_neighbours_are_applied() {
    let bench = Bench::new().await;
    bench.append(&["ann:0", "bob:panic", "carl:0", "bob:1"]).await;
    let consumer = bench.consume("one", 0);
    bench.until("select count(*) as n from applied", 2).await;
    bench.until("select count(*) as n from dead_letter", 2).await;
    assert_eq!(bench.applied("bob").await, Vec::<String>::new());
    end(consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poison_message_among_ten_thousand_good_ones_holds_up_only_its_key_whose_order_holds_after_a_redrive() {
    let without = p99(false).await;
    let with = p99(true).await;
    println!("p99 from the log to the table: {without} ms without a poison message, {with} ms with one");
    // Apart from stalls of the machine: who waited for the poison message would wait until it is redriven.
    assert!(with < without + 5_000, "{with} ms with, {without} ms without");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_cannot_be_read_is_dead_at_once_and_its_copy_is_the_record_byte_for_byte() {
    let bench = Bench::new().await;
    let headers = [("own", &b"\x00\xff"[..]), ("dlq_reason", b"theirs"), ("nul\0", b"x"), ("own", b"again")];
    let odd = |key: Option<&'static [u8]>, value: Option<Vec<u8>>| Record {
        topic: TOPIC.into(),
        key: key.map(Bytes::from_static),
        value: value.map(Bytes::from),
        headers: headers.iter().map(|(name, value)| ((*name).into(), Bytes::from_static(value))).collect(),
        timestamp: Utc::now(),
    };
    let large = vec![b'x'; 700_000];
    let records = vec![odd(Some(b"\xff\x00k"), Some(b"\xfe".to_vec())), odd(None, None), odd(Some(b"big"), Some(large.clone()))];
    let began = Instant::now();
    let consumer = bench.consume("one", 0);
    bench.log.append(records.clone()).await.unwrap();
    bench.until("select count(*) as n from dead_letter where state = 'dead' and attempts = 1", 3).await;
    assert!(began.elapsed() < Duration::from_secs(10));
    bench.relay().await;
    let copies = bench.copies().await;
    assert_eq!(copies.len(), 3);
    for record in records {
        let copy = copies.iter().find(|copy| copy.key == record.key).expect("a copy");
        assert_eq!(copy.value, record.value);
        let header = |name: &str| copy.headers.get(name).expect(name);
        let own: Vec<&[u8]> = copy.headers.iter().filter(|(name, _)| name == "own").map(|(_, value)| value).collect();
        assert_eq!(own, [&record.headers[0].1, &record.headers[3].1], "each of them, in their order");
        assert_eq!(copy.headers.iter().filter(|(name, _)| name == "dlq_reason").count(), 1);
        assert_eq!(header("nul\0"), record.headers[2].1);
        assert_eq!(header("dlq_topic"), TOPIC.as_bytes());
        assert_eq!(header("dlq_attempts"), b"1");
        assert_ne!(header("dlq_reason"), b"theirs");
        let place: (i32, i64) = (text(header("dlq_partition")), text(header("dlq_offset")));
        assert_eq!(count_at(&bench, place).await, 1);
    }
    end(consumer).await;
}

fn text<T: std::str::FromStr<Err: std::fmt::Debug>>(bytes: &[u8]) -> T {
    std::str::from_utf8(bytes).unwrap().parse().unwrap()
}

async fn count_at(bench: &Bench, (partition, offset): (i32, i64)) -> usize {
    let mut conn = bench.db.get().await.unwrap();
    sql("select 1 from dead_letter where partition = $1 and log_offset = $2")
        .bind::<diesel::sql_types::Integer, _>(partition)
        .bind::<diesel::sql_types::BigInt, _>(offset)
        .execute(&mut *conn)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_record_is_tried_again_by_itself_and_its_repeats_are_kept_once() {
    let bench = Bench::new().await;
    bench.run("insert into refused values ('ann:0')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0", "ann:1", "ann:0", "ann:1", "ann:2", "bob:0"]).await;
    bench.until("select count(*) as n from applied", 1).await;
    bench.append(&["ann:1", "ann:2", "ann:0"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'parked' and attempts >= 2 and followers = 2", 1).await;
    assert_eq!(count(&bench.db, "select count(*) as n from dead_letter").await, 3);
    bench.relay().await;
    assert_eq!(bench.copies().await.len(), 1, "one copy a record, not one a try, and none of what was never tried");
    bench.run("delete from refused").await;
    bench.until("select count(*) as n from dead_letter", 0).await;
    assert_eq!(bench.applied("ann").await, ["ann:0", "ann:1", "ann:2"]);
    end(consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_passes_with_time_never_parks_anything() {
    let bench = Bench::new().await;
    bench
        .run("insert into refused values ('ann:1', '40P01', 'deadlock detected'), ('bob:1', '40001', 'could not serialize access')")
        .await;
    let consumer = bench.consume("one", 3);
    bench.append(&["ann:0", "ann:1", "bob:1", "bob:2", "cid:0"]).await;
    // Long enough for many tries.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(3) {
        assert_eq!(bench.letters().await, Vec::<String>::new());
        poll().await;
    }
    bench.run("delete from refused").await;
    bench.until("select count(*) as n from applied", 5).await;
    assert_eq!(bench.letters().await, Vec::<String>::new());
    // The negative control: the same record under any other error is parked.
    bench.run("insert into refused values ('ann:2', '22003', 'bigint out of range')").await;
    bench.append(&["ann:2"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'parked'", 1).await;
    end(consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_too_many_wait_only_that_partition_stops_and_goes_on_by_itself() {
    let mut bench = Bench::new().await;
    bench.config.consumer.followers_max = 10;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0')").await;
    let consumer = bench.consume("one", 0);
    let partition_of = |key: &str| shopd::messaging::log::partitioner::partition_of(key.as_bytes(), PARTITIONS);
    let here = (0..).map(|n| format!("here{n}")).find(|key| partition_of(key) == partition_of("ann")).unwrap();
    let elsewhere = (0..).map(|n| format!("else{n}")).find(|key| partition_of(key) != partition_of("ann")).unwrap();
    bench.append(&texts(&names("ann", 0..30))).await;
    bench.append(&texts(&names(&here, 0..5))).await;
    bench.until("select count(*) as n from dead_letter where state = 'waiting'", 10).await;
    bench.append(&texts(&names(&elsewhere, 0..50))).await;
    bench.until("select count(*) as n from applied", 50).await;
    assert_eq!(bench.applied(&here).await, Vec::<String>::new(), "nothing behind the stop");
    assert_eq!(count(&bench.db, "select count(*) as n from dead_letter").await, 11);
    bench.run("delete from refused").await;
    let output = bench.dlq(&["redrive", "--all"]).await;
    assert!(output.status.success(), "{output:?}");
    bench.until("select count(*) as n from applied", 85).await;
    assert_eq!(bench.applied("ann").await, names("ann", 0..30));
    assert_eq!(bench.applied(&here).await, names(&here, 0..5));
    bench.until("select count(*) as n from dead_letter", 0).await;
    end(consumer).await;
}
