//! The data directory: made, entered and locked.
//!
//! `<data_dir>/lock` holds the lock and its holder's process id, `postgres` the database, `postgres.log` the server's own log.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::account::Account;
use super::error::{EmbeddedError, io};

/// A server log beyond this is put aside at the next start; the one put aside before goes.
const LOG_BYTES_MAX: u64 = 4 << 20;
const UNFINISHED: &str = "postgres.unfinished-";

#[derive(Clone, Debug)]
pub(super) struct Folder {
    /// Canonical.
    pub root: PathBuf,
}

/// Who holds the lock, as far as its file tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    pub pid: Option<i32>,
    /// A command that will be done soon, not `all`.
    pub passing: bool,
}

impl Holder {
    fn named_in(mut file: File) -> Self {
        let mut text = String::new();
        // Unreadable is unknown; only the message suffers.
        let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text));
        let mut words = text.split_whitespace();
        Self { pid: words.next().and_then(|pid| pid.parse().ok()), passing: words.next().is_some() }
    }
}

/// Held until dropped; the kernel lets go of it when the process dies.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just starting has the file too, until it becomes its program.
        let _ = self.0.unlock();
    }
}

impl Folder {
    /// Makes the directory and what is missing above it.
    pub fn open(path: &Path) -> Result<Self, EmbeddedError> {
        let root = nix::unistd::Uid::effective().is_root();
        let absolute = std::path::absolute(path).map_err(io("cannot use the data directory", path))?;
        let mut missing: Vec<&Path> = absolute.ancestors().take_while(|folder| !folder.exists()).collect();
        missing.reverse();
        for folder in missing {
            // As root the server is another user: it must pass, and need see nothing.
            let mode = if root { 0o711 } else { 0o700 };
            match DirBuilder::new().mode(mode).create(folder) {
                // Past the umask, which may be stricter.
                Ok(()) => set_mode(folder, mode)?,
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => (),
                Err(error) => return Err(io("cannot create the data directory", folder)(error)),
            }
        }
        let root = absolute.canonicalize().map_err(io("cannot use the data directory", &absolute))?;
        Ok(Self { root })
    }

    pub fn pgdata(&self) -> PathBuf {
        self.root.join("postgres")
    }

    /// Where a database is made, before it gets its name. Ours alone: an `initdb` whose shopd was killed may still be writing into another.
    pub fn unfinished(&self) -> PathBuf {
        self.root.join(format!("{UNFINISHED}{}", std::process::id()))
    }

    /// Takes away what interrupted beginnings left, as far as it can be; none of it is ever used.
    pub fn remove_unfinished(&self) {
        let entries = std::fs::read_dir(&self.root).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(UNFINISHED)) {
            if let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove an unfinished database");
            }
        }
    }

    pub fn server_log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    /// Lets the server's user pass through the directory; says which folder above is closed to it.
    pub fn admit(&self, account: &Account) -> Result<(), EmbeddedError> {
        if account.other {
            let meta = std::fs::metadata(&self.root).map_err(io("cannot use the data directory", &self.root))?;
            let mode = meta.permissions().mode() & 0o7777;
            if mode & 0o011 != 0o011 {
                set_mode(&self.root, mode | 0o011)?;
            }
        }
        match account.barrier(&self.root) {
            Some(path) => Err(EmbeddedError::NotEnterable { path, user: account.name.clone() }),
            None => Ok(()),
        }
    }

    /// `Ok(Err(holder))` when somebody else has it. `passing`: for one command only.
    pub fn try_lock(&self, passing: bool) -> Result<Result<Lock, Holder>, EmbeddedError> {
        let path = self.root.join("lock");
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = open.map_err(io("cannot open", &path))?;
        match file.try_lock() {
            Ok(()) => {
                let text = format!("{}{}\n", std::process::id(), if passing { " passing" } else { "" });
                let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes()));
                written.map_err(io("cannot write", &path))?;
                Ok(Ok(Lock(file)))
            }
            Err(TryLockError::WouldBlock) => Ok(Err(Holder::named_in(file))),
            Err(TryLockError::Error(error)) => Err(io("cannot lock", &path)(error)),
        }
    }

    /// Whoever has the lock, where somebody does and it can be read; takes none itself.
    pub fn holder(&self) -> Option<Holder> {
        let file = File::open(self.root.join("lock")).ok()?;
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Some(Holder::named_in(file)),
            Ok(()) | Err(TryLockError::Error(_)) => None,
        }
    }

    /// The second lock: shared by those who use a server that is not theirs, and awaited by who would stop it.
    pub fn try_lock_guests(&self, shared: bool) -> Result<Option<Lock>, EmbeddedError> {
        let path = self.root.join("guests");
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = open.map_err(io("cannot open", &path))?;
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => Ok(Some(Lock(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(io("cannot lock", &path)(error)),
        }
    }

    /// Opens the server's log for appending.
    pub fn open_server_log(&self) -> Result<File, EmbeddedError> {
        let path = self.server_log();
        if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
            std::fs::rename(&path, self.root.join("postgres.log.1")).map_err(io("cannot put aside", &path))?;
        }
        OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(io("cannot open", &path))
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<(), EmbeddedError> {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io("cannot set the mode of", path))
}
