//! Wake-ups between processes, over a real server.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use shopd::config::Secret;
use shopd::db::{self, Db, DbError, Listener, Notifier, Schema, sql};
use shopd::messaging::outbox::{self, Reader};
use shopd::shutdown::Shutdown;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::support::books::count;
use crate::support::postgres;

const CHANNEL: &str = "shopd_test";
const PATIENCE: Duration = Duration::from_secs(20);
/// In which what is not to come would have come.
const SILENCE: Duration = Duration::from_millis(300);

fn process(url: &str) -> Db {
    Db::new(&Secret::new(url.to_owned()), "test", &postgres::config()).unwrap()
}

/// Listens, and returns when it does.
async fn listen(db: &Db, stop: &Shutdown) -> Arc<Notify> {
    let wake = Arc::new(Notify::new());
    Listener::start(db.clone(), CHANNEL, wake.clone(), stop.clone());
    timeout(PATIENCE, wake.notified()).await.expect("it listens");
    wake
}

/// How many notifications there were; a wake-up may stand for several.
async fn heard(db: &Db) -> Arc<AtomicUsize> {
    let heard = Arc::new(AtomicUsize::new(0));
    let counted = heard.clone();
    let count = move |_: &str| {
        counted.fetch_add(1, Ordering::Relaxed);
    };
    tokio::spawn(db.listen(CHANNEL, count).await.unwrap().ended());
    heard
}

