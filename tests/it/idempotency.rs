//! `Idempotency-Key`: one effect a key, and one answer, whatever is repeated, wherever and whenever.

mod deadline;
mod model;
mod retries;
mod stamps;

use std::time::{Duration, Instant};

use chrono::Utc;
use diesel_async::{AsyncPgConnection, SimpleAsyncConnection};
use futures::future::join_all;
use shopd::db::{self, Db, Schema};
use shopd::http::idempotency;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use uuid::Uuid;

use crate::support::books::{connect, count};
use crate::support::postgres;
use crate::support::shop::{All, Answer, Client, PATIENCE, Process, poll, raw_member};

const DEPOSITS: &str = "select count(*) as n from transfer where order_id is null";
const KEYS: &str = "select count(*) as n from idempotency_key";
/// How many sessions wait for a lock.
const WAITING: &str = "select count(*) as n from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
/// For services that wait for what a test holds: longer than any stall of a busy machine.
const PATIENT: [(&str, &str); 2] =
    [("SHOPD__DATABASE__LOCK_TIMEOUT_MS", "30000"), ("SHOPD__DATABASE__STATEMENT_TIMEOUT_MS", "30000")];

/// Replicas of one service on one database; without a broker, which its port does not need.
struct Service {
    processes: Vec<Process>,
    clients: Vec<Client>,
    db: Db,
    env: Vec<(String, String)>,
}

impl Service {
    async fn start(role: &'static str, schema: Schema, replicas: usize, settings: &[(&str, &str)]) -> Self {
        let url = postgres::database(role).await;
        let db = connect(&url);
        db::migrate(&db, &[schema]).await.expect("a schema");
        let mut env = vec![
            (format!("SHOPD__{}__DATABASE_URL", role.to_uppercase()), url),
            // Nobody listens there.
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS".into(), "127.0.0.1:1".into()),
        ];
        env.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let processes: Vec<_> = (0..replicas).map(|_| Process::start(&[role], &env)).collect();
        let mut clients = Vec::new();
        for process in &processes {
            let client = Client::new(process.address(role).await);
            client.ready().await;
            clients.push(client);
        }
        Self { processes, clients, db, env }
    }

    async fn payments(replicas: usize) -> Self {
        Self::start("payments", Schema::Payments, replicas, &[]).await
    }

    /// A transaction of somebody else's that holds what `lock` takes, for as long as the test likes.
    async fn holder(&self, lock: &str) -> AsyncPgConnection {
        let mut holder = self.db.dedicated().await.expect("a connection");
        let begin = format!("begin; set local idle_in_transaction_session_timeout = 0; {lock}");
        holder.batch_execute(&begin).await.expect(lock);
        holder
    }

    /// Waits until so many sessions wait for a lock.
    async fn until_waiting(&self, sessions: i64) {
        let since = Instant::now();
        while count(&self.db, WAITING).await < sessions {
            assert!(since.elapsed() < PATIENCE, "{sessions} wait for a lock");
            poll().await;
        }
    }

    async fn run(&self, statements: &str) {
        self.db.dedicated().await.expect("a connection").batch_execute(statements).await.expect(statements);
    }
}

async fn post(client: &Client, path: &str, key: &str, body: Option<&str>) -> Answer {
    client.send("POST", path, &[("Idempotency-Key", key)], body).await.expect("an answer")
}

fn replayed(answer: &Answer) -> bool {
    answer.headers.get("idempotent-replayed").is_some_and(|value| value == "true")
}

