//! The server crashes, and what it had not brought to the disk is gone: transaction ids are given again.

use std::time::Duration;

use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use shopd::db::{self, Conn, Db, Schema};
use shopd::embedded::{self, Options, Server};
use shopd::messaging::outbox::Reader;

use super::{acquire, drain, write};
use crate::support::postgres;

/// A server whose write-ahead log reaches the disk late, unless somebody waits for it; one row is there, and read.
async fn read_to_the_end() -> (Server, Db, Reader) {
    let mut options = Options::new(postgres::own_dir());
    options.progress = false;
    options.settings = vec![("wal_writer_delay".into(), "10s".into())];
    let server = embedded::start(&options).await.unwrap();
    server.ensure_database("outbox").await.unwrap();
    let db = Db::new(&server.url("outbox"), "test", &postgres::config()).unwrap();
    db::migrate(&db, &[Schema::Payments]).await.unwrap();
    let before = write(&db.get().await.unwrap(), 1).await;
    let mut reader = acquire(&db, "r").await.unwrap();
    assert_eq!(drain(&mut reader, 10).await, before);
    (server, db, reader)
}

/// Gives fifty transaction ids that are never on the disk, tells `reader` of them, crashes the server, and answers a session when it is back.
async fn forget_ids(db: &Db, reader: &mut Reader, is_saved: bool) -> Conn {
    let (mut victim, mut bystander) = (db.dedicated().await.unwrap(), db.dedicated().await.unwrap());
    for _ in 0..50 {
        victim.batch_execute("begin; select pg_current_xact_id(); rollback").await.unwrap();
    }
    assert!(reader.page(10).await.unwrap().is_none());
    if is_saved {
        reader.save().await.unwrap();
    }
    // A session that dies takes all of the server's memory with it.
    let pid: i32 =
        diesel::select(diesel::dsl::sql::<diesel::sql_types::Integer>("pg_backend_pid()")).get_result(&mut victim).await.unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    // Once another session has gone too the server knows, and lets nobody in before every old session is gone: until then one of those
    // may still answer.
    let mut returned = None;
    for _ in 0..400 {
        if bystander.batch_execute("select 1").await.is_err() {
            returned = db.dedicated().await.ok();
        }
        if returned.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    returned.expect("the server returns")
}

/// After a crash the server gives transaction ids again that had not reached its disk: what a look knew of them is worth nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_whose_transaction_id_was_another_ones_before_a_crash_is_read() {
    let (server, db, mut reader) = read_to_the_end().await;
    let after = write(&forget_ids(&db, &mut reader, false).await, 1).await;
    let seen = match reader.page(10).await {
        Ok(page) => page.into_iter().flat_map(|page| page.rows).map(|row| row.event_id).collect(),
        // The session has ended with the crash: as the relay does, begin at what was saved.
        Err(_) => drain(&mut acquire(&db, "r").await.unwrap(), 10).await,
    };
    // The cursor need not have reached the disk: what was read before the crash may come again.
    assert!(seen.ends_with(&after) && seen.len() <= 2, "{seen:?}");
    server.stop(Duration::from_secs(10)).await.unwrap();
}

/// Red where a purge goes by what its process remembers: the rows lie below the ids that it has seen, and are on no log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_goes_by_no_snapshot_that_a_crash_has_taken_back() {
    let (server, db, mut reader) = read_to_the_end().await;
    let conn = forget_ids(&db, &mut reader, true).await;
    let after = write(&conn, 1).await;
    // Over a connection of the pool, which may have to notice the crash first.
    let mut purged = reader.purge(true).await;
    for _ in 0..20 {
        if purged.is_ok() {
            break;
        }
        purged = reader.purge(true).await;
    }
    purged.unwrap();
    let seen = drain(&mut acquire(&db, "r").await.unwrap(), 10).await;
    assert!(seen.ends_with(&after), "{seen:?}");
    server.stop(Duration::from_secs(10)).await.unwrap();
}
