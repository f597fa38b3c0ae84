//! The command line: what a user may ask for. Owns the flags and their help; may import config.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config::Role;

const AFTER_HELP: &str = "\
Exit status:
  0   a clean stop, or the command did what it says
  1   it failed, `audit` found offenders, `dlq` met an unknown id or a letter that failed again, or it did not drain within
      shutdown.timeout_ms
  2   a mistake in the command line or in the settings, each named on a line of its own; or `audit` could not check
  128 + the signal's number (130, 143): a second SIGINT or SIGTERM ended it at once

Settings come from built-in defaults, then DIR/default.toml, then DIR/NAME.toml, then the environment
(SHOPD__SECTION__KEY, or SHOPD__SECTION__KEY_FILE for a value in a file). docs/SETTINGS.md lists them.
SHOPD_LOG, else RUST_LOG, says what is logged (for example `debug` or `info,shopd::relay=debug`); the default is `info`.";

/// An online shop's backend whose money is never wrong.
///
/// `shopd all` runs the whole shop on this machine with nothing configured. The other roles are the same shop in parts, each in any
/// number of replicas, over Postgres and Kafka.
#[derive(Debug, Parser)]
#[command(name = "shopd", version, after_help = AFTER_HELP, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    #[command(flatten)]
    pub global: Global,
}

/// Flags of every command, before or after its name.
#[derive(Clone, Debug, clap::Args)]
pub struct Global {
    /// Read DIR/default.toml (and the profile); without it no file is read
    #[arg(long, global = true, value_name = "DIR")]
    pub config: Option<PathBuf>,
    /// Read DIR/NAME.toml over DIR/default.toml
    #[arg(long, global = true, value_name = "NAME")]
    pub profile: Option<String>,
    /// What `all` keeps [default: $XDG_DATA_HOME/shopd, else ~/.local/share/shopd, as root /var/lib/shopd]
    #[arg(long, global = true, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// How logs are written, to standard error [default: pretty on a terminal, else json]
    #[arg(long, global = true, value_name = "FORMAT", value_enum)]
    pub log: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people
    Pretty,
    /// A JSON object a line
    Json,
}

#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// The public port, 8000: API, Swagger UI at /swagger
    Gateway,
    /// The orders service, 8082
    Orders,
    /// The payments service, 8080
    Payments,
    /// From the services' outboxes to Kafka; health and metrics on 8083
    Relay,
    /// Every role in one process; with no database or broker configured it brings its own
    All,
    /// Bring both databases to this version's schema, create the topics
    ///
    /// Waits up to 60 s for a database that refuses connections and fails at once on bad credentials. With --data-dir it works on
    /// what `all` keeps there.
    Migrate,
    /// Prove that nothing was lost or charged twice
    ///
    /// Reads both databases, and the log's ends, beside running roles; what is in flight is no offence. Exit status: 0 all true,
    /// 1 there are offenders, 2 it could not be checked. With --data-dir it works on what `all` keeps there. docs/AUDIT.md names
    /// every check.
    Audit {
        /// One JSON object a line: the offenders, then a summary
        #[arg(long)]
        json: bool,
    },
    /// The dead letters: records that could not be applied, and what waits behind them
    ///
    /// A letter's id is its record's topic/partition/offset. `redrive` and `discard` only ask: whoever owns the partition does it, in
    /// order. With --data-dir it works on what `all` keeps there. docs/DEAD_LETTERS.md says what to do with them.
    Dlq {
        #[command(subcommand)]
        command: Dlq,
    },
    /// Print the OpenAPI document
    Openapi,
    /// For containers: exit 0 when the role answers ready, else 1
    ///
    /// Asks GET /health/ready at the role's configured port on this machine and waits at most 3 s.
    Healthcheck {
        /// The role to ask; `all` asks every role
        #[arg(value_enum, default_value_t = CheckedRole::Gateway)]
        role: CheckedRole,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Dlq {
    /// List them
    List {
        #[command(flatten)]
        letters: Letters,
        /// Letters at most; without it 1000 in a table, and all with --json
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1_000_000))]
        limit: Option<i64>,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Show some with their headers and values
    Show {
        /// topic/partition/offset
        #[arg(required = true, value_name = "ID")]
        ids: Vec<LetterId>,
        /// One JSON object a line, with the whole value
        #[arg(long)]
        json: bool,
    },
    /// Try some again, each with what waits behind it, in order
    ///
    /// Exit status: 0 all were applied, or marked where no owner runs; 1 an id is unknown, or a letter failed again.
    Redrive(Act),
    /// Drop some for good; what waits behind them goes on
    ///
    /// Exit status: 0 all were dropped, or marked where no owner runs; 1 an id is unknown.
    Discard(Act),
}

/// Which letters; several of these narrow it down.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
#[group(skip)]
pub struct Letters {
    /// Of this topic
    #[arg(long, value_name = "TOPIC")]
    pub topic: Option<String>,
    /// In this state
    #[arg(long, value_name = "STATE", value_enum)]
    pub state: Option<LetterState>,
    /// With this text in the reason
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// With this key
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
}

