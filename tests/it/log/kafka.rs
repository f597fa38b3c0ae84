//! The suite on a real broker, what other clients may write, and what becomes of the calls when the broker is away.

mod wire;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rskafka::client::ClientBuilder;
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use shopd::config::KafkaConfig;
use shopd::messaging::log::{KafkaLog, Log, LogError, Record};

use self::wire::Codec;
use super::suite::{contract, noise};
use super::{BYTES_MAX, LONG, Subject, now, offsets, read, record, until_it_answers, values};
use crate::support::kafka::{self, Broker};
use crate::support::shop::poll;

async fn subject() -> Subject {
    let config = kafka::config(&kafka::shared().await);
    Subject::new(move |fetch_wait| Arc::new(KafkaLog::new(&KafkaConfig { fetch_wait, ..config.clone() })))
}

contract!(subject);

async fn other_client(config: &KafkaConfig, topic: &str) -> PartitionClient {
    let client = ClientBuilder::new(config.bootstrap_servers.clone()).build().await.unwrap();
    let topic = format!("{}{topic}", config.topic_prefix);
    client.partition_client(topic, 0, UnknownTopicHandling::Error).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_other_clients_are_read_whatever_they_lack() {
    let config = kafka::config(&kafka::shared().await);
    let log = KafkaLog::new(&config);
    log.create_topics(&["events"], 1).await.unwrap();
    let other = other_client(&config, "events").await;
    let bare = |value: Option<&str>| rskafka::record::Record {
        key: None,
        value: value.map(|value| value.as_bytes().to_vec()),
        headers: BTreeMap::new(),
        timestamp: now(),
    };
    let codecs = [Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd, Compression::NoCompression];
    for codec in codecs {
        other.produce(vec![bare(Some("bare")), bare(None)], codec).await.unwrap();
    }
    let stored = read(&log, "events", 0, 0, 10).await;
    assert_eq!(offsets(&stored), (0..10).collect::<Vec<_>>());
    assert!(stored.iter().all(|record| record.key.is_none() && record.headers.is_empty() && record.unreadable().is_none()));
    assert_eq!(stored[8].value.as_deref(), Some(b"bare".as_slice()));
    assert_eq!(stored[9].value, None);
}

/// A header without a value is legal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_without_a_value_is_an_empty_one() {
    let config = kafka::config(&kafka::shared().await);
    let log = KafkaLog::new(&config);
    log.create_topics(&["events"], 1).await.unwrap();
    log.append(vec![record("events", "key", "before")]).await.unwrap();
    wire::produce(&config, "events", Codec::Plain, 3, None).await;
    log.append(vec![record("events", "key", noise(5_000, 1))]).await.unwrap();
    wire::produce(&config, "events", Codec::Plain, 1, None).await;

    let stored = read(&log, "events", 0, 0, 6).await;
    assert_eq!(offsets(&stored), (0..6).collect::<Vec<_>>());
    for record in [&stored[1], &stored[2], &stored[3], &stored[5]] {
        assert_eq!((record.key.as_deref(), record.value.as_deref()), (None, Some(b"raw".as_slice())));
        assert_eq!(record.headers.get("name").map(<[u8]>::len), Some(0));
        assert!((chrono::Utc::now() - record.timestamp).num_seconds() < 60);
    }
    assert_eq!(values(&stored[..1]), ["before"]);
    assert_eq!(stored[4].value.as_deref(), Some(noise(5_000, 1).as_slice()));
    // From the middle of such a batch as well.
    assert_eq!(offsets(&read(&log, "events", 0, 2, 4).await), [2, 3, 4, 5]);
}

