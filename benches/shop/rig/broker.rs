//! The Kafka broker of a run.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bytes::{Buf, BufMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::super::Result;

/// Kafka's own values for its life: the script's are for brokers that are killed, and ten heartbeats a second are a twentieth of what this one
/// does at half. The files of a topic go at once and not a minute after it: that is in the middle of what is measured next, and takes half a
/// second in which an order takes up to 190 ms. The last two are what docs/OPERATIONS.md recommends for a broker that shares its disk with a
/// database, on a host with its own settings.
const SETTINGS: &str = "broker.heartbeat.interval.ms=2000
broker.session.timeout.ms=9000
log.segment.delete.delay.ms=1000
log.flush.interval.ms=5000
log.flush.scheduler.interval.ms=1000
";
/// As much memory as Kafka's own script gives it, half of it for what is new; there from the start, in huge pages, and without the file of
/// counters for other processes, which a disk that writes back holds up. What each does is in docs/PERFORMANCE.md, "Kafka's memory".
const HEAP: &str = "-Xms1g -Xmx1g -XX:NewRatio=1 -XX:+AlwaysPreTouch -XX:+UseTransparentHugePages -XX:+PerfDisableSharedMem";
/// The jars may have to be fetched.
const START_TIMEOUT: Duration = Duration::from_secs(300);
const SET_TIMEOUT: Duration = Duration::from_secs(20);

/// `IncrementalAlterConfigs` of <https://kafka.apache.org/protocol>, in the version with fixed lengths.
const ALTER: (i16, i16) = (44, 0);
/// What is altered: a broker, by its number, or with an empty one all of them.
const BROKER: i8 = 4;
/// How: from now on this value, or again the one of the broker's file.
const SET: i8 = 0;
const DELETE: i8 = 1;
/// More than an answer to one setting has.
const ANSWER_BYTES_MAX: usize = 64 << 10;

pub struct Broker {
    dir: PathBuf,
    pub pid: u32,
    /// `host:port`.
    pub address: String,
}

impl Broker {
    /// With its files in `dir`, at a free port.
    pub async fn start(dir: PathBuf) -> Result<Self> {
        let mut broker = Self { dir, pid: 0, address: String::new() };
        std::fs::create_dir(&broker.dir)?;
        std::fs::write(broker.dir.join("extra.properties"), SETTINGS)?;
        let mut start = script("start", &broker.dir);
        start.args(["--port", "0"]).env("KAFKA_HEAP_OPTS", HEAP);
        let started = tokio::time::timeout(START_TIMEOUT, tokio::process::Command::from(start).output()).await;
        broker.address = said("start", &started.map_err(|_| "Kafka does not start")??)?;
        broker.pid = std::fs::read_to_string(broker.dir.join("pid"))?.trim().parse()?;
        Ok(broker)
    }

    /// Leaves it to the kernel when records go to the disk, as Kafka does by itself, or no longer.
    pub async fn leave_flushes_to_the_kernel(&self, leave: bool) -> Result<()> {
        let never = i64::MAX.to_string();
        self.alter("log.flush.interval.ms", leave.then_some(never.as_str())).await
    }

    /// Gives a setting that may change while it runs this value, or that of its file. rskafka does not have the request.
    async fn alter(&self, name: &str, value: Option<&str>) -> Result<()> {
        let altered = async {
            let mut stream = TcpStream::connect(&self.address).await?;
            stream.write_all(&alter(name, value)).await?;
            let mut answer = vec![0; usize::try_from(stream.read_u32().await?)?.min(ANSWER_BYTES_MAX)];
            stream.read_exact(&mut answer).await?;
            altered(&answer)
        };
        let altered = tokio::time::timeout(SET_TIMEOUT, altered).await.map_err(|_| "no answer")?;
        altered.map_err(|error| format!("the broker's {name}: {error}").into())
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Also where a measurement failed.
        let wiped = script("wipe", &self.dir).output().map_err(Into::into).and_then(|output| said("wipe", &output));
        if let Err(error) = wiped {
            eprintln!("bench: {error}");
        }
    }
}

/// The request, with its length before it.
fn alter(name: &str, value: Option<&str>) -> Vec<u8> {
    let mut request = Vec::new();
    let string = |request: &mut Vec<u8>, text: &str| {
        request.put_i16(text.len() as i16);
        request.put_slice(text.as_bytes());
    };
    request.put_i16(ALTER.0);
    request.put_i16(ALTER.1);
    // Which request of this connection, and from no client that has a name.
    request.put_i32(0);
    request.put_i16(-1);
    // One resource, one of its settings.
    request.put_i32(1);
    request.put_i8(BROKER);
    string(&mut request, "");
    request.put_i32(1);
    string(&mut request, name);
    match value {
        Some(value) => {
            request.put_i8(SET);
            string(&mut request, value);
        }
        None => {
            request.put_i8(DELETE);
            request.put_i16(-1);
        }
    }
    // Not only to see whether it may be.
    request.put_u8(0);
    let mut framed = (request.len() as u32).to_be_bytes().to_vec();
    framed.append(&mut request);
    framed
}

/// What the answer says, which has no length before it any more.
fn altered(mut answer: &[u8]) -> Result<()> {
    // The request's number, the milliseconds it was held back for, and how many resources.
    let head = 12;
    if answer.len() < head + 4 {
        return Err("an answer that is too short".into());
    }
    answer.advance(head);
    match (answer.get_i16(), answer.get_i16()) {
        (0, _) => Ok(()),
        (error, length) => {
            let message = answer.get(..usize::try_from(length).unwrap_or_default()).unwrap_or_default();
            Err(format!("error {error}: {}", String::from_utf8_lossy(message)).into())
        }
    }
}

/// `scripts/kafka/kafka VERB` for the broker of `dir`.
fn script(verb: &str, dir: &Path) -> Command {
    let script: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kafka/kafka");
    let mut command = Command::new(script);
    command.arg(verb).arg("--dir").arg(dir).stdin(Stdio::null());
    command
}

fn said(verb: &str, output: &Output) -> Result<String> {
    if !output.status.success() {
        return Err(format!("kafka {verb}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The environment's say over the one that `scripts/kafka/pom.xml` names, as the script has it.
pub fn version() -> Result<String> {
    if let Some(version) = std::env::var("SHOPD_KAFKA_VERSION").ok().filter(|version| !version.is_empty()) {
        return Ok(version);
    }
    let pom = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kafka/pom.xml"))?;
    let named = pom.split_once("<kafka.version>").and_then(|(_, after)| after.split_once('<'));
    Ok(named.ok_or("scripts/kafka/pom.xml names no version")?.0.to_owned())
}
