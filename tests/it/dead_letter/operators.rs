//! What operators ask for, and whoever owns the partition does.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_owner_keeps_the_order_of_what_was_parked_and_takes_the_operators_word() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0')").await;
    // On a runtime of its own, with which all of it dies, the heartbeat too; its leases expire.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let first = {
        let _inside = runtime.enter();
        bench.consume("one", 0)
    };
    bench.append(&["ann:0", "ann:1"]).await;
    bench.until("select count(*) as n from dead_letter", 2).await;
    runtime.shutdown_background();
    drop(first);
    let (second, third) = (bench.consume("two", 0), bench.consume("three", 0));
    bench.append(&["ann:2", "bob:0"]).await;
    bench.until("select count(*) as n from applied", 1).await;
    bench.until("select count(*) as n from dead_letter", 3).await;
    let failed = bench.dlq(&["redrive", "--topic", TOPIC, "--json"]).await;
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    bench.run("delete from refused").await;
    let output = bench.dlq(&["redrive", "--topic", TOPIC, "--json"]).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bench.applied("ann").await, ["ann:0", "ann:1", "ann:2"]);
    end(second).await;
    end(third).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_list_show_redrive_and_discard() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0'), ('bob:0')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0", "ann:1", "bob:0", "bob:1", "nothing"]).await;
    bench.until("select count(*) as n from dead_letter", 5).await;
    let listed = lines(&bench.dlq(&["list", "--json"]).await);
    let by_state: HashMap<&str, usize> = listed.iter().fold(HashMap::new(), |mut counts, letter| {
        *counts.entry(letter["state"].as_str().unwrap()).or_default() += 1;
        counts
    });
    assert_eq!(by_state, HashMap::from([("parked", 2), ("waiting", 2), ("dead", 1)]));
    let ann = lines(&bench.dlq(&["list", "--json", "--key", "ann", "--state", "parked", "--reason", "THIS ONE"]).await);
    let [ann] = ann.as_slice() else { panic!("{ann:?}") };
    let members: Vec<&String> = ann.as_object().unwrap().keys().collect();
    for member in ["id", "topic", "partition", "offset", "key", "reason", "attempts", "at"] {
        assert!(members.iter().any(|name| *name == member), "{member}: {ann}");
    }
    let id = format!("{TOPIC}/{}/{}", ann["partition"], ann["offset"]);
    assert_eq!((&ann["id"], &ann["key"], &ann["attempts"]), (&json!(id), &json!("ann"), &json!(1)));
    assert!(DateTime::parse_from_rfc3339(ann["at"].as_str().unwrap()).is_ok());
    let shown = lines(&bench.dlq(&["show", &id, "--json"]).await);
    assert_eq!((&shown[0]["value"], &shown[0]["headers"]["ce_id"]), (&json!("ann:0"), &json!("ann:0")));
    let page = bench.dlq(&["show", &id]).await;
    assert!(String::from_utf8_lossy(&page.stdout).matches("ann:0").count() >= 2, "{page:?}");
    let people = bench.dlq(&["list"]).await;
    assert!(String::from_utf8_lossy(&people.stdout).contains(&id), "{people:?}");

    // Failing again, unknown, and a mistake.
    let again = bench.dlq(&["redrive", &id, "--json"]).await;
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert_eq!(lines(&again)[0]["outcome"], "failed");
    assert_eq!(lines(&bench.dlq(&["list", "--json", "--key", "ann", "--state", "parked"]).await)[0]["attempts"], 2);
    let unknown = bench.dlq(&["discard", &format!("{TOPIC}/0/4711"), "--json"]).await;
    assert_eq!((unknown.status.code(), &lines(&unknown)[0]["outcome"]), (Some(1), &json!("unknown")));
    assert_eq!(bench.dlq(&["redrive"]).await.status.code(), Some(2));

    // What is discarded is gone, and what waited goes on; what is redriven comes first.
    let discarded = bench.dlq(&["discard", &id, "--json"]).await;
    assert!(discarded.status.success(), "{discarded:?}");
    assert_eq!(lines(&discarded)[0]["outcome"], "discarded");
    bench.until("select count(*) as n from applied where value = 'ann:1'", 1).await;
    bench.run("delete from refused").await;
    let redriven = bench.dlq(&["redrive", "--key", "bob", "--json"]).await;
    assert!(redriven.status.success(), "{redriven:?}");
    assert_eq!(lines(&redriven).len(), 2);
    assert_eq!(bench.applied("bob").await, ["bob:0", "bob:1"]);
    let dead = bench.dlq(&["redrive", "--state", "dead", "--json"]).await;
    assert_eq!((dead.status.code(), &lines(&dead)[0]["outcome"]), (Some(1), &json!("failed")));
    // As after an upgrade that can read it.
    bench.run("update dead_letter set value = 'cid:0'").await;
    let dead = bench.dlq(&["redrive", "--state", "dead", "--json"]).await;
    assert_eq!((dead.status.code(), &lines(&dead)[0]["outcome"]), (Some(0), &json!("applied")));
    assert_eq!(count(&bench.db, "select count(*) as n from dead_letter where state = 'resolved' and value is null").await, 1);
    assert!(lines(&bench.dlq(&["list", "--json"]).await).is_empty());

    // Without an owner it is only marked; the next one does it.
    bench.run("insert into refused values ('eve:0')").await;
    bench.append(&["eve:0", "eve:1"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'waiting'", 1).await;
    end(consumer).await;
    let marked = bench.dlq(&["discard", "--all", "--wait-ms", "200", "--json"]).await;
    assert!(marked.status.success(), "{marked:?}");
    assert!(lines(&marked).iter().all(|line| line["outcome"] == "marked"), "{marked:?}");
    let consumer = bench.consume("two", 0);
    bench.until("select count(*) as n from dead_letter where state <> 'resolved'", 0).await;
    assert_eq!(bench.applied("eve").await, Vec::<String>::new());
    end(consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_discard_that_is_asked_for_during_a_try_is_done_after_it() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'parked'", 1).await;
    bench
        .run(
            "create or replace function refuse() returns trigger language plpgsql as $$
              begin perform pg_sleep(1); raise exception 'slowly'; end $$;
              update dead_letter set requested = 'redrive';",
        )
        .await;
    bench
        .until("select count(*) as n from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()", 1)
        .await;
    bench.run("update dead_letter set requested = 'discard'").await;
    bench.until("select count(*) as n from dead_letter", 0).await;
    end(consumer).await;
}