/// A broker takes it, whose limits are those of the compressed bytes; read whole it would be any replica's end, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_cannot_be_decoded_or_becomes_too_large_holds_up_nobody() {
    let config = kafka::config(&kafka::shared().await);
    let log = KafkaLog::new(&config);
    log.create_topics(&["events"], 1).await.unwrap();
    log.append(vec![record("events", "key", "before")]).await.unwrap();
    let large = vec![b' '; 17 << 20];
    wire::produce_values(&config, "events", Codec::Gzip, &[&large, &large], None).await;
    log.append(vec![record("events", "key", "between")]).await.unwrap();
    wire::produce(&config, "events", Codec::Gzip, 2, None).await;
    wire::produce_values(&config, "events", Codec::Gzip, &[&large], Some("a header that is fine")).await;
    log.append(vec![record("events", "key", "after")]).await.unwrap();

    let stored = read(&log, "events", 0, 0, 8).await;
    assert_eq!(offsets(&stored), (0..8).collect::<Vec<_>>());
    let unreadable: Vec<bool> = stored.iter().map(|record| record.unreadable().is_some()).collect();
    assert_eq!(unreadable, [false, true, true, false, false, false, false, false]);
    let said = [&stored[0], &stored[3], &stored[7]].map(|record| record.value.as_deref().unwrap());
    assert_eq!(said, [b"before".as_slice(), b"between", b"after"]);
    assert_eq!(values(&stored[4..6]), ["raw", "raw"]);
    assert_eq!(stored[6].value.as_deref().map(<[u8]>::len), Some(large.len()));
    let end = log.fetch("events", 0, 8, BYTES_MAX).await.unwrap();
    assert_eq!((end.records.len(), end.next_offset, end.end_offset), (0, 8, 8));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_append_is_cut_into_batches_that_the_broker_takes() {
    // The broker's limit is 1 MiB; ours here is below it in one handle, and above it in the other.
    for batch_bytes_max in [100_000, 5_000_000] {
        let config = KafkaConfig { batch_bytes_max, ..kafka::config(&kafka::shared().await) };
        let log = KafkaLog::new(&config);
        log.create_topics(&["events"], 1).await.unwrap();
        let records: Vec<Record> = (0..60).map(|n| record("events", "key", noise(50_000, n))).collect();
        log.append(records.clone()).await.unwrap();
        let stored = read(&log, "events", 0, 0, 60).await;
        assert_eq!(offsets(&stored), (0..60).collect::<Vec<_>>());
        assert!(stored.iter().zip(&records).all(|(stored, record)| stored.value == record.value));
    }
}

/// A copy of what a broker took must fit, too, however small our own batches are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_record_as_large_as_a_broker_takes_by_default_is_appended_whole() {
    let config = kafka::config(&kafka::shared().await);
    assert!(config.batch_bytes_max < 1_000_000);
    let log = KafkaLog::new(&config);
    log.create_topics(&["events"], 1).await.unwrap();
    let records =
        [record("events", "key", "before"), record("events", "key", noise(1_048_000, 1)), record("events", "key", "after")];
    log.append(records.to_vec()).await.unwrap();
    let stored = read(&log, "events", 0, 0, 3).await;
    assert!(stored.iter().zip(&records).all(|(stored, record)| stored.value == record.value));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_that_can_never_be_appended_is_named() {
    // Refused by us, and refused by the broker.
    for (batch_bytes_max, size) in [(10_000, 1_050_000), (9_000_000, 2_000_000)] {
        let config = KafkaConfig { batch_bytes_max, ..kafka::config(&kafka::shared().await) };
        let log = KafkaLog::new(&config);
        log.create_topics(&["events", "others"], 1).await.unwrap();
        let records = vec![
            record("events", "key", "before"),
            record("others", "key", "beside"),
            record("events", "key", noise(size, 1)),
            record("events", "key", "after"),
        ];
        let error = log.append(records).await.unwrap_err();
        assert!(matches!(error.cause, LogError::RecordTooLarge { index: 0, bytes, .. } if bytes > size), "{error:?}");
        assert_eq!(
            error.unacknowledged.iter().map(|record| record.value.as_ref().map_or(0, bytes::Bytes::len)).collect::<Vec<_>>(),
            [size, 5]
        );
        assert_eq!(values(&read(&log, "events", 0, 0, 1).await), ["before"]);
        assert_eq!(values(&read(&log, "others", 0, 0, 1).await), ["beside"]);
    }
}

