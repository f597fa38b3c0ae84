//! The outbox's segments: whole ones are dropped while others are written, whatever segment a writer names and however long it takes.

use super::*;

use std::sync::atomic::AtomicUsize;

use diesel::sql_types::{BigInt, Text};

use crate::support::shop::{PATIENCE, poll};

/// What came of a while of writing, reading and dropping.
struct While {
    committed: HashSet<Uuid>,
    seen: Vec<Uuid>,
    dropped: usize,
}

/// Writers of one statement, and slow ones whose transactions write into several segments and sometimes roll back, beside a reader that
/// drops whatever it may between its pages.
async fn torture(db: &Db, how_long: Duration) -> While {
    let (writing, began) = (Arc::new(AtomicBool::new(true)), std::time::Instant::now());
    // Ten times as fast as theirs.
    let turn = move |turns_late: u128| (1 + (began.elapsed().as_millis() / 100 + 4 - turns_late) % 4) as i32;
    let writers: Vec<_> = (0..5)
        .map(|writer| {
            let (db, writing) = (db.clone(), writing.clone());
            tokio::spawn(async move {
                let mut conn = db.dedicated().await.unwrap();
                let mut committed = Vec::new();
                while AtomicBool::load(&writing, Ordering::SeqCst) {
                    let late = || turn(rand::rng().random_range(0..2));
                    if writer > 1 {
                        committed.extend(write_into(&conn, &[late()], 5).await);
                        tokio::time::sleep(Duration::from_millis(2)).await; // the writer's own work
                        continue;
                    }
                    conn.batch_execute("begin").await.unwrap();
                    let mut mine = write_into(&conn, &[late()], 2).await;
                    let wait = rand::rng().random_range(0..30);
                    tokio::time::sleep(Duration::from_millis(wait)).await; // the writer's own work
                    mine.extend(write_into(&conn, &[late(), late()], 2).await);
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
    let mut reader = acquire(db, "r").await.unwrap();
    let (mut seen, mut dropped) = (Vec::new(), 0);
    while began.elapsed() < how_long {
        if let Some(page) = reader.page(500).await.unwrap() {
            seen.extend(page.rows.iter().map(|row| row.event_id));
            reader.published(page).unwrap();
        }
        let quiet = rand::rng().random_bool(0.5);
        dropped += usize::from(reader.purge(quiet).await.unwrap() != Purged::Nothing);
    }
    writing.store(false, Ordering::SeqCst);
    let mut committed = HashSet::new();
    for writer in writers {
        committed.extend(writer.await.unwrap());
    }
    seen.extend(drain(&mut reader, 1_000).await);
    // On a busy machine somebody may have a lock for longer than writers are made to wait; a row that was not read stays all the same.
    let since = std::time::Instant::now();
    while reader.purge(true).await.unwrap() != Purged::All {
        assert!(since.elapsed() < PATIENCE, "{} rows are not dropped", rows(db).await);
        poll().await;
    }
    assert_eq!(rows(db).await, 0);
    While { committed, seen, dropped }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_while_segments_are_dropped_beside_slow_writers() {
    let db = fresh().await;
    let While { committed, seen, dropped } = torture(&db, Duration::from_secs(8)).await;
    assert!(committed.len() > 500 && dropped > 10, "{} rows, {dropped} times dropped", committed.len());
    assert_eq!(seen.len(), committed.len(), "none twice, none lost");
    assert_eq!(seen.into_iter().collect::<HashSet<_>>(), committed);
}

/// The negative control of the test above: without the look under the lock a writer's row is gone with the segment it waited in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_look_under_the_lock_rows_would_be_lost() {
    #[derive(diesel::QueryableByName)]
    struct Source {
        #[diesel(sql_type = Text)]
        source: String,
    }
    let db = fresh().await;
    let mut conn = db.dedicated().await.unwrap();
    let Source { source } =
        sql("select pg_get_functiondef('purge_outbox_segment'::regproc) as source").get_result(&mut conn).await.unwrap();
    let (before, after) = source.split_once("in access exclusive mode', segment);").expect("the lock");
    let (_, after) = after.split_once("end if;").expect("the look");
    conn.batch_execute(&format!("{before}in access exclusive mode', segment);{after}")).await.unwrap();
    let While { committed, seen, .. } = torture(&db, Duration::from_secs(8)).await;
    assert!(seen.len() < committed.len(), "{} rows, all read", seen.len());
}

#[derive(diesel::QueryableByName)]
struct Space {
    #[diesel(sql_type = BigInt)]
    bytes: i64,
    #[diesel(sql_type = BigInt)]
    dead: i64,
    #[diesel(sql_type = BigInt)]
    read: i64,
    #[diesel(sql_type = BigInt)]
    scans: i64,
}

async fn space(db: &Db) -> Space {
    let statement = sql("select sum(pg_total_relation_size(relid))::bigint as bytes, sum(n_dead_tup)::bigint as dead,
                                sum(coalesce(idx_tup_fetch, 0))::bigint as read, sum(seq_scan)::bigint as scans
                           from pg_stat_user_tables where relname ~ '^outbox(_[0-9])?$'");
    statement.get_result(&mut db.get().await.unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_a_steady_load_no_row_lies_dead_and_the_size_levels_off() {
    let db = fresh().await;
    let (writing, written) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let writer = {
        let (db, writing, written) = (db.clone(), writing.clone(), written.clone());
        tokio::spawn(async move {
            let conn = db.dedicated().await.unwrap();
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            while AtomicBool::load(&writing, Ordering::SeqCst) {
                written.fetch_add(write(&conn, 50).await.len(), Ordering::SeqCst);
                tick.tick().await;
            }
        })
    };
    let mut reader = acquire(&db, "r").await.unwrap();
    let (began, mut read, mut unpurged, mut sizes) = (std::time::Instant::now(), 0, 0, Vec::new());
    while began.elapsed() < Duration::from_secs(12) {
        let now = drain(&mut reader, 200).await.len();
        (read, unpurged) = (read + now, unpurged + now);
        if unpurged > 1_000 && reader.purge(false).await.unwrap() != Purged::Nothing {
            unpurged = 0;
        }
        let bytes = space(&db).await.bytes;
        sizes.push((began.elapsed(), AtomicUsize::load(&written, Ordering::SeqCst), bytes));
        tokio::time::sleep(Duration::from_millis(5)).await; // between two wake-ups
    }
    writing.store(false, Ordering::SeqCst);
    writer.await.unwrap();
    read += drain(&mut reader, 200).await.len();
    let written = AtomicUsize::load(&written, Ordering::SeqCst);
    assert_eq!(read, written);
    // Never more than what came in a few turns, however much came before: a row and its index entry are some 150 bytes.
    const KEPT: Duration = Duration::from_secs(5);
    for (at, rows, bytes) in sizes.iter().filter(|(at, ..)| *at > KEPT * 2) {
        let rows_before = sizes.iter().take_while(|(then, ..)| *then + KEPT < *at).last().map_or(0, |(_, rows, _)| *rows);
        let lately = rows - rows_before;
        assert!(*bytes < lately as i64 * 200 + 300_000, "{bytes} bytes at {at:?}, {lately} rows within {KEPT:?}, {rows} in all");
    }
    // The sessions tell their statistics a little later.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let space = space(&db).await;
    assert_eq!(space.dead, 0, "{written} rows");
}

/// A plan is made while the segments are empty, and again after each was emptied: a page must cost the same in a backlog.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_read_by_the_indexes_and_each_row_once_whatever_the_plans_were_made_for() {
    const ROWS: usize = 30_000;
    let db = fresh().await;
    let mut reader = acquire(&db, "r").await.unwrap();
    // A plan that is kept is made at the sixth time.
    for _ in 0..8 {
        write(&db.dedicated().await.unwrap(), 3).await;
        drain(&mut reader, 2).await;
        reader.purge(true).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(2)).await; // the sessions tell their statistics; making an index anew is a scan
    let before = space(&db).await;
    let conn = db.dedicated().await.unwrap();
    let mut written = Vec::new();
    for _ in 0..ROWS / 500 {
        written.extend(write_into(&conn, &[1, 3, 2, 4, 1], 100).await);
    }
    assert_eq!(drain(&mut reader, 100).await, written, "in the order in which they were written, across segments");
    drop((reader, conn));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let since = std::time::Instant::now();
    let after = loop {
        let now = space(&db).await;
        if now.read - before.read >= ROWS as i64 {
            break now;
        }
        assert!(since.elapsed() < PATIENCE, "{} rows read for {ROWS}", now.read - before.read);
        poll().await;
    };
    assert_eq!(after.scans - before.scans, 0, "read from one end to the other");
    let read = after.read - before.read;
    assert!((ROWS as i64..ROWS as i64 * 2).contains(&read), "{read} rows read for {ROWS}");
}

/// As the version before this does it, which may still be running while this one's schema is already there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_and_a_relay_of_the_version_before_get_on_with_segments() {
    let db = fresh().await;
    let mut conn = db.dedicated().await.unwrap();
    let old_writer = "insert into outbox (event_id, topic, key, payload, event_type, source, traceparent, request_id, created_at)
                      select gen_random_uuid(), 't', 'k', 'x', 'e', 's', '', '', now() from generate_series(1, 10)";
    conn.batch_execute(old_writer).await.unwrap();
    let written = write(&conn, 10).await;
    conn.batch_execute(old_writer).await.unwrap();
    let mut reader = acquire(&db, "r").await.unwrap();
    let seen = drain(&mut reader, 7).await;
    assert_eq!((seen.len(), &seen[10..20]), (30, &written[..]));
    assert_eq!(reader.purge(true).await.unwrap(), Purged::All);

    // Its relay empties all of it at once, and nothing of it while anything is unpublished.
    let old_purge = "select purge_outbox(epoch, snapshot::pg_snapshot) from outbox_cursor";
    let unread = write_into(&conn, &[1, 4], 3).await;
    conn.batch_execute(old_purge).await.unwrap();
    assert_eq!(rows(&db).await, 6);
    assert_eq!(drain(&mut reader, 7).await, unread);
    reader.save().await.unwrap();
    conn.batch_execute(old_purge).await.unwrap();
    assert_eq!(rows(&db).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_is_published_while_the_next_one_is_still_on_its_way() {
    const ROWS: usize = 20_000;
    let db = fresh().await;
    let conn = db.dedicated().await.unwrap();
    write_into(&conn, &[1], ROWS).await;
    let mut reader = acquire(&db, "r").await.unwrap();
    let mut published = 0;
    while let Some(page) = reader.page(ROWS as i64 / 4).await.unwrap() {
        published += page.rows.len();
        // Asked for, its first rows perhaps there, and nobody takes them: the log was faster.
        let _ = tokio::time::timeout(Duration::from_millis(5), reader.read_ahead(ROWS as i64 / 4)).await;
        reader.published(page).unwrap();
        let saved = tokio::time::timeout(Duration::from_secs(20), reader.save()).await;
        saved.expect("the cursor waits behind rows that nobody takes").unwrap();
    }
    assert_eq!(published, ROWS);
}
