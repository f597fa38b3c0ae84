//! The outbox's cursor on a real server: what commits is read once and in order, whatever else is open or rolled back.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::Utc;
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};
use rand::RngExt;
use shopd::config::Secret;
use shopd::db::{self, Db, DbError, Schema, sql};
use shopd::messaging::Message;
use shopd::messaging::outbox::{self, Purged, Reader};
use uuid::Uuid;

use crate::support::postgres;

mod crash;
mod segments;
mod several;

/// No test waits for its end.
const LEASE: Duration = Duration::from_secs(60);

async fn fresh() -> Db {
    let mut config = postgres::config();
    config.pool_size_max = 24;
    // Who waits for a lock waits for longer than any test allows.
    (config.lock_timeout, config.statement_timeout) = (Duration::from_secs(30), Duration::from_secs(40));
    let db = Db::new(&Secret::new(postgres::database("outbox").await), "test", &config).unwrap();
    db::migrate(&db, &[Schema::Payments]).await.unwrap();
    db
}

fn message(key: &str) -> Message {
    Message {
        event_id: Uuid::now_v7(),
        topic: "order-payment-requests",
        key: key.into(),
        payload: b"{}".to_vec(),
        kind: "test",
        source: "/test",
        traceparent: String::new(),
        request_id: String::new(),
        created_at: Utc::now(),
    }
}

async fn write(conn: &AsyncPgConnection, count: usize) -> Vec<Uuid> {
    let messages: Vec<_> = (0..count).map(|_| message("k")).collect();
    outbox::append(conn, &messages).await.unwrap();
    messages.iter().map(|m| m.event_id).collect()
}

/// Into these segments in turn, `count` rows in a statement each.
async fn write_into(conn: &AsyncPgConnection, segments: &[i32], count: usize) -> Vec<Uuid> {
    let mut written = Vec::new();
    for segment in segments {
        let ids: Vec<Uuid> = (0..count).map(|_| Uuid::now_v7()).collect();
        let rows = format!(
            "insert into outbox_{segment} (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
             select unnest($1), 't', 'k', 'x', 'e', 's', '', '', clock_timestamp()"
        );
        let statement = diesel::sql_query(rows).bind::<diesel::sql_types::Array<diesel::sql_types::Uuid>, _>(ids.clone());
        RunQueryDsl::execute(statement, &mut &*conn).await.unwrap();
        written.extend(ids);
    }
    written
}

/// Everything that is there now, in the order in which it was read.
async fn drain(reader: &mut Reader, rows_max: i64) -> Vec<Uuid> {
    let mut seen = Vec::new();
    while let Some(page) = reader.page(rows_max).await.unwrap() {
        seen.extend(page.rows.iter().map(|row| row.event_id));
        reader.published(page).unwrap();
    }
    reader.save().await.unwrap();
    seen
}

