//! The log on a Kafka cluster, through rskafka.
//!
//! rskafka retries inside, without an end if left alone, and has no idempotent producer: every call here has a bound, and a
//! produce that timed out or failed is reported as not acknowledged although it may be on the log. Topic names carry the
//! configured prefix on the broker and nowhere else.

mod batch;
mod codec;
mod connections;
mod decode;
mod dial;
mod encode;
mod fetch;
mod leaders;
mod lines;
mod part;
mod polls;
mod produce;
mod raw;
mod read;
mod sasl;
mod wire;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::OffsetAt;
use tokio::sync::Mutex;

use self::connections::{Connections, Loan, Use, bounded, meaning};
use self::dial::Dialer;
use self::leaders::Leaders;
use self::polls::LongPolls;
use self::wire::Wire;
use super::partitioner::partition_of;
use super::{AppendError, Fetched, Log, LogError, Record};
use crate::config::KafkaConfig;
use crate::faults;

const PING_WAIT: Duration = Duration::from_millis(1_000);
/// Kafka's word for "the broker's default".
const REPLICATION_OF_THE_BROKER: i16 = -1;

/// Held by whoever produces to a partition.
type Turn = Arc<Mutex<()>>;

/// Which records of one call go to one partition, by their index in the call.
struct Lane {
    topic: Arc<str>,
    partition: i32,
    indexes: Vec<usize>,
}

/// The records of a lane from the first that was not acknowledged on.
#[derive(Debug)]
struct Unacknowledged {
    indexes: Vec<usize>,
    cause: LogError,
}

/// Makes no connection until it is first used, and makes a new one after each that broke.
pub struct KafkaLog {
    topic_prefix: String,
    request_timeout: Duration,
    fetch_wait: Duration,
    batch_bytes_max: usize,
    connections: Connections,
    leaders: Arc<Leaders>,
    wire: Wire,
    polls: LongPolls,
    /// Who may produce to a partition: one at a time, so that no retry overtakes another batch.
    turns: std::sync::Mutex<HashMap<(Arc<str>, i32), Turn>>,
}

impl KafkaLog {
    /// Never waits and never fails: with the broker away, or with certificates that cannot be used, the calls fail instead.
    pub fn new(config: &KafkaConfig) -> Self {
        let dialer = Arc::new(Dialer::new(config));
        let leaders = Arc::new(Leaders::new(&config.bootstrap_servers, dialer.clone()));
        Self {
            topic_prefix: config.topic_prefix.clone(),
            request_timeout: config.request_timeout,
            fetch_wait: config.fetch_wait,
            batch_bytes_max: config.batch_bytes_max,
            connections: Connections::new(config, dialer.clone()),
            wire: Wire::new(leaders.clone(), dialer.clone()),
            polls: LongPolls::new(leaders.clone(), dialer, config),
            leaders,
            turns: std::sync::Mutex::default(),
        }
    }

    /// The broker's name of a topic.
    fn name<'a>(&self, topic: &'a str) -> Cow<'a, str> {
        if self.topic_prefix.is_empty() { Cow::Borrowed(topic) } else { Cow::Owned(format!("{}{topic}", self.topic_prefix)) }
    }

    /// Sorts `records` into lanes; those of topics that cannot be asked about are not acknowledged.
    async fn lanes(&self, records: &[Record]) -> (Vec<Lane>, Vec<Unacknowledged>) {
        let mut by_topic: BTreeMap<&Arc<str>, Vec<usize>> = BTreeMap::new();
        for (index, record) in records.iter().enumerate() {
            by_topic.entry(&record.topic).or_default().push(index);
        }
        let (mut lanes, mut failed) = (Vec::new(), Vec::new());
        for (topic, indexes) in by_topic {
            match self.partitions(topic).await {
                Err(cause) => failed.push(Unacknowledged { indexes, cause }),
                Ok(partitions) => {
                    let mut by_partition: BTreeMap<i32, Vec<usize>> = BTreeMap::new();
                    for index in indexes {
                        by_partition.entry(partition_of(records[index].partition_key(), partitions)).or_default().push(index);
                    }
                    let new = by_partition.into_iter();
                    lanes.extend(new.map(|(partition, indexes)| Lane { topic: topic.clone(), partition, indexes }));
                }
            }
        }
        (lanes, failed)
    }

    fn turn(&self, lane: &Lane) -> Turn {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        let mut turns = self.turns.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        turns.entry((lane.topic.clone(), lane.partition)).or_default().clone()
    }

    /// A client for reading a partition that exists.
    async fn reader(&self, topic: &str, partition: i32) -> Result<Loan, LogError> {
        self.exists(topic, partition).await?;
        self.connections.lend(Use::Fetch, &self.name(topic), partition).await
    }

    async fn exists(&self, topic: &str, partition: i32) -> Result<(), LogError> {
        let partitions = self.partitions(topic).await?;
        if !(0..partitions).contains(&partition) {
            return Err(LogError::Defect(format!("topic {topic} has {partitions} partitions, none is {partition}")));
        }
        Ok(())
    }

    async fn offset(&self, topic: &str, partition: i32, at: OffsetAt) -> Result<i64, LogError> {
        let loan = self.reader(topic, partition).await?;
        let answer = bounded(self.request_timeout, "asking for offsets", loan.client.get_offset(at)).await;
        match answer {
            Ok(Ok(offset)) => {
                self.connections.give_back(loan);
                Ok(offset)
            }
            Ok(Err(error)) => {
                self.connections.give_up(loan).await;
                Err(meaning(topic, &error))
            }
            Err(late) => {
                self.connections.give_up(loan).await;
                Err(late)
            }
        }
    }
}

