//! The Postgres server that `shopd all` brings along: found or fetched, initialised, run, taken over, stopped.
//!
//! It owns the data directory and the socket's directory, reads nothing else of ours and writes nothing into the databases; that is
//! the migrations' work. May import config and db.
//!
//! The server answers only on a socket in a directory that nobody but its own user and root may enter; behind that door it trusts
//! everybody, so there is no password to keep, to lose or to show.

mod account;
mod attach;
mod error;
mod fetch;
mod folder;
mod pins;
mod process;
mod programs;
mod run;
mod server;
mod socket;

use std::path::PathBuf;

pub use attach::{Attached, attach, exists, in_use};
pub use error::EmbeddedError;
pub use fetch::Fetch;
pub use programs::Search;
pub use server::{Server, start};

/// What to start, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Everything that `all` keeps; created where it is missing.
    pub data_dir: PathBuf,
    /// Whether a person watches: a spinner while fetching, on a terminal.
    pub progress: bool,
    /// More server settings, after ours and stronger.
    pub settings: Vec<(String, String)>,
    /// Where the server's programs are looked for first.
    pub search: Search,
    /// How they are fetched where none are found.
    pub fetch: Fetch,
}

impl Options {
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        let (settings, fetch) = (Vec::new(), Fetch::default());
        Self { data_dir: data_dir.into(), progress: true, settings, search: Search::Machine, fetch }
    }
}
