//! The suite on a database, and what only the log in Postgres must prove: its commits' order, its wake-ups, its retention.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shopd::config::{Config, DatabaseConfig, LogConfig, Secret};
use shopd::db::{Db, Schema, migrate};
use shopd::messaging::log::{Log, LogError, PostgresLog};
use tokio_postgres::{Client, NoTls};

use super::suite::contract;
use super::{BYTES_MAX, FETCH_WAIT, LONG, Subject, offsets, read, record, values};
use crate::support::postgres;

/// A database with an empty log.
async fn database() -> String {
    let url = postgres::database("log").await;
    migrate(&db(&url), &[Schema::Log]).await.expect("migrations");
    url
}

fn db(url: &str) -> Db {
    db_with(url, postgres::config())
}

fn db_with(url: &str, config: DatabaseConfig) -> Db {
    Db::new(&Secret::new(url), "test", &DatabaseConfig { pool_size_max: 4, ..config }).expect("a url")
}

fn open(url: &str, retention: Duration) -> PostgresLog {
    open_waiting(url, retention, FETCH_WAIT)
}

/// An idle fetch of it waits so long.
fn open_waiting(url: &str, retention: Duration, fetch_wait: Duration) -> PostgresLog {
    PostgresLog::new(db(url), &LogConfig { retention }, fetch_wait)
}

async fn subject() -> Subject {
    let url = database().await;
    Subject::new(move |fetch_wait| Arc::new(open_waiting(&url, LONG, fetch_wait)))
}

contract!(subject);

