//! Parse, telemetry, run, exit code; nothing else.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use shopd::cli::{Cli, Command, Dlq, Global};
use shopd::config::{Config, Mistakes, Role, Sources, load};
use shopd::healthcheck;
use shopd::http;
use shopd::roles::{self, RoleError};
use shopd::shutdown::{Shutdown, Signals};
use shopd::telemetry::{self, Levels};

/// 8 % less CPU a proxied request than glibc's, for 3 MiB more (`make bench-proxy`). Without huge pages, which would cost 15 MiB for nothing.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FAILED: u8 = 1;
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let levels = match telemetry::begin(cli.global.log, |name| std::env::var(name).ok()) {
        Ok(levels) => levels,
        Err(problem) => {
            complain(&problem);
            return ExitCode::from(USAGE);
        }
    };
    #[cfg(feature = "faults")]
    if let Err(problem) = shopd::faults::begin(&std::env::var("FAILPOINTS").unwrap_or_default()) {
        complain(&problem);
        return ExitCode::from(USAGE);
    }
    let role = match cli.command {
        Command::Openapi => return done(roles::openapi::run()),
        Command::Healthcheck { role } => {
            return match configure(&cli.global, role.role(), false) {
                Ok(config) => healthcheck::run(&config, role),
                Err(mistakes) => usage(&mistakes),
            };
        }
        Command::Gateway => Role::Gateway,
        Command::Orders => Role::Orders,
        Command::Payments => Role::Payments,
        Command::Relay => Role::Relay,
        Command::All => Role::All,
        Command::Migrate => Role::Migrate,
        Command::Audit { json } => return audit(&cli.global, json),
        Command::Dlq { command } => return dlq(&cli.global, command),
    };
    match configure(&cli.global, role, true) {
        Ok(config) => match roles::check(role, &config) {
            Ok(()) => run(role, config, levels),
            Err(mistake) => {
                complain(&mistake);
                ExitCode::from(USAGE)
            }
        },
        Err(mistakes) => usage(&mistakes),
    }
}

fn configure(flags: &Global, role: Role, runs: bool) -> Result<Config, Mistakes> {
    load(&Sources {
        role,
        runs,
        config_dir: flags.config.clone(),
        profile: flags.profile.clone(),
        data_dir: flags.data_dir.clone(),
        environment: std::env::vars_os().collect(),
        is_root: nix::unistd::geteuid().is_root(),
    })
}

/// 0 all true, 1 offenders, 2 could not check.
fn audit(flags: &Global, json: bool) -> ExitCode {
    let config = match configure(flags, Role::Audit, true) {
        Ok(config) => config,
        Err(mistakes) => return usage(&mistakes),
    };
    match drive(config, None, |config, stop| roles::audit::run(config, json, stop)) {
        Ok((Ok(true), _)) => ExitCode::SUCCESS,
        Ok((Ok(false), _)) => ExitCode::from(FAILED),
        Ok((Err(error), _)) => {
            failed(&error);
            ExitCode::from(USAGE)
        }
        Err(_) => ExitCode::from(USAGE),
    }
}

/// 0 all as asked for, 1 an unknown id, or one that failed again.
fn dlq(flags: &Global, command: Dlq) -> ExitCode {
    let config = match configure(flags, Role::Dlq, true) {
        Ok(config) => config,
        Err(mistakes) => return usage(&mistakes),
    };
    match drive(config, None, |config, stop| roles::dlq::run(config, command, stop)) {
        Ok((Ok(true), _)) => ExitCode::SUCCESS,
        Ok((Ok(false), _)) => ExitCode::from(FAILED),
        Ok((Err(error), _)) => failed(&error),
        Err(code) => code,
    }
}

