//! Waiting for records: one fetch request to each broker for all partitions that somebody waits for, where the client library makes one
//! each, and a broker with a little to say to each of twelve answers twelve times.
//!
//! A fetch is an [`Ask`]. A broker's task sends those that wait together and hands each its part of the answer. Whoever was handed
//! something asks again as soon as it has taken it over, so the next request waits a moment for these. One that comes while a request
//! is on its way goes in another one at once, which ends with the first: then they go together again.
//!
//! It does the plain case only; whatever a broker answers beside records is asked for by itself ([`super::read`]).

use std::collections::HashMap;
use std::io::{Error, Result};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::connections::bounded;
use super::dial::Dialer;
use super::fetch::{self, Place};
use super::leaders::Leaders;
use super::lines::{Line, Lines};
use super::part::Part;
use super::raw;
use crate::config::KafkaConfig;
use crate::messaging::log::{Fetched, LogError};

/// How long a request waits for those who were just answered: longer than they need to ask again, shorter than anybody notices.
const GATHER_MAX: Duration = Duration::from_millis(2);
/// Bytes that are decoded by whoever waits for them.
const PLAIN_AT_ONCE_MAX: usize = 16 * 1024;
/// Partitions that may wait at one broker.
const ASKS_MAX: usize = 4_096;
/// A broker that nobody asked for so long has no place here any more; it may be gone for good.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// What somebody waits for.
struct Ask {
    place: Place,
    answer: oneshot::Sender<Answer>,
}

enum Answer {
    Part(Part),
    /// Nothing within the time that the broker may wait.
    Nothing,
    /// The broker did not answer as it should.
    Unclear,
    /// It did not answer at all.
    Late(LogError),
}

#[derive(Clone, Copy)]
struct Times {
    /// The broker answers after so long at the latest.
    wait: Duration,
    /// Beyond that.
    request: Duration,
    /// A request waits so long for those who were just answered.
    gather: Duration,
}

/// The tasks of the brokers, by their addresses; they end with this.
pub(super) struct LongPolls {
    leaders: Arc<Leaders>,
    dialer: Arc<Dialer>,
    times: Times,
    brokers: Mutex<HashMap<String, mpsc::Sender<Ask>>>,
}

impl LongPolls {
    pub fn new(leaders: Arc<Leaders>, dialer: Arc<Dialer>, config: &KafkaConfig) -> Self {
        let times = Times { wait: config.fetch_wait, request: config.request_timeout, gather: GATHER_MAX };
        Self::with(leaders, dialer, times)
    }

    fn with(leaders: Arc<Leaders>, dialer: Arc<Dialer>, times: Times) -> Self {
        Self { leaders, dialer, times, brokers: Mutex::default() }
    }

    /// What lies at `place`; with nothing there it waits. `None`: it is to be asked for by itself. May be dropped at
    /// any await.
    ///
    /// # Errors
    /// [`LogError::Unavailable`] where a broker does not answer in time.
    pub async fn fetch(&self, place: Place) -> std::result::Result<Option<Fetched>, LogError> {
        let asked = bounded(self.times.request, "asking for leaders", self.leaders.of(&place.topic, place.partition)).await?;
        let Ok(Some(leader)) = asked else { return Ok(None) };
        let (from, topic) = (place.from, place.topic.clone());
        let (to, answer) = oneshot::channel();
        if self.broker(leader).try_send(Ask { place, answer: to }).is_err() {
            return Ok(None);
        }
        match answer.await {
            Ok(Answer::Part(part)) => {
                if part.error != 0 {
                    self.leaders.forget(&topic);
                }
                Ok(plain(part, from).await)
            }
            Ok(Answer::Nothing) => Ok(Some(Fetched { records: Vec::new(), next_offset: from, end_offset: from })),
            Ok(Answer::Late(late)) => {
                // Others may lead by now what it does not answer for.
                self.leaders.forget(&topic);
                Err(late)
            }
            Ok(Answer::Unclear) | Err(_) => {
                self.leaders.forget(&topic);
                Ok(None)
            }
        }
    }

    fn broker(&self, address: String) -> mpsc::Sender<Ask> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        let mut brokers = self.brokers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(asks) = brokers.get(&address).filter(|asks| !asks.is_closed()) {
            return asks.clone();
        }
        brokers.retain(|_, asks| !asks.is_closed());
        let (to, asks) = mpsc::channel(ASKS_MAX);
        tokio::spawn(serve(address.clone(), self.dialer.clone(), asks, self.times));
        brokers.insert(address, to.clone());
        to
    }
}

/// Larger ones on a thread of their own: they would keep others waiting.
async fn plain(part: Part, from: i64) -> Option<Fetched> {
    if part.batches.len() <= PLAIN_AT_ONCE_MAX {
        return part.plain(from);
    }
    tokio::task::spawn_blocking(move || part.plain(from)).await.ok().flatten()
}

/// A request that was answered, or failed.
struct Landed {
    asks: Vec<Ask>,
    answered: Answered,
    due: Instant,
}

enum Answered {
    Parts(Line, Vec<Part>),
    Unclear(Error),
    Late(LogError),
}

