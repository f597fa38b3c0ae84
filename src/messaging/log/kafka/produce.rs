//! Appending: each partition's records in batches, one request in flight each, in order.
//!
//! First the plain way ([`Wire`]): one request to each broker for all partitions that it leads. What is not taken there goes through the
//! client library, while its partition's turn is still held, so that nothing overtakes it.

use std::collections::VecDeque;
use std::ops::Range;

use futures::future::join_all;
use futures::{StreamExt, stream};
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::Compression;

use super::connections::{Use, bounded, meaning};
use super::wire::Part;
use super::{KafkaLog, Lane, Turn, Unacknowledged, batch};
use crate::faults;
use crate::messaging::log::{LogError, Record};

/// Partitions that the client library writes to at once.
const PARTITIONS_AT_ONCE_MAX: usize = 64;
/// Below this compressing a batch costs more than it saves.
const COMPRESSED_BYTES_MIN: usize = 2_048;
/// Kafka's own default of `message.max.bytes`.
const BROKER_BYTES_MAX: usize = 1_048_588;

/// A lane on its way.
struct Going {
    lane: Lane,
    /// The broker's name of its topic.
    topic: String,
    sizes: Vec<usize>,
    /// What of it is still to go.
    batches: VecDeque<Range<usize>>,
    acknowledged: usize,
    way: Way,
}

enum Way {
    Plain,
    /// The plain way did not work.
    Library,
    Failed(LogError),
}

impl Going {
    fn next_bytes(&self) -> Option<usize> {
        let range = self.batches.front()?;
        Some(batch::alone_bytes(self.sizes[range.clone()].iter().sum()))
    }

    fn end(self) -> Result<(), Unacknowledged> {
        match self.way {
            Way::Failed(cause) => Err(Unacknowledged { indexes: self.lane.indexes[self.acknowledged..].to_vec(), cause }),
            Way::Plain | Way::Library => Ok(()),
        }
    }
}

impl KafkaLog {
    /// Appends the records of these lanes, which are in the order of topics and partitions.
    pub(super) async fn append_lanes(&self, records: &[Record], lanes: Vec<Lane>) -> Vec<Result<(), Unacknowledged>> {
        let turns: Vec<Turn> = lanes.iter().map(|lane| self.turn(lane)).collect();
        let mut going: Vec<Going> = lanes
            .into_iter()
            .map(|lane| {
                let sizes: Vec<usize> = lane.indexes.iter().map(|index| batch::record_bytes(&records[*index])).collect();
                let batches = batch::cut(&sizes, self.batch_bytes_max);
                let topic = self.name(&lane.topic).into_owned();
                Going { lane, topic, sizes, batches, acknowledged: 0, way: Way::Plain }
            })
            .collect();
        // One after the other, in one order for all: two calls never wait for each other in a circle.
        let mut held = Vec::with_capacity(turns.len());
        for turn in &turns {
            match bounded(self.request_timeout, "waiting for the batch before", turn.lock()).await {
                Ok(turn) => held.push(turn),
                Err(late) => {
                    going.iter_mut().for_each(|going| going.way = Way::Failed(late.clone()));
                    return going.into_iter().map(Going::end).collect();
                }
            }
        }
        while self.append_plainly(records, &mut going).await {}
        let finished = stream::iter(going).map(|mut going| async move {
            if matches!(going.way, Way::Library)
                && let Err(cause) = self.append_batches(records, &mut going).await
            {
                going.way = Way::Failed(cause);
            }
            going.end()
        });
        finished.buffer_unordered(PARTITIONS_AT_ONCE_MAX).collect().await
    }

    /// One batch of each lane that goes the plain way; false where none does any more.
    async fn append_plainly(&self, records: &[Record], going: &mut [Going]) -> bool {
        let (mut parts, mut of) = (Vec::new(), Vec::new());
        for (index, one) in going.iter_mut().enumerate() {
            let (Way::Plain, Some(bytes), Some(range)) = (&one.way, one.next_bytes(), one.batches.front()) else { continue };
            if bytes > self.batch_bytes_max {
                one.way = Way::Library;
                continue;
            }
            of.push(index);
            parts.push((
                one.topic.clone(),
                one.lane.partition,
                one.lane.indexes[range.clone()].iter().map(|index| &records[*index]).collect::<Vec<_>>(),
                bytes >= COMPRESSED_BYTES_MIN,
            ));
        }
        if parts.is_empty() {
            return false;
        }
        let parts: Vec<Part<'_>> = parts
            .iter()
            .map(|(topic, partition, records, compressed)| Part {
                topic,
                partition: *partition,
                records: records.clone(),
                compressed: *compressed,
            })
            .collect();
        // Whatever is not said to be taken, or to be unknown, goes the other way.
        let mut ways: Vec<Way> = parts.iter().map(|_| Way::Library).collect();
        if let Ok(Ok(by_leader)) = bounded(self.request_timeout, "asking for leaders", self.wire.by_leader(&parts)).await {
            let asked = by_leader.iter().map(|(broker, indexes)| {
                let parts: Vec<&Part<'_>> = indexes.iter().map(|index| &parts[*index]).collect();
                async move { (indexes, self.send(broker, &parts).await) }
            });
            for (indexes, answer) in join_all(asked).await {
                match answer {
                    Ok(taken) => {
                        indexes.iter().zip(taken).filter(|(_, taken)| *taken).for_each(|(index, _)| ways[*index] = Way::Plain);
                    }
                    Err(cause) => indexes.iter().for_each(|index| ways[*index] = Way::Failed(cause.clone())),
                }
            }
        }
        for ((way, part), index) in ways.into_iter().zip(&parts).zip(of) {
            match way {
                Way::Plain => going[index].acknowledged = going[index].batches.pop_front().map_or(0, |range| range.end),
                _ => self.leaders.forget(part.topic),
            }
            going[index].way = way;
        }
        true
    }

