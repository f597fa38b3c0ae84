//! The command line: what a user may ask for. Owns the flags and their help; may import config.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};

use crate::config::Role;

const AFTER_HELP: &str = "\
Exit status:
  0   a clean stop, or the command did what it says
  1   it failed, `audit` found offenders, or did not drain within shutdown.timeout_ms
  2   a mistake in the command line or in the settings, each named on a line of its own; or `audit` could not check
  128 + the signal's number (130, 143): a second SIGINT or SIGTERM ended it at once

Settings come from built-in defaults, then DIR/default.toml, then DIR/NAME.toml, then the environment
(SHOPD__SECTION__KEY, or SHOPD__SECTION__KEY_FILE for a value in a file), then flags. docs/SETTINGS.md lists them.
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
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
    fn a_health_check_asks_the_gateway_unless_told() {
        assert_eq!(parse("shopd healthcheck").unwrap().command, Command::Healthcheck { role: CheckedRole::Gateway });
        assert_eq!(parse("shopd healthcheck relay").unwrap().command, Command::Healthcheck { role: CheckedRole::Relay });
        assert!(parse("shopd healthcheck migrate").is_err());
    }
}
