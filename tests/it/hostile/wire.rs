//! Bytes on a socket, a gateway process in front of a service that remembers what reached it.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::gateway::service::{Service, json_answer};
use crate::support::shop::{PATIENCE, Process, poll};

/// Where a test does not wait for one of these bounds: far beyond any stall of a busy machine.
const HEAD_TIME_MAX: Duration = Duration::from_secs(20);
const UPSTREAM_TIME_MAX: Duration = Duration::from_secs(30);
const DRAIN_TIME_MAX: Duration = Duration::from_secs(30);
/// What a head has in tests that wait until it is over.
pub const SHORT_HEAD: Duration = Duration::from_secs(2);

pub struct Edge {
    pub process: Process,
    pub address: String,
    pub service: Service,
}

impl Edge {
    pub async fn start() -> Self {
        Self::before(plain().await).await
    }

    /// For tests that wait until this time is over; an idle connection has twice that of a head.
    pub async fn with_head_time(head: Duration) -> Self {
        Self::with(plain().await, head, UPSTREAM_TIME_MAX).await
    }

    /// For tests that wait until this time is over; a client's body has the same.
    pub async fn with_upstream_time(upstream: Duration) -> Self {
        Self::with(plain().await, HEAD_TIME_MAX, upstream).await
    }

    pub async fn before(service: Service) -> Self {
        Self::with(service, HEAD_TIME_MAX, UPSTREAM_TIME_MAX).await
    }

    async fn with(service: Service, head: Duration, upstream: Duration) -> Self {
        let set = |name: &str, value: String| (format!("SHOPD__{name}"), value);
        let process = Process::start(
            &["gateway"],
            &[
                set("GATEWAY__ORDERS_URLS", service.url.clone()),
                set("GATEWAY__PAYMENTS_URLS", service.url.clone()),
                set("HTTP__HEADER_TIMEOUT_MS", head.as_millis().to_string()),
                set("HTTP__KEEP_ALIVE_MS", (2 * head).as_millis().to_string()),
                set("GATEWAY__UPSTREAM_TIMEOUT_MS", upstream.as_millis().to_string()),
                set("SHUTDOWN__TIMEOUT_MS", DRAIN_TIME_MAX.as_millis().to_string()),
            ],
        );
        let address = process.address("gateway").await.trim_start_matches("http://").to_owned();
        Self { process, address, service }
    }

    pub async fn open(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// Everything that is answered on a connection of its own until the server ends it.
    pub async fn told(&self, bytes: &[u8]) -> String {
        let mut stream = self.open().await;
        // A server that has closed already may refuse the rest.
        let _ = stream.write_all(bytes).await;
        rest(&mut stream).await
    }

    /// Whoever behaves is served.
    pub async fn serves(&self) {
        let answered = self.told(b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await;
        assert_eq!(statuses(&answered), ["200"], "{answered}");
    }

    /// Resident memory, MiB.
    pub fn resident_mib(&self) -> u64 {
        self.memory_mib("VmRSS:")
    }

    /// The most that was ever resident, MiB: what was held for a moment and given back is in it.
    pub fn peak_mib(&self) -> u64 {
        self.memory_mib("VmHWM:")
    }

    fn memory_mib(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid())).unwrap();
        let kib = status.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kib.unwrap() / 1024
    }

    /// Open sockets and files of the gateway.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.pid())).unwrap().count()
    }

    pub async fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let since = Instant::now();
        while !done(self) {
            assert!(since.elapsed() < PATIENCE, "{what}, after {PATIENCE:?}");
            poll().await;
        }
    }
}

async fn plain() -> Service {
    Service::start(|_, _| json_answer(r#"{"id":1}"#)).await
}

/// Reads until the end; a connection that the server keeps open is a failure.
pub async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await;
    // A reset is an end, too.
    let _ = read.unwrap_or_else(|_| panic!("the connection stays open after {:?}", String::from_utf8_lossy(&bytes)));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until `enough` or the end.
pub async fn read_until(stream: &mut TcpStream, enough: &str) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&bytes).contains(enough) && stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {}
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap_or_else(|_| panic!("no {enough:?}"));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Of every answer in `text`.
pub fn statuses(text: &str) -> Vec<&str> {
    let heads = text.match_indices("HTTP/1.").filter_map(|(at, _)| text.get(at + 8..at + 12));
    heads.filter_map(|status| status.strip_prefix(' ').filter(|status| status.bytes().all(|b| b.is_ascii_digit()))).collect()
}
