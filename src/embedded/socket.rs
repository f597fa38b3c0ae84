//! The private directory of the server's socket.
//!
//! It lies in a short path of its own because a socket's path has about 100 bytes at most. Its mode is its door: only the server's
//! user (and root) can enter it, so the server asks nobody behind it for a password.

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::account::Account;
use super::error::EmbeddedError;

/// `sun_path` has 104 bytes on some systems; `/.s.PGSQL.5432.lock` and the final NUL are 20.
const LENGTH_MAX: usize = 84;
const NAMES_TRIED_MAX: u32 = 8;

/// Makes or takes the directory for the data directory `root` (canonical).
pub(super) fn directory(root: &Path, account: &Account) -> Result<PathBuf, EmbeddedError> {
    // The session's directory goes when its user logs out, and a server started with nohup stays: it is only the second choice.
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|_| !account.other);
    let bases = [PathBuf::from("/tmp")].into_iter().chain(session);
    let name = format!("shopd-{}-{:012x}", account.uid, fnv(root.as_os_str().as_encoded_bytes()) & 0xffff_ffff_ffff);
    for base in bases.filter(|base| base.is_absolute() && base.is_dir()) {
        for attempt in 0..NAMES_TRIED_MAX {
            // Who makes our name before us only makes us take the next one.
            let path = base.join(if attempt == 0 { name.clone() } else { format!("{name}-{attempt}") });
            if path.as_os_str().len() <= LENGTH_MAX && take(&path, account) {
                return Ok(path);
            }
        }
    }
    Err(EmbeddedError::NoSocketDir { path: PathBuf::from("/tmp") })
}

/// Makes it, or takes what is there if it is the server's user's own and closed to everybody else.
pub(super) fn take(path: &Path, account: &Account) -> bool {
    if DirBuilder::new().mode(0o700).create(path).is_ok() && account.own(path).is_err() {
        return false;
    }
    // Not following a link: a link is somebody else's work.
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == account.uid && meta.mode() & 0o777 == 0o700)
}

/// Takes away what a killed server left. The directory serves one data directory, on which no server runs now: whose number the lock
/// file has does not matter, and a new server would mind.
pub(super) fn clear(directory: &Path, port: u16) {
    for name in [format!(".s.PGSQL.{port}"), format!(".s.PGSQL.{port}.lock")] {
        // Mostly there is none; one that stays is named by the server's own error.
        let _ = std::fs::remove_file(directory.join(name));
    }
}

/// FNV-1a, 64 bits: the same in every build, unlike the standard library's hasher.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
