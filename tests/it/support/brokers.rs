//! Three brokers that are one Kafka: topics have three copies, and a record is acknowledged when two have it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::kafka::{SCRIPT, START_WAIT, own_dir};

/// Nodes 1..=3.
pub const NODES: i32 = 3;
/// Three Java machines beside everything else.
const HEAP: &str = "256m";
const ASK_WAIT: Duration = Duration::from_secs(3);

pub struct Brokers {
    dir: PathBuf,
    /// `host:port` of each, in the order of their numbers, with commas between.
    pub bootstrap: String,
}

/// Of one partition, by the numbers of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// -1 where it has none.
    pub leader: i32,
    pub in_sync: Vec<i32>,
}

impl Brokers {
    /// Started, usable and empty.
    pub async fn new() -> Self {
        let mut brokers = Self { dir: own_dir(), bootstrap: String::new() };
        let dir = brokers.dir.to_str().expect("a path").to_owned();
        brokers.bootstrap = brokers.run(&["cluster", "start", "3", "--port", "0", "--dir", &dir]).await;
        brokers
    }

    /// SIGKILL.
    pub async fn kill(&self, node: i32) {
        self.of("kill", node).await;
    }

    /// SIGSTOP: its connections stay open, new ones come about, and nothing answers.
    pub async fn pause(&self, node: i32) {
        self.of("pause", node).await;
    }

    pub async fn resume(&self, node: i32) {
        self.of("resume", node).await;
    }

    /// Brings it back with its data, and waits until it is usable.
    pub async fn start(&self, node: i32) {
        self.of("start", node).await;
    }

    async fn of(&self, verb: &str, node: i32) {
        let dir = self.dir.join(node.to_string());
        self.run(&[verb, "--dir", dir.to_str().expect("a path")]).await;
    }

    async fn run(&self, arguments: &[&str]) -> String {
        let mut command = tokio::process::Command::new(SCRIPT);
        command.args(arguments).env("KAFKA_HEAP", HEAP).env_remove("KAFKA_HEAP_OPTS").stdin(Stdio::null());
        let output = tokio::time::timeout(START_WAIT, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("scripts/kafka/kafka {arguments:?} took too long")).expect("bash");
        assert!(output.status.success(), "scripts/kafka/kafka {arguments:?}:\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Every partition of a topic, as the first node that answers sees it; `None` where none does, or does not know the topic.
    pub async fn partitions(&self, topic: &str) -> Option<BTreeMap<i32, Partition>> {
        for address in self.bootstrap.split(',') {
            if let Ok(Some(found)) = tokio::time::timeout(ASK_WAIT, ask(address, topic)).await {
                return Some(found);
            }
        }
        None
    }
}

impl Drop for Brokers {
    fn drop(&mut self) {
        let wiped = Command::new(SCRIPT).arg("wipe").arg("--dir").arg(&self.dir).stdin(Stdio::null()).status();
        assert!(wiped.is_ok_and(|status| status.success()) || std::thread::panicking(), "the brokers in {:?} stay", self.dir);
    }
}

/// A metadata request, version 4.
async fn ask(address: &str, topic: &str) -> Option<BTreeMap<i32, Partition>> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let mut request = Vec::new();
    request.put_i16(3); // metadata
    request.put_i16(4); // version
    request.put_i32(1); // which request this is
    request.put_i16(-1); // whose
    request.put_i32(1);
    request.put_i16(topic.len() as i16);
    request.put_slice(topic.as_bytes());
    request.put_u8(0); // and do not create it
    stream.write_u32(request.len() as u32).await.ok()?;
    stream.write_all(&request).await.ok()?;
    let mut answer = vec![0; stream.read_u32().await.ok()? as usize];
    stream.read_exact(&mut answer).await.ok()?;
    read(&mut Bytes::from(answer))
}

fn read(answer: &mut Bytes) -> Option<BTreeMap<i32, Partition>> {
    let _which = answer.try_get_i32().ok()?;
    let _throttle = answer.try_get_i32().ok()?;
    for _broker in 0..answer.try_get_i32().ok()? {
        let _id = answer.try_get_i32().ok()?;
        skip_text(answer)?;
        let _port = answer.try_get_i32().ok()?;
        skip_text(answer)?;
    }
    skip_text(answer)?;
    let _controller = answer.try_get_i32().ok()?;
    let mut partitions = BTreeMap::new();
    for _topic in 0..answer.try_get_i32().ok()? {
        let _error = answer.try_get_i16().ok()?;
        skip_text(answer)?;
        let _internal = answer.try_get_u8().ok()?;
        for _partition in 0..answer.try_get_i32().ok()? {
            let _error = answer.try_get_i16().ok()?;
            let (index, leader) = (answer.try_get_i32().ok()?, answer.try_get_i32().ok()?);
            let _replicas = nodes(answer)?;
            partitions.insert(index, Partition { leader, in_sync: nodes(answer)? });
        }
    }
    (!partitions.is_empty()).then_some(partitions)
}

fn nodes(answer: &mut Bytes) -> Option<Vec<i32>> {
    (0..answer.try_get_i32().ok()?).map(|_| answer.try_get_i32().ok()).collect()
}

fn skip_text(answer: &mut Bytes) -> Option<()> {
    let length = answer.try_get_i16().ok()?.max(0) as usize;
    (answer.remaining() >= length).then(|| answer.advance(length))
}