async fn is_woken(wake: &Notify, within: Duration) -> bool {
    timeout(within, wake.notified()).await.is_ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_wakes_its_own_process_directly_and_others_by_the_database_each_once() {
    let url = postgres::database("wakes").await;
    let (here, there, stop) = (process(&url), process(&url), Shutdown::new());
    let (by_database, elsewhere) = (listen(&here, &stop).await, listen(&there, &stop).await);
    let direct = Arc::new(Notify::new());
    let notifier = Notifier::start(here, &[(CHANNEL, direct.clone())], stop.clone());
    for _ in 0..3 {
        notifier.committed(1);
        assert!(is_woken(&direct, Duration::ZERO).await, "at once");
        assert!(is_woken(&elsewhere, PATIENCE).await, "by the database");
    }
    // What it was told directly it does not hear a second time.
    assert!(!is_woken(&by_database, SILENCE).await);
    stop.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_stream_of_commits_others_hear_every_fifty_milliseconds_and_of_the_last_one_too() {
    let url = postgres::database("wakes").await;
    let (here, there, stop) = (process(&url), process(&url), Shutdown::new());
    let elsewhere = listen(&there, &stop).await;
    let notifier = Notifier::start(here, &[(CHANNEL, Arc::new(Notify::new()))], stop.clone());
    let (began, mut ticks) = (Instant::now(), tokio::time::interval(Duration::from_millis(1)));
    let (mut commits, mut heard) = (0, 0);
    // On a busy machine it takes more of them until others have heard a few times.
    while commits < 1_000 || heard < 5 {
        assert!(began.elapsed() < PATIENCE, "{heard} heard of {commits}");
        tokio::select! {
            biased;
            _ = ticks.tick() => {
                notifier.committed(1);
                commits += 1;
            }
            () = elsewhere.notified() => heard += 1,
        }
    }
    let elapsed_ms = began.elapsed().as_millis();
    assert!(heard <= elapsed_ms / 50 * 3 / 2 + 20, "{heard} in {elapsed_ms} ms, one each 50 ms");
    notifier.committed(1);
    assert!(is_woken(&elsewhere, PATIENCE).await, "of the last ones");
    stop.stop();
}

/// A segment is dropped after a second look under its lock, which must see what was committed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_read_committed_whatever_the_database_has_for_its_default() {
    let url = postgres::database("wakes").await;
    let mut conn = process(&url).dedicated().await.unwrap();
    let default = "alter database %I set default_transaction_isolation = ''repeatable read''";
    let set = format!("do $$ begin execute format('{default}', current_database()); end $$");
    conn.batch_execute(&set).await.unwrap();
    let isolated = "select count(*) as n where current_setting('transaction_isolation') = 'read committed'";
    assert_eq!(count(&process(&url), isolated).await, 1);
}

/// A table that nobody knows.
const WRITTEN: &str = "select count(*) as n from written";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_is_told_of_behind_its_commit_on_its_own_connection() {
    let url = postgres::database("wakes").await;
    let (here, there, stop) = (process(&url), process(&url), Shutdown::new());
    let mut conn = here.dedicated().await.unwrap();
    conn.batch_execute("create table written (n int)").await.unwrap();
    let (elsewhere, heard) = (listen(&there, &stop).await, heard(&there).await);
    let direct = Arc::new(Notify::new());
    let notifier = Notifier::start(here.clone(), &[(CHANNEL, direct.clone())], stop.clone());
    for n in 1..6 {
        tokio::time::sleep(Duration::from_millis(10)).await; // Longer than two notifications are apart at the most.
        let mut shared = &conn;
        let write = async { Ok(sql("insert into written values (1)").execute(&mut shared).await?) };
        assert_eq!(notifier.committing(&conn, 1, write).await.unwrap(), 1);
        assert!(is_woken(&direct, Duration::ZERO).await, "at once");
        assert!(is_woken(&elsewhere, PATIENCE).await, "by the database");
        assert_eq!(count(&there, WRITTEN).await, n);
    }
    // One was prepared first, and told of once more; all others went that way, and no session of the pool was needed for them.
    let told = "select count(*) as n from pg_stat_activity where datname = current_database() and query like 'set local %notify %'";
    let since = Instant::now();
    while count(&there, told).await < 1 {
        assert!(since.elapsed() < PATIENCE);
    }
    assert!(count(&there, told).await <= 2);
    tokio::time::sleep(SILENCE).await;
    let heard = AtomicUsize::load(&heard, Ordering::Relaxed);
    assert!((5..=6).contains(&heard), "each once, and the first once more: {heard}");
    // What fails is not told of in this process, and is no harm elsewhere.
    let fails = async { Err::<(), _>(DbError::Unavailable("on purpose".into())) };
    assert!(notifier.committing(&conn, 1, fails).await.is_err());
    assert!(!is_woken(&direct, Duration::ZERO).await);
    stop.stop();
}

/// The statement is prepared while the notification is on its way already: whoever hears that one finds nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_is_overtaken_by_its_notification_is_told_of_again() {
    let url = postgres::database("wakes").await;
    let (here, there, stop) = (process(&url), process(&url), Shutdown::new());
    let mut conn = here.dedicated().await.unwrap();
    conn.batch_execute("create table written (n int)").await.unwrap();
    let elsewhere = listen(&there, &stop).await;
    let notifier = Notifier::start(here.clone(), &[(CHANNEL, Arc::new(Notify::new()))], stop.clone());
    let mut shared = &conn;
    let slow = async { Ok(sql("insert into written select 1 from pg_sleep(0.3)").execute(&mut shared).await?) };
    let (written, early) = tokio::join!(notifier.committing(&conn, 1, slow), async {
        assert!(is_woken(&elsewhere, PATIENCE).await);
        count(&there, WRITTEN).await
    });
    assert_eq!(written.unwrap(), 1);
    // Where others of the server are notifying it may be refused, and is then heard once.
    if early == 0 {
        assert!(is_woken(&elsewhere, PATIENCE).await, "and again");
    }
    assert_eq!(count(&there, WRITTEN).await, 1);
    stop.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_the_outbox_hears_of_others_rows_over_the_session_that_it_reads_by() {
    let url = postgres::database("wakes").await;
    let (here, there, stop) = (process(&url), process(&url), Shutdown::new());
    db::migrate(&here, &[Schema::Orders]).await.unwrap();
    let wake = Arc::new(Notify::new());
    let _reader = Reader::acquire(&here, "relay", Duration::from_secs(60), true, &wake).await.unwrap().expect("a free outbox");
    let notifier = |db: &Db| Notifier::start(db.clone(), &[(outbox::CHANNEL, Arc::new(Notify::new()))], stop.clone());
    notifier(&there).committed(1);
    assert!(is_woken(&wake, PATIENCE).await);
    // What its own process writes it was told directly.
    notifier(&here).committed(1);
    assert!(!is_woken(&wake, SILENCE).await);
    // Its end is not a silence.
    let ended = "select count(pg_terminate_backend(pid)) as n from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and query like '%set snapshot = $2%'";
    assert_eq!(count(&there, ended).await, 1);
    assert!(is_woken(&wake, PATIENCE).await);
    stop.stop();
}
