//! What every log must do. Each test gets a fresh log.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use shopd::messaging::log::partitioner::partition_of;
use shopd::messaging::log::{Log, LogError, Record};

use super::{BYTES_MAX, FETCH_WAIT, LONG, Subject, offsets, read, record, until_it_answers, values};

/// Makes a test of every function of the suite, for a log that `$subject` makes.
macro_rules! contract {
    ($subject:path) => {
        crate::log::suite::contract! { $subject:
            records_of_a_key_lie_in_its_partition_in_order_and_whole
            a_record_without_a_key_or_a_value_comes_back_without
            appenders_side_by_side_leave_no_holes_for_a_tailing_reader
            a_record_appended_twice_is_there_twice
            a_waiting_fetch_is_woken_by_another_process
            an_idle_fetch_returns_empty_after_its_wait
            a_dropped_fetch_holds_up_nobody
            a_fetch_keeps_to_its_bytes_but_brings_a_record
            an_offset_that_is_not_on_the_log_is_told_with_the_bounds
            deleted_records_are_gone_and_the_rest_keeps_its_offsets
            topics_are_created_once
            an_unknown_topic_is_told_and_holds_up_no_other
            another_process_reads_on_where_the_first_ended
        }
    };
    ($subject:path: $($name:ident)+) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                crate::log::suite::$name($subject().await).await;
            }
        )+
    };
}
pub(crate) use contract;

pub async fn a_record_without_a_key_or_a_value_comes_back_without(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    let keyless = Record { key: None, ..record("events", "", "a value") };
    let empty = Record { value: None, ..keyless.clone() };
    log.append(vec![keyless, empty]).await.unwrap();
    let stored = read(&*log, "events", 0, 0, 2).await;
    assert_eq!((&stored[0].key, stored[0].value.as_deref()), (&None, Some(&b"a value"[..])));
    assert_eq!((&stored[1].key, &stored[1].value), (&None, &None));
}

pub async fn records_of_a_key_lie_in_its_partition_in_order_and_whole(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 3).await.unwrap();
    let appended: Vec<Record> = (0..120).map(|n| record("events", &format!("key-{}", n % 10), format!("value {n}"))).collect();
    for some in appended.chunks(40) {
        log.append(some.to_vec()).await.unwrap();
    }

    let mut of_partition: HashMap<i32, Vec<&Record>> = HashMap::new();
    for record in &appended {
        of_partition.entry(partition_of(record.key.as_ref().expect("a key"), 3)).or_default().push(record);
    }
    assert!(of_partition.len() > 1, "these keys are spread");
    for (partition, expected) in of_partition {
        let stored = read(&*log, "events", partition, 0, expected.len()).await;
        assert_eq!(offsets(&stored), (0..expected.len() as i64).collect::<Vec<_>>());
        for (stored, expected) in stored.iter().zip(expected) {
            assert_eq!(stored.key, expected.key);
            assert_eq!(stored.value, expected.value);
            assert_eq!(stored.timestamp, expected.timestamp);
            assert_eq!(stored.headers.len(), expected.headers.len());
            for (name, value) in &expected.headers {
                assert_eq!(stored.headers.get(name), Some(value.as_ref()));
            }
        }
        assert_eq!(log.bounds("events", partition).await.unwrap(), (0, stored.len() as i64));
    }
}

/// A broker is told a moment later that it leads a new topic. An append waits for that and so does this, a fetch does not: it is tried again.
async fn is_led(log: &dyn Log) {
    assert_eq!(log.bounds("events", 0).await.unwrap(), (0, 0));
}

pub async fn appenders_side_by_side_leave_no_holes_for_a_tailing_reader(subject: Subject) {
    const APPENDERS: usize = 4;
    const APPENDS: usize = 20;
    const TOTAL: usize = APPENDERS * APPENDS * 10;
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    is_led(&*log).await;

    let append = |appender: usize| {
        let log = subject.open();
        async move {
            for append in 0..APPENDS {
                let some = (0..10).map(|n| record("events", &appender.to_string(), (append * 10 + n).to_string()));
                log.append(some.collect()).await.unwrap();
            }
        }
    };
    let (stored, _) = tokio::join!(read(&*log, "events", 0, 0, TOTAL), join_all((0..APPENDERS).map(append)));

    assert_eq!(offsets(&stored), (0..TOTAL as i64).collect::<Vec<_>>(), "nothing skipped, nothing twice");
    for appender in 0..APPENDERS {
        let own = stored.iter().filter(|record| record.key.as_deref() == Some(appender.to_string().as_bytes()));
        let own = values(&own.cloned().collect::<Vec<_>>());
        assert_eq!(own, (0..APPENDS * 10).map(|n| n.to_string()).collect::<Vec<_>>(), "appender {appender}");
    }
}

