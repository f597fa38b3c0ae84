//! Initialising a database and running its server; whoever calls holds the data directory's lock.

use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::time::Instant;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use super::account::Account;
use super::error::{EmbeddedError, io};
use super::folder::Folder;
use super::process::{PidFile, Process, exists, is_inhabited, serves};
use super::programs::{self, Programs};
use super::{Options, fetch, socket};
use crate::config::Secret;

/// The superuser; the server is ours alone.
const USER: &str = "shopd";
/// A process number beyond any.
const NOBODY: i32 = i32::MAX;
/// There is no TCP listener; this only names the socket.
const PORT: u16 = 5432;
/// Recovery after a crash is part of a start: at most `max_wal_size` is read again.
const START_TIMEOUT: Duration = Duration::from_secs(120);
const INITIALISE_TIMEOUT: Duration = Duration::from_secs(120);
/// How long children of a killed server may take to notice.
const REMNANTS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a ready server may refuse before it is given up.
const UNREACHABLE_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CREATE_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The same while a server is starting, which takes some fifty milliseconds.
const READY_INTERVAL: Duration = Duration::from_millis(3);
/// The end of the server's log that an error shows.
const LOG_TAIL_BYTES: u64 = 2_000;

/// Small, durable, quiet. Parallel queries are off because they take shared memory, of which containers have little.
const SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", ""),
    ("unix_socket_permissions", "0700"),
    ("max_connections", "60"),
    ("shared_buffers", "128MB"),
    ("huge_pages", "off"),
    ("max_wal_size", "1GB"),
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("full_page_writes", "on"),
    ("max_parallel_workers_per_gather", "0"),
    ("jit", "off"),
    ("max_logical_replication_workers", "0"),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
    ("log_destination", "stderr"),
    ("logging_collector", "off"),
    // Failed statements are told to who sent them; here they would only fill the disk.
    ("log_min_messages", "log"),
    ("log_checkpoints", "off"),
    ("log_line_prefix", "%m [%p] "),
];

/// Where a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub socket_dir: PathBuf,
    pub port: u16,
}

impl Address {
    pub fn of(file: &PidFile) -> Self {
        Self { socket_dir: PathBuf::from(&file.socket_dir), port: file.port }
    }

    pub fn url(&self, database: &str) -> Secret {
        let host = self.socket_dir.to_string_lossy();
        let encoded = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
        Secret::new(format!("postgres://{USER}@{}:{}/{}", encoded(&host), self.port, encoded(database)))
    }

    /// One connection to the server's own database, for `work`, closed afterwards.
    pub async fn connect(&self) -> Result<tokio_postgres::Client, EmbeddedError> {
        let url = self.url("postgres");
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, tokio_postgres::connect(url.expose(), NoTls)).await;
        let connected = connected.map_err(|_| timed_out("connecting to the database server", CONNECT_TIMEOUT))?;
        let (client, connection) = connected.map_err(connection_error)?;
        // Ends when the client is dropped; its errors reach the client's calls.
        tokio::spawn(async move { drop(connection.await) });
        Ok(client)
    }

    /// Whether the server there is the one of `pgdata`.
    pub async fn is_of(&self, pgdata: &Path) -> Result<bool, EmbeddedError> {
        let client = self.connect().await?;
        let asked = tokio::time::timeout(CONNECT_TIMEOUT, client.query_one("select current_setting('data_directory')", &[])).await;
        let row = asked.map_err(|_| timed_out("asking the database server", CONNECT_TIMEOUT))?.map_err(connection_error)?;
        let directory: String = row.try_get(0).map_err(connection_error)?;
        Ok(Path::new(&directory).canonicalize().is_ok_and(|directory| directory == pgdata))
    }
}

/// The running server of this directory: the one found, which an earlier shopd left, or a new one.
pub(super) async fn run(folder: &Folder, options: &Options, wanted: Option<&Address>) -> Result<(Process, Address), EmbeddedError> {
    let pgdata = folder.pgdata();
    let account = Account::choose(&pgdata)?;
    folder.admit(&account)?;
    if let Some(found) = take_over(&pgdata).await? {
        return Ok(found);
    }
    let programs = programs(folder, options, &account).await?;
    if !pgdata.exists() {
        initialise(folder, options, &account, &programs).await?;
    }
    clear_remnants(&pgdata, &account).await?;
    let socket_dir = match wanted.filter(|wanted| socket::take(&wanted.socket_dir, &account)) {
        Some(wanted) => wanted.socket_dir.clone(),
        None => socket::directory(&folder.root, &account)?,
    };
    let address = Address { socket_dir, port: wanted.map_or(PORT, |wanted| wanted.port) };
    socket::clear(&address.socket_dir, address.port);
    let process = launch(folder, options, &account, &programs, &address).await?;
    Ok((process, address))
}

