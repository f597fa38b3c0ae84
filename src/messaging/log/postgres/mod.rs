//! The log in Postgres: what `shopd all` uses in place of a broker.
//!
//! Owns the schema `shopd_log`. One append is one transaction that locks its partitions' rows in one order and takes its
//! offsets from them, so offsets are given in the order of the commits: no holes, and no reader passes a late one.

mod headers;
mod signals;
mod store;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::SubsecRound;
use futures::FutureExt;
use tokio_util::task::AbortOnDropHandle;

use self::signals::Signals;
use self::store::{Columns, End, Place, Row, Topic};
use super::partitioner::partition_of;
use super::{AppendError, Fetched, Log, LogError, Record, StoredRecord};
use crate::config::LogConfig;
use crate::db::{Db, DbError};

/// How old a known topic may get.
const TOPICS_AGE_MAX: Duration = Duration::from_secs(30);
/// A bound on one record, key, value and headers; far above what any of ours has.
const RECORD_BYTES_MAX: usize = 8 * 1024 * 1024;
const FETCHED_RECORDS_MAX: i64 = 4_000;
/// Records of one partition that one `prune` removes at most.
const PRUNED_RECORDS_MAX: i64 = 10_000;
const PING_WAIT: Duration = Duration::from_millis(1_000);

/// Makes no connection until it is first used. Several in one process, or in several, may work on one database.
pub struct PostgresLog {
    db: Db,
    retention: Duration,
    fetch_wait: Duration,
    topics: Mutex<HashMap<String, (Instant, Topic)>>,
    signals: Arc<Signals>,
    /// End with this log.
    tasks: OnceLock<[AbortOnDropHandle<()>; 3]>,
}

impl From<DbError> for LogError {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Defect(text) => LogError::Defect(text),
            other => LogError::Unavailable(other.to_string()),
        }
    }
}

/// What one transaction appended: the new ends, or the topic whose partition is not there.
type Appended = Result<Vec<End>, i32>;

impl PostgresLog {
    /// On a database that was brought to `Schema::Log`. An idle fetch waits `fetch_wait`. Never waits, never fails.
    pub fn new(db: Db, config: &LogConfig, fetch_wait: Duration) -> Self {
        Self {
            db,
            retention: config.retention,
            fetch_wait,
            topics: Mutex::default(),
            signals: Arc::default(),
            tasks: OnceLock::new(),
        }
    }

    /// Starts what tells and hears of appends, when it is first needed.
    fn awake(&self) -> &Signals {
        self.tasks.get_or_init(|| {
            let runtime = self.db.runtime();
            [
                AbortOnDropHandle::new(runtime.spawn(self.signals.clone().keep_looking(self.db.clone()))),
                AbortOnDropHandle::new(runtime.spawn(self.signals.clone().keep_listening(self.db.clone()))),
                AbortOnDropHandle::new(runtime.spawn(self.signals.clone().keep_telling(self.db.clone()))),
            ]
        });
        &self.signals
    }

    fn topics(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Instant, Topic)>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn topic(&self, name: &str) -> Result<Topic, LogError> {
        let known = self.topics().get(name).filter(|(asked, _)| asked.elapsed() < TOPICS_AGE_MAX).map(|(_, topic)| *topic);
        if let Some(topic) = known {
            return Ok(topic);
        }
        let found = store::topic(&mut *self.db.get().await?, name).await.map_err(DbError::from)?;
        let topic = found.ok_or_else(|| LogError::UnknownTopic(name.to_owned()))?;
        self.topics().insert(name.to_owned(), (Instant::now(), topic));
        Ok(topic)
    }

    async fn place(&self, topic: &str, partition: i32) -> Result<Place, LogError> {
        let Topic { id, partitions } = self.topic(topic).await?;
        if !(0..partitions).contains(&partition) {
            return Err(LogError::Defect(format!("topic {topic} has {partitions} partitions, none is {partition}")));
        }
        Ok((id, partition))
    }

    /// What is there now.
    async fn look(&self, topic: &str, place: Place, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        let mut conn = self.db.get().await?;
        let rows = store::read(&mut conn, place, from, FETCHED_RECORDS_MAX, i64::from(bytes_max)).await.map_err(DbError::from)?;
        drop(conn);
        let Some(Row { start_offset: start, next_offset: end, .. }) = rows.first() else { return Err(self.gone(topic)) };
        let (start, end) = (*start, *end);
        if !(start..=end).contains(&from) {
            return Err(LogError::OutOfRange { start, end });
        }
        let records = rows.into_iter().filter_map(stored).collect::<Result<Vec<_>, _>>()?;
        let next_offset = records.last().map_or(from, |last| last.offset + 1);
        if records.is_empty() && from < end {
            return Err(LogError::Defect(format!("{topic}/{}: the record at {from} is missing", place.1)));
        }
        Ok(Fetched { records, next_offset, end_offset: end })
    }

