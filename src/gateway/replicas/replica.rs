//! One replica: where it is, how much is under way there, what is known of its health.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use actix_web::http::uri::Authority;
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::health::{Health, Seen};

static NEXT_ID: AtomicUsize = AtomicUsize::new(0);
static DEPARTURES: AtomicUsize = AtomicUsize::new(0);

/// How many replicas of the process are gone.
pub fn departures() -> usize {
    DEPARTURES.load(Ordering::Relaxed)
}

pub struct Replica {
    /// Among all replicas of the process.
    id: usize,
    /// Which of the configured names it has.
    name: usize,
    /// `http://host:port`, for the log and the metrics.
    base: String,
    authority: Authority,
    /// One of several that its name has. One that is the name's only one is looked up anew for each connection.
    address: Option<SocketAddr>,
    is_gone: AtomicBool,
    in_flight: AtomicU32,
    /// It said so with its last answer to a request that may travel in one.
    takes_batches: AtomicBool,
    health: Mutex<Health>,
    /// The health's lock need not be taken: there is nothing in it.
    is_settled: AtomicBool,
    /// It misses its checks: what is under way there should be asked elsewhere.
    died: Notify,
}

impl Replica {
    /// Wherever its name leads.
    pub fn named(name: usize, authority: &Authority) -> Self {
        Self::new(name, authority, None, Health::default())
    }

    /// One of several of its name; it gets its share little by little.
    pub fn at(name: usize, authority: &Authority, address: SocketAddr, now_ms: u64) -> Self {
        Self::new(name, authority, Some(address), Health::new_at(now_ms))
    }

    fn new(name: usize, authority: &Authority, address: Option<SocketAddr>, health: Health) -> Self {
        Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            name,
            base: address.map_or_else(|| format!("http://{authority}"), |address| format!("http://{address}")),
            authority: authority.clone(),
            address,
            is_gone: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            takes_batches: AtomicBool::new(false),
            is_settled: AtomicBool::new(health == Health::default()),
            health: Mutex::new(health),
            died: Notify::new(),
        }
    }

    pub fn id(&self) -> usize {
        self.id
    }

    pub fn name(&self) -> usize {
        self.name
    }

    pub fn base(&self) -> &str {
        &self.base
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// `host:port`, for `Host`.
    pub fn authority(&self) -> &str {
        self.authority.as_str()
    }

    /// # Errors
    /// No connection came about. Not bounded in time.
    pub async fn connect(&self) -> io::Result<TcpStream> {
        match self.address {
            Some(address) => TcpStream::connect(address).await,
            None => TcpStream::connect(host_and_port(&self.authority)).await,
        }
    }

    /// Its name does not lead there any more: nothing new is asked of it.
    pub fn leave(&self) {
        if !self.is_gone.swap(true, Ordering::Relaxed) {
            DEPARTURES.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Whether it takes batches, as far as it was heard of.
    pub fn takes_batches(&self, takes: bool) {
        self.takes_batches.store(takes, Ordering::Relaxed);
    }

    /// It takes batches, and there is another request under way for one to travel with.
    pub fn is_busy_with_batches(&self) -> bool {
        self.takes_batches.load(Ordering::Relaxed) && self.in_flight() > 1
    }

    /// Ends when the replica misses its checks.
    pub async fn died(&self) {
        self.died.notified().await;
    }

    pub fn give_up(&self) {
        self.died.notify_waiters();
    }

    pub fn health(&self) -> Health {
        *self.locked()
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its health before and after what was `seen`, and whether what is under way there should be asked elsewhere; `None` where it is
    /// well and stays so.
    pub fn see(&self, seen: Seen, now_ms: u64) -> Option<(Health, Health, bool)> {
        if matches!(seen, Seen::Answered | Seen::CheckPassed) && self.is_settled.load(Ordering::Relaxed) {
            return None;
        }
        let mut health = self.locked();
        let before = *health;
        let is_dead = health.see(seen, now_ms);
        self.is_settled.store(health.is_settled(now_ms), Ordering::Relaxed);
        Some((before, *health, is_dead))
    }

    pub fn is_well(&self, now_ms: u64) -> bool {
        if self.is_settled.load(Ordering::Relaxed) {
            return true;
        }
        let health = self.health();
        // One request at a time finds out whether the breaker can close.
        !(health.is_ejected(now_ms) || health.is_on_trial(now_ms) && self.in_flight() > 0)
    }

    /// What one more request would make of it.
    pub fn load(&self, now_ms: u64) -> u64 {
        let share = if self.is_settled.load(Ordering::Relaxed) { 100 } else { self.health().share(now_ms) };
        (u64::from(self.in_flight()) + 1) * 100 / share
    }
}

/// For looking up; an IPv6 address without its brackets.
pub fn host_and_port(authority: &Authority) -> (&str, u16) {
    (authority.host().trim_matches(['[', ']']), authority.port_u16().unwrap_or(80))
}

/// One request under way at a replica, until dropped.
pub struct Picked {
    pub replica: Arc<Replica>,
}

impl Picked {
    pub fn new(replica: Arc<Replica>) -> Self {
        replica.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { replica }
    }
}

impl Drop for Picked {
    fn drop(&mut self) {
        self.replica.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
