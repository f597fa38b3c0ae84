//! How far something has come: counters that cost next to nothing to look at, and the time they take to a goal.

use std::time::{Duration, Instant};

use shopd::messaging::log::{KafkaLog, Log};
use tokio_postgres::{Client, Statement};

use super::super::Result;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(10);
/// Without any progress.
const PATIENCE: Duration = Duration::from_secs(120);

/// A number that only grows, from 0.
pub enum Counter<'a> {
    /// Records on a topic.
    Log { log: &'a KafkaLog, topic: &'static str },
    /// Records that a service has applied: where it goes on. One short statement over a dozen rows.
    Consumed { client: Client, statement: Statement },
}

impl<'a> Counter<'a> {
    pub fn log(log: &'a KafkaLog, topic: &'static str) -> Self {
        Self::Log { log, topic }
    }

    pub async fn consumed(client: Client) -> Result<Self> {
        let statement = client.prepare("select coalesce(sum(next_offset), 0)::bigint from consumer_offset").await?;
        Ok(Self::Consumed { client, statement })
    }

    pub async fn read(&self) -> Result<i64> {
        match self {
            Self::Log { log, topic } => {
                let partitions = log.partitions(topic).await?;
                let ends = (0..partitions).map(|partition| log.bounds(topic, partition));
                let ends = futures::future::try_join_all(ends).await?;
                Ok(ends.iter().map(|(_, end)| end).sum())
            }
            Self::Consumed { client, statement } => Ok(client.query_one(statement, &[]).await?.try_get(0)?),
        }
    }
}

/// Looks at a counter from a start to a goal.
pub struct Progress {
    start: Instant,
    /// When the first were done, and how many.
    first: Option<(Duration, i64)>,
    last: (Duration, i64),
}

impl Progress {
    pub fn begin() -> Self {
        Self { start: Instant::now(), first: None, last: (Duration::ZERO, 0) }
    }

    /// # Errors
    /// Says what has not happened, where nothing has for long.
    pub fn patience(&self, what: &str) -> Result<()> {
        if self.start.elapsed() - self.last.0 > PATIENCE { Err(format!("{what} after {PATIENCE:?}").into()) } else { Ok(()) }
    }

    /// Until the counter, which stood at `from`, has grown by `count`.
    pub async fn until(mut self, counter: &Counter<'_>, from: i64, count: i64) -> Result<Self> {
        loop {
            let done = counter.read().await? - from;
            let at = self.start.elapsed();
            if done > self.last.1 {
                self.first.get_or_insert((at, done));
                self.last = (at, done);
            }
            if done >= count {
                return Ok(self);
            }
            self.patience(&format!("{done} of {count} are done, and no more"))?;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A second, from the start.
    pub fn whole(&self) -> f64 {
        self.last.1 as f64 / self.last.0.as_secs_f64()
    }

    /// A second, from when the first were done; of those after them. The whole where one look saw them all.
    pub fn steady(&self) -> f64 {
        match self.first {
            Some((at, done)) if done < self.last.1 => (self.last.1 - done) as f64 / (self.last.0 - at).as_secs_f64(),
            _ => self.whole(),
        }
    }
}
