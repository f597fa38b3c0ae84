//! Real brokers: one for the whole test process, and private ones for the tests that break them. Needs Java and, once, Maven.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shopd::config::{Config, KafkaConfig};
use tokio::sync::OnceCell;

pub(super) const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/kafka/kafka");
const PREFIX: &str = "shopd-it-kafka-";
/// The first start on a machine fetches the jars.
pub(super) const START_WAIT: Duration = Duration::from_secs(240);

/// Of a broker that nobody kills: it counts as alive through a long stall of the machine. One that is killed comes back only when its
/// old session is over.
pub const UNHURRIED: &str = "broker.session.timeout.ms=18000\n";

static SHARED: OnceCell<Broker> = OnceCell::const_new();
static COUNT: AtomicU32 = AtomicU32::new(0);

/// The address of the broker that all tests of this process share. Topics need a prefix of the test's own.
pub async fn shared() -> String {
    let unhurried = |dir: &Path| std::fs::write(dir.join("extra.properties"), UNHURRIED).expect("a file");
    SHARED.get_or_init(|| Broker::prepared(unhurried)).await.bootstrap.clone()
}

/// A topic prefix that nobody else has on the shared broker.
pub fn prefix() -> String {
    format!("t{}-{}.", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Settings for the broker at `bootstrap`, with a prefix of their own.
pub fn config(bootstrap: &str) -> KafkaConfig {
    KafkaConfig { bootstrap_servers: vec![bootstrap.to_owned()], topic_prefix: prefix(), ..Config::default().kafka }
}

/// A broker of one's own, at a port that it keeps; gone when dropped, and when the test process has ended at the latest.
pub struct Broker {
    dir: PathBuf,
    /// `host:port`
    pub bootstrap: String,
}

impl Broker {
    /// Started, usable and empty.
    pub async fn new() -> Self {
        Self::prepared(|_| {}).await
    }

    /// The same, after `prepare` has laid files into its directory: `extra.properties` and `scram` (see the script).
    pub async fn prepared(prepare: impl FnOnce(&Path)) -> Self {
        let dir = own_dir();
        std::fs::create_dir_all(&dir).expect("a directory");
        prepare(&dir);
        let mut broker = Self { dir, bootstrap: String::new() };
        broker.bootstrap = broker.run("start", &["--port", "0"]).await;
        broker
    }

    /// Brings a killed or stopped broker back with its data, and waits until it is usable.
    pub async fn start(&self) {
        assert_eq!(self.run("start", &[]).await, self.bootstrap);
    }

    /// Where its data lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// SIGTERM: a clean stop.
    pub async fn stop(&self) {
        self.run("stop", &[]).await;
    }

    /// SIGKILL: a crash.
    pub async fn kill(&self) {
        self.run("kill", &[]).await;
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub async fn pause(&self) {
        self.run("pause", &[]).await;
    }

    /// Undoes `pause`.
    pub async fn resume(&self) {
        self.run("resume", &[]).await;
    }

    async fn run(&self, verb: &str, arguments: &[&str]) -> String {
        let mut command = tokio::process::Command::new(SCRIPT);
        command.arg(verb).arg("--dir").arg(&self.dir).args(arguments).stdin(Stdio::null());
        let output = tokio::time::timeout(START_WAIT, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("scripts/kafka/kafka {verb} took too long")).expect("bash");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "scripts/kafka/kafka {verb} failed:\n{said}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let wiped = Command::new(SCRIPT).arg("wipe").arg("--dir").arg(&self.dir).stdin(Stdio::null()).status();
        assert!(wiped.is_ok_and(|status| status.success()) || std::thread::panicking(), "the broker in {:?} stays", self.dir);
    }
}

/// A folder for brokers that end with the test process at the latest.
pub(super) fn own_dir() -> PathBuf {
    sweep();
    let name = format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let dir = std::env::temp_dir().join(name);
    // Before the broker, so that nothing is left behind however the start ends.
    watch(std::process::id(), &dir);
    dir
}

/// A test binary has no end of its own to clean up at, so a child waits for it and then removes the broker in `dir`.
fn watch(owner: u32, dir: &Path) {
    let script = r#"
        while kill -0 "$1" 2>/dev/null; do sleep 0.5; done
        "$3" wipe --dir "$2"
    "#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "watch"]).arg(owner.to_string()).arg(dir).arg(SCRIPT);
    // Neither its terminal nor its pipes are ours: cargo waits for those to close.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).current_dir("/");
    drop(command.spawn().expect("sh"));
}

/// What runs left whose watcher was killed too.
fn sweep() {
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split_once('-'));
        let owner = owner.and_then(|(pid, _)| pid.parse::<i32>().ok());
        if let Some(owner) = owner
            && nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner), None).is_err()
        {
            watch(owner.cast_unsigned(), &entry.path());
        }
    }
}
