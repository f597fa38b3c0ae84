//! A database server that says nothing to what it was asked, while its kernel acknowledges every byte.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;
use futures::FutureExt;
use shopd::config::{Config, DatabaseConfig, Secret};
use shopd::db::{Db, DbError};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use tokio_postgres::config::Host;

use crate::support::cluster::Cluster;
use crate::support::inside::until;

/// Enough to make a connection on a busy machine.
const CONNECT: Duration = Duration::from_secs(2);
const STATEMENT: Duration = Duration::from_millis(200);
/// The silence after which a server is suspected, or an eighth later.
const BOUND: Duration = Duration::from_millis(2_200);
/// A session that only listens asks every ten seconds.
const LISTENERS_BOUND: Duration = Duration::from_secs(20);

fn connect(url: &str) -> Db {
    let limits = DatabaseConfig {
        connect_timeout: CONNECT,
        statement_timeout: STATEMENT,
        idle_in_transaction_timeout: 60 * BOUND,
        ..Config::default().database
    };
    Db::new(&Secret::new(url.to_owned()), "test", &limits).unwrap()
}

/// Red where a server is given up for its silence alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lets_others_in_is_waited_for_however_long_its_answer_takes() {
    let cluster = Cluster::new(&[]).await;
    let mut conn = connect(&cluster.url("postgres")).dedicated().await.unwrap();
    // As a commit that waits for its synchronous standby, which no bound of the server's own ends.
    let slow = format!("set statement_timeout = 0; select pg_sleep({})", 3 * BOUND.as_secs());
    conn.batch_execute(&slow).await.expect("it is answered in the end");
}

/// Each of them is red where nobody watches what a server owes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_server_that_hangs_hears_of_it_and_is_served_once_it_goes_on() {
    let cluster = Cluster::new(&[]).await;
    let db = connect(&cluster.url("postgres"));
    // One that waits for its commit when the server stops, one in the pool, and two that listen.
    let (begun, stopped) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let transaction = {
        let (db, begun, stopped) = (db.clone(), begun.clone(), stopped.clone());
        tokio::spawn(async move {
            db.transaction(move |conn| {
                let (begun, stopped) = (begun.clone(), stopped.clone());
                async move {
                    conn.batch_execute("select pg_current_xact_id()").await?;
                    begun.notify_one();
                    stopped.notified().await;
                    Ok::<_, DbError>(())
                }
                .boxed()
            })
            .await
        })
    };
    begun.notified().await;
    drop(db.get().await.unwrap());
    let listening = db.listen("a", |_| {}).await.unwrap();
    let ended = Arc::new(Notify::new());
    let session = db.session(ended.clone()).await.unwrap();
    session.batch_execute("listen a").await.unwrap();
    cluster.hang().await;
    let since = Instant::now();
    stopped.notify_one();
    let outcome = timeout(10 * BOUND, transaction).await.expect("its fate is unknown, and it is told").unwrap();
    assert!(matches!(outcome, Err(DbError::Unavailable(_))), "{outcome:?}");
    assert!(since.elapsed() >= BOUND, "not before a statement may take as long");
    // Found out by the one: who asks next does not wait for another one.
    timeout(LISTENERS_BOUND, ended.notified()).await.expect("a session that is asked nothing ends with the others");
    timeout(LISTENERS_BOUND, listening.ended()).await.expect("and so does one that only listens");
    assert!(matches!(db.get().await.map(drop), Err(DbError::Unavailable(_))), "the one in the pool is not handed out");
    cluster.go_on();
    until("it serves again", async || db.ping(BOUND).await.is_ok()).await;
}

/// By itself a session that only listens finds out as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_only_listens_asks_whether_the_server_is_there() {
    let cluster = Cluster::new(&[]).await;
    let db = connect(&cluster.url("postgres"));
    let listening = db.listen("a", |_| {}).await.unwrap();
    cluster.hang().await;
    timeout(LISTENERS_BOUND, listening.ended()).await.expect("it ends");
    cluster.go_on();
    until("it is made again", async || db.listen("a", |_| {}).await.is_ok()).await;
}

fn socket(cluster: &Cluster) -> PathBuf {
    let config: tokio_postgres::Config = cluster.url("postgres").parse().unwrap();
    let Host::Unix(folder) = &config.get_hosts()[0] else { panic!("a socket") };
    folder.join(format!(".s.PGSQL.{}", config.get_ports().first().copied().unwrap_or(5432)))
}

/// An address that leads to one server after the other, as a balancer's does, or a name's. Those who are connected stay with theirs.
async fn balancer(to: watch::Receiver<PathBuf>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let to = to.borrow().clone();
            tokio::spawn(async move {
                let mut server = UnixStream::connect(to).await.unwrap();
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    address
}

/// Red where a server is known by its address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_is_left_also_where_its_successor_has_the_same_address() {
    let (old, new) = (Cluster::new(&[]).await, Cluster::new(&[]).await);
    let (switch, to) = watch::channel(socket(&old));
    let db = connect(&format!("postgres://shopd@{}/postgres?sslmode=disable", balancer(to).await));
    db.ping(CONNECT).await.unwrap();
    old.hang().await;
    switch.send_replace(socket(&new));
    let since = Instant::now();
    let waits = timeout(10 * BOUND, async { db.get().await?.batch_execute("select 1").await.map_err(DbError::from) });
    let outcome = waits.await.expect("it is told");
    assert!(matches!(outcome, Err(DbError::Unavailable(_))) && since.elapsed() >= BOUND, "{outcome:?}");
    until("the successor is asked", async || db.ping(CONNECT).await.is_ok()).await;
}

/// Red where nobody remembers who was late: each new connection would spend half of its time at the first host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_takes_connections_and_says_nothing_costs_the_first_of_them_and_not_each() {
    let cluster = Cluster::new(&[]).await;
    let (_keep, to) = watch::channel(socket(&cluster));
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, tried) = (silent.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
    let counted = tried.clone();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((client, _)) = silent.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            held.push(client);
        }
    });
    let url = format!("postgres://shopd@{address},{}/postgres?sslmode=disable&target_session_attrs=read-write", balancer(to).await);
    let db = connect(&url);
    for _ in 0..3 {
        db.dedicated().await.unwrap().batch_execute("select 1").await.unwrap();
    }
    assert_eq!(tried.load(Ordering::SeqCst), 1);
}
