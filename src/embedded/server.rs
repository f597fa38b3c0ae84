//! The server as its owner sees it: started, addressed, kept running, stopped.

use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::Options;
use super::error::EmbeddedError;
use super::folder::{Folder, Lock};
use super::process::Process;
use super::run::{self, Address};
use crate::config::Secret;

/// How long `start` waits for a command (`migrate`) that started the server for itself.
const PASSING_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// After the immediate shutdown, which waits for nobody.
const IMMEDIATE_TIMEOUT: Duration = Duration::from_secs(5);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(10);

/// A running server and the lock on its data directory. Dropped without [`Server::stop`] it is told to stop, and nobody waits for it; the
/// next start does. After a SIGKILL of ours it goes on, and the next start takes it over.
#[derive(Debug)]
pub struct Server {
    folder: Folder,
    options: Options,
    address: Address,
    process: Process,
    _lock: Lock,
}

/// Takes the data directory, finds or fetches the programs, initialises, starts or takes over; returns when the server answers.
///
/// # Errors
/// [`EmbeddedError::InUse`] when another process keeps the directory; the others say what to do.
pub async fn start(options: &Options) -> Result<Server, EmbeddedError> {
    let folder = Folder::open(&options.data_dir)?;
    let deadline = Instant::now() + PASSING_TIMEOUT;
    loop {
        match folder.try_lock(false)? {
            Ok(lock) => return Server::run(folder, options, lock).await,
            Err(holder) if holder.passing && Instant::now() < deadline => tokio::time::sleep(POLL_INTERVAL).await,
            Err(holder) => return Err(EmbeddedError::InUse { path: folder.root, pid: holder.pid }),
        }
    }
}

impl Server {
    pub(super) async fn run(folder: Folder, options: &Options, lock: Lock) -> Result<Self, EmbeddedError> {
        let (process, address) = run::run(&folder, options, None).await?;
        Ok(Self { folder, options: options.clone(), address, process, _lock: lock })
    }

    /// `postgres://...` through the socket; the same for the server's whole life, restarts included.
    pub fn url(&self, database: &str) -> Secret {
        self.address.url(database)
    }

    pub fn pid(&self) -> i32 {
        self.process.pid
    }

    /// Creates the database where it is missing.
    pub async fn ensure_database(&self, name: &str) -> Result<(), EmbeddedError> {
        self.ensure_databases(&[name]).await
    }

    /// Creates those that are missing.
    pub async fn ensure_databases(&self, names: &[&str]) -> Result<(), EmbeddedError> {
        run::ensure_databases(&self.address, names).await
    }

    /// Resolves when the server's process has ended, whoever ended it. Safe to drop and call again.
    pub async fn exited(&self) {
        self.process.ended(&self.folder.pgdata()).await;
    }

    /// Starts the server again if it has ended; says whether it had.
    pub async fn ensure_running(&mut self) -> Result<bool, EmbeddedError> {
        if self.process.is_running(&self.folder.pgdata()) {
            return Ok(false);
        }
        let (process, address) = run::run(&self.folder, &self.options, Some(&self.address)).await?;
        (self.process, self.address) = (process, address);
        Ok(true)
    }

    /// Restarts the server whenever it ends, until `stop` is done; the server then still runs.
    pub async fn supervise(&mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => return,
                () = self.exited() => tracing::warn!(pid = self.pid(), "the database server ended; starting it again"),
            }
            let mut pause = Duration::from_millis(100);
            loop {
                // Dropped half-way, the new server is found by `stop` through its pid file.
                let started = tokio::select! {
                    () = &mut stop => return,
                    started = self.ensure_running() => started,
                };
                match started {
                    Ok(_) => break tracing::info!(pid = self.pid(), "the database server runs again"),
                    Err(error) => tracing::error!(%error, "the database server does not start"),
                }
                pause = (pause * 2).min(RESTART_PAUSE_MAX);
                tokio::select! {
                    () = &mut stop => return,
                    () = tokio::time::sleep(pause) => (),
                }
            }
        }
    }

    /// Ends it: fast (sessions are cut, everything is written), and after `timeout` immediately (the next start recovers).
    pub async fn stop(self, timeout: Duration) -> Result<(), EmbeddedError> {
        let pgdata = self.folder.pgdata();
        let process = run::current(&pgdata, &self.process);
        process.signal(Signal::SIGINT, &pgdata);
        if tokio::time::timeout(timeout, process.ended(&pgdata)).await.is_err() {
            tracing::warn!(pid = process.pid, "the database server does not stop in time; stopping it at once");
            process.signal(Signal::SIGQUIT, &pgdata);
            let ended = tokio::time::timeout(IMMEDIATE_TIMEOUT, process.ended(&pgdata)).await;
            ended.map_err(|_| run::timed_out("stopping the database server", timeout + IMMEDIATE_TIMEOUT))?;
        }
        // Left behind it would be taken again; where it holds anything, it stays.
        let _ = std::fs::remove_dir(&self.address.socket_dir);
        Ok(())
    }

    /// What tells it to stop and does not wait: for an exit in a hurry, whoever has the server then.
    pub fn stop_soon(&self) -> impl Fn() + Send + 'static {
        let (pgdata, process) = (self.folder.pgdata(), self.process.clone());
        move || run::current(&pgdata, &process).signal(Signal::SIGINT, &pgdata)
    }

    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_soon()();
    }
}
