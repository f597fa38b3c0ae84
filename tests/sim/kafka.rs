//! A Kafka, as much of one as [`Log`] needs: partitions, acknowledgements that get lost, appends that land twice or late, retention,
//! topics that are wiped and made anew, and a broker that is away.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use shopd::contracts::Headers;
use shopd::messaging::log::partitioner::partition_of;
use shopd::messaging::log::{AppendError, Fetched, Log, LogError, Record, StoredRecord};
use tokio::sync::Notify;

use crate::world::{Guard, Process, World};

/// How long a fetch waits for a first record.
const FETCH_WAIT: Duration = Duration::from_secs(2);
/// Records of one fetch, and of one request of an append.
const FETCH_RECORDS_MAX: usize = 20;
const REQUEST_RECORDS_MAX: usize = 4;
/// The header that numbers what lands, over all partitions.
pub const LANDED: &str = "sim-landed";

pub const POISON: &[u8] = b"{";

/// What happens to the next requests that append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Luck {
    /// On the log, and the producer hears nothing of it.
    AckLost,
    /// On the log twice, as after a retry inside the client.
    Twice,
    /// Refused as far as the producer knows, and on the log so many milliseconds later.
    Late(u64),
}

#[derive(Default)]
struct Partition {
    start: i64,
    records: Vec<StoredRecord>,
}

impl Partition {
    fn end(&self) -> i64 {
        self.start + self.records.len() as i64
    }
}

struct State {
    up: bool,
    topics: BTreeMap<String, Vec<Partition>>,
    luck: Vec<Luck>,
    landed: i64,
    /// Event ids on the log, now or before.
    events: BTreeSet<Bytes>,
    /// Topics that were made anew.
    wiped: BTreeSet<String>,
}

#[derive(Clone)]
pub struct Kafka {
    world: World,
    state: Arc<Mutex<State>>,
    appended: Arc<Notify>,
}