/// What to do it to; without any it is a mistake.
#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(true).args(["ids", "topic", "state", "reason", "key", "all"])))]
pub struct Act {
    /// topic/partition/offset
    #[arg(value_name = "ID", conflicts_with_all = ["topic", "state", "reason", "key", "all"])]
    pub ids: Vec<LetterId>,
    #[command(flatten)]
    pub letters: Letters,
    /// All there are
    #[arg(long, conflicts_with_all = ["topic", "state", "reason", "key"])]
    pub all: bool,
    /// How long to wait until the owner has done it, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    pub wait_ms: u64,
    /// One JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LetterState {
    /// It cannot be decoded
    Dead,
    /// It keeps failing, and its key's later records wait
    Parked,
    /// It waits behind a parked one
    Waiting,
    /// It was dead, and was applied after all
    Resolved,
}

impl LetterState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::Parked => "parked",
            Self::Waiting => "waiting",
            Self::Resolved => "resolved",
        }
    }
}

/// `topic/partition/offset`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LetterId {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
}

impl std::str::FromStr for LetterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let id = || {
            let mut parts = text.rsplitn(3, '/');
            let (offset, partition) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let topic = parts.next().filter(|topic| !topic.is_empty())?.to_owned();
            (offset >= 0 && partition >= 0).then_some(Self { topic, partition, offset })
        };
        id().ok_or_else(|| "not of the form topic/partition/offset".to_owned())
    }
}

/// What a health check may ask. Without a name it is the gateway: the shop as its clients see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CheckedRole {
    Gateway,
    Orders,
    Payments,
    Relay,
    All,
}

impl CheckedRole {
    /// The role whose settings apply.
    pub fn role(self) -> Role {
        match self {
            Self::Gateway => Role::Gateway,
            Self::Orders => Role::Orders,
            Self::Payments => Role::Payments,
            Self::Relay => Role::Relay,
            Self::All => Role::All,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_command() {
        for line in
            ["shopd --config c --profile p --data-dir d --log json all", "shopd all --config c --profile p --data-dir d --log json"]
        {
            let cli = parse(line).unwrap();
            assert_eq!(cli.command, Command::All);
            assert_eq!(cli.global.config, Some("c".into()));
            assert_eq!(cli.global.profile.as_deref(), Some("p"));
            assert_eq!(cli.global.data_dir, Some("d".into()));
            assert_eq!(cli.global.log, Some(LogFormat::Json));
        }
    }

    #[test]
    fn no_command_prints_the_help_and_is_a_mistake() {
        let error = parse("shopd").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("Exit status:"));
        assert_eq!(parse("shopd --log json").unwrap_err().exit_code(), 2);
        assert_eq!(parse("shopd orders 1").unwrap_err().exit_code(), 2);
        assert_eq!(parse("shopd all --log xml").unwrap_err().exit_code(), 2);
        assert_eq!(parse("shopd --help").unwrap_err().exit_code(), 0);
    }

    #[test]
    fn a_letter_is_named_by_its_place_and_nothing_is_done_to_all_unasked() {
        let id = |text: &str| text.parse::<LetterId>();
        assert_eq!(id("t/3/17"), Ok(LetterId { topic: "t".into(), partition: 3, offset: 17 }));
        for odd in ["", "t", "t/1", "/1/2", "t/x/2", "t/-1/2", "t/1/-2", "t/1/2/"] {
            assert!(id(odd).is_err(), "{odd}");
        }
        for verb in ["redrive", "discard"] {
            for mistake in ["", "--json", "--wait-ms 5", "t/1", "t/1/2 --all", "t/1/2 --key k", "--all --key k"] {
                assert_eq!(parse(&format!("shopd dlq {verb} {mistake}")).unwrap_err().exit_code(), 2, "{verb} {mistake}");
            }
            for good in ["t/1/2 t/1/3", "--all", "--key k --state parked", "--reason r --json --wait-ms 0"] {
                assert!(parse(&format!("shopd dlq {verb} {good}")).is_ok(), "{verb} {good}");
            }
        }
        assert!(parse("shopd dlq list --state parked --json").is_ok());
        assert_eq!(parse("shopd dlq list --state lost").unwrap_err().exit_code(), 2);
        assert_eq!(parse("shopd dlq show").unwrap_err().exit_code(), 2);
        assert_eq!(parse("shopd dlq").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_health_check_asks_the_gateway_unless_told() {
        assert_eq!(parse("shopd healthcheck").unwrap().command, Command::Healthcheck { role: CheckedRole::Gateway });
        assert_eq!(parse("shopd healthcheck relay").unwrap().command, Command::Healthcheck { role: CheckedRole::Relay });
        assert!(parse("shopd healthcheck migrate").is_err());
    }
}