/// Ends within what the settings allow, with room for a busy machine.
async fn within<T>(bound: Duration, call: impl Future<Output = T>) -> T {
    let started = Instant::now();
    let answer = tokio::time::timeout(bound + Duration::from_secs(5), call).await;
    answer.unwrap_or_else(|_| panic!("not within {bound:?}: {:?}", started.elapsed()))
}

async fn every_call_fails_in_time(log: &KafkaLog, config: &KafkaConfig) {
    let twice = 2 * config.request_timeout;
    let error = within(twice * 2, log.append(vec![record("events", "key", "lost?")])).await.unwrap_err();
    assert!(error.cause.is_transient() && error.unacknowledged.len() == 1, "{error:?}");
    assert!(within(twice + config.fetch_wait, log.fetch("events", 0, 0, BYTES_MAX)).await.unwrap_err().is_transient());
    assert!(within(twice, log.bounds("events", 0)).await.unwrap_err().is_transient());
    assert!(within(twice, log.create_topics(&["more"], 1)).await.unwrap_err().is_transient());
    assert!(within(Duration::from_secs(1), log.ping()).await.unwrap_err().is_transient());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_no_broker_every_call_ends_in_time() {
    let config = KafkaConfig { request_timeout: Duration::from_secs(1), ..kafka::config("127.0.0.1:1") };
    every_call_fails_in_time(&KafkaLog::new(&config), &config).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_dies_or_hangs_costs_no_acknowledged_record_and_is_found_again() {
    let broker = Broker::new().await;
    let config = KafkaConfig {
        request_timeout: Duration::from_secs(2),
        fetch_wait: Duration::from_secs(1),
        ..kafka::config(&broker.bootstrap)
    };
    // Who is asked only while the broker is well has the time that a busy machine needs.
    let reader = KafkaLog::new(&KafkaConfig { request_timeout: Duration::from_secs(10), ..config.clone() });
    let log = KafkaLog::new(&config);
    reader.create_topics(&["events"], 1).await.unwrap();
    let mut acknowledged = Vec::new();
    for outage in ["kill", "pause"] {
        acknowledged.extend(append_until_acknowledged(&log, outage, 20).await);
        match outage {
            "kill" => broker.kill().await,
            _ => broker.pause().await,
        }
        every_call_fails_in_time(&log, &config).await;
        match outage {
            "kill" => broker.start().await,
            _ => broker.resume().await,
        }
        let returned = Instant::now();
        acknowledged.extend(append_until_acknowledged(&log, &format!("after {outage}"), 20).await);
        assert!(returned.elapsed() < Duration::from_secs(20), "{:?}", returned.elapsed());
        until_it_answers(&log).await;
    }
    let (start, end) = reader.bounds("events", 0).await.unwrap();
    let there = values(&read(&reader, "events", 0, start, usize::try_from(end - start).unwrap()).await);
    let mut rest = there.iter();
    for value in &acknowledged {
        assert!(rest.any(|there| there == value), "{value} is missing or out of order in {there:?}");
    }
}

/// One after the other, each again until it is on the log.
async fn append_until_acknowledged(log: &KafkaLog, name: &str, count: usize) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for n in 0..count {
        let value = format!("{name} {n}");
        let mut waiting = vec![record("events", "key", value.clone())];
        let trying = async {
            while let Err(error) = log.append(waiting).await {
                assert!(error.cause.is_transient(), "{error:?}");
                waiting = error.unacknowledged;
                poll().await;
            }
        };
        tokio::time::timeout(LONG, trying).await.expect("the broker is there");
        acknowledged.push(value);
    }
    acknowledged
}
