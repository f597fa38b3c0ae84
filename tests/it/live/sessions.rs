//! The session that feeds a process's streams: it may be lost, it ends with the process, and without streams there is none.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_outlives_the_session_that_feeds_it() {
    let shop = Shop::new().await;
    let one = shop.replica("fed").await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    shop.run(&accept("u", 1, 1)).await;
    let mut got = stream.take(1).await;
    for n in 2..=4 {
        let mut late = shop.conn().await;
        run(&mut late, &format!("begin; {}", accept("u", n * 10, n * 10))).await;
        shop.run(&accept("u", n, n)).await;
        got.extend(stream.take(1).await);
        shop.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'shopd-fed' and pid <> pg_backend_pid()")
            .await;
        run(&mut late, "commit").await;
        got.extend(stream.take(1).await);
    }
    let expected = [1, 2, 20, 3, 30, 4, 40].map(|n| (order(n), "New".to_owned()));
    assert_eq!(said(&got), expected);
}

/// Red where a session that cannot begin forgets where everybody stands: the next one would begin with what is there then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_while_no_session_can_begin_reaches_who_listens() {
    let shop = Shop::new().await;
    let one = shop.replica("kept-out").await;
    shop.run(&accept("u", 1, 1)).await;
    let mut stream = Events::open(&one.base, &of(1), "").await;
    assert_eq!(stream.take(1).await[0].status(), "New");
    let mut holder = shop.conn().await;
    run(&mut holder, &format!("begin; lock table order_event in access exclusive mode; {}", finish(1, 1))).await;
    // The one that was looking, one that could not begin, and the next.
    let mut waited = HashSet::new();
    until("a third session waits", async || {
        waited.extend(waiting_for_a_lock(&shop, "kept-out").await);
        waited.len() >= 3
    })
    .await;
    run(&mut holder, "commit").await;
    assert_eq!(said(&stream.take(1).await), [(order(1), "Finished".to_owned())]);
}