/// `again` must be `first`, byte for byte, marked as a replay.
#[track_caller]
fn assert_replay(first: &Answer, again: &Answer) {
    assert!(replayed(again), "{again:?}");
    assert_eq!((first.status, &first.text), (again.status, &again.text));
    for name in ["content-type", "location"] {
        assert_eq!(first.headers.get(name), again.headers.get(name), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_comes_again_is_answered_as_the_first_time_and_nothing_happens_again() {
    let mut shop = All::start(postgres::own_dir()).await;
    let client = shop.client.clone();
    let opened = post(&client, "/api/PaymentsProxy/ann", "open", None).await.expect(200);
    let deposited = post(&client, "/api/PaymentsProxy/ann/deposit", "k", Some("100.5")).await.expect(200);
    let order = r#"{"userId":"ann","amount":0.5}"#;
    let placed = post(&client, "/api/OrdersProxy", "k", Some(order)).await.expect(201);
    assert!(![&opened, &deposited, &placed].into_iter().any(replayed), "the first time is no replay");
    let id = placed.json()["id"].as_str().unwrap().to_owned();
    client.ended(&id).await;

    for restarted in [false, true] {
        if restarted {
            shop.process.kill().await;
            shop = All::start(shop.dir.clone()).await;
        }
        let client = &shop.client;
        assert_replay(&opened, &post(client, "/api/PaymentsProxy/ann", "open", None).await);
        assert_replay(&deposited, &post(client, "/api/PaymentsProxy/ann/deposit", "k", Some("100.5")).await);
        // The answer of then, though the order has ended since; its id alone answers the state of now.
        assert_replay(&placed, &post(client, "/api/OrdersProxy", "k", Some(order)).await);
        assert_eq!(placed.json()["status"], "New");
        let by_id = format!(r#"{{"orderId":"{id}","userId":"ann","amount":0.5}}"#);
        let now = client.post("/api/OrdersProxy", &by_id).await.expect(200);
        assert_eq!((replayed(&now), &now.json()["status"]), (true, &"Finished".into()));
        assert_eq!(client.balance("ann").await, "100");
        assert_eq!(client.get("/api/OrdersProxy?userId=ann").await.json().as_array().unwrap().len(), 1);

        // The same key at the service's own port is the same request; the way on leads through the port that was asked.
        let own = post(&Client::new(shop.orders.clone()), "/api/Orders", "k", Some(order)).await.expect(201);
        assert_eq!((own.text.as_str(), own.headers["location"].as_str()), (placed.text.as_str(), &*format!("/api/Orders/{id}")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_with_another_body_is_refused_and_nothing_happens() {
    let service = Service::payments(1).await;
    let client = &service.clients[0];
    post(client, "/api/Account/ann", "open", None).await.expect(200);
    assert_eq!(post(client, "/api/Account/ann", "open", Some("other")).await.expect(422).code(), "idempotency_mismatch");
    post(client, "/api/Account/ann/deposit", "k", Some("5")).await.expect(200);
    // The bytes count, not what they mean.
    for other in ["6", "5.0", " 5", r#"{"amount":5}"#] {
        let refused = post(client, "/api/Account/ann/deposit", "k", Some(other)).await.expect(422);
        assert_eq!(
            (refused.code(), refused.headers["content-type"].as_str()),
            ("idempotency_mismatch".into(), "application/problem+json")
        );
        assert!(!replayed(&refused));
    }
    assert_eq!(count(&service.db, DEPOSITS).await, 1);
    let orders = Service::start("orders", Schema::Orders, 1, &[]).await;
    post(&orders.clients[0], "/api/Orders", "k", Some(r#"{"userId":"ann","amount":1}"#)).await.expect(201);
    let refused = post(&orders.clients[0], "/api/Orders", "k", Some(r#"{"userId":"ann","amount":2}"#)).await.expect(422);
    assert_eq!(refused.code(), "idempotency_mismatch");
    assert_eq!(count(&orders.db, "select count(*) as n from orders").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_counts_where_it_was_used_however_the_path_is_spelled() {
    let service = Service::payments(1).await;
    let client = &service.clients[0];
    for user in ["ann", "bob", "a%2Fdeposit", "a"] {
        post(client, &format!("/api/Account/{user}"), "k", None).await.expect(200);
        let deposited = post(client, &format!("/api/Account/{user}/deposit"), "k", Some("1")).await.expect(200);
        assert!(!replayed(&deposited), "{user}");
    }
    assert!(replayed(&post(client, "/api/Account/%61nn/deposit", "k", Some("1")).await.expect(200)));
    assert_eq!((count(&service.db, DEPOSITS).await, count(&service.db, KEYS).await), (4, 8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_must_be_one_of_1_to_255_characters() {
    let service = Service::payments(1).await;
    let client = &service.clients[0];
    client.send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
    let (longest, too_long) = ("k".repeat(255), "k".repeat(256));
    for bad in [vec![""], vec![" "], vec![too_long.as_str()], vec!["a", "b"], vec!["a", "a"]] {
        let headers: Vec<_> = bad.iter().map(|key| ("Idempotency-Key", *key)).collect();
        let refused = client.send("POST", "/api/Account/ann/deposit", &headers, Some("1")).await.unwrap().expect(400);
        assert_eq!(refused.code(), "invalid_request");
        assert!(refused.json()["errors"]["Idempotency-Key"].is_array(), "{refused:?}");
    }
    assert_eq!(raw_status(client, "/api/Account/ann/deposit", b"\xff").await, 400);
    assert_eq!(count(&service.db, DEPOSITS).await, 0);
    post(client, "/api/Account/ann/deposit", &longest, Some("1")).await.expect(200);

    // The longest there can be of both, each character four bytes long, must still fit into the index.
    let user = "%F0%9F%A6%80".repeat(128);
    client.send("POST", &format!("/api/Account/{user}"), &[], None).await.unwrap().expect(200);
    let path = format!("/api/Account/{user}/deposit");
    // Of scattered digits, which compress badly.
    let key: String = (0..255u32).map(|n| char::from_u32(0x1f300 + n.wrapping_mul(2_654_435_761) % 0x2ff).unwrap()).collect();
    assert_eq!(raw_status(client, &path, key.as_bytes()).await, 200);
    assert_eq!(raw_status(client, &path, key.as_bytes()).await, 200);
    assert_eq!(count(&service.db, DEPOSITS).await, 2);
}

/// The status of a deposit of 1 under a key of any bytes.
async fn raw_status(client: &Client, path: &str, key: &[u8]) -> u16 {
    let mut stream = send_raw(client, path, key).await;
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    std::str::from_utf8(&status[9..]).unwrap().parse().unwrap()
}

async fn send_raw(client: &Client, path: &str, key: &[u8]) -> tokio::net::TcpStream {
    send_head(client, path, &[b"idempotency-key: ", key, b"\r\n"].concat(), "1").await
}

/// A request with `headers` as they are, each with its line's end.
async fn send_head(client: &Client, path: &str, headers: &[u8], body: &str) -> tokio::net::TcpStream {
    let mut stream = tokio::net::TcpStream::connect(client.base.trim_start_matches("http://")).await.unwrap();
    let length = body.len();
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n");
    stream.write_all(&[head.as_bytes(), headers, b"\r\n", body.as_bytes()].concat()).await.unwrap();
    stream
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_that_came_of_the_effect_is_replayed_though_the_state_has_changed() {
    let service = Service::payments(1).await;
    let client = &service.clients[0];
    let deposit = "/api/Account/ann/deposit";
    let missing = post(client, deposit, "early", Some("1")).await.expect(404);
    assert_eq!(missing.code(), "account_not_found");
    post(client, "/api/Account/ann", "open", None).await.expect(200);
    assert_replay(&missing, &post(client, deposit, "early", Some("1")).await);
    post(client, deposit, "late", Some("1")).await.expect(200);

    let exists = post(client, "/api/Account/ann", "again", None).await.expect(409);
    assert_replay(&exists, &post(client, "/api/Account/ann", "again", None).await);
    service.run("update account set balance = 9223372036854775807").await;
    let full = post(client, deposit, "full", Some("1")).await.expect(400);
    service.run("update account set balance = 100").await;
    assert_eq!(full.code(), "amount_too_large");
    assert_replay(&full, &post(client, deposit, "full", Some("1")).await);
    assert_eq!(count(&service.db, DEPOSITS).await, 1);

    let orders = Service::start("orders", Schema::Orders, 1, &[]).await;
    let (client, id) = (&orders.clients[0], Uuid::new_v4());
    let order = |amount: u8| format!(r#"{{"orderId":"{id}","userId":"ann","amount":{amount}}}"#);
    post(client, "/api/Orders", "a", Some(&order(1))).await.expect(201);
    let conflict = post(client, "/api/Orders", "b", Some(&order(2))).await.expect(409);
    assert_eq!(conflict.code(), "order_conflict");
    assert_replay(&conflict, &post(client, "/api/Orders", "b", Some(&order(2))).await);
    let same = post(client, "/api/Orders", "c", Some(&order(1))).await.expect(200);
    assert!(replayed(&same), "the order's own id");
    assert_replay(&same, &post(client, "/api/Orders", "c", Some(&order(1))).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_before_the_effect_or_fails_is_not_stored() {
    let service = Service::payments(1).await;
    let client = &service.clients[0];
    client.send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
    for (bad, status) in [("0", 400), ("{", 400), ("0.001", 400)] {
        post(client, "/api/Account/ann/deposit", "k", Some(bad)).await.expect(status);
    }
    // A bad row among good ones, all at once: each request has its own fate.
    service.run("alter table transfer add constraint unlucky check (amount <> 1300)").await;
    let asked = (1..=20).map(|n| (n, format!("n{n}"), n.to_string()));
    let asked: Vec<_> = asked.collect();
    let answers = join_all(asked.iter().map(|(_, key, body)| post(client, "/api/Account/ann/deposit", key, Some(body)))).await;
    for ((n, ..), answer) in asked.iter().zip(&answers) {
        assert_eq!(answer.status, if *n == 13 { 500 } else { 200 }, "{n}: {answer:?}");
    }
    service.run("alter table transfer drop constraint unlucky").await;
    let again = join_all(asked.iter().map(|(_, key, body)| post(client, "/api/Account/ann/deposit", key, Some(body)))).await;
    for ((n, ..), answer) in asked.iter().zip(&again) {
        assert_eq!((answer.status, replayed(answer)), (200, *n != 13), "{n}: {answer:?}");
    }
    post(client, "/api/Account/ann/deposit", "k", Some("1")).await.expect(200);
    assert_eq!(count(&service.db, DEPOSITS).await, 21);
    let balance = client.get("/api/Account/ann/balance").await;
    assert_eq!(raw_member(&balance.text, "balance"), "211");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_key_nothing_asks_the_table_of_keys() {
    let payments = Service::payments(1).await;
    let orders = Service::start("orders", Schema::Orders, 1, &[]).await;
    for service in [&payments, &orders] {
        service.run("drop function claim_stamped_keys(text[], text[], bigint[]); drop table idempotency_key").await;
    }
    let client = &payments.clients[0];
    client.send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
    client.post("/api/Account/ann/deposit", "1").await.expect(200);
    orders.clients[0].post("/api/Orders", r#"{"userId":"ann","amount":1}"#).await.expect(201);
    // An order keeps the key that the gateway added itself, also among others that have none.
    let orders = &orders.clients[0];
    let stamp = Uuid::now_v7().to_string();
    let added = [("X-Shopd-Stamp", stamp.as_str()), ("Idempotency-Key", &stamp)];
    let batch = (0..20)
        .map(|n| orders.send("POST", "/api/Orders", if n % 2 == 0 { &added } else { &[] }, Some(r#"{"userId":"ann","amount":1}"#)));
    join_all(batch).await.into_iter().for_each(|answer| drop(answer.unwrap().expect(201)));
    // With one it does, so the test can fail.
    post(client, "/api/Account/ann/deposit", "k", Some("1")).await.expect(503);
    post(orders, "/api/Orders", "k", Some(r#"{"userId":"ann","amount":1}"#)).await.expect(503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_keys_are_deleted_a_thousand_a_step_by_any_number_of_processes() {
    let db = connect(&postgres::database("payments").await);
    db::migrate(&db, &[Schema::Payments]).await.expect("a schema");
    let day = Duration::from_secs(24 * 3600);
    // Once before there is anything: the statement's plan is made then, and kept.
    assert_eq!(idempotency::prune(&db, Utc::now(), day).await.unwrap(), 0);
    let rows = "insert into idempotency_key (key, scope, body_hash, status, headers, body, created_at)
                select 'k' || n, 'POST /', '', 200, '[]', '', now() - case when n % 2 = 0 then interval '25 hours' else interval '23 hours' end
                  from generate_series(1, 20000) n";
    db.dedicated().await.unwrap().batch_execute(rows).await.unwrap();
    // Where the database's clock is two hours ahead of this process's, they are as old as the younger of the two says.
    assert_eq!(idempotency::prune(&db, Utc::now() - 2 * Duration::from_secs(3600), day).await.unwrap(), 0);
    let deleted = join_all((0..4).map(|_| async {
        let mut all = 0;
        loop {
            let deleted = idempotency::prune(&db, Utc::now(), day).await.unwrap();
            assert!(deleted <= 1_000, "{deleted}");
            all += deleted;
            if deleted == 0 {
                return all;
            }
        }
    }));
    assert_eq!(deleted.await.iter().sum::<u64>(), 10_000);
    assert_eq!(count(&db, "select count(*) as n from idempotency_key where created_at < now() - interval '24 hours'").await, 0);
    assert_eq!(count(&db, KEYS).await, 10_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_past_its_retention_is_forgotten() {
    // It is looked at every two seconds.
    let retention = [("SHOPD__HTTP__IDEMPOTENCY_RETENTION_MS", "20000")];
    for (role, schema, path, body) in [
        ("payments", Schema::Payments, "/api/Account/ann", None),
        ("orders", Schema::Orders, "/api/Orders", Some(r#"{"userId":"ann","amount":1}"#)),
    ] {
        let service = Service::start(role, schema, 1, &retention).await;
        post(&service.clients[0], path, "k", body).await;
        assert_eq!(count(&service.db, KEYS).await, 1, "{role}");
        service.run("update idempotency_key set created_at = created_at - interval '2 minutes'").await;
        let since = Instant::now();
        while count(&service.db, KEYS).await > 0 {
            assert!(since.elapsed() < PATIENCE, "{}", service.processes[0].log());
            poll().await;
        }
        let again = post(&service.clients[0], path, "k", body).await;
        assert!(!replayed(&again), "{again:?}");
    }
}
