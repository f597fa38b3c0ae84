//! One Postgres server for the whole test process, and a fresh database for whoever asks.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shopd::config::{Config, DatabaseConfig};
use shopd::embedded::{self, Options, Server};
use tokio::sync::OnceCell;

const PREFIX: &str = "shopd-it-";

static SERVER: OnceCell<Server> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// The URL of a new, empty database whose name begins with `name` (lower case, short).
pub async fn database(name: &str) -> String {
    let server = SERVER.get_or_init(serve).await;
    let name = format!("{name}_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    server.ensure_database(&name).await.expect("a database");
    server.url(&name).expose().to_owned()
}

/// How the tests use a database: a stall of a busy machine ends none of their transactions and none of their ways in.
pub fn config() -> DatabaseConfig {
    DatabaseConfig {
        connect_timeout: Duration::from_secs(30),
        idle_in_transaction_timeout: Duration::from_secs(60),
        ..Config::default().database
    }
}

/// Fast and forgetful: what the tests write need not survive them.
pub fn options(data_dir: &Path) -> Options {
    let settings = [("fsync", "off"), ("synchronous_commit", "off"), ("full_page_writes", "off"), ("max_connections", "300")];
    let mut options = Options::new(data_dir);
    options.progress = false;
    options.settings = settings.map(|(name, value)| (name.into(), value.into())).to_vec();
    options
}

async fn serve() -> Server {
    sweep();
    let dir = std::env::temp_dir().join(format!("{PREFIX}{}", std::process::id()));
    // Before the server, so that nothing is left behind however the start ends.
    watch(std::process::id(), &dir);
    embedded::start(&options(&dir)).await.expect("a database server")
}

/// A test binary has no end of its own to clean up at, so a child waits for it: stops the server in `dir`, removes both.
pub fn watch(owner: u32, dir: &Path) {
    let script = r#"
        while kill -0 "$1" 2>/dev/null; do sleep 0.5; done
        file="$2/postgres/postmaster.pid"
        pid=$(head -n 1 "$file" 2>/dev/null)
        # Not from the pid file, which is gone where the server was told to stop and nobody waited.
        socket=$(sed -n 's/.*"-k" "\([^"]*\)".*/\1/p' "$2/postgres/postmaster.opts" 2>/dev/null)
        ours() {
            line=$(tr '\0' ' ' < "/proc/$pid/cmdline" || ps -ww -o command= -p "$pid")
            case "$line" in *"$2/postgres"*) return 0 ;; *) return 1 ;; esac
        } 2>/dev/null
        if [ -n "$pid" ] && ours "$1" "$2"; then
            kill -INT "$pid"
            for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
                ours "$1" "$2" || break
                sleep 0.2
            done
            if ours "$1" "$2"; then kill -KILL "$pid"; fi
        fi
        rm -rf "$2"
        if [ -n "$socket" ]; then rmdir "$socket" 2>/dev/null; fi
    "#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "watch"]).arg(owner.to_string()).arg(dir);
    // Neither its terminal nor its pipes are ours: cargo waits for those to close.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0).current_dir("/");
    drop(command.spawn().expect("sh"));
}

/// What runs left whose watcher was killed too.
fn sweep() {
    let entries = std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split('-').next()?.parse().ok());
        if let Some(owner) = owner
            && nix::sys::signal::kill(nix::unistd::Pid::from_raw(owner), None) == Err(nix::errno::Errno::ESRCH)
        {
            watch(owner.cast_unsigned(), &entry.path());
        }
    }
}

/// Waits until `done`, at most 20 s.
pub async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..400 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{what}: not within 20 s");
}

/// A directory for one test's own server, closed to others as `mktemp -d` makes it; when the test process has ended, at the latest, its
/// server is stopped and it is removed.
pub fn own_dir() -> PathBuf {
    let owner = std::process::id();
    let private = Permissions::from_mode(0o700);
    let made = tempfile::Builder::new().prefix(&format!("{PREFIX}{owner}-")).permissions(private).tempdir();
    let dir = made.expect("a directory").keep();
    watch(owner, &dir);
    dir
}