    /// A topic that was known is not there: the log was made anew.
    fn gone(&self, topic: &str) -> LogError {
        self.topics().clear();
        LogError::UnknownTopic(topic.to_owned())
    }

    /// Appends records whose topics are known, in one transaction.
    async fn append_all(&self, records: &[Record], topics: &HashMap<&str, Topic>) -> Result<(), LogError> {
        let mut by_place: BTreeMap<Place, Vec<&Record>> = BTreeMap::new();
        for record in records {
            if let Some(topic) = topics.get(&*record.topic) {
                by_place.entry((topic.id, partition_of(record.partition_key(), topic.partitions))).or_default().push(record);
            }
        }
        let mut columns = Columns::default();
        for ((topic_id, partition), records) in &by_place {
            for (index, record) in records.iter().enumerate() {
                columns.topic_ids.push(*topic_id);
                columns.partitions.push(*partition);
                // From the partition's end on, which is added once it is locked.
                columns.offsets.push(index as i64);
                columns.keys.push(record.key.as_ref().map(|key| key.to_vec()));
                columns.values.push(record.value.as_ref().map(|value| value.to_vec()));
                columns.headers.push(headers::encode(record.headers.iter().map(|(name, value)| (name.as_ref(), value.as_ref()))));
                columns.timestamps.push(record.timestamp.trunc_subsecs(3));
            }
        }
        let counts: Vec<(Place, i64)> = by_place.iter().map(|(place, records)| (*place, records.len() as i64)).collect();
        let work = Arc::new((counts, columns));
        let appended: Result<Appended, DbError> = self
            .db
            .transaction(move |conn| {
                let work = work.clone();
                async move {
                    let (counts, columns) = &*work;
                    let topic_ids: Vec<i32> = counts.iter().map(|(place, _)| place.0).collect();
                    let partitions: Vec<i32> = counts.iter().map(|(place, _)| place.1).collect();
                    let mut ends = store::lock(conn, &topic_ids, &partitions).await?;
                    let mut columns = columns.clone();
                    let mut offsets = columns.offsets.iter_mut();
                    for (index, (place, count)) in counts.iter().enumerate() {
                        let Some(end) = ends.get_mut(index).filter(|end| (end.topic_id, end.partition) == *place) else {
                            return Ok(Err(place.0));
                        };
                        offsets.by_ref().take(*count as usize).for_each(|offset| *offset += end.next_offset);
                        end.next_offset += count;
                    }
                    store::insert(conn, &ends, &columns).await?;
                    Ok(Ok(ends))
                }
                .boxed()
            })
            .await;
        match appended? {
            Ok(ends) => {
                let signals = self.awake();
                ends.iter().for_each(|end| signals.committed((end.topic_id, end.partition), end.next_offset));
                Ok(())
            }
            Err(id) => {
                let name = topics.iter().find(|(_, topic)| topic.id == id).map_or("", |(name, _)| name);
                Err(self.gone(name))
            }
        }
    }

    async fn sweep(&self, place: Place) -> Result<u64, LogError> {
        let swept = store::sweep(&mut *self.db.get().await?, place, PRUNED_RECORDS_MAX).await.map_err(DbError::from)?;
        Ok(swept as u64)
    }
}

fn record_bytes(record: &Record) -> usize {
    let headers: usize = record.headers.iter().map(|(name, value)| 8 + name.len() + value.len()).sum();
    let sized = |bytes: &Option<Bytes>| bytes.as_ref().map_or(0, Bytes::len);
    sized(&record.key) + sized(&record.value) + headers
}

/// The record of a row, if it has one.
fn stored(row: Row) -> Option<Result<StoredRecord, LogError>> {
    let (Some(offset), Some(timestamp), Some(bytes)) = (row.offset, row.timestamp, row.headers) else { return None };
    Some(match headers::decode(bytes) {
        Some(headers) => {
            Ok(StoredRecord { offset, key: row.key.map(Bytes::from), value: row.value.map(Bytes::from), headers, timestamp })
        }
        None => Err(LogError::Defect(format!("the headers at {offset} cannot be read"))),
    })
}