/// The server that runs here already, once it is ready; `None` once it has ended, or where none ran.
async fn take_over(pgdata: &Path) -> Result<Option<(Process, Address)>, EmbeddedError> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut unreachable_since = None;
    while let Some(file) = PidFile::read(pgdata).filter(|file| serves(file.pid, pgdata)) {
        let (process, address) = (Process::adopted(file.pid), Address::of(&file));
        if file.is_ready() {
            match address.is_of(pgdata).await {
                Ok(true) => {
                    tracing::info!(pid = file.pid, "taking over the database server that runs here already");
                    return Ok(Some((process, address)));
                }
                // Its socket's directory was cleared away, say: it serves nobody, and no other can start beside it.
                unreachable if unreachable_since.get_or_insert_with(Instant::now).elapsed() > UNREACHABLE_TIMEOUT => {
                    tracing::warn!(pid = file.pid, ?unreachable, "the database server that runs here does not answer; stopping it");
                    process.signal(Signal::SIGINT, pgdata);
                    unreachable_since = None;
                }
                _ => (),
            }
        }
        if Instant::now() > deadline {
            return Err(timed_out(
                &format!("waiting for the database server that runs already (process {})", file.pid),
                START_TIMEOUT,
            ));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(None)
}

async fn programs(folder: &Folder, options: &Options, account: &Account) -> Result<Programs, EmbeddedError> {
    let pgdata = folder.pgdata();
    let version = pgdata.join("PG_VERSION");
    // A database only opens under the major version that made it.
    let major = match pgdata.exists() {
        true => {
            let text = std::fs::read_to_string(&version).map_err(io("cannot read", &version))?;
            let number = text.trim().parse::<u32>();
            Some(number.map_err(|error| io("cannot understand", &version)(std::io::Error::other(error)))?)
        }
        false => None,
    };
    if let Some(found) = programs::find(&options.search, major, account) {
        return Ok(found);
    }
    let fetched = fetch::programs(&options.fetch, &folder.root, major, account, options.progress).await?;
    let major = major.unwrap_or_default();
    fetched.ok_or(EmbeddedError::NoSuchVersion { path: pgdata, major })
}

/// Makes the database under another name first: a rename is all or nothing, an interrupted `initdb` is not.
async fn initialise(folder: &Folder, options: &Options, account: &Account, programs: &Programs) -> Result<(), EmbeddedError> {
    let pgdata = folder.pgdata();
    let failed = |cause: String| EmbeddedError::Initialise { path: pgdata.clone(), cause };
    folder.remove_unfinished();
    let place = folder.unfinished();
    std::fs::create_dir(&place).map_err(io("cannot create", &place))?;
    account.own(&place)?;

    let mut command = account.command(&programs.initdb());
    command.arg("-D").arg(&place).args(["-U", USER, "-E", "UTF8", "--locale=C", "--auth=trust", "--no-instructions"]);
    if options.settings.iter().any(|(name, value)| name == "fsync" && value == "off") {
        command.arg("--no-sync");
    }
    let running = tokio::process::Command::from(command).kill_on_drop(true).output();
    let done = tokio::time::timeout(INITIALISE_TIMEOUT, running).await;
    let output =
        done.map_err(|_| timed_out("making a new database", INITIALISE_TIMEOUT))?.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    std::fs::rename(&place, &pgdata).map_err(io("cannot name", &pgdata))?;
    // The name itself must survive a crash too.
    std::fs::File::open(&folder.root).and_then(|root| root.sync_all()).map_err(io("cannot sync", &folder.root))
}

/// Waits for a killed server's children, and corrects a pid file whose number is taken, by a stranger or by a killed server that its
/// parent has not buried yet: the new server would believe that the old one runs. The rest of the file stays, because by it the new
/// server finds children that we could not see.
async fn clear_remnants(pgdata: &Path, account: &Account) -> Result<(), EmbeddedError> {
    let deadline = Instant::now() + REMNANTS_TIMEOUT;
    while is_inhabited(pgdata) {
        if Instant::now() > deadline {
            return Err(timed_out("waiting for a killed database server's processes", REMNANTS_TIMEOUT));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let path = pgdata.join("postmaster.pid");
    if let Some(file) = PidFile::read(pgdata)
        && exists(file.pid)
    {
        let text = std::fs::read_to_string(&path).map_err(io("cannot read", &path))?;
        let rest = text.split_once('\n').map(|(_, rest)| rest).unwrap_or_default();
        let corrected = pgdata.with_extension("pid");
        std::fs::write(&corrected, format!("{NOBODY}\n{rest}")).map_err(io("cannot write", &corrected))?;
        account.own(&corrected)?;
        std::fs::rename(&corrected, &path).map_err(io("cannot correct", &path))?;
    }
    Ok(())
}

async fn launch(
    folder: &Folder,
    options: &Options,
    account: &Account,
    programs: &Programs,
    address: &Address,
) -> Result<Process, EmbeddedError> {
    let (pgdata, deadline) = (folder.pgdata(), Instant::now() + START_TIMEOUT);
    let patience = Instant::now() + REMNANTS_TIMEOUT;
    loop {
        let log = folder.open_server_log()?;
        let log_start = log.metadata().map(|meta| meta.len()).unwrap_or_default();
        let mut command = account.command(&programs.postgres());
        command.arg("-D").arg(&pgdata).arg("-k").arg(&address.socket_dir).arg("-p").arg(address.port.to_string());
        let settings = options.settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in SETTINGS.iter().copied().chain(settings) {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let error_log = log.try_clone().map_err(io("cannot use", &folder.root))?;
        command.stdout(Stdio::from(log)).stderr(Stdio::from(error_log));
        let program = programs.postgres();
        let child = command.spawn().map_err(io("cannot start", &program))?;
        let process = Process::spawned(child).map_err(io("cannot watch", &program))?;
        let mut unready = Unready { process: &process, pgdata: &pgdata, given_up: true };

        while process.is_running(&pgdata) {
            let file = PidFile::read(&pgdata).filter(|file| file.pid == process.pid && file.is_ready());
            if file.is_some() && matches!(address.is_of(&pgdata).await, Ok(true)) {
                unready.given_up = false;
                drop(unready);
                return Ok(process);
            }
            if Instant::now() > deadline {
                process.signal(Signal::SIGQUIT, &pgdata);
                return Err(timed_out("starting the database server", START_TIMEOUT));
            }
            // Whichever comes first.
            let _ = tokio::time::timeout(READY_INTERVAL, process.ended(&pgdata)).await;
        }
        let cause = tail(&folder.server_log(), log_start);
        let passes = cause.contains("pre-existing shared memory block") || cause.contains("lock file");
        if !passes || Instant::now() > patience {
            return Err(EmbeddedError::Ended { cause });
        }
        tokio::time::sleep(10 * POLL_INTERVAL).await;
    }
}

/// A server that nobody owns yet: whoever no longer waits for it must not leave it running.
struct Unready<'a> {
    process: &'a Process,
    pgdata: &'a Path,
    given_up: bool,
}

impl Drop for Unready<'_> {
    fn drop(&mut self) {
        if self.given_up {
            self.process.signal(Signal::SIGINT, self.pgdata);
        }
    }
}

/// What was logged since `start`, or the end of it.
fn tail(path: &Path, start: u64) -> String {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|mut file| {
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(length.saturating_sub(LOG_TAIL_BYTES))))?;
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)
    });
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).trim().to_owned(),
        Err(error) => format!("its log {} cannot be read: {error}", path.display()),
    }
}