#[async_trait]
impl Log for KafkaLog {
    async fn create_topics(&self, topics: &[&str], partitions: i32) -> Result<(), LogError> {
        let there = self.connections.list_topics(self.request_timeout).await?;
        let timeout_ms = i32::try_from(self.request_timeout.as_millis()).unwrap_or(i32::MAX);
        for name in topics.iter().map(|topic| self.name(topic)).filter(|name| !there.contains_key(name.as_ref())) {
            let created = self.connections.ask(self.request_timeout, "creating a topic", |client| async move {
                let controller = client.controller_client().map_err(|error| meaning(&name, &error))?;
                let answer = controller.create_topic(name.as_ref(), partitions, REPLICATION_OF_THE_BROKER, timeout_ms).await;
                match answer {
                    Ok(()) | Err(Error::ServerError { protocol_error: ProtocolError::TopicAlreadyExists, .. }) => Ok(()),
                    Err(error) => Err(meaning(&name, &error)),
                }
            });
            created.await?;
        }
        self.connections.forget_topics().await;
        // The controller says yes a little before every broker knows.
        let listed = async {
            for topic in topics {
                while let Err(error) = self.partitions(topic).await {
                    if !matches!(error, LogError::UnknownTopic(_)) {
                        return Err(error);
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            Ok(())
        };
        bounded(self.request_timeout, "waiting until new topics are listed, as they are to whoever may describe them", listed)
            .await?
    }

    async fn partitions(&self, topic: &str) -> Result<i32, LogError> {
        match self.connections.partitions(&self.name(topic)).await {
            Err(LogError::UnknownTopic(_)) => Err(LogError::UnknownTopic(topic.to_owned())),
            answer => answer,
        }
    }

    async fn append(&self, records: Vec<Record>) -> Result<(), AppendError> {
        let (lanes, mut failed) = self.lanes(&records).await;
        let appended = self.append_lanes(&records, lanes).await;
        failed.extend(appended.into_iter().filter_map(Result::err));
        match combine(records, failed) {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    async fn fetch(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        faults::point!("log.before_fetch")?;
        let fetched = self.read(topic, partition, from, bytes_max).await?;
        faults::point!("log.after_fetch")?;
        Ok(fetched)
    }

    async fn bounds(&self, topic: &str, partition: i32) -> Result<(i64, i64), LogError> {
        let start = self.offset(topic, partition, OffsetAt::Earliest).await?;
        let end = self.offset(topic, partition, OffsetAt::Latest).await?;
        Ok((start, end.max(start)))
    }

    async fn delete_records_before(&self, topic: &str, partition: i32, offset: i64) -> Result<(), LogError> {
        let loan = self.reader(topic, partition).await?;
        let timeout_ms = i32::try_from(self.request_timeout.as_millis()).unwrap_or(i32::MAX);
        match bounded(self.request_timeout, "deleting records", loan.client.delete_records(offset, timeout_ms)).await {
            Ok(Ok(())) => {
                self.connections.give_back(loan);
                Ok(())
            }
            Ok(Err(Error::ServerError { protocol_error: ProtocolError::OffsetOutOfRange, .. })) => {
                self.connections.give_back(loan);
                let (start, end) = self.bounds(topic, partition).await?;
                Err(LogError::OutOfRange { start, end })
            }
            Ok(Err(error)) => {
                self.connections.give_up(loan).await;
                Err(meaning(topic, &error))
            }
            Err(late) => {
                self.connections.give_up(loan).await;
                Err(late)
            }
        }
    }

    async fn ping(&self) -> Result<(), LogError> {
        self.connections.list_topics(PING_WAIT).await.map(drop)
    }

    async fn prune(&self) -> Result<u64, LogError> {
        Ok(0)
    }
}

/// One error of all the lanes'. A record that is too large comes before what may pass by itself.
fn combine(records: Vec<Record>, failed: Vec<Unacknowledged>) -> Option<AppendError> {
    let rank = |cause: &LogError| match cause {
        LogError::RecordTooLarge { .. } => 0,
        LogError::Defect(_) | LogError::Refused(_) | LogError::UnknownTopic(_) | LogError::OutOfRange { .. } => 1,
        LogError::Unavailable(_) => 2,
    };
    let mut cause = failed.iter().map(|lane| &lane.cause).min_by_key(|cause| rank(cause))?.clone();
    let mut indexes: Vec<usize> = failed.into_iter().flat_map(|lane| lane.indexes).collect();
    indexes.sort_unstable();
    if let LogError::RecordTooLarge { index, .. } = &mut cause {
        *index = indexes.binary_search(index).unwrap_or_default();
    }
    let mut records: Vec<Option<Record>> = records.into_iter().map(Some).collect();
    let unacknowledged = indexes.into_iter().filter_map(|index| records[index].take()).collect();
    Some(AppendError { unacknowledged, cause })
}
