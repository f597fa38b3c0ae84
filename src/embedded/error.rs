//! Why the server that `all` brings along cannot be had; every text is for the person who typed the command.

use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("{what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    /// Another process keeps this directory.
    #[error("the data directory {} is in use by another shopd{}; stop it first, or choose another directory with --data-dir", path.display(), by(*pid))]
    InUse { path: PathBuf, pid: Option<i32> },
    #[error(
        "the database server runs as user {user}, who may not enter {}; allow it (chmod o+x {}) or choose another directory with --data-dir",
        path.display(), path.display()
    )]
    NotEnterable { path: PathBuf, user: String },
    #[error(
        "Postgres refuses to run as root, and there is neither a user `postgres` nor `nobody` to run it as; create one, or start shopd as another user"
    )]
    NoUser,
    #[error("the database in {} belongs to user {owner}; start shopd as that user or as root", path.display())]
    OtherOwner { path: PathBuf, owner: String },
    #[error(
        "the database in {} was made by Postgres {major}, which is not on this machine and not among the versions shopd can fetch; install Postgres {major}", path.display()
    )]
    NoSuchVersion { path: PathBuf, major: u32 },
    #[error(
        "no usable Postgres on this machine, and fetching version {version} failed: {cause}; install Postgres 15 or later, or try again with access to the internet"
    )]
    Download { version: String, cause: String },
    #[error("cannot make a new database in {}: {cause}", path.display())]
    Initialise { path: PathBuf, cause: String },
    #[error("the database server ended while starting: {cause}")]
    Ended { cause: String },
    #[error("{what} took longer than {seconds} s")]
    TimedOut { what: String, seconds: u64 },
    #[error("cannot find a private directory for the database's socket below {}", path.display())]
    NoSocketDir { path: PathBuf },
    #[error("the database server does not answer as it should: {0}")]
    Connection(String),
}

fn by(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// Names the path in an I/O error.
pub(super) fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> EmbeddedError + 'a {
    move |source| EmbeddedError::Io { what, path: path.to_path_buf(), source }
}