impl Kafka {
    pub fn start(world: World, topics: &[&str], partitions: usize) -> Self {
        let made = |topic: &&str| ((*topic).to_owned(), (0..partitions).map(|_| Partition::default()).collect());
        let topics = topics.iter().map(made).collect();
        let state = State { up: true, topics, luck: Vec::new(), landed: 0, events: BTreeSet::new(), wiped: BTreeSet::new() };
        Self { world, state: Arc::new(Mutex::new(state)), appended: Arc::new(Notify::new()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_up(&self, up: bool) {
        self.state().up = up;
        self.appended.notify_waiters();
    }

    pub fn luck(&self, luck: Luck, times: u64) {
        let mut state = self.state();
        for _ in 0..times {
            state.luck.push(luck);
        }
    }

    pub fn calm(&self) {
        self.state().luck.clear();
    }

    /// Whether an event was ever on the log.
    pub fn has_had(&self, event_id: &str) -> bool {
        self.state().events.contains(event_id.as_bytes())
    }

    /// Retention: everything that is there now is gone.
    pub fn expire(&self, topic: &str) {
        for partition in self.state().topics.get_mut(topic).into_iter().flatten() {
            partition.start = partition.end();
            partition.records.clear();
        }
        self.appended.notify_waiters();
    }

    /// Deleted; and made anew at once, or by whoever misses it. Offsets begin at 0 again.
    pub fn wipe(&self, topic: &str, made_anew: bool) {
        let mut state = self.state();
        for partition in state.topics.get_mut(topic).into_iter().flatten() {
            *partition = Partition::default();
        }
        state.wiped.insert(topic.to_owned());
        if !made_anew {
            state.topics.remove(topic);
        }
        drop(state);
        self.appended.notify_waiters();
    }

    pub fn was_wiped(&self, topic: &str) -> bool {
        self.state().wiped.contains(topic)
    }

    /// Whether the record at an offset can be read by nobody.
    pub fn is_poison(&self, topic: &str, partition: i32, offset: i64) -> bool {
        let state = self.state();
        let one = state.topics.get(topic).and_then(|partitions| partitions.get(partition as usize));
        let record = one.and_then(|one| one.records.get((offset - one.start) as usize));
        record.is_some_and(|record| record.value.as_deref() == Some(POISON))
    }

    /// Puts records of any producer's on the log.
    pub fn land(&self, records: &[Record]) {
        let mut state = self.state();
        for record in records {
            // Too late for a topic that is no more.
            if !state.topics.contains_key(&*record.topic) {
                continue;
            }
            state.landed += 1;
            let landed = state.landed;
            let event = record.headers.iter().find(|(name, _)| name == "ce_id").map(|(_, id)| id.clone());
            state.events.extend(event);
            let Some(partitions) = state.topics.get_mut(&*record.topic) else { continue };
            let number = partition_of(record.key.as_deref().unwrap_or_default(), partitions.len() as i32);
            let partition = &mut partitions[number as usize];
            let headers: Headers = record.headers.iter().map(|(name, value)| (name, value)).collect();
            let headers = headers.with([(LANDED, landed.to_string().as_bytes())]);
            let (key, value) = (record.key.clone(), record.value.clone());
            let offset = partition.end();
            partition.records.push(StoredRecord { offset, key, value, headers, timestamp: record.timestamp });
            self.world.tell(0, "record lands; partition, offset", [landed, i64::from(number), offset]);
        }
        drop(state);
        self.appended.notify_waiters();
    }

    fn next_luck(&self) -> Result<Option<Luck>, LogError> {
        let mut state = self.state();
        if state.up { Ok(state.luck.pop()) } else { Err(away()) }
    }

    fn knows(&self, records: &[Record]) -> bool {
        let state = self.state();
        records.iter().all(|record| state.topics.contains_key(&*record.topic))
    }

    /// One request to one partition.
    async fn produce(&self, records: &[Record]) -> Result<(), LogError> {
        self.world.network().await;
        let luck = match self.next_luck() {
            Ok(luck) => luck,
            Err(error) => {
                // A client waits for a broker for a while.
                tokio::time::sleep(Duration::from_millis(self.world.pick(20..800))).await;
                return Err(error);
            }
        };
        match luck {
            _ if !self.knows(records) => return Err(LogError::UnknownTopic(records[0].topic.to_string())),
            Some(Luck::AckLost) => {
                self.world.tell(0, "acknowledgement lost", [0; 3]);
                self.land(records);
                return Err(away());
            }
            None => self.land(records),
            Some(Luck::Twice) => {
                self.land(records);
                self.land(records);
            }
            Some(Luck::Late(ms)) => {
                let (kafka, records) = (self.clone(), records.to_vec());
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    kafka.land(&records);
                });
                return Err(away());
            }
        }
        self.world.network().await;
        Ok(())
    }

    async fn append_all(&self, records: Vec<Record>) -> Result<(), AppendError> {
        let mut lanes: BTreeMap<(Arc<str>, i32), Vec<usize>> = BTreeMap::new();
        for (index, record) in records.iter().enumerate() {
            let partitions = self.state().topics.get(&*record.topic).map_or(1, Vec::len);
            lanes
                .entry((record.topic.clone(), partition_of(record.key.as_deref().unwrap_or_default(), partitions as i32)))
                .or_default()
                .push(index);
        }
        let lane = async |indexes: Vec<usize>| {
            for (n, request) in indexes.chunks(REQUEST_RECORDS_MAX).enumerate() {
                let request: Vec<Record> = request.iter().map(|index| records[*index].clone()).collect();
                if let Err(cause) = self.produce(&request).await {
                    return Some((indexes[n * REQUEST_RECORDS_MAX..].to_vec(), cause));
                }
            }
            None
        };
        let failed = futures::future::join_all(lanes.into_values().map(lane)).await;
        let mut unacknowledged = BTreeSet::new();
        let mut why = None;
        for (indexes, cause) in failed.into_iter().flatten() {
            unacknowledged.extend(indexes);
            why = Some(cause);
        }
        let Some(cause) = why else { return Ok(()) };
        Err(AppendError { unacknowledged: unacknowledged.into_iter().map(|index| records[index].clone()).collect(), cause })
    }

    /// What is there from `from` on; `None` where nothing is yet.
    fn read(&self, topic: &str, partition: i32, from: i64) -> Result<Option<Fetched>, LogError> {
        let state = self.state();
        if !state.up {
            return Err(away());
        }
        let partitions = state.topics.get(topic).ok_or_else(|| LogError::UnknownTopic(topic.into()))?;
        let one = partitions.get(partition as usize).ok_or_else(|| LogError::UnknownTopic(topic.into()))?;
        let (start, end) = (one.start, one.end());
        if from < start || from > end {
            self.world.tell(0, "offset out of range", [i64::from(partition), from, end]);
            return Err(LogError::OutOfRange { start, end });
        }
        let records: Vec<_> = one.records.iter().skip((from - start) as usize).take(FETCH_RECORDS_MAX).cloned().collect();
        if records.is_empty() {
            return Ok(None);
        }
        let next_offset = from + records.len() as i64;
        Ok(Some(Fetched { records, next_offset, end_offset: end }))
    }
}

fn away() -> LogError {
    LogError::Unavailable("the broker is away".into())
}

/// The log as one process sees it.
pub struct ProcessLog {
    pub kafka: Kafka,
    pub process: Process,
}

impl ProcessLog {
    /// Whether a call reaches the broker, or its answer comes back.
    fn reaches(&self) -> Result<(), LogError> {
        if self.process.is_off_the_log() { Err(away()) } else { Ok(()) }
    }
}

#[async_trait]
impl Log for ProcessLog {
    async fn create_topics(&self, topics: &[&str], partitions: i32) -> Result<(), LogError> {
        self.process.gate().await;
        self.kafka.world.network().await;
        self.reaches()?;
        let mut state = self.kafka.state();
        if !state.up {
            return Err(away());
        }
        for topic in topics {
            let made = || (0..partitions).map(|_| Partition::default()).collect();
            state.topics.entry((*topic).to_owned()).or_insert_with(made);
        }
        Ok(())
    }