/// Server processes of `role` that wait for a lock.
async fn waiting_for_a_lock(shop: &Shop, role: &str) -> Vec<i32> {
    use diesel_async::RunQueryDsl;
    #[derive(diesel::QueryableByName)]
    struct Waiting {
        #[diesel(sql_type = diesel::sql_types::Integer)]
        pid: i32,
    }
    let statement = sql("select pid from pg_stat_activity where datname = current_database() and application_name = 'shopd-' || $1
                            and wait_event_type = 'Lock'");
    let found: Vec<Waiting> = statement.bind::<diesel::sql_types::Text, _>(role).load(&mut shop.conn().await).await.unwrap();
    found.into_iter().map(|one| one.pid).collect()
}

/// Red where it stops the reader: everybody would hear heartbeats alone from then on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_this_version_cannot_read_is_passed_over_and_nobody_waits_behind_it() {
    let shop = Shop::new().await;
    let one = shop.replica("older").await;
    shop.run(&accept("u", 1, 2)).await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    let begun = stream.take(2).await;
    let odd = format!(
        "insert into order_event (order_id, status, failure_reason, at) values ('{}', 'Cancelled', 'a_later_reason', now());",
        order(1)
    );
    shop.run(&odd).await;
    shop.run(&finish(2, 2)).await;
    assert_eq!(said(&stream.take(1).await), [(order(2), "Finished".to_owned())]);
    // Nor does who comes or comes back.
    let mut back = Events::open(&one.base, LISTED, &begun.last().unwrap().id).await;
    assert_eq!(said(&back.take(1).await), [(order(2), "Finished".to_owned())]);
    let states = Events::open(&one.base, LISTED, "").await.take(1).await;
    assert_eq!(said(&states), [(order(2), "Finished".to_owned())]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_at_once_when_their_process_stops() {
    let shop = Shop::new().await;
    let (mut one, other) = (shop.replica("one").await, shop.replica("other").await);
    shop.run(&accept("u", 1, 1)).await;
    let (mut order_stream, mut user_stream) =
        (Events::open(&one.base, &of(1), "").await, Events::open(&one.base, LISTED, "").await);
    let mut socket = WebSocket::open(&one.base, &format!("/api/Orders/{}/ws", order(1))).await.unwrap();
    let last = order_stream.next().await.unwrap();
    assert_eq!(user_stream.next().await.unwrap().data, last.data);
    assert!(matches!(socket.next().await, Frame::Text(_)));
    let waits = tokio::spawn({
        let client = one.client.clone();
        async move {
            let body = r#"{"userId":"u","amount":1}"#;
            client.send("POST", "/api/Orders", &[("Prefer", "wait=30")], Some(body)).await.unwrap()
        }
    });
    assert_eq!(user_stream.next().await.unwrap().status(), "New");
    let asked = Instant::now();
    one.stop.stop();
    for stream in [&mut order_stream, &mut user_stream] {
        let rest = stream.rest().await;
        let (word, others) = rest.split_last().unwrap();
        assert_eq!((word.name.as_str(), word.data.as_str(), others.len()), ("closing", r#"{"reason":"stopping"}"#, 0));
    }
    assert_eq!(socket.next().await, Frame::Close(1001, "stopping".into()));
    let answer = waits.await.unwrap();
    assert_eq!((answer.status, answer.json()["status"].as_str()), (201, Some("New")), "who waits is answered");
    (&mut one.served).await.unwrap().expect("a clean end");
    assert!(asked.elapsed() < Duration::from_secs(15), "{:?}", asked.elapsed());
    shop.run(&finish(1, 1)).await;
    let mut resumed = Events::open(&other.base, &of(1), &last.id).await;
    assert_eq!(said(&resumed.rest().await), [(order(1), "Finished".to_owned())]);
}

#[derive(diesel::QueryableByName)]
struct Begun {
    #[diesel(sql_type = diesel::sql_types::BigInt)]
    sessions: i64,
    #[diesel(sql_type = diesel::sql_types::Text)]
    begun: String,
}

/// The sessions of `role` that have asked something like `query`, and when each began its last statement.
pub async fn sessions(shop: &Shop, role: &str, query: &str) -> (i64, String) {
    use diesel_async::RunQueryDsl;
    let statement = sql("select count(*) as sessions, coalesce(string_agg(query_start::text, ' ' order by pid), '') as begun
          from pg_stat_activity where datname = current_database() and application_name = 'shopd-' || $1 and query ~* $2");
    let statement = statement.bind::<diesel::sql_types::Text, _>(role).bind::<diesel::sql_types::Text, _>(query);
    let Begun { sessions, begun } = statement.get_result(&mut shop.conn().await).await.unwrap();
    (sessions, begun)
}

/// Those that read events for streams or hear of them.
async fn feeding(shop: &Shop) -> (i64, String) {
    sessions(shop, "idle", "listen shopd_order_event|pg_current_snapshot|order_change e").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_streams_nothing_is_asked() {
    let shop = Shop::new().await;
    let one = shop.replica("idle").await;
    let placed = one.client.post("/api/Orders", r#"{"userId":"u","amount":1}"#).await;
    assert_eq!(placed.status, 201);
    assert_eq!(feeding(&shop).await.0, 0, "nobody came yet");
    let id = placed.json()["id"].as_str().unwrap().to_owned();
    // A stream of events would be missed only when its next heartbeat cannot be sent.
    let mut stream = WebSocket::open(&one.base, &format!("/api/Orders/{id}/ws")).await.unwrap();
    assert_eq!(stream.next().await, Frame::Text(placed.text));
    assert!(feeding(&shop).await.0 > 0);
    drop(stream);
    let mut begun = HashSet::new();
    until("the session ends", async || {
        let (sessions, statements) = feeding(&shop).await;
        begun.insert(statements);
        sessions == 0
    })
    .await;
    // With a stream it would be one each second, over the ten that the session stays.
    assert!(begun.len() <= 5, "{begun:?}");
    for _commit in 0..20 {
        one.wake.notify_one();
        poll().await;
    }
    assert_eq!(feeding(&shop).await.0, 0, "commits wake nobody");
}
