//! The load's loop: what is ready, what is due, and nothing between.

use std::collections::VecDeque;
use std::net::ToSocketAddrs;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::super::Result;
use super::connection::Connection;
use super::{Load, Pace, Ran, Stream, Streamed};

/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the end is looked for where nothing happens.
const LOOK: Duration = Duration::from_millis(100);
const TIMER: Token = Token(usize::MAX - 1);

/// A stream under way.
struct Running<'l> {
    stream: &'l Stream,
    connections: Vec<Connection>,
    idle: VecDeque<usize>,
    /// Requests sent so far; the next one's number.
    sent: u64,
    result: Streamed,
}

impl Running<'_> {
    /// When the request of this number is due.
    fn due(&self, start: Instant, number: u64) -> Option<Instant> {
        match self.stream.pace {
            Pace::Closed { .. } => None,
            Pace::Open { per_second } => Some(start + Duration::from_secs_f64(number as f64 / per_second)),
        }
    }

    fn send(&mut self, connection: usize, due: Instant) -> Result<()> {
        let requests = &self.stream.requests;
        let request = (self.sent % requests.len() as u64) as usize;
        self.sent += 1;
        self.connections[connection].send(requests, request, due)
    }

    /// Sends what is due and has a connection.
    fn send_due(&mut self, start: Instant, until: Instant, now: Instant) -> Result<()> {
        while let Some(connection) = self.idle.front().copied() {
            let due = match self.stream.pace {
                Pace::Closed { count } if self.sent >= count as u64 || now >= until => return Ok(()),
                Pace::Closed { .. } => now,
                Pace::Open { .. } => match self.due(start, self.sent) {
                    Some(due) if due <= now && due < until => due,
                    _ => return Ok(()),
                },
            };
            self.idle.pop_front();
            self.send(connection, due)?;
        }
        Ok(())
    }

    fn is_over(&self, start: Instant, until: Instant, now: Instant) -> bool {
        let sent_all = match self.stream.pace {
            Pace::Closed { count } => self.sent >= count as u64 || now >= until,
            Pace::Open { .. } => self.due(start, self.sent).is_none_or(|due| due >= until),
        };
        sent_all && self.idle.len() == self.connections.len()
    }
}

pub fn run(load: &Load) -> Result<Ran> {
    let address = load.address.to_socket_addrs()?.next().ok_or_else(|| format!("no address {}", load.address))?;
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(1024);
    let mut streams = Vec::new();
    // The stream and the place in it of each connection, by token.
    let mut places = Vec::new();
    for (at, stream) in load.streams.iter().enumerate() {
        let mut connections = Vec::new();
        for place in 0..stream.connections {
            connections.push(Connection::open(address, poll.registry(), Token(places.len()))?);
            places.push((at, place));
        }
        let idle = (0..connections.len()).collect();
        streams.push(Running { stream, connections, idle, sent: 0, result: Streamed::new()? });
    }
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
    poll.registry().register(&mut SourceFd(&timer.as_fd().as_raw_fd()), TIMER, Interest::READABLE)?;

    let cpu = thread_cpu()?;
    let start = Instant::now();
    let (until, mut last) = (start + load.time, start);
    loop {
        let now = Instant::now();
        for stream in &mut streams {
            stream.send_due(start, until, now)?;
        }
        if streams.iter().all(|stream| stream.is_over(start, until, now)) {
            break;
        }
        if now > until + PATIENCE {
            let open: usize = streams.iter().map(|stream| stream.connections.len() - stream.idle.len()).sum();
            return Err(format!("{open} requests have no answer {PATIENCE:?} after the end of the load").into());
        }
        set_timer(&timer, &streams, start, now)?;
        match poll.poll(&mut events, Some(LOOK)) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            polled => polled?,
        }
        for event in &events {
            let Some(&(at, place)) = places.get(event.token().0) else { continue };
            let running = &mut streams[at];
            let connection = &mut running.connections[place];
            let Some(answer) = connection.advance(&running.stream.requests)? else { continue };
            last = Instant::now();
            if answer.is_accepted {
                // What is refused is refused soon: it would make the rest look better.
                running.result.latency.saturating_record((last - answer.due).as_micros() as u64);
                running.result.accepted += 1;
                load.accepted.fetch_add(1, Ordering::Relaxed);
            } else {
                running.result.refused += 1;
                running.result.refusal.get_or_insert_with(|| connection.text());
            }
            running.idle.push_back(place);
            running.send_due(start, until, last)?;
        }
    }
    let cpu = thread_cpu()?.saturating_sub(cpu);
    Ok(Ran { elapsed: last - start, cpu, streams: streams.into_iter().map(|running| running.result).collect() })
}

/// To the next time that a free connection is wanted.
fn set_timer(timer: &TimerFd, streams: &[Running<'_>], start: Instant, now: Instant) -> Result<()> {
    let waiting = streams.iter().filter(|stream| !stream.idle.is_empty());
    if let Some(due) = waiting.filter_map(|stream| stream.due(start, stream.sent)).min() {
        let wait = due.saturating_duration_since(now).max(Duration::from_nanos(1));
        timer.set(Expiration::OneShot(TimeSpec::from_duration(wait)), TimerSetTimeFlags::empty())?;
    }
    Ok(())
}

/// User and system time of this thread.
fn thread_cpu() -> Result<Duration> {
    Ok(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID.now()?.into())
}