/// What runs in `pgdata` now: `known`, or the one that an interrupted restart left.
pub(super) fn current(pgdata: &Path, known: &Process) -> Process {
    let other = || PidFile::read(pgdata).filter(|file| serves(file.pid, pgdata)).map(|file| Process::adopted(file.pid));
    if known.is_running(pgdata) { known.clone() } else { other().unwrap_or_else(|| known.clone()) }
}

/// Creates those that are missing.
pub(super) async fn ensure_databases(address: &Address, names: &[&str]) -> Result<(), EmbeddedError> {
    let client = address.connect().await?;
    let make = async {
        let known = client.query("select datname::text from pg_database", &[]).await?;
        let known = known.iter().map(|row| row.try_get(0)).collect::<Result<Vec<String>, _>>()?;
        for name in names.iter().filter(|name| !known.iter().any(|known| known == *name)) {
            let made = client.batch_execute(&format!("create database \"{}\"", name.replace('"', "\"\""))).await;
            // Somebody made it in between.
            made.or_else(|error| if error.code() == Some(&SqlState::DUPLICATE_DATABASE) { Ok(()) } else { Err(error) })?;
        }
        Ok(())
    };
    let done = tokio::time::timeout(CREATE_TIMEOUT, make).await;
    done.map_err(|_| timed_out(&format!("creating the databases {}", names.join(", ")), CREATE_TIMEOUT))?.map_err(connection_error)
}

pub(super) fn timed_out(what: &str, bound: Duration) -> EmbeddedError {
    EmbeddedError::TimedOut { what: what.to_owned(), seconds: bound.as_secs() }
}

pub(super) fn connection_error(error: tokio_postgres::Error) -> EmbeddedError {
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    EmbeddedError::Connection(format!("{error}{cause}"))
}