/// Runs a role until it is done or the signals' patience is.
fn run(role: Role, config: Config, levels: Levels) -> ExitCode {
    // Before anything is counted: a gauge that goes up unseen and then down would be below nothing.
    http::metrics::install();
    if let Err(problem) = telemetry::begin_spans(&config.telemetry, serving(role)) {
        return failed(&problem);
    }
    let workers = (role != Role::All).then_some(WORKERS_OF_A_ROLE);
    let ended = drive(config, workers, |config, stop| async move {
        tokio::spawn(levels.follow(stop.clone()));
        dispatch(role, config, stop).await
    });
    telemetry::end_spans();
    match ended {
        // A role that ends unasked is a failure, whatever it says.
        Ok((Ok(()), stop)) if role != Role::Migrate && !stop.is_stopping() => {
            tracing::error!(role = role.as_str(), "ended without being asked to");
            ExitCode::from(FAILED)
        }
        Ok((result, _)) => {
            if result.is_ok() && role != Role::Migrate {
                tracing::info!(role = role.as_str(), "stopped");
            }
            done(result)
        }
        Err(code) => code,
    }
}

/// The roles that a process of `role` serves as; each is a service of its own in traces.
fn serving(role: Role) -> &'static [&'static str] {
    match role {
        Role::Gateway => &["gateway"],
        Role::Orders => &["orders"],
        Role::Payments => &["payments"],
        Role::Relay => &["relay"],
        Role::All => &["gateway", "orders", "payments", "relay"],
        Role::Migrate | Role::Audit | Role::Dlq => &[],
    }
}

/// Threads that wait for servers in a process of one role; requests are served by threads of their own, and what computes for long is done
/// on others (docs/PERFORMANCE.md, "Threads").
const WORKERS_OF_A_ROLE: usize = 1;

/// Runs `work` to its end, under the signals, on so many threads, by default one a core.
fn drive<R, F: Future<Output = R>>(
    config: Config,
    workers: Option<usize>,
    work: impl FnOnce(Config, Shutdown) -> F,
) -> Result<(R, Shutdown), ExitCode> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(workers) = workers {
        builder.worker_threads(workers);
    }
    let runtime = builder.enable_all().build().map_err(|error| failed(&error))?;
    raise_open_files();
    let stop = Shutdown::new();
    heed_signals(stop.clone(), config.shutdown.timeout).map_err(|error| failed(&error))?;
    let result = runtime.block_on(work(config, stop.clone()));
    // What still runs has been asked to stop and belongs to nobody; a thread that blocks must not hold the end up.
    runtime.shutdown_background();
    Ok((result, stop))
}

/// On a thread and a runtime of its own, so that not even a role that blocks its own can keep the process from ending.
fn heed_signals(stop: Shutdown, timeout: Duration) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signals = {
        let _inside = runtime.enter();
        Signals::catch()?
    };
    let heed = move || exit(runtime.block_on(signals.force(stop, timeout)).exit_code());
    std::thread::Builder::new().name("signals".into()).spawn(heed)?;
    Ok(())
}

/// As many connections as the system lets this process have: the soft limit of most systems (1 024) is for programs that use `select`.
fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok((soft, hard))
    });
    match raised {
        Ok((from, to)) => tracing::debug!(from, to, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
}

async fn dispatch(role: Role, config: Config, stop: Shutdown) -> Result<(), RoleError> {
    match role {
        Role::Gateway => roles::gateway::run(config, stop).await,
        Role::Orders => roles::orders::run(config, stop).await,
        Role::Payments => roles::payments::run(config, stop).await,
        Role::Relay => roles::relay::run(config, stop).await,
        Role::All => roles::all::run(config, stop).await,
        Role::Migrate => roles::migrate::run(config, stop).await,
        // Run by functions of their own, whose exit status says more.
        Role::Audit | Role::Dlq => Ok(()),
    }
}

#[expect(clippy::disallowed_methods, reason = "a second signal and a drain without end leave nobody who could return")]
fn exit(code: u8) {
    std::process::exit(code.into())
}

fn done(result: Result<(), RoleError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::fmt::Display) -> ExitCode {
    tracing::error!(%error, "shopd failed");
    ExitCode::from(FAILED)
}

/// Mistakes are for people and their scripts, a line each, not for a log.
fn usage(mistakes: &Mistakes) -> ExitCode {
    mistakes.lines().iter().for_each(|line| complain(line));
    ExitCode::from(USAGE)
}

/// A closed standard error is no reason to panic, which `eprintln` would.
fn complain(problem: &dyn std::fmt::Display) {
    drop(writeln!(std::io::stderr(), "shopd: {problem}"));
}