async fn acquire(db: &Db, owner: &str) -> Option<Reader> {
    Reader::acquire(db, owner, LEASE, true, &Arc::default()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_committed_row_is_read_exactly_once_beside_slow_writers_and_rollbacks() {
    let db = fresh().await;
    // Open all the time, with a transaction id of its own: it must hold nobody up.
    let mut bystander = db.dedicated().await.unwrap();
    bystander.batch_execute("create table bystander (i int); begin; insert into bystander values (1)").await.unwrap();
    let writing = Arc::new(AtomicBool::new(true));
    let writers: Vec<_> = (0..16)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move {
                let mut conn = db.dedicated().await.unwrap();
                let mut committed = Vec::new();
                for _ in 0..40 {
                    conn.batch_execute("begin").await.unwrap();
                    let mut mine = write(&conn, 2).await;
                    let wait = rand::rng().random_range(0..8);
                    tokio::time::sleep(Duration::from_millis(wait)).await; // a poll interval of the writer's own work
                    mine.extend(write(&conn, 2).await);
                    if rand::rng().random_bool(0.1) {
                        conn.batch_execute("rollback").await.unwrap();
                    } else {
                        conn.batch_execute("commit").await.unwrap();
                        committed.extend(mine);
                    }
                }
                committed
            })
        })
        .collect();
    let reading = {
        let (db, writing) = (db.clone(), writing.clone());
        tokio::spawn(async move {
            let mut reader = acquire(&db, "r").await.unwrap();
            let mut seen = Vec::new();
            while AtomicBool::load(&writing, Ordering::SeqCst) {
                // Small pages, so that a look is often left half-way.
                seen.extend(drain(&mut reader, 7).await);
                tokio::task::yield_now().await;
            }
            seen.extend(drain(&mut reader, 7).await);
            seen
        })
    };
    let mut committed = HashSet::new();
    for writer in writers {
        committed.extend(writer.await.unwrap());
    }
    writing.store(false, Ordering::SeqCst);
    let seen = reading.await.unwrap();
    assert!(committed.len() > 1_000);
    assert_eq!(seen.len(), committed.len(), "none twice, none lost");
    assert_eq!(seen.into_iter().collect::<HashSet<_>>(), committed);
}

