//! Letters whose record, place or fate changes while somebody looks at them.

use std::sync::Arc;

use serde_json::json;
use shopd::messaging::log::PostgresLog;
use shopd::messaging::log::partitioner::partition_of;

use super::{Bench, end, lines};
use crate::support::books::count;

/// A place on a topic that was deleted and made anew is another record's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_of_a_topic_made_anew_takes_the_place_of_the_old_one_and_no_queue_is_left_without_a_head() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0'), ('ann:new')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0", "ann:1"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'waiting'", 1).await;
    end(consumer).await;
    bench.run("delete from shopd_log.record; update shopd_log.partition set next_offset = 0, start_offset = 0").await;
    // Where it was made anew with more records than were read nothing tells but the records themselves.
    bench.run("update consumer_offset set next_offset = 0").await;
    let consumer = bench.consume("two", 0);
    bench.append(&["ann:new"]).await;
    // It waited behind the old head, which is gone: it is its key's head now, and is tried.
    let head = "select count(*) as n from dead_letter where state = 'parked' and attempts = 1 and followers = 1
                   and convert_from(value, 'UTF8') = 'ann:new'";
    bench.until(head, 1).await;
    assert_eq!(count(&bench.db, "select count(*) as n from dead_letter").await, 2);
    bench.run("delete from refused").await;
    let output = bench.dlq(&["redrive", "--all", "--json"]).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(bench.applied("ann").await, ["ann:new", "ann:1"]);
    end(consumer).await;
}

/// As after an operator set the offsets back: the letter keeps its state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_whose_record_is_read_again_stays_as_it_is() {
    let bench = Bench::new().await;
    let consumer = bench.consume("one", 0);
    bench.append(&["nothing", "ann:0"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'dead'", 1).await;
    bench.until("select count(*) as n from applied", 1).await;
    end(consumer).await;
    bench.run("update dead_letter set reason = 'the first time'; update consumer_offset set next_offset = 0").await;
    let whole = "select letter::text as value from dead_letter letter";
    let before = bench.lines(whole).await;
    let consumer = bench.consume("two", 0);
    bench.until("select count(*) as n from applied", 2).await;
    // Both records: the letter's, too.
    bench.until("select sum(next_offset)::bigint as n from consumer_offset", 2).await;
    end(consumer).await;
    assert_eq!(bench.lines(whole).await, before);
}

/// As after an upgrade that can read it, with the offsets set back: the database refuses it then, and what comes after it must not overtake
/// it, nor wait behind nobody. Red where the letter stays dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_can_be_read_when_it_is_read_again_heads_its_key_or_waits_like_any_other() {
    for state in ["dead", "resolved"] {
        let mut bench = Bench::new().await;
        bench.config.consumer.park_attempts_max = 1;
        bench.run("insert into refused values ('ann:0')").await;
        bench.append(&["ann:0", "ann:1", "ann:2"]).await;
        let consumer = bench.consume("one", 0);
        bench.until("select count(*) as n from dead_letter", 3).await;
        end(consumer).await;
        // As the version before left the first two, and the third was none.
        bench
            .run(&format!(
                "delete from dead_letter where state = 'waiting' and convert_from(value, 'UTF8') = 'ann:2';
                 update dead_letter set state = '{state}', undecodable = true, ordering_key = null, business_key = null, followers = 0,
                                        next_attempt_at = null, key = null, value = null;
                 update consumer_offset set next_offset = 0;"
            ))
            .await;
        let consumer = bench.consume("two", 0);
        let queue = "select count(*) as n from dead_letter where state = 'parked' and followers = 2 and convert_from(value, 'UTF8') = 'ann:0'
                        and attempts = 2";
        bench.until(queue, 1).await;
        bench.until("select count(*) as n from dead_letter where state = 'waiting'", 2).await;
        assert_eq!(bench.applied("ann").await, Vec::<String>::new());
        bench.run("delete from refused").await;
        let redriven = bench.dlq(&["redrive", "--key", "ann", "--json"]).await;
        assert_eq!(redriven.status.code(), Some(0), "{redriven:?}");
        assert_eq!(bench.applied("ann").await, ["ann:0", "ann:1", "ann:2"]);
        // The audit must know of those two why their order differs.
        bench.until("select count(*) as n from dead_letter where state = 'resolved' and undecodable and value is null", 2).await;
        assert_eq!(count(&bench.db, "select count(*) as n from dead_letter").await, 2);
        end(consumer).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_is_being_applied_cannot_be_discarded_any_more() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    bench.run("insert into refused values ('ann:0')").await;
    let consumer = bench.consume("one", 0);
    bench.append(&["ann:0"]).await;
    bench.until("select count(*) as n from dead_letter", 1).await;
    bench
        .run(
            "delete from refused;
             create function linger() returns trigger language plpgsql as $$ begin perform pg_sleep(1); return new; end $$;
             create trigger linger before insert on applied for each row execute function linger();",
        )
        .await;
    let discard = async {
        bench
            .until("select count(*) as n from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()", 1)
            .await;
        bench.dlq(&["discard", "--key", "ann", "--json"]).await
    };
    let (redriven, discarded) = tokio::join!(bench.dlq(&["redrive", "--key", "ann", "--json"]), discard);
    assert_eq!((redriven.status.code(), &lines(&redriven)[0]["outcome"]), (Some(0), &json!("applied")));
    assert!(lines(&discarded).is_empty(), "it was applied: {discarded:?}");
    assert_eq!(bench.applied("ann").await, ["ann:0"]);
    end(consumer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_of_a_partition_that_is_no_more_can_still_be_redriven_and_discarded() {
    let mut bench = Bench::new().await;
    bench.config.consumer.park_attempts_max = 1;
    // Of the last partition, and of the only one that is left.
    let of = |partition: i32| move |key: &String| partition_of(key.as_bytes(), super::PARTITIONS) == partition;
    let key = |partition: i32| (0..).map(|n| format!("key{n}")).find(of(partition)).unwrap();
    let (gone, here) = (key(super::PARTITIONS - 1), key(0));
    let value = |name: &str| format!("{gone}:{name}");
    bench.run(&format!("insert into refused values ('{}')", value("0"))).await;
    let consumer = bench.consume("one", 0);
    bench.append(&[&value("0"), &value("1"), &gone]).await;
    bench.until("select count(*) as n from dead_letter", 3).await;
    end(consumer).await;
    bench
        .run(
            "delete from shopd_log.record; update shopd_log.topic set partitions = 1; delete from shopd_log.partition where partition > 0;
             delete from refused;",
        )
        .await;
    // As after a restart: the log as the new process finds it.
    bench.log = Arc::new(PostgresLog::new(bench.db.clone(), &bench.config.log, bench.config.kafka.fetch_wait));
    assert_eq!(bench.log.partitions(super::TOPIC).await, Ok(1));
    let consumer = bench.consume("two", 0);
    bench.append(&[&format!("{here}:0")]).await;
    bench.until("select count(*) as n from applied", 1).await;
    let redriven = bench.dlq(&["redrive", "--state", "parked", "--json"]).await;
    assert_eq!((redriven.status.code(), &lines(&redriven)[0]["outcome"]), (Some(0), &json!("applied")));
    let discarded = bench.dlq(&["discard", "--state", "dead", "--json"]).await;
    assert_eq!((discarded.status.code(), &lines(&discarded)[0]["outcome"]), (Some(0), &json!("discarded")));
    bench.until("select count(*) as n from dead_letter", 0).await;
    assert_eq!(bench.applied(&gone).await, [value("0"), value("1")]);
    end(consumer).await;
}