#[async_trait]
impl Log for PostgresLog {
    async fn create_topics(&self, topics: &[&str], partitions: i32) -> Result<(), LogError> {
        let mut names = topics.to_vec();
        names.sort_unstable();
        names.dedup();
        store::create_topics(&mut *self.db.get().await?, &names, partitions).await.map_err(DbError::from)?;
        Ok(())
    }

    async fn partitions(&self, topic: &str) -> Result<i32, LogError> {
        Ok(self.topic(topic).await?.partitions)
    }

    async fn append(&self, records: Vec<Record>) -> Result<(), AppendError> {
        let names: HashSet<Arc<str>> = records.iter().map(|record| record.topic.clone()).collect();
        let mut topics = HashMap::new();
        let mut cause = None;
        for name in &names {
            match self.topic(name).await {
                Ok(topic) => drop(topics.insert(&**name, topic)),
                Err(error) => cause = Some(error),
            }
        }
        // A record that is too large holds up what follows it in its topic, as a batch of a broker's would.
        let mut too_large: HashSet<Arc<str>> = HashSet::new();
        let (mut good, mut unacknowledged) = (Vec::new(), Vec::new());
        for record in records {
            let bytes = record_bytes(&record);
            if bytes > RECORD_BYTES_MAX && topics.contains_key(&*record.topic) && too_large.insert(record.topic.clone()) {
                let first = !matches!(cause, Some(LogError::RecordTooLarge { .. }));
                if first {
                    cause = Some(LogError::RecordTooLarge { index: unacknowledged.len(), bytes, bytes_max: RECORD_BYTES_MAX });
                }
            }
            let refused = too_large.contains(&record.topic) || !topics.contains_key(&*record.topic);
            if refused { &mut unacknowledged } else { &mut good }.push(record);
        }
        if !good.is_empty()
            && let Err(error) = self.append_all(&good, &topics).await
        {
            // Nothing of the call is surely there.
            good.append(&mut unacknowledged);
            return Err(AppendError { unacknowledged: good, cause: error });
        }
        match cause {
            None => Ok(()),
            Some(cause) => Err(AppendError { unacknowledged, cause }),
        }
    }

    async fn fetch(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        let deadline = tokio::time::Instant::now() + self.fetch_wait;
        let place = self.place(topic, partition).await?;
        let signals = self.awake();
        let _waiting = signals.wait();
        let mut end = signals.end(place);
        loop {
            // Where nothing is known to have moved there is nothing to ask the database for.
            let known = *end.borrow_and_update();
            if known != from || !signals.is_fresh() {
                let fetched = self.look(topic, place, from, bytes_max).await?;
                if !fetched.records.is_empty() {
                    return Ok(fetched);
                }
                signals.saw(place, fetched.end_offset);
                let now_known = *end.borrow_and_update();
                if now_known != known && now_known > from {
                    continue;
                }
            }
            if let Err(_late) = tokio::time::timeout_at(deadline, end.changed()).await {
                return Ok(Fetched { records: Vec::new(), next_offset: from, end_offset: from });
            }
        }
    }

    async fn bounds(&self, topic: &str, partition: i32) -> Result<(i64, i64), LogError> {
        let place = self.place(topic, partition).await?;
        let bounds = store::bounds(&mut *self.db.get().await?, place).await.map_err(DbError::from)?;
        let bounds = bounds.ok_or_else(|| self.gone(topic))?;
        Ok((bounds.start_offset, bounds.next_offset))
    }

    async fn delete_records_before(&self, topic: &str, partition: i32, offset: i64) -> Result<(), LogError> {
        let place = self.place(topic, partition).await?;
        let moved = store::move_start(&mut *self.db.get().await?, place, offset).await.map_err(DbError::from)?;
        if moved == 0 {
            let (start, end) = self.bounds(topic, partition).await?;
            if offset > end {
                return Err(LogError::OutOfRange { start, end });
            }
        }
        while self.sweep(place).await? > 0 {}
        Ok(())
    }

    async fn ping(&self) -> Result<(), LogError> {
        Ok(self.db.ping(PING_WAIT).await?)
    }

    async fn prune(&self) -> Result<u64, LogError> {
        let age = self.retention.as_secs_f64();
        let starts = store::old(&mut *self.db.get().await?, age, PRUNED_RECORDS_MAX).await.map_err(DbError::from)?;
        let mut removed = 0;
        for End { topic_id, partition, next_offset: start } in starts {
            let place = (topic_id, partition);
            // Readers find it out of range from here on; then it is deleted, without holding up an append meanwhile.
            store::move_start(&mut *self.db.get().await?, place, start).await.map_err(DbError::from)?;
            removed += self.sweep(place).await?;
        }
        Ok(removed)
    }
}