pub async fn a_record_appended_twice_is_there_twice(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    let one = record("events", "key", "value");
    log.append(vec![one.clone(), one.clone()]).await.unwrap();
    log.append(vec![one]).await.unwrap();
    log.append(Vec::new()).await.unwrap();
    let stored = read(&*log, "events", 0, 0, 3).await;
    assert_eq!(offsets(&stored), [0, 1, 2]);
    assert_eq!(values(&stored), ["value"; 3]);
}

pub async fn a_waiting_fetch_is_woken_by_another_process(subject: Subject) {
    let (reader, writer) = (subject.open(), subject.open());
    writer.create_topics(&["events"], 1).await.unwrap();
    writer.append(vec![record("events", "key", "first")]).await.unwrap();
    assert_eq!(read(&*reader, "events", 0, 0, 1).await.len(), 1);

    let mut waits = Vec::new();
    for n in 1..=9 {
        let mut fetch = tokio::spawn({
            let reader = reader.clone();
            async move {
                let stored = read(&*reader, "events", 0, n, 1).await;
                (stored[0].offset, Instant::now())
            }
        });
        // Time enough to reach the log: it is a waiting fetch that must be woken.
        assert!(tokio::time::timeout(Duration::from_millis(60), &mut fetch).await.is_err(), "nothing is there to fetch");
        writer.append(vec![record("events", "key", "next")]).await.unwrap();
        let appended = Instant::now();
        let (offset, woken) = fetch.await.unwrap();
        assert_eq!(offset, n);
        waits.push(woken.saturating_duration_since(appended));
    }
    waits.sort_unstable();
    assert!(waits[4] < Duration::from_millis(600), "woken, not found by looking now and then: {waits:?}");
}

pub async fn an_idle_fetch_returns_empty_after_its_wait(subject: Subject) {
    const WAIT: Duration = Duration::from_secs(1);
    let log = subject.open_waiting(WAIT);
    log.create_topics(&["events"], 1).await.unwrap();
    log.append(vec![record("events", "key", "value")]).await.unwrap();
    let started = Instant::now();
    let fetched = log.fetch("events", 0, 1, BYTES_MAX).await.unwrap();
    assert!(fetched.records.is_empty(), "{fetched:?}");
    assert_eq!((fetched.next_offset, fetched.end_offset), (1, 1));
    assert!(started.elapsed() >= WAIT.mul_f32(0.9), "{:?}", started.elapsed());
    assert!(started.elapsed() < WAIT + Duration::from_secs(10), "{:?}", started.elapsed());
}

pub async fn a_dropped_fetch_holds_up_nobody(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    is_led(&*log).await;
    for _ in 0..5 {
        let dropped = tokio::time::timeout(Duration::from_millis(40), log.fetch("events", 0, 0, BYTES_MAX)).await;
        assert!(dropped.is_err(), "{dropped:?}");
    }
    let started = Instant::now();
    let (appended, stored) = tokio::join!(log.append(vec![record("events", "key", "value")]), read(&*log, "events", 0, 0, 1));
    appended.unwrap();
    assert_eq!(stored.len(), 1);
    assert!(started.elapsed() < FETCH_WAIT, "{:?}", started.elapsed());
}

pub async fn a_fetch_keeps_to_its_bytes_but_brings_a_record(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    for n in 0..40 {
        log.append(vec![record("events", "key", noise(10_000, n))]).await.unwrap();
    }
    let some = log.fetch("events", 0, 0, 50_000).await.unwrap();
    assert!((1..=5).contains(&some.records.len()), "{}", some.records.len());
    assert_eq!(some.next_offset, some.records.len() as i64);
    assert_eq!(some.end_offset, 40);
    let one = log.fetch("events", 0, some.next_offset, 1).await.unwrap();
    assert_eq!(offsets(&one.records), [some.next_offset]);
}

