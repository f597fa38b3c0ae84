//! `shopd all` killed at random moments under load: nothing that was acknowledged is missing, every order ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use rand::RngExt;
use shopd::db::Db;
use shopd::embedded;
use uuid::Uuid;

use crate::support::books::{assert_balanced, connect, count};
use crate::support::postgres;
use crate::support::shop::{All, Client, PATIENCE, poll};

/// What clients know.
#[derive(Default)]
struct History {
    /// 201 or 200 was answered.
    accepted: Vec<Uuid>,
    /// Deposits of 1.00 that were acknowledged, and those whose fate is unknown.
    deposited: i64,
    indefinite: i64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_kills_under_load_lose_nothing_that_was_acknowledged() {
    let kills = 20;
    let mut shop = All::start(postgres::own_dir()).await;
    shop.client.account("ann", "1000000").await;
    let client = Arc::new(RwLock::new(shop.client.clone()));
    let history = Arc::new(Mutex::new(History::default()));
    let load: Vec<_> = (0..8).map(|n| tokio::spawn(load(n, client.clone(), history.clone()))).collect();
    for _ in 0..kills {
        let moment = Duration::from_millis(rand::rng().random_range(20..400));
        tokio::time::sleep(moment).await; // the poll of fate: any moment will do
        shop.process.kill().await;
        let restarted = Instant::now();
        shop = All::start(shop.dir.clone()).await;
        assert!(restarted.elapsed() < Duration::from_secs(20));
        *client.write().unwrap() = shop.client.clone();
    }
    for task in load {
        task.abort();
        let _ = task.await;
    }
    let attached = embedded::attach(&embedded::Options::new(&shop.dir)).await.expect("the running server");
    assert!(!attached.is_host());
    let (orders, payments): (Db, Db) =
        (connect(attached.url("shopd_orders").expose()), connect(attached.url("shopd_payments").expose()));
    let since = Instant::now();
    while count(&orders, "select count(*) as n from orders where status = 'New'").await > 0 {
        assert!(since.elapsed() < PATIENCE, "orders do not end: {}", shop.process.log());
        poll().await;
    }
    assert_balanced(&orders, &payments).await;
    let (accepted, deposited, indefinite) = {
        let history = history.lock().unwrap();
        (history.accepted.clone(), history.deposited, history.indefinite)
    };
    let stored: HashMap<Uuid, ()> = {
        use diesel_async::RunQueryDsl;
        #[derive(diesel::QueryableByName)]
        struct Id {
            #[diesel(sql_type = diesel::sql_types::Uuid)]
            id: Uuid,
        }
        let mut conn = orders.get().await.unwrap();
        let ids: Vec<Id> = shopd::db::sql("select id from orders").load(&mut *conn).await.unwrap();
        ids.into_iter().map(|row| (row.id, ())).collect()
    };
    for id in &accepted {
        assert!(stored.contains_key(id), "accepted order {id} is missing");
    }
    let applied = count(&payments, "select count(*) - 1 as n from transfer where order_id is null").await;
    assert!(
        (deposited..=deposited + indefinite).contains(&applied),
        "{deposited} acknowledged, {indefinite} unknown, {applied} there"
    );
    assert!(accepted.len() > 100 && deposited > 20, "there was load: {} orders, {deposited} deposits", accepted.len());
}

async fn load(n: usize, client: Arc<RwLock<Client>>, history: Arc<Mutex<History>>) {
    loop {
        let client = client.read().unwrap().clone();
        if n == 0 {
            // Beforehand: whoever ends this task in the middle does not learn its fate either.
            history.lock().unwrap().indefinite += 1;
            let answer = client.send("POST", "/api/PaymentsProxy/ann/deposit", &[], Some("1")).await;
            let mut history = history.lock().unwrap();
            match answer {
                Ok(answer) if answer.status == 200 => {
                    (history.deposited, history.indefinite) = (history.deposited + 1, history.indefinite - 1)
                }
                // Refused before anything was sent: certainly not applied.
                Err(error) if error.is_connect() => history.indefinite -= 1,
                _ => {}
            }
        } else {
            let id = Uuid::now_v7();
            let body = format!(r#"{{"orderId":"{id}","userId":"ann","amount":0.01}}"#);
            if let Ok(answer) = client.send("POST", "/api/OrdersProxy", &[], Some(&body)).await
                && matches!(answer.status, 200 | 201)
            {
                history.lock().unwrap().accepted.push(id);
            }
        }
        poll().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_on_one_data_directory_says_so_and_ends() {
    let shop = All::start(postgres::own_dir()).await;
    let mut second = crate::support::shop::Process::start(&["all", "--data-dir", shop.dir.to_str().unwrap()], &[]);
    assert!(!second.ended().await.success());
    let said = || second.log().contains(&shop.process.pid().to_string());
    postgres::eventually("it names the first", said).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_drains_and_the_next_start_finds_everything() {
    let mut shop = All::start(postgres::own_dir()).await;
    shop.client.account("ann", "5").await;
    let id = crate::scenario::place(&shop.client, "ann", "2.5").await;
    shop.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(shop.process.ended().await.success(), "{}", shop.process.log());
    assert!(!shop.dir.join("postgres/postmaster.pid").exists(), "the server was stopped too");
    let shop = All::start(shop.dir.clone()).await;
    assert_eq!(shop.client.ended(&id).await["status"], "Finished");
    assert_eq!(shop.client.balance("ann").await, "2.5");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_it_at_once_and_leaves_no_server_behind() {
    let mut shop = All::start(postgres::own_dir()).await;
    let gateway = shop.process.address("gateway").await;
    // A body that never comes: the drain has something to wait for.
    let mut slow = std::net::TcpStream::connect(gateway.trim_start_matches("http://")).unwrap();
    let head = "POST /api/OrdersProxy HTTP/1.1\r\nhost: shop\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n{";
    std::io::Write::write_all(&mut slow, head.as_bytes()).unwrap();
    shop.client.account("ann", "1").await; // by now the gateway has the other request, too
    let interrupt = nix::sys::signal::Signal::SIGINT;
    shop.process.signal(interrupt);
    let log = || shop.process.log();
    postgres::eventually("the first signal is seen", || log().contains("a second signal ends it at once")).await;
    shop.process.signal(interrupt);
    assert_eq!(shop.process.ended().await.code(), Some(130), "{}", shop.process.log());
    postgres::eventually("the end of the server", || !shop.dir.join("postgres/postmaster.pid").exists()).await;
}
