//! Reading a partition: what lies there may be any producer's, so offsets without a record and batches that cannot be
//! decoded are stepped over, never waited at.
//!
//! First the plain way ([`super::polls::LongPolls`]), together with whatever else is waited for; what is not plain is asked for by itself.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::connections::bounded;
use super::fetch::Place;
use super::{KafkaLog, Log, LogError, raw};
use crate::messaging::log::{Fetched, StoredRecord};

/// From an answer without records, where there should be some, to the next try.
const EMPTY_INTERVAL: Duration = Duration::from_millis(100);

/// Errors that a broker answers for a partition (Kafka's protocol).
const OFFSET_OUT_OF_RANGE: i16 = 1;

impl KafkaLog {
    pub(super) async fn read(&self, topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Fetched, LogError> {
        let place = Place { topic: self.name(topic).into_owned(), partition, from, bytes_max };
        match self.polls.fetch(place.clone()).await? {
            Some(fetched) => Ok(fetched),
            None => self.read_by_itself(topic, place).await,
        }
    }

    /// On connections of its own: such places are rare. What was damaged on its way is whole then; what lies damaged on the broker's disk is
    /// not, and is told.
    async fn read_by_itself(&self, topic: &str, place: Place) -> Result<Fetched, LogError> {
        let Place { partition, from, .. } = place;
        self.exists(topic, partition).await?;
        let began = Instant::now();
        let asked = raw::fetch(self.connections.dialer(), self.connections.servers(), &place, self.fetch_wait);
        let part = bounded(self.fetch_wait + self.request_timeout, "fetching by itself", asked).await?;
        let part = part.map_err(|error| LogError::Unavailable(error.to_string()))?;
        match part.error {
            0 => (),
            OFFSET_OUT_OF_RANGE => return Err(self.out_of_range(topic, partition, from).await),
            error => return Err(LogError::Unavailable(format!("the broker answered a fetch with error {error}"))),
        }
        // It may have to be decompressed.
        let read = tokio::task::spawn_blocking(move || part.whatever_it_takes(from)).await;
        let fetched = read.map_err(|error| LogError::Defect(error.to_string()))?;
        let fetched = fetched.ok_or_else(|| LogError::Unavailable("an answer without a whole batch".into()))?;
        if let Some(reason) = fetched.records.iter().find_map(StoredRecord::unreadable) {
            let reason = String::from_utf8_lossy(reason);
            tracing::error!(topic, partition, from, next = fetched.next_offset, %reason, "records on the log cannot be decoded");
        }
        if fetched.next_offset == from {
            // A broker that has not fetched it from its own store yet, or whose copies do not agree, may say so at once, again and again.
            sleep_until(began + EMPTY_INTERVAL).await;
        }
        Ok(fetched)
    }

    async fn out_of_range(&self, topic: &str, partition: i32, from: i64) -> LogError {
        match self.bounds(topic, partition).await {
            Ok((start, end)) if (start..=end).contains(&from) => LogError::Unavailable("the partition's bounds moved".into()),
            Ok((start, end)) => LogError::OutOfRange { start, end },
            Err(error) => error,
        }
    }
}
