use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use super::*;

const ORDERS: &str = "postgres://o:p1@db:5432/orders";
const PAYMENTS: &str = "postgres://p:p2@db:5432/payments";

fn sources(role: Role, environment: &[(&str, &str)]) -> Sources {
    Sources {
        role,
        runs: true,
        config_dir: None,
        profile: None,
        data_dir: None,
        environment: environment.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect(),
        is_root: true,
    }
}

fn gateway(environment: &[(&str, &str)]) -> Result<Config, Mistakes> {
    load(&sources(Role::Gateway, environment))
}

/// A folder of settings with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn from_folder(dir: &Path, profile: Option<&str>, environment: &[(&str, &str)]) -> Result<Config, Mistakes> {
    let mut sources = sources(Role::Gateway, environment);
    sources.config_dir = Some(dir.to_owned());
    sources.profile = profile.map(str::to_owned);
    load(&sources)
}

fn lines(result: Result<Config, Mistakes>) -> Vec<String> {
    result.unwrap_err().lines().to_vec()
}

#[test]
fn the_binary_alone_suffices_for_the_gateway_and_for_all() {
    let config = gateway(&[("PATH", "/bin"), ("SHOPD_PORT", "tcp://10.0.0.1:80")]).unwrap();
    assert_eq!(config.gateway.listen.to_string(), "0.0.0.0:8000");
    assert_eq!(config.gateway.orders_urls, ["http://127.0.0.1:8082"]);
    let all = load(&sources(Role::All, &[])).unwrap();
    assert_eq!(all.gateway.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(all.relay.listen.to_string(), "127.0.0.1:8083");
}

#[test]
fn a_configured_address_counts_for_all_too() {
    let all = load(&sources(Role::All, &[("SHOPD__GATEWAY__LISTEN", "0.0.0.0:0")])).unwrap();
    assert_eq!(all.gateway.listen.to_string(), "0.0.0.0:0");
    assert_eq!(all.orders.listen.to_string(), "127.0.0.1:8082");
}

#[test]
fn each_layer_lies_over_the_one_before() {
    let dir = folder(&[
        ("default.toml", "[gateway]\nlisten = '1.1.1.1:1'\nupstream_timeout_ms = 1\n[kafka]\npartitions = 3\ntopic_prefix = 'a'\n"),
        ("prod.toml", "[gateway]\nlisten = '2.2.2.2:2'\norders_urls = ['http://a:1', 'http://b:2']\n[kafka]\npartitions = 4\n"),
    ]);
    let config = from_folder(dir.path(), Some("prod"), &[("SHOPD__KAFKA__PARTITIONS", "5")]).unwrap();
    assert_eq!(config.gateway.listen.to_string(), "2.2.2.2:2");
    assert_eq!(config.gateway.upstream_timeout, Duration::from_millis(1));
    assert_eq!(config.gateway.orders_urls, ["http://a:1", "http://b:2"]);
    assert_eq!(config.kafka.partitions, 5);
    assert_eq!(config.kafka.topic_prefix, "a");
    assert_eq!(from_folder(dir.path(), None, &[]).unwrap().kafka.partitions, 3);
}

#[test]
fn every_mistake_is_named_by_where_it_was_made() {
    let dir = folder(&[(
        "default.toml",
        "[gateway]\nlisten = 'x'\nlissten = 1\n[kafka]\npartitions = 0\nrequest_timeout_ms = 1.5\n[consumer]\nlease_ms = true\n[smtp]\n",
    )]);
    let environment = [
        ("SHOPD__ORDERS__LISTEN", "y"),
        ("SHOPD__ORDER__LISTEN", "0.0.0.0:1"),
        ("shopd__relay__listen", "0.0.0.0:1"),
        ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", "kafka"),
        ("SHOPD__SHUTDOWN__TIMEOUT_MS", "0"),
    ];
    let lines = lines(from_folder(dir.path(), None, &environment));
    for start in [
        "gateway.listen: \"x\" is no address and port",
        "gateway.lissten: there is no such setting, did you mean gateway.listen?",
        "smtp: there is no such section",
        "kafka.partitions: 0 is out of range, 1 to 1000",
        "kafka.request_timeout_ms: must not be a fraction",
        "consumer.lease_ms: must not be a boolean",
        "SHOPD__ORDERS__LISTEN: \"y\" is no address and port",
        "SHOPD__ORDER__LISTEN: there is no such setting, did you mean SHOPD__ORDERS__LISTEN?",
        "shopd__relay__listen: there is no such setting, did you mean SHOPD__RELAY__LISTEN?",
        "SHOPD__KAFKA__BOOTSTRAP_SERVERS: item 1 is not of the form host:port",
        "SHOPD__SHUTDOWN__TIMEOUT_MS: 0 is out of range, 1 to 3600000 ms",
    ] {
        assert_eq!(lines.iter().filter(|line| line.starts_with(start)).count(), 1, "{start}\n{lines:#?}");
    }
    assert_eq!(lines.len(), 11, "{lines:#?}");
    assert!(lines.iter().all(|line| !line.contains('\n')));
}

#[test]
fn a_value_is_read_from_the_file_that_a_variable_names() {
    let dir = folder(&[("url", &format!("{ORDERS}\r\n\n")), ("listen", "127.0.0.1:9\n"), ("empty", "\n")]);
    let path = |name: &str| dir.path().join(name).display().to_string();
    let config =
        gateway(&[("SHOPD__ORDERS__DATABASE_URL_FILE", &path("url")), ("SHOPD__GATEWAY__LISTEN_FILE", &path("listen"))]).unwrap();
    assert_eq!(config.orders.database_url, Some(Secret::new(ORDERS)));
    assert_eq!(config.gateway.listen.to_string(), "127.0.0.1:9");
    assert_eq!(
        lines(gateway(&[("SHOPD__ORDERS__DATABASE_URL_FILE", &path("empty"))])),
        ["SHOPD__ORDERS__DATABASE_URL_FILE: is empty; leave it out where there is no database"]
    );
}

#[test]
fn a_variable_and_its_file_together_are_a_mistake_and_so_is_a_file_that_is_not_there() {
    let both = [("SHOPD__ORDERS__DATABASE_URL", ORDERS), ("SHOPD__ORDERS__DATABASE_URL_FILE", "/dev/null")];
    let lines_of_both = lines(gateway(&both));
    assert_eq!(
        lines_of_both,
        ["SHOPD__ORDERS__DATABASE_URL: SHOPD__ORDERS__DATABASE_URL_FILE is given too; only one of them may be"]
    );
    let away = lines(gateway(&[("SHOPD__GATEWAY__LISTEN_FILE", "/nowhere/x")]));
    assert!(away[0].starts_with("SHOPD__GATEWAY__LISTEN_FILE: the file cannot be read: No such file"), "{away:?}");
    assert!(away[0].contains("/nowhere/x"));
    let secret = lines(gateway(&[("SHOPD__ORDERS__DATABASE_URL_FILE", "hunter2")]));
    assert!(!secret[0].contains("hunter2"), "{secret:?}");
    let unknown = lines(gateway(&[("SHOPD__ORDERS__DATABASEURL_FILE", "x")]));
    assert!(unknown[0].ends_with("did you mean SHOPD__ORDERS__DATABASE_URL_FILE?"), "{unknown:?}");
}

#[test]
fn the_environment_keeps_its_text() {
    let config = gateway(&[
        ("SHOPD__KAFKA__TOPIC_PREFIX", "007"),
        ("SHOPD__PAYMENTS__DATABASE_URL", "postgres://u:[1,2]=%22x%22#%7Btrue%7D@h/d"),
    ]);
    assert_eq!(config.unwrap().kafka.topic_prefix, "007");
    for text in ["true", "1e3", "0x10"] {
        assert_eq!(gateway(&[("SHOPD__KAFKA__TOPIC_PREFIX", text)]).unwrap().kafka.topic_prefix, text);
    }
    assert!(gateway(&[("SHOPD__KAFKA__PARTITIONS", "[1]")]).is_err());
}

#[test]
fn no_secret_is_in_any_message_or_debug_output() {
    let dir = folder(&[("default.toml", "[orders]\ndatabase_url = \"postgres://u:hunter2@h/d\n")]);
    let broken = from_folder(dir.path(), None, &[]).unwrap_err();
    assert!(broken.lines()[0].contains("default.toml: line 2: "), "{broken}");
    let malformed = gateway(&[("SHOPD__ORDERS__DATABASE_URL", "u:hunter2@h/d")]).unwrap_err();
    let misplaced = gateway(&[("SHOPD__GATEWAY__ORDERS_URLS", "postgres://u:hunter2@h/d")]).unwrap_err();
    let given = gateway(&[
        ("SHOPD__ORDERS__DATABASE_URL", "postgres://u:hunter2@h/d?sslmode=require"),
        ("SHOPD__KAFKA__SASL_PASSWORD", "hunter2"),
    ]);
    let given = given.unwrap();
    let two_lines = gateway(&[("SHOPD__KAFKA__SASL_PASSWORD", "hunter2\n")]).unwrap_err();
    let in_place_of_its_file = gateway(&[("SHOPD__KAFKA__SASL_PASSWORD_FILE", "hunter2")]).unwrap_err();
    for text in [
        two_lines.to_string(),
        in_place_of_its_file.to_string(),
        broken.to_string(),
        malformed.to_string(),
        misplaced.to_string(),
        format!("{given:?}"),
    ] {
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[test]
fn a_role_without_its_database_or_broker_says_which() {
    let keys = |role, environment: &[(&str, &str)]| -> Vec<String> {
        let lines = lines(load(&sources(role, environment)));
        lines.iter().map(|line| line.split(':').next().unwrap().to_owned()).collect()
    };
    assert_eq!(keys(Role::Orders, &[]), ["orders.database_url", "kafka.bootstrap_servers"]);
    assert_eq!(
        keys(Role::Payments, &[("SHOPD__ORDERS__DATABASE_URL", ORDERS)]),
        ["payments.database_url", "kafka.bootstrap_servers"]
    );
    assert_eq!(keys(Role::Relay, &[]), ["orders.database_url", "payments.database_url", "kafka.bootstrap_servers"]);
    assert_eq!(keys(Role::Migrate, &[]), ["orders.database_url", "payments.database_url"]);
    assert_eq!(keys(Role::All, &[("SHOPD__ORDERS__DATABASE_URL", ORDERS)]), ["payments.database_url"]);
    // What is malformed is said once, not also to be missing.
    assert_eq!(
        keys(Role::Orders, &[("SHOPD__ORDERS__DATABASE_URL", "x"), ("SHOPD__KAFKA__BOOTSTRAP_SERVERS_FILE", "/nowhere")]),
        ["SHOPD__KAFKA__BOOTSTRAP_SERVERS_FILE", "SHOPD__ORDERS__DATABASE_URL"]
    );
    let both = [("SHOPD__ORDERS__DATABASE_URL", ORDERS), ("SHOPD__PAYMENTS__DATABASE_URL", PAYMENTS)];
    assert!(load(&sources(Role::All, &both)).is_ok());
    assert!(load(&sources(Role::Migrate, &both)).is_ok());
    let mut look = sources(Role::Orders, &[]);
    look.runs = false;
    assert!(load(&look).is_ok());
}

#[test]
fn both_services_in_one_database_or_on_one_port_are_a_mistake() {
    let same = [("SHOPD__ORDERS__DATABASE_URL", ORDERS), ("SHOPD__PAYMENTS__DATABASE_URL", "postgres://x@db/orders")];
    assert!(lines(load(&sources(Role::Migrate, &same)))[0].starts_with("payments.database_url: names the same database"));
    let port = [("SHOPD__RELAY__LISTEN", "0.0.0.0:8080")];
    assert_eq!(lines(load(&sources(Role::All, &port))), ["relay.listen: 0.0.0.0:8080 is taken by payments.listen"]);
    let any = [("SHOPD__RELAY__LISTEN", "127.0.0.1:0"), ("SHOPD__ORDERS__LISTEN", "127.0.0.1:0")];
    assert!(load(&sources(Role::All, &any)).is_ok());
}

#[test]
fn a_role_looks_at_the_certificates_of_the_connections_that_it_makes_and_at_no_others() {
    let url = format!("{ORDERS}?sslmode=verify-full&sslrootcert=/nowhere/ca.pem");
    let environment = [
        ("SHOPD__ORDERS__DATABASE_URL", url.as_str()),
        ("SHOPD__PAYMENTS__DATABASE_URL", PAYMENTS),
        ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", "kafka:9093"),
        ("SHOPD__KAFKA__SECURITY_PROTOCOL", "sasl_ssl"),
        ("SHOPD__KAFKA__SSL_KEY_FILE", "/nowhere/key.pem"),
        ("SHOPD__KAFKA__SASL_USERNAME", "shop"),
    ];
    let starts = |role| -> Vec<String> {
        let lines = lines(load(&sources(role, &environment)));
        lines.iter().map(|line| line.split(',').next().unwrap().to_owned()).collect()
    };
    let kafka = ["kafka.sasl_password: is not configured", "kafka.ssl_certificate_file: is not configured"];
    let orders = "orders.database_url: /nowhere/ca.pem: cannot be used: ";
    assert!(starts(Role::Orders)[0].starts_with(orders), "{:?}", starts(Role::Orders));
    assert_eq!(starts(Role::Orders)[1..], kafka);
    assert!(starts(Role::Migrate)[0].starts_with(orders));
    assert_eq!(starts(Role::Payments), kafka);
    assert!(gateway(&environment).is_ok());
    // What is malformed already is said once.
    let unknown = [("SHOPD__KAFKA__SECURITY_PROTOCOL", "TLS"), ("SHOPD__KAFKA__SASL_USERNAME", "shop")];
    let both = [environment[1], environment[2], unknown[0], unknown[1]];
    assert_eq!(lines(load(&sources(Role::Payments, &both))).len(), 1);
}

#[test]
fn flags_that_lead_nowhere_are_mistakes() {
    let dir = folder(&[("prod.toml", "")]);
    assert!(from_folder(dir.path(), Some("prod"), &[]).is_ok());
    assert!(lines(from_folder(dir.path(), None, &[]))[0].contains("default.toml: cannot be read"));
    assert!(lines(from_folder(dir.path(), Some("test"), &[]))[0].contains("test.toml: cannot be read"));
    assert!(lines(from_folder(dir.path(), Some("../x"), &[]))[0].starts_with("--profile: "));
    assert!(lines(from_folder(Path::new("/nowhere"), None, &[]))[0].starts_with("--config: /nowhere"));
    let mut alone = sources(Role::Gateway, &[]);
    alone.profile = Some("prod".into());
    assert!(lines(load(&alone))[0].starts_with("--profile: needs --config"));
}

#[test]
fn the_data_directory_follows_the_flag_then_xdg_then_the_user() {
    let dir = |environment: &[(&str, &str)], is_root, flag: Option<&str>| {
        let mut sources = sources(Role::All, environment);
        sources.is_root = is_root;
        sources.data_dir = flag.map(PathBuf::from);
        load(&sources).map(|config| config.data_dir.display().to_string())
    };
    let home = ("HOME", "/home/a");
    assert_eq!(dir(&[home, ("XDG_DATA_HOME", "/x")], true, None).unwrap(), "/x/shopd");
    assert_eq!(dir(&[home, ("XDG_DATA_HOME", "")], true, None).unwrap(), "/var/lib/shopd");
    assert_eq!(dir(&[home, ("XDG_DATA_HOME", "relative")], false, None).unwrap(), "/home/a/.local/share/shopd");
    assert_eq!(dir(&[home, ("XDG_DATA_HOME", "/x")], true, Some("/d")).unwrap(), "/d");
    assert!(Path::new(&dir(&[], false, Some("d")).unwrap()).is_absolute());
    assert!(dir(&[], false, Some("")).unwrap_err().lines()[0].starts_with("--data-dir: "));
    assert!(dir(&[], false, None).unwrap_err().lines()[0].starts_with("--data-dir: "));
    let mut migrate = sources(Role::Migrate, &[]);
    migrate.data_dir = Some("/d".into());
    assert!(load(&migrate).unwrap().data_dir_given);
}

#[test]
fn the_documented_settings_are_the_known_ones_with_their_defaults() {
    let documented = include_str!("../../docs/SETTINGS.md");
    let rows: String = documented.lines().filter(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
    assert_eq!(rows, table(), "docs/SETTINGS.md should hold this table:\n{}", table());
}

#[test]
fn the_shipped_defaults_are_the_built_in_ones() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config");
    let config = from_folder(&shipped, None, &[]).unwrap();
    assert_eq!(format!("{config:?}"), format!("{:?}", gateway(&[]).unwrap()));
}