/// The negative control of the test above: the usual cursor over `id` alone does lose rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_over_the_id_alone_loses_a_row_that_commits_late() {
    use diesel_async::RunQueryDsl;
    #[derive(diesel::QueryableByName)]
    struct Id {
        #[diesel(sql_type = diesel::sql_types::BigInt)]
        id: i64,
    }
    let db = fresh().await;
    let (mut early, late) = (db.dedicated().await.unwrap(), db.dedicated().await.unwrap());
    early.batch_execute("begin").await.unwrap();
    write(&early, 1).await;
    write(&late, 1).await;
    let mut conn = db.get().await.unwrap();
    let after = |id: i64| sql("select id from outbox where id > $1 order by id").bind::<diesel::sql_types::BigInt, _>(id);
    let first: Vec<Id> = after(0).load(&mut conn).await.unwrap();
    early.batch_execute("commit").await.unwrap();
    let second: Vec<Id> = after(first.last().unwrap().id).load(&mut conn).await.unwrap();
    assert_eq!(first.len() + second.len(), 1, "the early id that commits late is passed");
    let mut reader = acquire(&db, "r").await.unwrap();
    assert_eq!(drain(&mut reader, 100).await.len(), 2, "ours reads both");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_stays_open_delays_its_own_rows_and_nobody_elses() {
    let db = fresh().await;
    let mut reader = acquire(&db, "r").await.unwrap();
    let mut open = db.dedicated().await.unwrap();
    open.batch_execute("begin").await.unwrap();
    let late = write(&open, 3).await;
    let others = write(&db.dedicated().await.unwrap(), 5).await;
    assert_eq!(drain(&mut reader, 2).await, others);
    let more = write(&db.dedicated().await.unwrap(), 5).await;
    assert_eq!(drain(&mut reader, 2).await, more);
    open.batch_execute("commit").await.unwrap();
    assert_eq!(drain(&mut reader, 2).await, late);
    assert!(drain(&mut reader, 2).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_acknowledged_is_read_again_by_whoever_comes_next() {
    let db = fresh().await;
    let written = write_into(&db.dedicated().await.unwrap(), &[1], 10).await;
    let mut first = acquire(&db, "first").await.unwrap();
    let page = first.page(4).await.unwrap().unwrap();
    first.published(page).unwrap();
    let lost = first.page(4).await.unwrap().unwrap();
    assert_eq!(lost.rows.iter().map(|r| r.event_id).collect::<Vec<_>>(), written[4..8]);
    first.release().await.unwrap();
    let mut second = acquire(&db, "second").await.unwrap();
    assert_eq!(drain(&mut second, 4).await, written[4..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_published_asks_to_be_saved_and_an_idle_look_does_not() {
    let db = fresh().await;
    let conn = db.dedicated().await.unwrap();
    write(&conn, 3).await;
    let mut reader = acquire(&db, "r").await.unwrap();
    let page = reader.page(10).await.unwrap().unwrap();
    assert!(reader.is_saved());
    reader.published(page).unwrap();
    assert!(!reader.is_saved());
    // Each save is a transaction that the next look learns of: to save that too would go on for ever.
    for _ in 0..3 {
        reader.save().await.unwrap();
        assert!(reader.page(10).await.unwrap().is_none());
        assert!(reader.is_saved());
    }
    // Handed over with what is not saved yet: nothing is published again.
    let written = write(&conn, 2).await;
    let page = reader.page(10).await.unwrap().unwrap();
    assert_eq!(page.rows.iter().map(|row| row.event_id).collect::<Vec<_>>(), written);
    reader.published(page).unwrap();
    reader.release().await.unwrap();
    assert!(acquire(&db, "next").await.unwrap().page(10).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_lost_its_lease_moves_nothing() {
    let db = fresh().await;
    write(&db.dedicated().await.unwrap(), 3).await;
    let mut slow = Reader::acquire(&db, "slow", Duration::from_millis(1), true, &Arc::default()).await.unwrap().unwrap();
    let page = slow.page(10).await.unwrap().unwrap();
    let mut quick = loop {
        // Its lease is over in a millisecond of the server's time.
        if let Some(reader) = acquire(&db, "quick").await {
            break reader;
        }
    };
    assert!(acquire(&db, "third").await.is_none(), "a lease that runs is respected");
    slow.published(page).unwrap();
    assert!(matches!(slow.save().await, Err(DbError::Fenced(_))));
    assert!(matches!(slow.release().await, Err(DbError::Fenced(_))));
    assert!(matches!(slow.purge(true).await, Err(DbError::Fenced(_))));
    assert_eq!(drain(&mut quick, 10).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn purging_drops_what_is_published_and_never_the_row_of_an_open_transaction() {
    let db = fresh().await;
    let mut reader = acquire(&db, "r").await.unwrap();
    write(&db.dedicated().await.unwrap(), 5).await;
    drain(&mut reader, 100).await;
    assert_eq!(reader.purge(true).await.unwrap(), Purged::All);
    assert_eq!(rows(&db).await, 0);

    // Busy: a writer holds a segment, and another one while that is being filled. Nobody waits long.
    let published = write_into(&db.dedicated().await.unwrap(), &[1, 2, 3], 5).await;
    drain(&mut reader, 100).await;
    let mut open = db.dedicated().await.unwrap();
    open.batch_execute("begin").await.unwrap();
    let late = write_into(&open, &[2], 1).await;
    let began = std::time::Instant::now();
    assert_eq!(reader.purge(true).await.unwrap(), Purged::Some);
    assert!(began.elapsed() < Duration::from_secs(10), "it did not wait for the writer");
    assert_eq!(rows(&db).await, 5, "the others are empty");
    assert_eq!(reader.purge(true).await.unwrap(), Purged::Nothing);
    open.batch_execute("commit").await.unwrap();
    assert_eq!(reader.purge(true).await.unwrap(), Purged::Nothing, "the open transaction's row is beyond the cursor");
    assert_eq!(drain(&mut reader, 100).await, late);
    assert_eq!(reader.purge(true).await.unwrap(), Purged::All);
    assert_eq!(published.len(), 15);

    // Beyond the cursor: nothing is dropped.
    let unread = write(&db.dedicated().await.unwrap(), 2).await;
    reader.purge(true).await.unwrap();
    assert_eq!(drain(&mut reader, 100).await, unread);
}

/// Runs `work` on a runtime that goes one step at a time, with five published rows in the outbox. What its sessions hold between two
/// steps, a process that is frozen there holds: the first step at which that was the outbox, and what came of the work.
fn frozen_at_any_step<T: Send + 'static, F>(work: impl FnOnce(Db, Reader) -> F) -> (Option<usize>, T)
where
    F: Future<Output = T> + Send + 'static,
{
    let watching = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let stepping = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let url = watching.block_on(postgres::database("outbox"));
    let connect = || Db::new(&Secret::new(url.clone()), "test", &postgres::config()).unwrap();
    let (watcher, db) = (watching.block_on(async { connect() }), stepping.block_on(async { connect() }));
    watching.block_on(async { db::migrate(&watcher, &[Schema::Payments]).await }).unwrap();
    let mut writer = watching.block_on(watcher.dedicated()).unwrap();
    watching.block_on(write(&writer, 5));
    let mut reader = stepping.block_on(acquire(&db, "r")).unwrap();
    stepping.block_on(drain(&mut reader, 100));
    let working = stepping.spawn(work(db, reader));
    let (mut steps, mut holds) = (0, None);
    while !working.is_finished() {
        stepping.block_on(tokio::task::yield_now());
        steps += 1;
        let held = sql("select 1 from pg_locks l join pg_stat_activity a using (pid)
                         where l.relation::regclass::text ~ '^outbox(_\\d)?$' and l.mode = 'AccessExclusiveLock' and a.state = 'idle in transaction'");
        if watching.block_on(held.execute(&mut writer)).unwrap() > 0 {
            holds.get_or_insert(steps);
        }
    }
    assert!(steps > 1, "it was seen at work");
    (holds, stepping.block_on(working).unwrap())
}

#[test]
fn a_relay_that_is_frozen_at_any_moment_of_a_purge_keeps_no_writer_out() {
    let (holds, purged) = frozen_at_any_step(|_, mut reader| async move { reader.purge(true).await });
    assert_eq!(purged.unwrap(), Purged::All);
    assert_eq!(holds, None);
}

/// The negative control of the test above: the same in a client's transaction would.
#[test]
fn a_relay_that_is_frozen_inside_a_transaction_of_its_own_would_keep_writers_out() {
    let (holds, ()) = frozen_at_any_step(|db, _| async move {
        let mut conn = db.dedicated().await.unwrap();
        for statement in ["begin", "lock table outbox in access exclusive mode", "truncate outbox", "commit"] {
            conn.batch_execute(statement).await.unwrap();
        }
    });
    assert!(holds.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_restored_into_another_cluster_is_read_all_the_same() {
    let db = fresh().await;
    let mut reader = acquire(&db, "r").await.unwrap();
    drain(&mut reader, 100).await;
    reader.release().await.unwrap();
    // As pg_restore leaves it: rows whose transaction ids lie in this cluster's future, a cursor from elsewhere.
    let written = write(&db.dedicated().await.unwrap(), 3).await;
    let mut conn = db.get().await.unwrap();
    conn.batch_execute("update outbox set xid = '9000000000'; update outbox_cursor set system_identifier = 'elsewhere'")
        .await
        .unwrap();
    let mut reader = acquire(&db, "r").await.unwrap();
    assert_eq!(drain(&mut reader, 100).await, written);
}

/// A dump of before the first relay: nothing in it says where it is from.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_that_no_relay_had_claimed_and_that_was_restored_into_another_cluster_is_read_all_the_same() {
    let db = fresh().await;
    let written = write(&db.dedicated().await.unwrap(), 3).await;
    db.get().await.unwrap().batch_execute("update outbox set xid = '9000000000'").await.unwrap();
    let mut reader = acquire(&db, "r").await.unwrap();
    assert_eq!(drain(&mut reader, 100).await, written);
}

async fn rows(db: &Db) -> i64 {
    use diesel::QueryDsl;
    use diesel_async::RunQueryDsl;
    diesel::table! { outbox (id) { id -> BigInt, } }
    let mut conn = db.get().await.unwrap();
    RunQueryDsl::get_result(outbox::table.count(), &mut *conn).await.unwrap()
}
