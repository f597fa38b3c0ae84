//! Copies of dead letters that nobody takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use shopd::messaging::log::{AppendError, Fetched, Log, LogError, Record, SharedLog};
use shopd::messaging::outbox::{self, Reader};
use shopd::messaging::{Message, Reach};
use shopd::relay::{Copies, Step, publish_batch};
use shopd::shutdown::Shutdown;
use uuid::Uuid;

use super::{Bench, TOPIC, end};

/// All tries take twice as long and longer, one no time.
const IN_EARNEST: Duration = Duration::from_secs(5);

/// A log that answers, and lets nobody write to the topics of dead letters.
struct Refusing(SharedLog);

#[async_trait]
impl Log for Refusing {
    async fn create_topics(&self, topics: &[&str], partitions: i32) -> Result<(), LogError> {
        self.0.create_topics(topics, partitions).await
    }

    async fn partitions(&self, topic: &str) -> Result<i32, LogError> {
        self.0.partitions(topic).await
    }

    async fn append(&self, records: Vec<Record>) -> Result<(), AppendError> {
        let (unacknowledged, taken): (Vec<_>, Vec<_>) = records.into_iter().partition(|record| record.topic.ends_with(".dlq"));
        self.0.append(taken).await?;
        let cause = LogError::Unavailable("not allowed".into());
        if unacknowledged.is_empty() { Ok(()) } else { Err(AppendError { unacknowledged, cause }) }
    }

    async fn fetch(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        self.0.fetch(topic, partition, from, bytes_max).await
    }

    async fn bounds(&self, topic: &str, partition: i32) -> Result<(i64, i64), LogError> {
        self.0.bounds(topic, partition).await
    }

    async fn delete_records_before(&self, topic: &str, partition: i32, offset: i64) -> Result<(), LogError> {
        self.0.delete_records_before(topic, partition, offset).await
    }

    async fn ping(&self) -> Result<(), LogError> {
        self.0.ping().await
    }

    async fn prune(&self) -> Result<u64, LogError> {
        self.0.prune().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_for_dead_letters_that_refuses_them_holds_nothing_else_up() {
    let bench = Bench::new().await;
    let consumer = bench.consume("one", 0);
    bench.append(&["nothing"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'dead'", 1).await;
    end(consumer).await;
    let message = Message {
        event_id: Uuid::now_v7(),
        topic: TOPIC,
        key: "ann".into(),
        payload: b"ann:0".to_vec(),
        kind: "k",
        source: "/s",
        traceparent: String::new(),
        request_id: String::new(),
        created_at: chrono::Utc::now(),
    };
    let before = records(&bench).await;
    outbox::append(&bench.db.get().await.unwrap(), &[message]).await.unwrap();
    let log: SharedLog = Arc::new(Refusing(bench.log.clone()));
    let mut reader =
        Reader::acquire(&bench.db, "relay", Duration::from_secs(5), true, &Arc::default()).await.unwrap().expect("a free outbox");
    // One row a page: the copy's page comes first, and the other's after it all the same.
    let (mut copies, reach) = (Copies::default(), Reach::default());
    let since = Instant::now();
    for _ in 0..2 {
        let step = publish_batch(&mut reader, &*log, 1, 1, &reach, &mut copies, &Shutdown::new()).await.unwrap();
        assert!(matches!(step, Step::Published(1)), "{step:?}");
    }
    assert_eq!(records(&bench).await, before + 1);
    assert!(since.elapsed() > IN_EARNEST, "it was not given up at once");
    assert!(bench.copies().await.is_empty());
    bench.until("select count(*) as n from dead_letter where state = 'dead'", 1).await;

    // The next one is: each page of what is to be paid may have a copy among it.
    let consumer = bench.consume("two", 0);
    bench.append(&["nothing again"]).await;
    bench.until("select count(*) as n from dead_letter where state = 'dead'", 2).await;
    end(consumer).await;
    let since = Instant::now();
    // The look before found nothing more.
    while publish_batch(&mut reader, &*log, 1, 1, &reach, &mut copies, &Shutdown::new()).await.unwrap() == Step::Idle {
        assert!(since.elapsed() < IN_EARNEST, "its copy is in the outbox");
    }
    assert!(since.elapsed() < IN_EARNEST, "{:?}", since.elapsed());
}

/// On the topic itself.
async fn records(bench: &Bench) -> i64 {
    let mut records = 0;
    for partition in 0..super::PARTITIONS {
        records += bench.log.bounds(TOPIC, partition).await.unwrap().1;
    }
    records
}
