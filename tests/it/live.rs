//! Live orders, over real ports and a real database: nothing is missed or comes twice, whatever commits when and wherever a client
//! comes back.

pub mod client;
mod plans;
mod replica;
mod sessions;
mod timeline;
mod waits;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt;
use serde_json::Value;
use shopd::db::sql;

use crate::support::books::count;
use crate::support::inside::{Inside, until};
use crate::support::shop::{Answer, poll};
use client::{Event, Events, Frame, WebSocket};
use replica::{Shop, accept, accept_described, connect, finish, order, run};

const LISTED: &str = "/api/Orders/events?userId=u";
/// Every change of a status there is.
const EVENTS: &str = "select count(*) as n from order_change where xid is not null";

fn of(n: usize) -> String {
    format!("/api/Orders/{}/events", order(n))
}

fn codes(answer: &Answer) -> (u16, String) {
    (answer.status, answer.code())
}

/// The position in an event's id.
fn place(event: &Event) -> &str {
    event.id.split(['+', '~']).next().unwrap()
}

/// What each event says, for comparison.
fn said(events: &[Event]) -> Vec<(String, String)> {
    events.iter().map(|event| (event.order(), event.status())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_orders_stream_begins_with_its_state_and_ends_with_it_on_any_replica() {
    let shop = Shop::new().await;
    let (one, other) = (shop.replica("one").await, shop.replica("other").await);
    shop.run(&accept("u", 1, 1)).await;

    let mut stream = Events::open(&one.base, &of(1), "").await;
    assert_eq!(stream.status, 200);
    for (name, value) in [("content-type", "text/event-stream"), ("cache-control", "no-store"), ("x-accel-buffering", "no")] {
        assert_eq!(stream.headers[name], value);
    }
    let new = stream.next().await.unwrap();
    assert_eq!(new.data, one.client.get(&format!("/api/Orders/{}", order(1))).await.text, "as GET has it");
    let mut same = Events::open(&other.base, &of(1), "").await;
    let there = same.next().await.unwrap();
    // What other tests' transactions on this server had open at either look may be named behind it.
    assert_eq!((&there.data, place(&there)), (&new.data, place(&new)), "the same event everywhere");
    drop(same);

    shop.run(&finish(1, 1)).await;
    let rest = stream.rest().await;
    assert_eq!(said(&rest), [(order(1), "Finished".to_owned())]);
    assert_eq!(rest[0].data, one.client.get(&format!("/api/Orders/{}", order(1))).await.text);
    assert_ne!(rest[0].id, new.id);

    let mut resumed = Events::open(&other.base, &of(1), &new.id).await;
    assert_eq!(said(&resumed.rest().await), said(&rest), "only what came later");
    let mut anew = Events::open(&other.base, &of(1), "").await;
    assert_eq!(said(&anew.rest().await), said(&rest), "the current state only");
    let over = Events::open(&other.base, &of(1), &rest[0].id).await;
    assert_eq!(over.status, 204, "a client stops coming back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_streamed_is_refused_as_a_problem() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, 1)).await;
    let ws = |id: &str| format!("/api/Orders/{id}/ws");
    for (path, last_id, status, code) in [
        (of(2), None, 404, "order_not_found"),
        ("/api/Orders/x/events".into(), None, 400, "invalid_order_id"),
        (of(1), Some("x"), 400, "invalid_request"),
        (LISTED.into(), Some("1-1~5,3"), 400, "invalid_request"),
        ("/api/Orders/events".into(), None, 400, "invalid_request"),
        ("/api/Orders/events?userId=".into(), None, 400, "invalid_request"),
        (ws(&order(1)), None, 400, "invalid_request"),
        (ws("x"), None, 400, "invalid_order_id"),
        (format!("/api/Orders/{}/timeline", order(2)), None, 404, "order_not_found"),
        ("/api/Orders/x/timeline".into(), None, 400, "invalid_order_id"),
    ] {
        let headers: Vec<_> = last_id.map(|id| ("Last-Event-ID", id)).into_iter().collect();
        let answer = one.client.send("GET", &path, &headers, None).await.unwrap();
        assert_eq!(codes(&answer), (status, code.to_owned()), "{path} {last_id:?}");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
    }
    let answer = one.client.send("POST", &of(1), &[], Some("{}")).await.unwrap();
    assert_eq!(codes(&answer), (405, "method_not_allowed".into()));
    let head = one.client.send("HEAD", &of(1), &[], None).await.unwrap();
    assert_eq!((head.status, head.text.as_str()), (200, ""), "the head of a stream, and no stream");
    assert!(WebSocket::open(&one.base, &ws(&order(2))).await.is_err_and(|answer| answer.starts_with("HTTP/1.1 404 ")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_commits_late_is_not_missed_and_holds_nobody_up() {
    let shop = Shop::new().await;
    let (one, other) = (shop.replica("one").await, shop.replica("other").await);
    // Open all the time, in another database: it must hold nobody up.
    let elsewhere = connect(&crate::support::postgres::database("live").await, "test");
    let mut bystander = elsewhere.dedicated().await.unwrap();
    run(&mut bystander, "create table t (i int); begin; insert into t values (1)").await;

    let mut stays = Events::open(&one.base, LISTED, "").await;
    let mut goes = Events::open(&one.base, LISTED, "").await;
    let mut late = shop.conn().await;
    run(&mut late, &format!("begin; {}", accept("u", 1, 2))).await;
    shop.run(&accept("u", 3, 3)).await;
    shop.run(&accept("u", 4, 4)).await;
    for stream in [&mut stays, &mut goes] {
        assert_eq!(said(&stream.take(2).await), [3, 4].map(|n| (order(n), "New".to_owned())), "not held up");
    }
    let last = {
        shop.run(&finish(3, 3)).await;
        goes.next().await.unwrap().id
    };
    assert!(last.contains('~'), "{last} says what is still open");
    drop(goes);
    run(&mut late, "commit").await;
    shop.run(&accept("u", 5, 5)).await;
    let missed = [(1, "New"), (2, "New"), (5, "New")].map(|(n, status)| (order(n), status.to_owned()));
    assert_eq!(stays.next().await.unwrap().order(), order(3), "which the other one has");
    let got = stays.take(3).await;
    assert_eq!(said(&got), missed);
    let mut resumed = Events::open(&other.base, LISTED, &last).await;
    assert_eq!(said(&resumed.take(3).await), missed, "exactly the rest, on another replica");
    // In the middle of what was late: the rest of that, on yet another stream.
    let mut again = Events::open(&other.base, LISTED, &got[0].id).await;
    assert_eq!(said(&again.take(2).await), missed[1..]);
}

/// The negative control of these: a cursor over the event's number alone passes what commits late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_over_the_number_alone_would_miss_what_commits_late() {
    let shop = Shop::new().await;
    let mut late = shop.conn().await;
    run(&mut late, &format!("begin; {}", accept("u", 1, 1))).await;
    shop.run(&accept("u", 2, 2)).await;
    shop.run("create table cursor as select max(id) as id from order_change").await;
    run(&mut late, "commit").await;
    let unseen = "select count(*) as n from order_change where id > (select id from cursor)";
    assert_eq!(count(&shop.db, unseen).await, 0, "the late one lies below the cursor");
    assert_eq!(count(&shop.db, EVENTS).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_writers_and_a_client_that_comes_and_goes_nothing_is_missed_or_comes_twice() {
    const WRITERS: usize = 8;
    const ORDERS: usize = 60;
    let shop = Arc::new(Shop::new().await);
    let replicas = [shop.replica("one").await, shop.replica("other").await];
    // The client is there before the writers are: a state stands for what came before it.
    shop.run(&accept("u", WRITERS * 1_000, WRITERS * 1_000)).await;
    let mut stream = Events::open(&replicas[0].base, LISTED, "").await;
    let first = stream.next().await.unwrap();
    let written = Arc::new(AtomicUsize::new(1));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (shop, written) = (shop.clone(), written.clone());
            tokio::spawn(async move {
                let mut conn = shop.conn().await;
                let mut last = None;
                for k in 0..ORDERS {
                    let n = writer * 1_000 + k;
                    let begun = format!("begin; {}", last.map_or(String::new(), |last| finish(last, last)));
                    run(&mut conn, &begun).await;
                    let pause = rand::rng().random_range(0..6);
                    tokio::time::sleep(Duration::from_millis(pause)).await; // the writer's own work
                    run(&mut conn, &accept("u", n, n)).await;
                    let keep = rand::rng().random_bool(0.9);
                    run(&mut conn, if keep { "commit" } else { "rollback" }).await;
                    if keep {
                        written.fetch_add(1 + usize::from(last.is_some()), Ordering::SeqCst);
                        last = Some(n);
                    }
                }
            })
        })
        .collect();
    let mut got = HashMap::from([((first.order(), first.status()), 1)]);
    let (mut last, mut lives) = (first.id, 0);
    let mut writing = tokio::spawn(async move {
        for writer in writers {
            writer.await.unwrap();
        }
    });
    let mut done = false;
    while !done || got.len() < written.load(Ordering::SeqCst) {
        lives += 1;
        for _ in 0..rand::rng().random_range(1..40) {
            tokio::select! {
                event = stream.next() => {
                    let event = event.expect("it stays open");
                    *got.entry((event.order(), event.status())).or_default() += 1;
                    last = event.id;
                }
                ended = &mut writing, if !done => {
                    ended.unwrap();
                    done = true;
                }
            }
            if done && got.len() >= written.load(Ordering::SeqCst) {
                break;
            }
        }
        stream = Events::open(&replicas[lives % 2].base, LISTED, &last).await;
    }
    let twice: Vec<_> = got.iter().filter(|(_, times)| **times != 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    let events = count(&shop.db, EVENTS).await;
    assert_eq!(got.len() as i64, events, "none missed, over {lives} streams");
    assert!(lives > 10, "it came and went {lives} times");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_states_come_in_order_and_a_client_that_breaks_off_among_them_gets_the_rest() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    for n in 1..=6 {
        shop.run(&accept("u", n, n)).await;
    }
    shop.run(&accept("somebody", 7, 7)).await;
    shop.run(&finish(2, 3)).await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    let states = stream.take(6).await;
    let expected = [(1, "New"), (4, "New"), (5, "New"), (6, "New"), (2, "Finished"), (3, "Finished")];
    let expected = expected.map(|(n, status)| (order(n), status.to_owned()));
    assert_eq!(said(&states), expected, "each order once, the oldest change first");
    shop.run(&accept("u", 8, 8)).await;
    let live = stream.next().await.unwrap();
    // Every change behind the state that came last, those that a state stood for among them.
    let changes =
        [(1, "New"), (2, "New"), (3, "New"), (4, "New"), (5, "New"), (6, "New"), (2, "Finished"), (3, "Finished"), (8, "New")];
    let changes = changes.map(|(n, status)| (order(n), status.to_owned()));
    for (state, said_there) in states.iter().zip(said(&states)) {
        let rest = &changes[changes.iter().position(|change| *change == said_there).unwrap() + 1..];
        let mut resumed = Events::open(&one.base, LISTED, &state.id).await;
        let got = resumed.take(rest.len()).await;
        assert_eq!(said(&got), rest);
        assert_eq!(place(got.last().unwrap()), place(&live));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resume_after_a_long_absence_brings_every_page_of_what_was_missed() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, 1)).await;
    let last = Events::open(&one.base, LISTED, "").await.next().await.unwrap().id;
    let mut late = shop.conn().await;
    run(&mut late, &format!("begin; {}", accept("u", 2, 700))).await;
    shop.run(&accept("u", 701, 1_400)).await;
    let mut stream = Events::open(&one.base, LISTED, &last).await;
    let mut got = stream.take(699).await;
    run(&mut late, "commit").await;
    drop(stream);
    let mut stream = Events::open(&one.base, LISTED, &got.last().unwrap().id).await;
    got.extend(stream.take(700).await);
    let orders: HashSet<_> = got.iter().map(Event::order).collect();
    assert_eq!((got.len(), orders.len()), (1_399, 1_399));
    assert_eq!(stream.headers["content-type"], "text/event-stream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_reads_too_slowly_is_dropped_and_gets_the_rest_when_it_comes_back() {
    const ORDERS: usize = 12_000;
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, 1)).await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    let mut got = stream.take(1).await;
    // More than the sockets between hold, and the queue behind them.
    for from in (2..ORDERS).step_by(1_000) {
        shop.run(&accept_described("u", from, from + 999, "repeat('x', 1000)")).await;
    }
    until("it is dropped", async || metric(&one.client.get("/metrics").await.text, "shopd_live_dropped_total") > 0).await;
    let written = count(&shop.db, EVENTS).await;
    let rest = stream.rest().await;
    let (word, events) = rest.split_last().unwrap();
    assert_eq!((word.name.as_str(), word.data.as_str(), word.id.as_str()), ("dropped", r#"{"reason":"slow_reader"}"#, ""));
    got.extend_from_slice(events);
    assert!((got.len() as i64) < written, "{} of {written}", got.len());
    while (got.len() as i64) < written {
        let mut stream = Events::open(&one.base, LISTED, &got.last().unwrap().id).await;
        while (got.len() as i64) < written {
            match stream.next().await {
                Some(event) if event.name.is_empty() => got.push(event),
                _ => break,
            }
        }
    }
    let orders: HashSet<_> = got.iter().map(Event::order).collect();
    assert_eq!((orders.len() as i64, got.len() as i64), (written, written));
}

fn metric(text: &str, name: &str) -> u64 {
    let lines = text.lines().filter(|line| line.starts_with(name));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Red where those who came during a look begin at it: what they know of may have been committed behind its snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_whose_acceptance_is_known_has_a_stream() {
    const EACH: usize = 100;
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    let begun = (0..8usize).map(|writer| {
        let (db, base) = (shop.db.clone(), one.base.clone());
        tokio::spawn(async move {
            let mut conn = db.dedicated().await.expect("a connection");
            let mut refused = 0;
            for n in writer * EACH + 1..=writer * EACH + EACH {
                run(&mut conn, &accept("u", n, n)).await;
                refused += usize::from(Events::open(&base, &of(n), "").await.status != 200);
            }
            refused
        })
    });
    let refused: usize = futures::future::join_all(begun).await.into_iter().map(Result::unwrap).sum();
    assert_eq!(refused, 0, "of {}", 8 * EACH);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_of_a_restored_database_are_streamed_and_new_ones_with_them() {
    let shop = Shop::new().await;
    shop.run(&accept("u", 1, 3)).await;
    shop.run(&finish(2, 2)).await;
    // As pg_restore leaves it: transaction ids that this server has not reached.
    shop.run(
        "update order_event set xid = (xid::text::bigint + 9000000000)::text::xid8;
         update orders set accepted_xid = (accepted_xid::text::bigint + 9000000000)::text::xid8;",
    )
    .await;
    let one = shop.replica("one").await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    let states = stream.take(3).await;
    let expected = [(1, "New"), (3, "New"), (2, "Finished")].map(|(n, status)| (order(n), status.to_owned()));
    assert_eq!(said(&states), expected);
    shop.run(&accept("u", 4, 4)).await;
    shop.run(&finish(1, 1)).await;
    let live = stream.take(2).await;
    assert_eq!(said(&live), [(order(4), "New".to_owned()), (order(1), "Finished".to_owned())]);
    let mut resumed = Events::open(&one.base, LISTED, &states[1].id).await;
    assert_eq!(said(&resumed.take(3).await), said(&[states[2].clone(), live[0].clone(), live[1].clone()]));
    let over = Events::open(&one.base, &of(2), &states[2].id).await;
    assert_eq!(over.status, 204);
    // An id that only the old server could give: the current state at once.
    let mut anew = Events::open(&one.base, &of(3), "9000000999-7").await;
    assert_eq!(anew.next().await.unwrap().order(), order(3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_tells_the_same_and_closes_normally_behind_the_last_state() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, 2)).await;
    let path = |n| format!("/api/Orders/{}/ws", order(n));
    let item = async |n| Frame::Text(one.client.get(&format!("/api/Orders/{}", order(n))).await.text);
    let mut socket = WebSocket::open(&one.base, &path(1)).await.unwrap();
    assert_eq!(socket.next().await, item(1).await);
    socket.send(1, b"nobody listens to this").await;
    socket.send(9, b"there?").await;
    assert_eq!(socket.next().await, Frame::Pong(b"there?".to_vec()));
    shop.run(&finish(1, 1)).await;
    assert_eq!(socket.next().await, item(1).await);
    assert_eq!(socket.next().await, Frame::Close(1000, String::new()));

    let mut over = WebSocket::open(&one.base, &path(1)).await.unwrap();
    assert_eq!((over.next().await, over.next().await), (item(1).await, Frame::Close(1000, String::new())));
    let mut large = WebSocket::open(&one.base, &path(2)).await.unwrap();
    assert_eq!(large.next().await, item(2).await);
    large.send(1, &[b'x'; 10_000]).await;
    assert!(matches!(large.next().await, Frame::Close(1002, _)));
    let mut leaves = WebSocket::open(&one.base, &path(2)).await.unwrap();
    assert_eq!(leaves.next().await, item(2).await);
    leaves.send(8, &1000u16.to_be_bytes()).await;
    assert!(matches!(leaves.next().await, Frame::Close(1000, _)));
}
