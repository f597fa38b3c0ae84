//! From the layers to a `Config`, or to every mistake in them.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use figment::Figment;

use super::layers::{Origin, value_of, with_environment, with_file};
use super::require::missing;
use super::{Config, Mistakes, Role, SETTINGS};

/// Where settings come from. All of it is passed in: loading reads no global state but files.
#[derive(Clone, Debug)]
pub struct Sources {
    pub role: Role,
    /// The role is about to run, so what it cannot do without must be there; not so for a health check.
    pub runs: bool,
    /// `--config`
    pub config_dir: Option<PathBuf>,
    /// `--profile`
    pub profile: Option<String>,
    /// `--data-dir`
    pub data_dir: Option<PathBuf>,
    pub environment: Vec<(OsString, OsString)>,
    /// The process may write to /var/lib.
    pub is_root: bool,
}

/// Every setting from its uppermost layer, checked.
///
/// # Errors
///
/// All mistakes at once: unreadable files, unknown keys and variables, values out of their kind or range, and, where the role is to
/// run, what is missing for it.
pub fn load(sources: &Sources) -> Result<Config, Mistakes> {
    let mut mistakes = Mistakes::default();
    let mut figment = Figment::new();
    for file in files(sources, &mut mistakes) {
        figment = with_file(figment, &file, &mut mistakes);
    }
    let unreadable = mistakes.lines().len();
    figment = with_environment(figment, &sources.environment, &mut mistakes);

    let mut config = Config::defaults(sources.role);
    config.data_dir_given = sources.data_dir.is_some();
    config.data_dir = data_dir(sources, &mut mistakes);

    let mut malformed = Vec::new();
    for setting in SETTINGS {
        let Some((raw, origin)) = value_of(&figment, setting) else { continue };
        let Err(problem) = (setting.set)(&mut config, &raw) else { continue };
        malformed.push(setting.key);
        match origin {
            Origin::Variable(variable) => mistakes.add(variable, problem),
            Origin::File(file) => mistakes.add(setting.key, format!("{problem} (in {file})")),
        }
    }
    // What lies in a layer that could not be read is not known to be missing.
    let excused = |key: &str| {
        let variable = format!("SHOPD__{}", key.replace('.', "__").to_uppercase());
        unreadable > 0 || malformed.contains(&key) || mistakes.lines().iter().any(|line| line.starts_with(&variable))
    };
    let missing = if sources.runs { missing(&config, sources.role, excused) } else { Vec::new() };
    for (key, problem) in missing {
        mistakes.add(key, problem);
    }
    mistakes.into_result().map(|()| config)
}

/// The files that the flags ask for, the lower layer first.
fn files(sources: &Sources, mistakes: &mut Mistakes) -> Vec<PathBuf> {
    let Some(dir) = &sources.config_dir else {
        if sources.profile.is_some() {
            mistakes.add("--profile", "needs --config, the folder of the profiles");
        }
        return Vec::new();
    };
    if !dir.is_dir() {
        mistakes.add("--config", format!("{} is no folder that can be read", dir.display()));
        return Vec::new();
    }
    let mut files = Vec::new();
    let base = dir.join("default.toml");
    // With a profile the defaults may all be the built-in ones; without one the flag would do nothing.
    if base.exists() || sources.profile.is_none() {
        files.push(base);
    }
    if let Some(profile) = &sources.profile {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if profile.is_empty() || !profile.chars().all(plain) {
            mistakes.add("--profile", format!("{profile:?} is no profile's name: letters, digits, '-' and '_'"));
        } else {
            files.push(dir.join(format!("{profile}.toml")));
        }
    }
    files
}

/// The flag, else the XDG base directory's `shopd`, else the usual place of such data. Empty where there is none.
fn data_dir(sources: &Sources, mistakes: &mut Mistakes) -> PathBuf {
    if let Some(given) = &sources.data_dir {
        return std::path::absolute(given).unwrap_or_else(|problem| {
            mistakes.add("--data-dir", problem);
            PathBuf::new()
        });
    }
    let variable = |name: &str| {
        let found = sources.environment.iter().find(|(key, _)| key == OsStr::new(name)).map(|(_, value)| value.as_os_str());
        // The XDG specification says to ignore a relative path; an empty one is as good as none.
        found.filter(|value| Path::new(value).is_absolute())
    };
    match (variable("XDG_DATA_HOME"), variable("HOME")) {
        (Some(data), _) => Path::new(data).join("shopd"),
        (None, _) if sources.is_root => PathBuf::from("/var/lib/shopd"),
        (None, Some(home)) => Path::new(home).join(".local/share/shopd"),
        (None, None) => PathBuf::new(),
    }
}
