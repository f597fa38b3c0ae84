//! The load: one thread over keep-alive connections, which costs as little as it can beside what it measures.
//!
//! Requests are made before the run, nothing is allocated for one, and an answer is looked at only as far as its status and its
//! end. Two paces: [`Pace::Closed`], the next request when the answer to the last is there, which finds out how much is taken;
//! and [`Pace::Open`], each request at its own time whatever the answers do, which is how latency is measured: it is counted from
//! the time when the request was due, also where it had to wait for a free connection.

mod client;
mod connection;
mod run;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::Result;

pub use client::Client;

/// Latencies are kept to three digits, in microseconds.
const DIGITS: u8 = 3;
const LATENCY_MAX_US: u64 = 120_000_000;

/// Requests as they go over the wire, sent by turns.
pub type Requests = Arc<[Vec<u8>]>;

#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// At most so many in all.
    Closed {
        count: usize,
    },
    Open {
        per_second: f64,
    },
}

/// Requests of one kind over connections of their own.
#[derive(Clone, Debug)]
pub struct Stream {
    pub requests: Requests,
    pub connections: usize,
    pub pace: Pace,
}

#[derive(Clone, Debug)]
pub struct Load {
    /// `host:port`.
    pub address: String,
    pub streams: Vec<Stream>,
    /// Nothing is sent after this; what was due before is still answered.
    pub time: Duration,
    /// Counts accepted requests as they are answered, for whoever watches.
    pub accepted: Arc<AtomicU64>,
}

/// How a stream went.
pub struct Streamed {
    /// Answered 200 or 201.
    pub accepted: u64,
    /// Answered otherwise.
    pub refused: u64,
    /// The first answer of those.
    pub refusal: Option<String>,
    /// Microseconds, of all answers; from the due time where the pace is open, else from the sending.
    pub latency: Histogram<u64>,
}

pub struct Ran {
    /// From the first request until the last answer.
    pub elapsed: Duration,
    /// Of the load's own thread.
    pub cpu: Duration,
    pub streams: Vec<Streamed>,
}

impl Load {
    /// One stream as fast as the answers come, for `time`.
    pub fn closed(address: &str, requests: Requests, connections: usize, time: Duration) -> Self {
        let pace = Pace::Closed { count: usize::MAX };
        let streams = vec![Stream { requests, connections, pace }];
        Self { address: address.to_owned(), streams, time, accepted: Arc::default() }
    }

    /// One stream as fast as the answers come, `count` requests in all, within `time`.
    pub fn counted(address: &str, requests: Requests, connections: usize, count: usize, time: Duration) -> Self {
        let streams = vec![Stream { requests, connections, pace: Pace::Closed { count } }];
        Self { address: address.to_owned(), streams, time, accepted: Arc::default() }
    }

    /// Runs on a thread of its own.
    pub async fn run(self) -> Result<Ran> {
        tokio::task::spawn_blocking(move || run::run(&self)).await?
    }

    /// As [`Self::run`] where nothing may be refused.
    ///
    /// # Errors
    /// Says what the first refusal was.
    pub async fn run_accepted(self) -> Result<Ran> {
        let ran = self.run().await?;
        match ran.streams.iter().find(|stream| stream.refused > 0) {
            None => Ok(ran),
            Some(stream) => Err(stream.refused()),
        }
    }
}

impl Streamed {
    fn new() -> Result<Self> {
        let latency = Histogram::new_with_bounds(1, LATENCY_MAX_US, DIGITS)?;
        Ok(Self { accepted: 0, refused: 0, refusal: None, latency })
    }

    fn refused(&self) -> super::Error {
        let answer = self.refusal.as_deref().unwrap_or("nothing");
        format!("{} requests were refused, the first with: {answer}", self.refused).into()
    }
}

impl Ran {
    /// The first stream's.
    pub fn accepted(&self) -> u64 {
        self.streams.first().map_or(0, |stream| stream.accepted)
    }
}

/// A request with a JSON body, and more headers, each with its line's end.
pub fn post(path: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let own = "Host: shop.example\r\nContent-Type: application/json\r\n";
    format!("POST {path} HTTP/1.1\r\n{own}{headers}Content-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// An order of each of the users `u0..`, over one cent.
pub fn orders(path: &str, headers: &str, accounts: usize) -> Requests {
    orders_of(path, headers, 0..accounts as u64)
}

/// An order of each of these users `uN`, over one cent.
pub fn orders_of(path: &str, headers: &str, users: impl Iterator<Item = u64>) -> Requests {
    let order = |user| post(path, headers, &format!(r#"{{"userId":"u{user}","amount":0.01,"description":"a small book"}}"#));
    users.map(order).collect()
}

/// A deposit of a cent to each of the users `u0..`.
pub fn deposits(accounts: usize) -> Requests {
    (0..accounts).map(|user| post(&format!("/api/Account/u{user}/deposit"), "", "0.01")).collect()
}