pub async fn an_offset_that_is_not_on_the_log_is_told_with_the_bounds(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    log.append((0..5).map(|n| record("events", "key", n.to_string())).collect()).await.unwrap();
    assert_eq!(log.fetch("events", 0, 6, BYTES_MAX).await, Err(LogError::OutOfRange { start: 0, end: 5 }));
    log.delete_records_before("events", 0, 3).await.unwrap();
    assert_eq!(log.fetch("events", 0, 2, BYTES_MAX).await, Err(LogError::OutOfRange { start: 3, end: 5 }));
    assert!(matches!(log.fetch("events", 7, 0, BYTES_MAX).await, Err(LogError::Defect(_))));
    assert!(matches!(log.fetch("events", -1, 0, BYTES_MAX).await, Err(LogError::Defect(_))));
}

pub async fn deleted_records_are_gone_and_the_rest_keeps_its_offsets(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events", "others"], 1).await.unwrap();
    for topic in ["events", "others"] {
        log.append((0..5).map(|n| record(topic, "key", n.to_string())).collect()).await.unwrap();
    }
    log.delete_records_before("events", 0, 3).await.unwrap();
    log.delete_records_before("events", 0, 1).await.unwrap();
    assert_eq!(log.bounds("events", 0).await.unwrap(), (3, 5));
    assert_eq!(values(&read(&*log, "events", 0, 3, 2).await), ["3", "4"]);
    assert_eq!(log.bounds("others", 0).await.unwrap(), (0, 5));

    assert_eq!(log.delete_records_before("events", 0, 6).await, Err(LogError::OutOfRange { start: 3, end: 5 }));
    log.delete_records_before("events", 0, 5).await.unwrap();
    assert_eq!(log.bounds("events", 0).await.unwrap(), (5, 5));
    log.append(vec![record("events", "key", "next")]).await.unwrap();
    assert_eq!(offsets(&read(&*log, "events", 0, 5, 1).await), [5]);
}

pub async fn topics_are_created_once(subject: Subject) {
    let (log, other) = (subject.open(), subject.open());
    until_it_answers(&*log).await;
    log.create_topics(&["events"], 2).await.unwrap();
    log.append(vec![record("events", "key", "value")]).await.unwrap();
    let (one, two) = tokio::join!(log.create_topics(&["events", "more"], 5), other.create_topics(&["more", "events"], 5));
    one.unwrap();
    two.unwrap();
    assert_eq!(log.partitions("events").await, Ok(2));
    assert_eq!(other.partitions("more").await, Ok(5));
    assert_eq!(read(&*other, "events", partition_of(b"key", 2), 0, 1).await.len(), 1);
}

pub async fn an_unknown_topic_is_told_and_holds_up_no_other(subject: Subject) {
    let log = subject.open();
    let unknown = LogError::UnknownTopic("nowhere".into());
    assert_eq!(log.partitions("nowhere").await, Err(unknown.clone()));
    assert_eq!(log.fetch("nowhere", 0, 0, BYTES_MAX).await, Err(unknown.clone()));
    assert_eq!(log.bounds("nowhere", 0).await, Err(unknown.clone()));

    log.create_topics(&["events"], 1).await.unwrap();
    let records = vec![record("nowhere", "a", "1"), record("events", "a", "2"), record("nowhere", "b", "3")];
    let error = log.append(records).await.unwrap_err();
    assert_eq!(error.cause, unknown);
    assert_eq!(error.unacknowledged.iter().map(|record| &*record.topic).collect::<Vec<_>>(), ["nowhere"; 2]);
    assert_eq!(values(&read(&*log, "events", 0, 0, 1).await), ["2"]);

    // Created by whoever it may be, it is there for the next try.
    subject.open().create_topics(&["nowhere"], 1).await.unwrap();
    log.append(error.unacknowledged).await.unwrap();
    assert_eq!(values(&read(&*log, "nowhere", 0, 0, 2).await), ["1", "3"]);
}

pub async fn another_process_reads_on_where_the_first_ended(subject: Subject) {
    let log = subject.open();
    log.create_topics(&["events"], 1).await.unwrap();
    log.append((0..7).map(|n| record("events", "key", n.to_string())).collect()).await.unwrap();
    let last = read(&*log, "events", 0, 0, 7).await.last().unwrap().offset;
    drop(log);
    let log = subject.open();
    log.append(vec![record("events", "key", "7")]).await.unwrap();
    let rest = tokio::time::timeout(LONG, read(&*log, "events", 0, last + 1, 1)).await.unwrap();
    assert_eq!((offsets(&rest), values(&rest)), (vec![7], vec!["7".to_owned()]));
}

/// Bytes that no codec makes smaller.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let next = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    next.flatten().take(length).collect()
}
