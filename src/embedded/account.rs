//! The user id under which the server runs: our own, or, as root, one that Postgres accepts.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{Gid, Uid, User};

use super::error::{EmbeddedError, io};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub uid: u32,
    pub gid: u32,
    pub name: String,
    /// Whether it is not our own, so that files must be given to it and processes started as it.
    pub other: bool,
}

impl Account {
    /// `pgdata` decides where it exists: a server can only run as its directory's owner.
    pub fn choose(pgdata: &Path) -> Result<Self, EmbeddedError> {
        let own = Uid::effective();
        if let Ok(meta) = std::fs::metadata(pgdata)
            && meta.uid() != 0
        {
            let name = name_of(meta.uid());
            if meta.uid() == own.as_raw() {
                return Ok(Self { uid: own.as_raw(), gid: Gid::effective().as_raw(), name, other: false });
            }
            if own.is_root() {
                return Ok(Self { uid: meta.uid(), gid: meta.gid(), name, other: true });
            }
            return Err(EmbeddedError::OtherOwner { path: pgdata.to_path_buf(), owner: name });
        }
        if !own.is_root() {
            return Ok(Self { uid: own.as_raw(), gid: Gid::effective().as_raw(), name: name_of(own.as_raw()), other: false });
        }
        let user = ["postgres", "nobody"].into_iter().find_map(|name| User::from_name(name).ok().flatten());
        let user = user.filter(|user| !user.uid.is_root()).ok_or(EmbeddedError::NoUser)?;
        Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw(), name: user.name, other: true })
    }

    /// A command as this user, away from our terminal: its own process group, so that Ctrl-C reaches only us and the server
    /// outlives the draining; nothing of our environment (which may hold secrets) but what finds libraries.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("LC_ALL", "C").current_dir("/").stdin(Stdio::null()).process_group(0);
        for name in ["PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        if self.other {
            // The standard library drops the supplementary groups along with it.
            command.uid(self.uid).gid(self.gid);
        }
        command
    }

    /// Gives it `path`.
    pub fn own(&self, path: &Path) -> Result<(), EmbeddedError> {
        match self.other {
            true => std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid)).map_err(io("cannot change the owner of", path)),
            false => Ok(()),
        }
    }

    /// The first folder on the way to `path`, itself included, that this user may not enter. Goes by owner, group and mode.
    pub fn barrier(&self, path: &Path) -> Option<PathBuf> {
        if !self.other {
            return None;
        }
        let mut folders: Vec<&Path> = path.ancestors().collect();
        folders.reverse();
        let enters = |folder: &Path| {
            std::fs::metadata(folder).is_ok_and(|meta| {
                let bit = match (meta.uid() == self.uid, meta.gid() == self.gid) {
                    (true, _) => 0o100,
                    (_, true) => 0o010,
                    _ => 0o001,
                };
                meta.permissions().mode() & bit != 0
            })
        };
        folders.into_iter().find(|folder| !enters(folder)).map(Path::to_path_buf)
    }
}

fn name_of(uid: u32) -> String {
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}
