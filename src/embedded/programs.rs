//! The server's programs on this machine: where they are looked for, and which of them will do.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::account::Account;

/// Older ones lack what the schema uses.
pub const MAJOR_MIN: u32 = 15;

/// Where programs are looked for before any are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Search {
    /// `PATH` and the distributions' usual places.
    Machine,
    /// These `bin` directories and nothing else; none: always fetch.
    Only(Vec<PathBuf>),
}

/// A `bin` directory with `postgres` and `initdb`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Programs {
    pub bin: PathBuf,
    pub version: (u32, u32),
}

impl Programs {
    pub fn postgres(&self) -> PathBuf {
        self.bin.join("postgres")
    }

    pub fn initdb(&self) -> PathBuf {
        self.bin.join("initdb")
    }

    /// Asks the programs in `bin` for their version; `None` if they do not run or `account` cannot reach them.
    pub fn at(bin: &Path, account: &Account) -> Option<Self> {
        let bin = bin.canonicalize().ok()?;
        if !bin.join("initdb").is_file() || account.barrier(&bin).is_some() {
            return None;
        }
        let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
        let version = version(std::str::from_utf8(&output.stdout).ok()?)?;
        Some(Self { bin, version })
    }
}

/// The newest that will do; `major`: no other than that.
pub(super) fn find(search: &Search, major: Option<u32>, account: &Account) -> Option<Programs> {
    let mut bins = match search {
        Search::Machine => usual_places(),
        Search::Only(bins) => bins.clone(),
    };
    bins.sort();
    bins.dedup();
    let found = bins.iter().filter_map(|bin| Programs::at(bin, account));
    found
        .filter(|found| major.map_or(found.version.0 >= MAJOR_MIN, |major| major == found.version.0))
        .max_by_key(|found| found.version)
}

fn usual_places() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A program in PATH is often a link into the directory that has all of them.
    let in_path = std::env::split_paths(&path).filter_map(|dir| dir.join("postgres").canonicalize().ok());
    let mut bins: Vec<PathBuf> = in_path.filter_map(|program| program.parent().map(Path::to_path_buf)).collect();
    bins.extend(below("/usr/lib/postgresql", ""));
    bins.extend(below("/usr", "pgsql-"));
    bins.extend(below("/usr/local", "pgsql"));
    bins.extend(below("/opt/homebrew/opt", "postgresql"));
    bins.extend(below("/usr/local/opt", "postgresql"));
    bins.extend(below("/home/linuxbrew/.linuxbrew/opt", "postgresql"));
    bins
}

/// The `bin` directories in those folders of `parent` whose names begin with `prefix`.
fn below(parent: &str, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    named.map(|entry| entry.path().join("bin")).filter(|bin| bin.join("postgres").is_file()).collect()
}

/// `postgres (PostgreSQL) 15.18 (Debian ...)` is (15, 18); a beta's minor is 0.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.split("(PostgreSQL) ").nth(1)?.split_whitespace().next()?;
    let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    Some((digits(major).parse().ok()?, minor.parse().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_distributions_write_them() {
        assert_eq!(version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some((15, 18)));
        assert_eq!(version("postgres (PostgreSQL) 18.4\n"), Some((18, 4)));
        assert_eq!(version("postgres (PostgreSQL) 19beta1\n"), Some((19, 0)));
        assert_eq!(version("something else"), None);
    }
}