/// Asks one broker until nobody can ask any more, or did for long.
async fn serve(broker: String, dialer: Arc<Dialer>, mut asks: mpsc::Receiver<Ask>, times: Times) {
    let mut flights = FuturesUnordered::new();
    // When the broker answers them at the latest.
    let mut dues: Vec<Instant> = Vec::new();
    let mut lines = Lines::default();
    let mut waiting: Vec<Ask> = Vec::new();
    // Who was answered and has not asked again.
    let mut answered: Vec<(String, i32)> = Vec::new();
    let mut gather_until = Instant::now();
    loop {
        while let Ok(ask) = asks.try_recv() {
            join(ask, &mut waiting, &mut answered);
        }
        let now = Instant::now();
        let are_expected = !answered.is_empty() || dues.iter().any(|due| *due <= now + times.gather);
        let wait_until = if are_expected { gather_until } else { now };
        if !waiting.is_empty() && now >= wait_until {
            answered.clear();
            let asks = together(&mut waiting);
            if asks.is_empty() {
                continue;
            }
            let due = dues.iter().copied().filter(|due| *due > now).min().unwrap_or(now + times.wait);
            dues.push(due);
            flights.push(fly(&broker, &dialer, lines.take(), asks, due, times.request));
            continue;
        }
        tokio::select! {
            ask = asks.recv() => match ask {
                Some(ask) => join(ask, &mut waiting, &mut answered),
                None => return,
            },
            Some(Landed { asks, answered: how, due }) = flights.next() => {
                if let Some(at) = dues.iter().position(|one| *one == due) {
                    dues.swap_remove(at);
                }
                gather_until = Instant::now() + times.gather;
                match how {
                    Answered::Parts(line, parts) => {
                        lines.put(line);
                        hand_out(asks, parts, due, &mut waiting, &mut answered);
                    }
                    Answered::Unclear(error) => {
                        tracing::debug!(%broker, %error, "a fetch request failed; another one is made");
                        asks.into_iter().for_each(|ask| drop(ask.answer.send(Answer::Unclear)));
                    }
                    Answered::Late(late) => asks.into_iter().for_each(|ask| drop(ask.answer.send(Answer::Late(late.clone())))),
                }
            }
            () = sleep_until(wait_until), if !waiting.is_empty() => {}
            () = sleep(IDLE_MAX), if waiting.is_empty() && flights.is_empty() => return,
        }
    }
}

fn join(ask: Ask, waiting: &mut Vec<Ask>, answered: &mut Vec<(String, i32)>) {
    answered.retain(|(topic, partition)| !ask.place.is_partition(topic, *partition));
    waiting.push(ask);
}

/// Takes those out that go in one request: each partition once, by topic, whoever waits longest first. Nobody waits for the rest of them any
/// more, or it is left.
fn together(waiting: &mut Vec<Ask>) -> Vec<Ask> {
    let (mut taken, mut left): (Vec<Ask>, Vec<Ask>) = (Vec::new(), Vec::new());
    for ask in waiting.drain(..).filter(|ask| !ask.answer.is_closed()) {
        let is_there = taken.iter().any(|one| one.place.is_partition(&ask.place.topic, ask.place.partition));
        if is_there { left.push(ask) } else { taken.push(ask) }
    }
    *waiting = left;
    taken.sort_by(|a, b| a.place.topic.cmp(&b.place.topic));
    taken
}

/// Gives each its part. Those without one wait on, or hear that there is nothing.
fn hand_out(asks: Vec<Ask>, mut parts: Vec<Part>, due: Instant, waiting: &mut Vec<Ask>, answered: &mut Vec<(String, i32)>) {
    let is_over = Instant::now() >= due;
    // Where an answer is full the last partitions have no part of it; they are asked for first in the next one.
    let is_full = parts.iter().map(|part| part.batches.len()).sum::<usize>() >= fetch::ANSWER_BYTES_MAX as usize / 2;
    for ask in asks {
        let at = parts.iter().position(|part| ask.place.is_partition(&part.topic, part.partition));
        let answer = match at.map(|at| parts.swap_remove(at)) {
            Some(part) if part.is_empty() && (is_full || part.end_offset <= ask.place.from) => {
                if is_full || !is_over {
                    waiting.push(ask);
                    continue;
                }
                Answer::Nothing
            }
            Some(part) => Answer::Part(part),
            None => Answer::Unclear,
        };
        let place = (ask.place.topic, ask.place.partition);
        if ask.answer.send(answer).is_ok() {
            answered.push(place);
        }
    }
}

/// One request, from its sending to its answer. An answer without anything comes when `due`.
async fn fly(broker: &str, dialer: &Dialer, line: Option<Line>, asks: Vec<Ask>, due: Instant, request: Duration) -> Landed {
    let wait = due.saturating_duration_since(Instant::now());
    let until = Instant::now() + wait + request;
    let answered = match timeout_at(until, exchange(broker, dialer, line, &asks, wait, until)).await {
        Ok(Ok((line, parts))) => Answered::Parts(line, parts),
        Ok(Err(error)) => Answered::Unclear(error),
        Err(_) => Answered::Late(LogError::Unavailable(format!("fetching: no answer within {} ms", (wait + request).as_millis()))),
    };
    Landed { asks, answered, due }
}

async fn exchange(
    broker: &str,
    dialer: &Dialer,
    line: Option<Line>,
    asks: &[Ask],
    wait: Duration,
    until: Instant,
) -> Result<(Line, Vec<Part>)> {
    let mut line = match line {
        Some(line) => line,
        None => Line::dial(dialer, broker, until).await?,
    };
    let places: Vec<&Place> = asks.iter().map(|ask| &ask.place).collect();
    // Rounded up: an answer before its time would only be asked for again.
    let wait_ms = i32::try_from(wait.as_micros().div_ceil(1_000)).unwrap_or(i32::MAX);
    fetch::request(&mut line.request, &places, wait_ms);
    line.connection.stream.write_all(&line.request).await?;
    line.connection.stream.flush().await?;
    let mut answer = raw::answer(&mut line.connection.stream).await?;
    let parts = fetch::parts(&mut answer).ok_or_else(|| Error::other("an answer to a fetch that cannot be read"))?;
    Ok((line, parts))
}

#[cfg(test)]
mod tests;
