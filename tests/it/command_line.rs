//! What a process says and how it ends when it cannot begin.

use std::process::{Command, Output};

fn shopd(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shopd"));
    command.args(arguments).env_clear().envs(environment.iter().copied());
    command.output().expect("the program")
}

fn stderr(output: &Output) -> Vec<String> {
    String::from_utf8_lossy(&output.stderr).lines().map(str::to_owned).collect()
}

#[test]
fn without_a_command_the_help_is_shown_and_that_is_a_mistake() {
    let output = shopd(&[], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).iter().any(|line| line.contains("Usage: shopd")));
    let help = shopd(&["--help"], &[]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit status:"));
}

#[test]
fn a_role_with_nothing_configured_ends_at_once_and_names_what_is_missing() {
    for (role, keys) in [
        ("orders", &["orders.database_url", "kafka.bootstrap_servers"][..]),
        ("payments", &["payments.database_url", "kafka.bootstrap_servers"]),
        ("relay", &["orders.database_url", "payments.database_url", "kafka.bootstrap_servers"]),
        ("migrate", &["orders.database_url", "payments.database_url"]),
        ("audit", &["orders.database_url", "payments.database_url"]),
    ] {
        let output = shopd(&[role], &[]);
        assert_eq!(output.status.code(), Some(2), "{role}");
        assert!(output.stdout.is_empty());
        let lines = stderr(&output);
        assert_eq!(lines.len(), keys.len(), "{lines:?}");
        for (line, key) in lines.iter().zip(keys) {
            assert!(line.starts_with(&format!("shopd: {key}: ")), "{line}");
        }
    }
}

#[test]
fn every_mistake_is_a_line_and_no_secret_is_in_it() {
    let environment = [
        ("SHOPD__ORDERS__DATABASE_URL", "postgres://u:hunter2@h"),
        ("SHOPD__GATEWAY__LISTEN", "nowhere"),
        ("SHOPD__GATEWAY__LISTN", "0.0.0.0:1"),
    ];
    let output = shopd(&["all", "--log", "json"], &environment);
    assert_eq!(output.status.code(), Some(2));
    let lines = stderr(&output);
    assert_eq!(lines.len(), 3, "{lines:?}");
    for name in ["SHOPD__GATEWAY__LISTN: ", "SHOPD__GATEWAY__LISTEN: ", "SHOPD__ORDERS__DATABASE_URL: "] {
        assert!(lines.iter().any(|line| line.starts_with(&format!("shopd: {name}"))), "{lines:?}");
    }
    assert!(!lines.concat().contains("hunter2"));
}

#[test]
fn a_rate_limit_for_a_route_that_there_is_not_is_a_mistake_before_anything_is_opened() {
    let environment = [
        ("SHOPD__GATEWAY__RATE_LIMITS", "GET /api/Orders=1/s"),
        ("SHOPD__GATEWAY__ORDERS_URLS", "http://127.0.0.1:1"),
        ("SHOPD__GATEWAY__PAYMENTS_URLS", "http://127.0.0.1:1"),
    ];
    for role in ["gateway", "all"] {
        let output = shopd(&[role], &[&environment[..], &[("HOME", "/nowhere")]].concat());
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(stderr(&output), ["shopd: gateway.rate_limits: there is no route GET /api/Orders"]);
    }
}

#[test]
fn a_health_check_of_a_role_that_is_not_there_fails() {
    // Not a port that was free a moment ago: the system may give it to another test's server.
    let output = shopd(&["healthcheck", "relay"], &[("SHOPD__RELAY__LISTEN", "127.0.0.1:1")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output)[0].starts_with("shopd: relay: "));
    assert_eq!(shopd(&["healthcheck", "relay"], &[("SHOPD__RELAY__LISTEN", "127.0.0.1:0")]).status.code(), Some(2));
}

#[test]
fn a_port_that_is_taken_is_said_before_a_server_is_made() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let dir = tempfile::tempdir().expect("a folder");
    let data = dir.path().join("data");
    let any = "127.0.0.1:0";
    let environment = [
        ("SHOPD__GATEWAY__LISTEN", address.as_str()),
        ("SHOPD__ORDERS__LISTEN", any),
        ("SHOPD__PAYMENTS__LISTEN", any),
        ("SHOPD__RELAY__LISTEN", any),
    ];
    let output = shopd(&["all", "--data-dir", data.to_str().expect("a name")], &environment);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(&output).concat();
    assert!(said.contains(&address) && said.contains("gateway.listen"), "{said}");
    assert!(!data.exists());
    // Where it is another shopd's, on the same data directory, that is what is said.
    std::fs::create_dir(&data).expect("a folder");
    let lock = std::fs::File::create(data.join("lock")).expect("its lock");
    lock.lock().expect("nobody else's");
    std::fs::write(data.join("lock"), "4711\n").expect("whose it is");
    let output = shopd(&["all", "--data-dir", data.to_str().expect("a name")], &environment);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(&output).concat();
    assert!(said.contains("in use by another shopd (process 4711)") && !data.join("postgres").exists(), "{said}");
}