    /// Which of these the broker has taken. An error is the end of it; a broken connection is not, the client library makes another one.
    async fn send(&self, broker: &str, parts: &[&Part<'_>]) -> Result<Vec<bool>, LogError> {
        faults::point!("log.before_produce").map_err(LogError::from)?;
        if faults::repeat!("log.produce") {
            let _ = bounded(self.request_timeout, "producing", self.wire.produce(broker, parts, self.request_timeout)).await;
        }
        let answer = bounded(self.request_timeout, "producing", self.wire.produce(broker, parts, self.request_timeout)).await?;
        let taken = answer.unwrap_or_else(|error| {
            tracing::debug!(broker, %error, "a produce request failed; the client library makes another one");
            vec![false; parts.len()]
        });
        faults::point!("log.after_produce").map_err(LogError::from)?;
        Ok(taken)
    }

    /// Through the client library, batch after batch, up to the first that fails: it finds leaders, tries again and says what is wrong.
    async fn append_batches(&self, records: &[Record], going: &mut Going) -> Result<(), LogError> {
        let Going { lane, sizes, batches, acknowledged, .. } = going;
        while let Some(range) = batches.pop_front() {
            let bytes = batch::alone_bytes(sizes[range.clone()].iter().sum());
            let too_large = LogError::RecordTooLarge { index: lane.indexes[range.start], bytes, bytes_max: self.batch_bytes_max };
            // Only one record can be above our own limit, which keeps a distance to the broker's: that says whether it takes it.
            if bytes > self.batch_bytes_max.max(BROKER_BYTES_MAX) {
                return Err(too_large);
            }
            match self.produce(records, lane, range.clone(), bytes).await {
                Ok(()) => *acknowledged = range.end,
                Err(Refused::TooLarge) if range.len() > 1 => {
                    // This broker's limit is lower than ours: find out by halves.
                    let middle = range.start + range.len() / 2;
                    batches.push_front(middle..range.end);
                    batches.push_front(range.start..middle);
                }
                Err(Refused::TooLarge) => return Err(too_large),
                Err(Refused::For(cause)) => return Err(cause),
            }
        }
        Ok(())
    }

    async fn produce(&self, records: &[Record], lane: &Lane, range: Range<usize>, bytes: usize) -> Result<(), Refused> {
        let batch: Vec<_> = lane.indexes[range].iter().map(|index| to_kafka(&records[*index])).collect();
        let compression = if bytes < COMPRESSED_BYTES_MIN { Compression::NoCompression } else { Compression::Lz4 };
        let loan = self.connections.lend(Use::Produce, &self.name(&lane.topic), lane.partition).await;
        // By our name of it, not by the broker's.
        let loan = loan.map_err(|error| match error {
            LogError::UnknownTopic(_) => LogError::UnknownTopic(lane.topic.to_string()),
            other => other,
        })?;
        faults::point!("log.before_produce").map_err(LogError::from)?;
        if faults::repeat!("log.produce") {
            let _ = bounded(self.request_timeout, "producing", loan.client.produce(batch.clone(), compression)).await;
        }
        match bounded(self.request_timeout, "producing", loan.client.produce(batch, compression)).await {
            Ok(Ok(_offsets)) => {
                self.connections.give_back(loan);
                faults::point!("log.after_produce").map_err(LogError::from)?;
                Ok(())
            }
            Ok(Err(Error::ServerError {
                protocol_error: ProtocolError::MessageTooLarge | ProtocolError::RecordListTooLarge,
                ..
            })) => {
                self.connections.give_back(loan);
                Err(Refused::TooLarge)
            }
            Ok(Err(error)) => {
                self.connections.give_up(loan).await;
                Err(Refused::For(meaning(&lane.topic, &error)))
            }
            Err(late) => {
                self.connections.give_up(loan).await;
                Err(Refused::For(late))
            }
        }
    }
}

/// Why a broker did not take a batch.
enum Refused {
    TooLarge,
    For(LogError),
}

impl From<LogError> for Refused {
    fn from(cause: LogError) -> Self {
        Refused::For(cause)
    }
}

fn to_kafka(record: &Record) -> rskafka::record::Record {
    rskafka::record::Record {
        key: record.key.as_ref().map(|key| key.to_vec()),
        value: record.value.as_ref().map(|value| value.to_vec()),
        headers: record.headers.iter().map(|(name, value)| (name.to_string(), value.to_vec())).collect(),
        timestamp: record.timestamp,
    }
}
