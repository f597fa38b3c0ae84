//! Rows of several messages: what is written together shares them, and is published one by one in its order.

use super::*;

use crate::support::books::{count, facts};

const ROWS: &str = "select count(*) as n from outbox";
/// Bytes that were moved out of the segments because a row was too long for a page.
const MOVED_OUT: &str = "select sum(pg_relation_size(reltoastrelid))::bigint as n from pg_class where relname ~ '^outbox_[0-9]$'";

/// Of lengths that fill rows unevenly.
fn uneven(count: usize) -> Vec<Message> {
    let one = |n: usize| Message {
        payload: vec![b'a' + (n % 26) as u8; n * 37 % 500],
        request_id: format!("r{n}"),
        traceparent: format!("t{n}"),
        created_at: chrono::DateTime::from_timestamp_micros(1_700_000_000_000_000 + n as i64).unwrap(),
        ..message(&format!("user-{n}"))
    };
    (0..count).map(one).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_are_written_together_share_rows_and_are_published_one_by_one_in_their_order() {
    let db = fresh().await;
    let mut messages = uneven(700);
    // A session that has not prepared the statement yet: several of it are on their way at once.
    outbox::append(&db.dedicated().await.unwrap(), &messages).await.unwrap();
    let rows = count(&db, ROWS).await;
    assert!((22..60).contains(&rows), "700 messages in {rows} rows");
    assert_eq!(count(&db, MOVED_OUT).await, 0, "each row fits into a page");
    messages.push(Message { payload: (0..50_000_u32).flat_map(u32::to_be_bytes).collect(), ..message("long") });
    messages.extend(uneven(3));
    outbox::append(&db.dedicated().await.unwrap(), &messages[700..]).await.unwrap();
    assert!(count(&db, MOVED_OUT).await > 0, "one that does not goes in all the same");

    let one_by_one = "select event_id || ' ' || key || ' ' || length(payload) || ' ' || traceparent || ' ' || request_id as fact
                        from outbox_message order by xid, id, n";
    let of = |m: &Message| format!("{} {} {} {} {}", m.event_id, m.key, m.payload.len(), m.traceparent, m.request_id);
    assert_eq!(facts(&db, one_by_one).await, messages.iter().map(of).collect::<Vec<_>>());
    assert_eq!(outbox::depth(&db).await.unwrap().rows, 704);

    let mut reader = acquire(&db, "r").await.unwrap();
    let mut read = Vec::new();
    while let Some(page) = reader.page(100).await.unwrap() {
        read.extend(page.rows.iter().map(|row| (row.event_id, row.record.clone())));
        reader.published(page).unwrap();
    }
    assert_eq!(read.len(), messages.len());
    for ((event_id, record), message) in read.into_iter().zip(&messages) {
        let expected = outbox::Row::new(shopd::db::types::Xid(1), 1, message).record;
        assert_eq!((event_id, record.key, record.value), (message.event_id, expected.key, expected.value));
        assert_eq!((&*record.topic, record.headers), (message.topic, expected.headers));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_ends_with_a_whole_row_because_the_cursor_moves_past_rows() {
    let db = fresh().await;
    let mut conn = db.dedicated().await.unwrap();
    // Both forms, in one transaction and in others.
    let mut written = Vec::new();
    for _ in 0..3 {
        conn.batch_execute("begin").await.unwrap();
        written.extend(write(&conn, 40).await);
        written.extend(write_into(&conn, &[1], 5).await);
        written.extend(write(&conn, 3).await);
        conn.batch_execute("commit").await.unwrap();
    }
    let mut seen = Vec::new();
    for owner in 0.. {
        // Each reader is given one page, reads another one, and dies.
        let mut reader = acquire(&db, &format!("r{owner}")).await.unwrap();
        let Some(page) = reader.page(1).await.unwrap() else { break };
        seen.extend(page.rows.iter().map(|row| row.event_id));
        reader.published(page).unwrap();
        if let Some(lost) = reader.page(2).await.unwrap() {
            assert!(!lost.rows.is_empty());
        }
        reader.release().await.unwrap();
    }
    assert_eq!(seen, written, "none lost, none twice");
}

/// The negative control of the test above: a cursor that is moved past a row of which something is not published loses that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_that_was_cut_within_a_row_would_lose_the_rest_of_it() {
    let db = fresh().await;
    let written = write(&db.dedicated().await.unwrap(), 20).await;
    let mut first = acquire(&db, "first").await.unwrap();
    let mut page = first.page(10).await.unwrap().unwrap();
    assert_eq!(page.rows.len(), 20, "one row, whatever was asked for");
    page.rows.truncate(10);
    first.published(page).unwrap();
    first.release().await.unwrap();
    assert!(drain(&mut acquire(&db, "second").await.unwrap(), 100).await.is_empty(), "{} are lost", written.len() - 10);
}
