//! For commands such as `migrate`: the server that runs, or one started for as long as the command takes.

use std::time::Duration;

use tokio::time::Instant;

use super::Options;
use super::error::EmbeddedError;
use super::folder::{Folder, Lock};
use super::process::{PidFile, serves};
use super::run::{self, Address};
use super::server::Server;
use crate::config::Secret;

/// How long somebody else's server may take to become ready, or to go away; it may be making its database.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a command that started the server waits for others that came to use it.
const GUESTS_TIMEOUT: Duration = Duration::from_secs(60);
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A server to work on; end with [`Attached::detach`].
#[derive(Debug)]
pub struct Attached(Kind);

#[derive(Debug)]
enum Kind {
    /// Ours to stop.
    Host(Box<Server>),
    /// Somebody else's; the shared lock tells a passing host that we are here.
    Guest { address: Address, _here: Lock },
}

/// Connects to the server of the data directory if it runs, else starts it.
///
/// # Errors
/// As [`super::start`], but a directory in use is none.
pub async fn attach(options: &Options) -> Result<Attached, EmbeddedError> {
    let folder = Folder::open(&options.data_dir)?;
    let pgdata = folder.pgdata();
    let deadline = Instant::now() + READY_TIMEOUT;
    loop {
        let holder = match folder.try_lock(true)? {
            Ok(lock) => return Ok(Attached(Kind::Host(Box::new(Server::run(folder, options, lock).await?)))),
            Err(holder) => holder,
        };
        let ready = PidFile::read(&pgdata).filter(|file| file.is_ready() && serves(file.pid, &pgdata));
        if let Some(address) = ready.map(|file| Address::of(&file)) {
            // A host that is just leaving has it; its server is about to stop.
            let here = folder.try_lock_guests(true)?;
            if let Some(here) = here
                && address.is_of(&pgdata).await.unwrap_or(false)
            {
                return Ok(Attached(Kind::Guest { address, _here: here }));
            }
        }
        if Instant::now() > deadline {
            let who = holder.pid.map(|pid| format!(" of process {pid}")).unwrap_or_default();
            return Err(run::timed_out(&format!("waiting for the database server{who}"), READY_TIMEOUT));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// [`EmbeddedError::InUse`] where another process keeps the data directory; makes nothing.
pub fn in_use(options: &Options) -> Option<EmbeddedError> {
    let holder = Folder { root: options.data_dir.clone() }.holder()?;
    Some(EmbeddedError::InUse { path: options.data_dir.clone(), pid: holder.pid })
}

/// Whether the data directory holds a database; makes nothing.
pub fn exists(options: &Options) -> bool {
    options.data_dir.join("postgres").join("PG_VERSION").exists()
}

impl Attached {
    pub fn url(&self, database: &str) -> Secret {
        match &self.0 {
            Kind::Host(server) => server.url(database),
            Kind::Guest { address, .. } => address.url(database),
        }
    }

    /// Creates the database where it is missing.
    pub async fn ensure_database(&self, name: &str) -> Result<(), EmbeddedError> {
        match &self.0 {
            Kind::Host(server) => server.ensure_database(name).await,
            Kind::Guest { address, .. } => run::ensure_databases(address, &[name]).await,
        }
    }

    /// Whether the server was started for this command and ends with it.
    pub fn is_host(&self) -> bool {
        matches!(self.0, Kind::Host(_))
    }

    /// Stops the server if it was started for us, once no other command uses it.
    pub async fn detach(self, timeout: Duration) -> Result<(), EmbeddedError> {
        let Kind::Host(server) = self.0 else { return Ok(()) };
        let deadline = Instant::now() + GUESTS_TIMEOUT;
        let mut alone = server.folder().try_lock_guests(false)?;
        while alone.is_none() && Instant::now() < deadline {
            tokio::time::sleep(POLL_INTERVAL).await;
            alone = server.folder().try_lock_guests(false)?;
        }
        // Held until the server is gone: nobody comes in meanwhile.
        let stopped = server.stop(timeout).await;
        drop(alone);
        stopped
    }
}
