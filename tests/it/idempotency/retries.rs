//! What a client does that does not know whether it was heard: it asks again, at once, elsewhere, after a crash.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use diesel_async::SimpleAsyncConnection;
use futures::future::join_all;
use shopd::config::Secret;
use shopd::db::{self, Db, DbError, Notifier, Schema};
use shopd::money::Amount;
use shopd::orders::{NewOrder, Orders, Origin, PlaceError};
use shopd::trace::TraceContext;
use shopd::user_id::UserId;
use uuid::Uuid;

use super::{DEPOSITS, PATIENT, Service, assert_replay, post, replayed, send_raw};
use crate::support::books::count;
use crate::support::inside::{done, until};
use crate::support::postgres;
use crate::support::shop::{Answer, Client, PATIENCE, Process, poll};

const DEPOSIT: &str = "/api/Account/ann/deposit";

async fn payments_with_ann(replicas: usize) -> Service {
    let service = Service::payments(replicas).await;
    service.clients[0].send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
    service
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_at_once_under_one_key_at_two_replicas_are_one_deposit() {
    let service = payments_with_ann(2).await;
    for round in 1..=10 {
        let key = format!("k{round}");
        let answers: Vec<Answer> = join_all((0..50).map(|n| post(&service.clients[n % 2], DEPOSIT, &key, Some("1")))).await;
        let done: Vec<_> = answers.iter().filter(|answer| answer.status == 200).collect();
        assert_eq!(done.iter().filter(|answer| !replayed(answer)).count(), 1, "one is the first: {answers:?}");
        assert!(done.iter().all(|answer| answer.text == done[0].text));
        for refused in answers.into_iter().filter(|answer| answer.status != 200) {
            assert_eq!(refused.expect(409).code(), "idempotency_in_progress");
        }
        assert_eq!(count(&service.db, DEPOSITS).await, round);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_request_runs_its_key_is_in_progress_elsewhere_and_afterwards_replayed() {
    let service = Service::start("payments", Schema::Payments, 2, &PATIENT).await;
    let (here, there) = (&service.clients[0], &service.clients[1]);
    here.send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
    let mut holder = service.holder("select 1 from account where user_id = 'ann' for update").await;
    let running = {
        let here = here.clone();
        tokio::spawn(async move { post(&here, DEPOSIT, "k", Some("1")).await })
    };
    service.until_waiting(1).await;
    let asked = Instant::now();
    assert_eq!(post(there, DEPOSIT, "k", Some("1")).await.expect(409).code(), "idempotency_in_progress");
    assert_eq!(post(there, DEPOSIT, "k", Some("2")).await.expect(409).code(), "idempotency_in_progress");
    assert!(asked.elapsed() < Duration::from_secs(10), "refused at once, not after a wait");
    holder.batch_execute("commit").await.unwrap();
    let first = running.await.unwrap().expect(200);
    assert!(!replayed(&first));
    assert_replay(&first, &post(there, DEPOSIT, "k", Some("1")).await);
    assert_eq!(post(there, DEPOSIT, "k", Some("2")).await.expect(422).code(), "idempotency_mismatch");
    assert_eq!(count(&service.db, DEPOSITS).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_never_delivered_is_given_to_the_retry() {
    let service = payments_with_ann(1).await;
    // Sent, and gone before the answer.
    drop(send_raw(&service.clients[0], DEPOSIT, b"k").await);
    let since = Instant::now();
    while count(&service.db, DEPOSITS).await == 0 {
        assert!(since.elapsed() < PATIENCE, "what was sent is done");
        poll().await;
    }
    let again = post(&service.clients[0], DEPOSIT, "k", Some("1")).await.expect(200);
    assert!(replayed(&again) && again.text.ends_with(r#""balance":1}"#), "{again:?}");
    assert_eq!(count(&service.db, DEPOSITS).await, 1);
}

/// What the rows are for: with one of them gone the same retry is a second deposit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_row_a_retry_deposits_again() {
    let service = payments_with_ann(1).await;
    let client = &service.clients[0];
    post(client, DEPOSIT, "k", Some("1")).await.expect(200);
    post(client, DEPOSIT, "k", Some("1")).await.expect(200);
    assert_eq!(count(&service.db, DEPOSITS).await, 1);
    service.run("delete from idempotency_key").await;
    assert!(!replayed(&post(client, DEPOSIT, "k", Some("1")).await.expect(200)));
    assert_eq!(count(&service.db, DEPOSITS).await, 2);
}

/// Sessions ended by the server leave the fate of their COMMIT unknown, processes killed leave answers undelivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deposits_that_are_retried_through_lost_sessions_and_crashes_happen_once_each() {
    let mut service = payments_with_ann(2).await;
    let addresses: Vec<String> = service.clients.iter().map(|client| client.base.clone()).collect();
    let clients = service.clients.clone();
    let (answered, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let load: Vec<_> = (0..8)
        .map(|c| {
            let (clients, answered, over) = (clients.clone(), answered.clone(), over.clone());
            tokio::spawn(async move {
                let (mut done, mut retries) = (0, 0);
                while !over.load(Ordering::Relaxed) {
                    retries += deposit_until_answered(&clients, &format!("c{c}-{done}")).await;
                    answered.fetch_add(1, Ordering::Relaxed);
                    done += 1;
                }
                (done, retries)
            })
        })
        .collect();
    for fault in 0..10 {
        let enough = answered.load(Ordering::Relaxed) + 40;
        until("some load in between", async || answered.load(Ordering::Relaxed) >= enough).await;
        if fault % 5 == 4 {
            let n = fault / 5;
            service.processes[n].kill().await;
            let mut env = service.env.clone();
            env.push(("SHOPD__PAYMENTS__LISTEN".into(), addresses[n].trim_start_matches("http://").into()));
            service.processes[n] = Process::start(&["payments"], &env);
        } else {
            service.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'shopd-payments' and datname = current_database()").await;
        }
    }
    over.store(true, Ordering::Relaxed);
    let (mut deposits, mut retries) = (0, 0);
    for task in load {
        let (done, retried) = task.await.unwrap();
        (deposits, retries) = (deposits + done, retries + retried);
    }
    assert_eq!(count(&service.db, DEPOSITS).await, deposits, "{retries} retries");
    assert!(deposits > 100 && retries > 10, "there was load, and trouble: {deposits} deposits, {retries} retries");
}

/// The number of retries it took.
async fn deposit_until_answered(clients: &[Client], key: &str) -> i64 {
    let since = Instant::now();
    let mut last = String::new();
    for retries in 0.. {
        assert!(since.elapsed() < PATIENCE, "{key} is not answered: {last}");
        let client = &clients[retries as usize % clients.len()];
        match client.send("POST", DEPOSIT, &[("Idempotency-Key", key)], Some("1")).await {
            Ok(answer) if answer.status == 200 => return retries,
            Ok(answer) if answer.status == 503 || answer.code() == "idempotency_in_progress" => last = answer.text,
            Ok(answer) => panic!("{answer:?}"),
            Err(error) => last = error.to_string(),
        }
        poll().await;
    }
    unreachable!("it returns or runs out of patience")
}

/// Red where one row that breaks a rule fails the batch that meets it: what was written beside it is tried again, and found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_again_for_an_order_that_cannot_be_read_makes_no_replay_of_a_new_one_beside_it() {
    let url = postgres::database("orders").await;
    let db = Db::new(&Secret::new(&*url), "test", &postgres::config()).unwrap();
    db::migrate(&db, &[Schema::Orders]).await.unwrap();
    let orders = Orders::new(db.clone(), Notifier::local([]));
    let order = || NewOrder {
        id: Uuid::now_v7(),
        user_id: UserId::new("ann").unwrap(),
        amount: Amount::from_minor(100).unwrap(),
        description: None,
    };
    let place = async |order: &NewOrder| {
        let origin = Origin { trace: TraceContext::new_root(), request_id: "r".into(), stamp: None };
        done(orders.place(order.clone(), origin, None).await)
    };
    let damaged = order();
    place(&damaged).await.unwrap();
    db.get().await.unwrap().batch_execute("update orders set user_id = ''").await.unwrap();
    for _ in 0..10 {
        // The first goes alone, and the others meet while it is written.
        let new: Vec<NewOrder> = (0..6).map(|_| order()).collect();
        let (again, placed) = tokio::join!(place(&damaged), join_all(new.iter().map(&place)));
        assert!(matches!(again, Err(PlaceError::Db(DbError::Defect(_)))), "{again:?}");
        let (again, mixed) = tokio::join!(place(&damaged), join_all(new.iter().chain([&damaged]).map(&place)));
        assert!(again.is_err() && mixed[6].is_err(), "{mixed:?}");
        assert!(mixed[..6].iter().flatten().filter(|placed| placed.replayed).count() == 6, "{mixed:?}");
        for placed in placed {
            let placed = placed.unwrap();
            assert!(placed.is_new && !placed.replayed, "{placed:?}");
        }
    }
    assert_eq!(count(&db, "select count(*) as n from orders").await, 61);
}