/// A session beside the log's own.
async fn session(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a session");
    tokio::spawn(connection);
    client
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_never_passes_a_record_that_commits_late() {
    let url = database().await;
    // The append that waits behind another is given the time that the rest takes on a busy machine.
    let (lock_timeout, statement_timeout) = (LONG, 2 * LONG);
    let config = DatabaseConfig { lock_timeout, statement_timeout, ..postgres::config() };
    let log = Arc::new(PostgresLog::new(db_with(&url, config), &LogConfig { retention: LONG }, FETCH_WAIT));
    let reader = open(&url, LONG);
    log.create_topics(&["events"], 2).await.unwrap();
    let (here, there) = ("key", other_partitions_key());
    log.append(vec![record("events", here, "early")]).await.unwrap();
    let partition = shopd::messaging::log::partitioner::partition_of(here.as_bytes(), 2);

    // Another process's append, its transaction open: offset 1 is taken and not yet there.
    let late = session(&url).await;
    late.batch_execute(&format!(
        "begin;
         select * from shopd_log.partition where partition = {partition} for update;
         update shopd_log.partition set next_offset = 2 where partition = {partition};
         insert into shopd_log.record (topic_id, partition, \"offset\", key, value, headers, timestamp)
         select topic_id, partition, 1, 'key', 'late', '', now() from shopd_log.partition where partition = {partition}"
    ))
    .await
    .unwrap();

    let behind = tokio::spawn({
        let log = log.clone();
        async move { log.append(vec![record("events", "key", "behind")]).await }
    });
    // The other partition is not held up, so the append behind had its time as well.
    log.append(vec![record("events", &there, "beside")]).await.unwrap();
    assert_eq!(values(&read(&reader, "events", 1 - partition, 0, 1).await), ["beside"]);
    let seen = reader.fetch("events", partition, 0, BYTES_MAX).await.unwrap();
    assert_eq!((values(&seen.records), seen.next_offset, seen.end_offset), (vec!["early".to_owned()], 1, 1));
    assert!(!behind.is_finished(), "it waits for the transaction before it");

    late.batch_execute("commit").await.unwrap();
    behind.await.unwrap().unwrap();
    let rest = read(&reader, "events", partition, 1, 2).await;
    assert_eq!((offsets(&rest), values(&rest)), (vec![1, 2], vec!["late".to_owned(), "behind".to_owned()]));
}

fn other_partitions_key() -> String {
    use shopd::messaging::log::partitioner::partition_of;
    let other = |key: &String| partition_of(key.as_bytes(), 2) != partition_of(b"key", 2);
    (0..).map(|n: u32| n.to_string()).find(other).expect("half of all keys")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_rolls_back_leaves_no_hole() {
    let url = database().await;
    let log = open(&url, LONG);
    log.create_topics(&["events"], 1).await.unwrap();
    let other = session(&url).await;
    other.batch_execute("begin; update shopd_log.partition set next_offset = next_offset + 7; rollback").await.unwrap();
    log.append(vec![record("events", "key", "value")]).await.unwrap();
    assert_eq!(offsets(&read(&log, "events", 0, 0, 1).await), [0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_behind_a_frozen_one_ends_in_time_and_says_so() {
    let url = database().await;
    let log = open(&url, LONG);
    log.create_topics(&["events"], 1).await.unwrap();
    let frozen = session(&url).await;
    frozen.batch_execute("begin; select * from shopd_log.partition for update").await.unwrap();
    let started = Instant::now();
    let error = log.append(vec![record("events", "key", "value")]).await.unwrap_err();
    assert!(error.cause.is_transient() && error.unacknowledged.len() == 1, "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    drop(frozen);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_nobody_told_of_is_found_by_the_slow_look() {
    let url = database().await;
    // Not found by a fetch that ends, and the next one that begins.
    let log = open_waiting(&url, LONG, 2 * LONG);
    log.create_topics(&["events"], 1).await.unwrap();
    let silent = session(&url).await;
    let started = Instant::now();
    let (stored, _) = tokio::join!(read(&log, "events", 0, 0, 1), async {
        silent
            .batch_execute(
                "begin;
                 update shopd_log.partition set next_offset = 1;
                 insert into shopd_log.record (topic_id, partition, \"offset\", headers, timestamp)
                 select topic_id, partition, 0, '', now() from shopd_log.partition;
                 commit",
            )
            .await
            .unwrap();
    });
    assert_eq!((stored[0].key.as_ref(), stored[0].value.as_ref(), stored[0].headers.len()), (None, None, 0));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_log_asks_the_database_next_to_nothing() {
    let url = database().await;
    let log = PostgresLog::new(db(&url), &LogConfig { retention: LONG }, Duration::from_millis(100));
    log.create_topics(&["events"], 12).await.unwrap();
    let idle = async |times: usize| {
        let one = async |partition| {
            for _ in 0..times {
                assert!(log.fetch("events", partition, 0, BYTES_MAX).await.unwrap().records.is_empty());
            }
        };
        futures::future::join_all((0..12).map(one)).await;
    };
    let statistics = session(&url).await;
    let count = async || -> i64 {
        let statement = "select xact_commit from pg_stat_database where datname = current_database()";
        statistics.query_one(statement, &[]).await.unwrap().get(0)
    };
    idle(10).await;
    let before = count().await;
    idle(40).await;
    let during = count().await - before;
    // The server counts late, so the first fetches are among them.
    assert!(during < 120, "{during} transactions for 480 idle fetches");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_older_than_the_retention_is_pruned_and_nothing_else() {
    let url = database().await;
    let log = open(&url, Duration::from_secs(3_600));
    log.create_topics(&["events"], 1).await.unwrap();
    let aged = session(&url).await;
    for n in 0..5 {
        // More than one round takes.
        log.append((0..5_000).map(|_| record("events", "key", n.to_string())).collect()).await.unwrap();
    }
    assert_eq!(log.prune().await, Ok(0));
    aged.batch_execute("update shopd_log.record set appended_at = now() - interval '2 hours' where \"offset\" < 23000")
        .await
        .unwrap();

    let mut removed = 0;
    let mut rounds = 0;
    loop {
        match log.prune().await.unwrap() {
            0 => break,
            some => (removed, rounds) = (removed + some, rounds + 1),
        }
    }
    assert_eq!((removed, rounds), (23_000, 3), "a bounded amount a round");
    assert_eq!(log.bounds("events", 0).await, Ok((23_000, 25_000)));
    assert_eq!(log.fetch("events", 0, 22_999, BYTES_MAX).await, Err(LogError::OutOfRange { start: 23_000, end: 25_000 }));
    assert_eq!(read(&log, "events", 0, 23_000, 2_000).await.len(), 2_000);
    let rows: i64 = aged.query_one("select count(*) from shopd_log.record", &[]).await.unwrap().get(0);
    assert_eq!(rows, 2_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_made_anew_is_noticed() {
    let url = database().await;
    let log = open_waiting(&url, LONG, Duration::from_secs(1));
    log.create_topics(&["events"], 1).await.unwrap();
    log.append((0..5).map(|n| record("events", "key", n.to_string())).collect()).await.unwrap();
    assert!(log.fetch("events", 0, 5, BYTES_MAX).await.unwrap().records.is_empty());
    let operator = session(&url).await;
    operator
        .batch_execute("begin; delete from shopd_log.record; update shopd_log.partition set next_offset = 0; commit")
        .await
        .unwrap();
    let noticing = async {
        loop {
            match log.fetch("events", 0, 5, BYTES_MAX).await {
                Ok(fetched) => assert!(fetched.records.is_empty()),
                Err(error) => return error,
            }
        }
    };
    let error = tokio::time::timeout(LONG, noticing).await.unwrap();
    assert_eq!(error, LogError::OutOfRange { start: 0, end: 0 });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_no_database_every_call_ends_in_time() {
    let url = "postgres://nobody:nothing@127.0.0.1:1/none";
    let started = Instant::now();
    let log = PostgresLog::new(db_with(url, Config::default().database), &LogConfig { retention: LONG }, FETCH_WAIT);
    assert!(log.ping().await.unwrap_err().is_transient());
    let error = log.append(vec![record("events", "key", "value")]).await.unwrap_err();
    assert!(error.cause.is_transient() && error.unacknowledged.len() == 1);
    assert!(log.fetch("events", 0, 0, BYTES_MAX).await.unwrap_err().is_transient());
    assert!(log.prune().await.unwrap_err().is_transient());
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}
