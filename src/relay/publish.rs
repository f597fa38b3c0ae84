//! The step: one page of the outbox onto the log, then the cursor past it; whoever calls saves it.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::time::Instant;

use crate::db::DbError;
use crate::faults;
use crate::messaging::log::{Log, LogError, Record};
use crate::messaging::outbox::{Reader, Source};
use crate::messaging::{Reach, is_copy, shorten};
use crate::shutdown::Shutdown;
use crate::telemetry::Incident;

use super::traced::Sending;

/// After a page of fewer rows there is nothing to read ahead: what comes meanwhile is read together afterwards.
pub(super) const PAGE_LARGE: usize = 64;
/// About 15 s. A topic for dead letters that refuses them must not hold up what is to be paid.
const COPY_TRIES_MAX: u32 = 20;
/// For so long after that the next ones are given up at their first refusal: each page of what is to be paid may have one among it.
const COPIES_GIVEN_UP_FOR: Duration = Duration::from_secs(300);

/// The relay ends its turn for a reason of the database's; the log being away never ends it.
pub type RelayError = DbError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// That many rows are on the log, and the cursor is past them.
    Published(usize),
    /// Nothing waits.
    Idle,
    /// Stopped while the log was away; the page will be published by whoever comes next.
    Interrupted,
}

/// What a relay remembers of copies of dead letters that were refused, from one page to the next.
#[derive(Debug, Default)]
pub struct Copies {
    given_up: Option<Instant>,
}

impl Copies {
    fn tries_max(&self) -> u32 {
        let lately = self.given_up.is_some_and(|since| since.elapsed() < COPIES_GIVEN_UP_FOR);
        if lately { 1 } else { COPY_TRIES_MAX }
    }

    /// Where they were refused after all tries; the time runs from there, so that they are tried in earnest again.
    fn give_up(&mut self, tries: u32) {
        if tries >= COPY_TRIES_MAX {
            self.given_up = Some(Instant::now());
        }
    }
}

/// Publishes one page. While the log is away it tries again with back-off, keeping its lease; the cursor moves only when every
/// row is acknowledged (S13), so a row may be there twice and never not at all. A topic that somebody deleted is made anew, with
/// `partitions`. Copies of dead letters alone are given up in the end, where the log answers and refuses them: the letters are kept.
pub async fn publish_batch<S: Source>(
    reader: &mut Reader<S>,
    log: &dyn Log,
    rows_max: i64,
    partitions: i32,
    reach: &Reach,
    copies: &mut Copies,
    stop: &Shutdown,
) -> Result<Step, RelayError> {
    let Some(mut page) = reader.page(rows_max).await? else { return Ok(Step::Idle) };
    let rows = page.rows.len();
    let ahead = (rows >= PAGE_LARGE).then_some(rows_max);
    let sending = Sending::begin(&page.rows);
    let mut unacknowledged: Vec<Record> = std::mem::take(&mut page.rows).into_iter().map(|row| row.record).collect();
    let mut incident = Incident::new("publishing");
    let mut delays = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(20))
        .with_max_delay(Duration::from_secs(1))
        .with_jitter()
        .without_max_times()
        .build();
    let mut tries = 0;
    faults::point!("relay.before_append")?;
    let way = Way { log, reach };
    while let Err(error) = leased(reader, way, ahead, log.append(unacknowledged)).await? {
        let cause = error.cause;
        unacknowledged = error.unacknowledged;
        if let LogError::RecordTooLarge { index, bytes, bytes_max } = cause
            && let Some(record) = unacknowledged.get_mut(index)
            && shorten(record, bytes, bytes_max)
        {
            continue;
        }
        incident.failed(&cause);
        tries += 1;
        if tries >= copies.tries_max() && unacknowledged.iter().all(is_copy) && log.ping().await.is_ok() {
            copies.give_up(tries);
            tracing::error!(copies = unacknowledged.len(), %cause, "copies of dead letters are refused and given up; the letters are kept");
            metrics::counter!("shopd_dead_letter_copies_dropped_total").increment(unacknowledged.len() as u64);
            break;
        }
        if let LogError::UnknownTopic(topic) = &cause
            && let Err(cause) = leased(reader, way, ahead, make(log, topic, partitions)).await?
        {
            incident.failed(&cause);
        }
        let delay = delays.next().unwrap_or(Duration::from_secs(1));
        // What the log refuses it would refuse anybody: the outbox is given up only where the log is out of this process's reach.
        reach.doubted();
        let pause = async {
            tokio::select! {
                biased;
                () = tokio::time::sleep(delay) => false,
                () = stop.stopped() => true,
                () = reach.watch(log) => false,
            }
        };
        if leased(reader, way, ahead, pause).await? {
            return Ok(Step::Interrupted);
        }
        // Fails where another relay has taken over meanwhile: it publishes these rows.
        reader.set_cut_off(reach.is_cut_off());
        reader.save().await?;
    }
    incident.recovered();
    reach.heard();
    faults::point!("relay.after_append")?;
    reader.published(page)?;
    sending.acknowledged();
    faults::point!("relay.after_cursor")?;
    Ok(Step::Published(rows))
}

/// What lay on the topic is lost; whoever waits for it asks again.
async fn make(log: &dyn Log, topic: &str, partitions: i32) -> Result<(), LogError> {
    log.create_topics(&[topic], partitions).await?;
    tracing::error!(topic, partitions, "the log did not know the topic; it was made anew, and what lay on it is asked for again");
    metrics::counter!("shopd_relay_topics_made_total", "topic" => topic.to_owned()).increment(1);
    Ok(())
}

/// A log, and whether it is within reach.
#[derive(Clone, Copy)]
struct Way<'l> {
    log: &'l dyn Log,
    reach: &'l Reach,
}

/// Awaits the log, and reads the next page meanwhile, `ahead` rows. Keeps the lease: a broker that hangs must not cost it; where it does for
/// long, finds out whether the log can be reached at all.
async fn leased<S: Source, T>(
    reader: &mut Reader<S>,
    way: Way<'_>,
    mut ahead: Option<i64>,
    awaited: impl Future<Output = T>,
) -> Result<T, RelayError> {
    let (mut awaited, mut watching) = (std::pin::pin!(awaited), std::pin::pin!(way.reach.watch(way.log)));
    let heartbeat = reader.heartbeat();
    let (mut renewal, mut is_late) = (std::pin::pin!(tokio::time::sleep(heartbeat)), false);
    loop {
        tokio::select! {
            biased;
            done = &mut awaited => return Ok(done),
            () = &mut renewal => {
                reader.set_cut_off(way.reach.is_cut_off());
                reader.save().await?;
                is_late = true;
                renewal.as_mut().reset(tokio::time::Instant::now() + heartbeat);
            }
            () = &mut watching, if is_late => {}
            () = reader.read_ahead(ahead.unwrap_or_default()), if ahead.is_some() => ahead = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn copies_that_were_given_up_after_all_tries_are_tried_once_each_for_a_while() {
        let mut copies = Copies::default();
        assert_eq!(copies.tries_max(), COPY_TRIES_MAX);
        copies.give_up(COPY_TRIES_MAX);
        tokio::time::advance(COPIES_GIVEN_UP_FOR / 2).await;
        assert_eq!(copies.tries_max(), 1);
        // One that is given up meanwhile does not put it off.
        copies.give_up(1);
        tokio::time::advance(COPIES_GIVEN_UP_FOR / 2).await;
        assert_eq!(copies.tries_max(), COPY_TRIES_MAX);
    }
}
