//! Letters that could be read once and no longer can, and dead ones that can be read after all.

use super::*;

/// As after a downgrade. Red where one that waits is parked as soon as it cannot be read: a queue would have two heads, which the
/// database refuses, and with it every step of the owner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_letter_that_can_no_longer_be_read_holds_up_its_own_key_and_no_other() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0'), ('bob:0')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0", "ann:1", "ann:2", "ann:3", "bob:0"]).await;
    bench.until("select count(*) as n from dead_letter", 5).await;
    let damaged = "update dead_letter set value = 'nothing' where convert_from(value, 'UTF8') = 'ann:2'";
    bench.run(damaged).await;

    // Behind a head that fails again it stays as it is.
    let failed = bench.dlq(&["redrive", "--key", "ann", "--json"]).await;
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    bench.run("delete from refused where value = 'bob:0'").await;
    let other = bench.dlq(&["redrive", "--key", "bob", "--json"]).await;
    assert!(other.status.success(), "{other:?}");
    let states = "select state || ' ' || convert_from(value, 'UTF8') as value from dead_letter order by log_offset";
    assert_eq!(bench.lines(states).await, ["parked ann:0", "waiting ann:1", "waiting nothing", "waiting ann:3"]);

    // What is before it is applied, and then it is its queue's head.
    bench.run("delete from refused").await;
    let failed = bench.dlq(&["redrive", "--key", "ann", "--json"]).await;
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    bench.until("select count(*) as n from dead_letter where state = 'parked' and attempts = 1 and followers = 1", 1).await;
    assert_eq!(bench.applied("ann").await, ["ann:0", "ann:1"]);
    bench.append(&["ann:4"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'waiting'", 2).await;

    // As after an upgrade.
    bench.run("update dead_letter set value = 'ann:2' where state = 'parked'").await;
    let output = bench.dlq(&["redrive", "--key", "ann", "--json"]).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bench.applied("ann").await, names("ann", 0..5));
    assert!(bench.letters().await.is_empty());
    end(consumer).await;
}

/// Red where it is tried beside its key's queue, of which a step sees only the beginning: it would be there twice, which the database
/// refuses, and with it every step of the owner.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_that_repeats_the_last_of_a_long_queue_is_tried_when_the_queue_is_at_rest() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    // More than one step tries.
    const LAST: usize = 700;
    bench.run("insert into refused values ('ann:0'), ('ann:700')").await;
    let partition_of = |key: &str| shopd::messaging::log::partitioner::partition_of(key.as_bytes(), PARTITIONS);
    let unreadable = (0..).map(|n| format!("nothing{n}")).find(|key| partition_of(key) == partition_of("ann")).unwrap();
    let consumer = bench.consume("one", 0);
    bench.append(&[&unreadable]).await;
    bench.append(&texts(&names("ann", 0..LAST + 1))).await;
    bench.until("select count(*) as n from dead_letter", LAST as i64 + 2).await;
    bench.run("update dead_letter set value = 'ann:700' where state = 'dead'; delete from refused where value = 'ann:0'").await;
    let output = bench.dlq(&["redrive", "--all", "--json"]).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    bench.until("select count(*) as n from dead_letter where state <> 'resolved'", 1).await;
    assert_eq!(bench.applied("ann").await, names("ann", 0..LAST));
    let left = bench.letters().await;
    assert!(left.iter().all(|letter| letter.starts_with("parked ann:700 ")), "{left:?}");
    end(consumer).await;
}
