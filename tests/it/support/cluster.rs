//! Database servers that are dumped, copied, recovered, followed and promoted, with Postgres' own programs beside the server's.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shopd::embedded::{self, Server};
use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::postgres;
use super::shop::poll;

/// How long one of Postgres' programs may take on a small database and a busy machine.
const PROGRAM_WAIT: Duration = Duration::from_secs(90);

/// A database server in a folder of its own. What it acknowledged survives the end of its processes, not that of the machine.
pub struct Cluster {
    pub server: Server,
    pub dir: PathBuf,
    hangs: AtomicBool,
}

/// What stands still hears of no stop: it would be there for ever.
impl Drop for Cluster {
    fn drop(&mut self) {
        if self.hangs.load(Ordering::Relaxed) {
            signal(&self.processes(), Signal::SIGKILL);
        }
    }
}

impl Cluster {
    /// A new one: its system identifier is nobody else's.
    pub async fn new(settings: &[(&str, &str)]) -> Self {
        Self::at(postgres::own_dir(), settings).await
    }

    /// On what lies in `dir`/postgres already.
    pub async fn at(dir: PathBuf, settings: &[(&str, &str)]) -> Self {
        let mut options = postgres::options(&dir);
        for (name, value) in &mut options.settings {
            if name == "synchronous_commit" || name == "full_page_writes" {
                *value = "on".into();
            }
        }
        options.settings.extend(settings.iter().map(|(name, value)| ((*name).into(), (*value).into())));
        Self { server: embedded::start(&options).await.expect("a database server"), dir, hangs: AtomicBool::new(false) }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.join("postgres")
    }

    pub fn url(&self, database: &str) -> String {
        self.server.url(database).expose().to_owned()
    }

    /// The URL of a database, made where it is missing.
    pub async fn database(&self, name: &str) -> String {
        self.server.ensure_database(name).await.expect("a database");
        self.url(name)
    }

    /// Statements outside the shop; the first column of the last row.
    pub async fn ask(&self, database: &str, statements: &str) -> String {
        let (client, connection) = tokio_postgres::connect(&self.url(database), NoTls).await.expect("a session");
        tokio::spawn(connection);
        let answers = client.simple_query(statements).await.unwrap_or_else(|error| panic!("{error:?}: {statements}"));
        let texts = answers.iter().filter_map(|answer| match answer {
            SimpleQueryMessage::Row(row) => row.get(0).map(String::from),
            _ => None,
        });
        texts.last().unwrap_or_default()
    }

    /// What the server calls itself in `outbox_cursor`.
    pub async fn system_identifier(&self) -> String {
        self.ask("postgres", "select system_identifier from pg_control_system()").await
    }

    /// So many transactions that write nothing: their ids are used up.
    pub async fn burn_transactions(&self, count: u32) {
        let statements = format!("do $$ begin for n in 1..{count} loop perform pg_current_xact_id(); commit; end loop; end $$");
        self.ask("postgres", &statements).await;
    }

    /// One of Postgres' programs, of the server's own version.
    pub async fn program(&self, name: &str, arguments: &[&str]) {
        let server = std::fs::read_link(format!("/proc/{}/exe", self.server.pid())).expect("where the server's program is");
        let program = server.with_file_name(name);
        assert!(program.is_file(), "{} is missing: install the whole server, not a part of it", program.display());
        let mut command = tokio::process::Command::new(&program);
        command.args(arguments).env("LC_ALL", "C").current_dir("/").stdin(Stdio::null()).kill_on_drop(true);
        let output = tokio::time::timeout(PROGRAM_WAIT, command.output()).await;
        let output = output.unwrap_or_else(|_| panic!("{name} takes longer than {PROGRAM_WAIT:?}")).expect("a program");
        assert!(output.status.success(), "{name} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// `pg_dump` of one database: its state at one moment, while others write.
    pub async fn dump(&self, database: &str, into: &Path) {
        let url = self.url(database);
        self.program("pg_dump", &["--format=custom", "--compress=0", "--file", text(into), &url]).await;
    }

    /// `pg_restore` into a database of that name, which is made.
    pub async fn restore(&self, database: &str, from: &Path) -> String {
        let url = self.database(database).await;
        self.program("pg_restore", &["--exit-on-error", "--no-owner", "--dbname", &url, text(from)]).await;
        url
    }

    /// `pg_basebackup` into `dir`/postgres, given to the user that the server runs as.
    pub async fn base_backup(&self, dir: &Path, more: &[&str]) {
        let (url, to) = (self.url("postgres"), dir.join("postgres"));
        let mut arguments = vec!["--checkpoint=fast", "--no-sync", "--pgdata", text(&to), "--dbname", &url];
        arguments.extend(more);
        self.program("pg_basebackup", &arguments).await;
        self.give(&to);
    }

    /// Gives files to the server's user, where that is not the tests' own.
    pub fn give(&self, path: &Path) {
        let of = std::fs::metadata(self.data()).expect("its data");
        let given = std::process::Command::new("chown").arg("-R").arg(format!("{}:{}", of.uid(), of.gid())).arg(path).status();
        assert!(given.is_ok_and(|status| status.success()), "chown {}", path.display());
    }

    /// SIGKILL to every process of it at once, as when its machine goes: what a session was about to answer is not answered.
    pub async fn crash(&self) {
        assert!(!self.processes().is_empty(), "it runs");
        loop {
            let pids = self.processes();
            if pids.is_empty() {
                return;
            }
            signal(&pids, Signal::SIGKILL);
            poll().await;
        }
    }

    /// SIGSTOP to every process of it, as when its machine stands still: the kernel goes on to acknowledge what is sent to it, and to take
    /// connections.
    pub async fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
        let mut stopped = Vec::new();
        loop {
            let more: Vec<i32> = self.processes().into_iter().filter(|pid| !stopped.contains(pid)).collect();
            if more.is_empty() {
                return;
            }
            signal(&more, Signal::SIGSTOP);
            stopped.extend(more);
            poll().await;
        }
    }

    /// After [`Self::hang`].
    pub fn go_on(&self) {
        self.hangs.store(false, Ordering::Relaxed);
        signal(&self.processes(), Signal::SIGCONT);
    }

    /// Those that work in its folder.
    fn processes(&self) -> Vec<i32> {
        let data = self.data().canonicalize().expect("its data");
        let all = std::fs::read_dir("/proc").expect("/proc").flatten().filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            (std::fs::read_link(entry.path().join("cwd")).ok()? == data).then_some(pid)
        });
        all.collect()
    }
}

fn signal(pids: &[i32], signal: Signal) {
    for pid in pids {
        // One may have ended in between.
        let _ = kill(Pid::from_raw(*pid), signal);
    }
}

/// Lets the servers' user pass through a folder of ours.
pub fn admit(dir: &Path) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711)).expect("a mode");
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