    async fn partitions(&self, topic: &str) -> Result<i32, LogError> {
        self.process.gate().await;
        self.kafka.world.network().await;
        let partitions = {
            let state = self.kafka.state();
            state.topics.get(topic).filter(|_| state.up).map(Vec::len)
        };
        self.process.gate().await;
        self.reaches()?;
        partitions.map(|partitions| partitions as i32).ok_or_else(away)
    }

    /// What was sent goes on at the broker, whether the caller still waits or not.
    async fn append(&self, records: Vec<Record>) -> Result<(), AppendError> {
        self.process.gate().await;
        if let Err(cause) = self.reaches() {
            self.kafka.world.network().await;
            return Err(AppendError { unacknowledged: records, cause });
        }
        let kafka = self.kafka.clone();
        let sent = records.clone();
        let appending = tokio::spawn(async move { kafka.append_all(sent).await });
        if !self.kafka.world.holds(Guard::AckBeforeCursor) {
            return Ok(());
        }
        let unheard = |cause| Err(AppendError { unacknowledged: records.clone(), cause });
        let appended = appending.await.unwrap_or_else(|_| unheard(away()));
        let appended = self.reaches().map_or_else(unheard, |()| appended);
        self.process.trap(&self.kafka.world);
        self.process.gate().await;
        appended
    }

    async fn fetch(&self, topic: &str, partition: i32, from: i64, _bytes_max: i32) -> Result<Fetched, LogError> {
        self.process.gate().await;
        self.kafka.world.network().await;
        self.reaches()?;
        let deadline = tokio::time::Instant::now() + FETCH_WAIT;
        let fetched = loop {
            let appended = self.kafka.appended.notified();
            match self.kafka.read(topic, partition, from) {
                Ok(Some(fetched)) => break Ok(fetched),
                Err(error) => break Err(error),
                Ok(None) if tokio::time::timeout_at(deadline, appended).await.is_err() => {
                    break Ok(Fetched { records: Vec::new(), next_offset: from, end_offset: from });
                }
                Ok(None) => {}
            }
        };
        self.kafka.world.network().await;
        self.process.gate().await;
        self.reaches()?;
        fetched
    }

    async fn bounds(&self, _topic: &str, _partition: i32) -> Result<(i64, i64), LogError> {
        Err(LogError::Defect("nothing in the simulation asks for bounds".into()))
    }

    async fn delete_records_before(&self, _topic: &str, _partition: i32, _offset: i64) -> Result<(), LogError> {
        Err(LogError::Defect("nothing in the simulation deletes records".into()))
    }

    async fn ping(&self) -> Result<(), LogError> {
        self.process.gate().await;
        self.kafka.world.network().await;
        self.reaches()?;
        let up = self.kafka.state().up;
        up.then_some(()).ok_or_else(away)
    }

    async fn prune(&self) -> Result<u64, LogError> {
        Ok(0)
    }
}
