//! Fault points: each is where the list says, does what it says with the feature `faults`, and is not there without.

use std::collections::BTreeSet;
use std::path::Path;

use shopd::faults::{POINTS, REPEATS};

/// Every name that the macros are given, by macro.
fn placed(call: &str) -> BTreeSet<String> {
    let call = format!("faults::{call}!(\"");
    let mut found = BTreeSet::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name != "faults.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let names = text.split(call.as_str()).skip(1).filter_map(|rest| rest.split_once('"'));
                found.extend(names.map(|(name, _)| name.to_owned()));
            }
        }
    }
    found
}

#[test]
fn every_fault_point_in_the_list_is_in_the_code_and_the_other_way_round() {
    for (call, list) in [("point", &POINTS[..]), ("repeat", &REPEATS[..])] {
        let list: BTreeSet<String> = list.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(placed(call), list, "{call}!");
    }
}

#[test]
fn the_binary_knows_fault_points_with_the_feature_and_not_without_it() {
    let binary = std::fs::read(env!("CARGO_BIN_EXE_shopd")).unwrap();
    let knows = |name: &str| binary.windows(name.len()).any(|window| window == name.as_bytes());
    for name in ["relay.after_append", "log.before_fetch", "FAILPOINTS"] {
        assert_eq!(knows(name), cfg!(feature = "faults"), "{name}");
    }
}

#[cfg(feature = "faults")]
mod injected {
    use std::collections::BTreeSet;
    use std::os::unix::process::ExitStatusExt;

    use shopd::messaging::log::{KafkaLog, Log};

    use crate::support::books::{connect, count};
    use crate::support::inside::{REQUESTS, until};
    use crate::support::shop::{Client, Process};
    use crate::support::{kafka, postgres};

    /// `payments` alone, with a database of its own, where ann has an account; the faults come after that.
    async fn payments(failpoints: &str) -> (Process, Client, String) {
        let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
        let mut env: Vec<(String, String)> = [
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", kafka::shared().await),
            ("SHOPD__KAFKA__TOPIC_PREFIX", kafka::prefix()),
            ("SHOPD__ORDERS__DATABASE_URL", orders),
            ("SHOPD__PAYMENTS__DATABASE_URL", payments.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec();
        assert!(Process::start(&["migrate"], &env).ended().await.success());
        let start = async |env: &[(String, String)]| {
            let process = Process::start(&["payments"], env);
            let client = Client::new(process.address("payments").await);
            client.ready().await;
            (process, client)
        };
        let (mut process, client) = start(&env).await;
        client.send("POST", "/api/Account/ann", &[], None).await.unwrap().expect(200);
        process.kill().await;
        env.push(("FAILPOINTS".into(), failpoints.into()));
        let (process, client) = start(&env).await;
        (process, client, payments)
    }

    async fn deposited(url: &str) -> i64 {
        count(&connect(url), "select count(*) as n from transfer").await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_error_before_the_commit_has_no_effect_and_a_dropped_acknowledgement_has() {
        for (point, happened) in [
            ("group.before_commit=return(error)", 0),
            ("db.before_commit=return(error)", 0),
            ("db.after_commit=return(drop_ack)", 1),
            ("group.after_commit=return(drop_ack)", 1),
        ] {
            let (_process, client, url) = payments(point).await;
            client.post("/api/Account/ann/deposit", "5").await.expect(503);
            assert_eq!(deposited(&url).await, happened, "{point}");
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_crash_is_a_kill_and_what_was_committed_stays() {
        let (mut process, client, url) = payments("group.after_commit=return(crash)").await;
        assert!(client.send("POST", "/api/Account/ann/deposit", &[], Some("5")).await.is_err());
        assert_eq!(process.ended().await.signal(), Some(9));
        assert_eq!(deposited(&url).await, 1);
    }

    #[test]
    fn a_process_asked_for_a_fault_that_does_not_exist_says_so_and_ends() {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_shopd"));
        let ended = command.arg("openapi").env("FAILPOINTS", "relay.after_apend=return(error)").output().unwrap();
        assert_eq!(ended.status.code(), Some(2));
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(said.contains("relay.after_apend"), "{said}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_produce_is_repeated_and_one_without_an_acknowledgement_is_sent_again() {
        // Where nothing was asked for there is one record: nobody else makes a second.
        for (point, sent) in [("", 1), ("log.produce=1*return(duplicate)", 2), ("log.after_produce=1*return(drop_ack)", 2)] {
            let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
            let bootstrap = kafka::shared().await;
            let mut config = kafka::config(&bootstrap);
            config.topic_prefix = kafka::prefix();
            let mut env: Vec<(String, String)> = [
                ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", bootstrap),
                ("SHOPD__KAFKA__TOPIC_PREFIX", config.topic_prefix.clone()),
                ("SHOPD__KAFKA__PARTITIONS", "1".into()),
                // A broker that is slow is not asked again.
                ("SHOPD__KAFKA__REQUEST_TIMEOUT_MS", "30000".into()),
                // Nor is the order asked for again, which has no result here.
                ("SHOPD__ORDERS__SWEEP_AFTER_MS", "3600000".into()),
                ("SHOPD__ORDERS__DATABASE_URL", orders.clone()),
                ("SHOPD__PAYMENTS__DATABASE_URL", payments),
            ]
            .map(|(name, value)| (name.to_owned(), value))
            .to_vec();
            assert!(Process::start(&["migrate"], &env).ended().await.success());
            let service = Process::start(&["orders"], &env);
            env.push(("FAILPOINTS".into(), point.into()));
            let _relay = Process::start(&["relay"], &env);
            let client = Client::new(service.address("orders").await);
            client.ready().await;
            client.post("/api/Orders", r#"{"userId":"ann","amount":1}"#).await.expect(201);
            // What is acknowledged is dropped: then the relay has done all that it does for this order.
            let orders = connect(&orders);
            until("the relay is done", async || count(&orders, "select count(*) as n from outbox").await == 0).await;
            let log = KafkaLog::new(&config);
            assert_eq!(log.bounds(REQUESTS, 0).await.unwrap().1, sent, "{point}");
            let records = log.fetch(REQUESTS, 0, 0, 1_000_000).await.unwrap().records;
            let ids: BTreeSet<_> = records.iter().map(|record| record.headers.get("ce_id").unwrap().to_vec()).collect();
            assert_eq!((records.len() as i64, ids.len()), (sent, 1), "{point}: one event");
        }
    }
}
