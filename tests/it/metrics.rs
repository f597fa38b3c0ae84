//! The metrics that a running shop exposes, the catalogue of them, its page, the dashboard and the alerts: all of one mind.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use shopd::messaging::outbox;
use shopd::telemetry::{Kind, METRICS, Metric};

use crate::scenario::place;
use crate::support::books::{connect, count};
use crate::support::inside::until;
use crate::support::shop::{Client, Four};
use crate::support::{kafka, postgres};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn known(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

fn kind(metric: &Metric) -> &'static str {
    match metric.kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
        Kind::Histogram(_) => "histogram",
    }
}

/// The rows of docs/METRICS.md.
fn table() -> String {
    let mut table = "| metric | kind | labels | |\n|---|---|---|---|\n".to_owned();
    for metric in METRICS {
        let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
        table += &format!("| `{}` | {} | {} | {} |\n", metric.name, kind(metric), labels.join(", "), metric.help);
    }
    table
}

#[test]
fn the_documented_metrics_are_the_known_ones() {
    let documented = read("docs/METRICS.md");
    let rows: String = documented.lines().filter(|line| line.starts_with('|')).map(|line| format!("{line}\n")).collect();
    assert_eq!(rows, table(), "docs/METRICS.md should hold this table:\n{}", table());
}

/// Names, with the macro that records them.
fn recorded(folder: &Path, found: &mut BTreeSet<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            recorded(&path, found);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for part in text.split("metrics::").skip(1) {
            let Some((kind, rest)) = part.split_once("!(") else { continue };
            let Some(name) = rest.trim_start().strip_prefix('"').and_then(|rest| rest.split('"').next()) else { continue };
            if ["counter", "gauge", "histogram"].contains(&kind) {
                found.insert((name.to_owned(), kind.to_owned()));
            }
        }
    }
}

#[test]
fn what_is_recorded_is_in_the_catalogue_and_what_is_in_it_is_recorded() {
    let mut found = BTreeSet::new();
    recorded(&root().join("src"), &mut found);
    for (name, how) in &found {
        let metric = known(name).unwrap_or_else(|| panic!("{name} is recorded and not in the catalogue"));
        assert_eq!(kind(metric), how, "{name}");
    }
    // The HTTP server's two are recorded by constants; a library records the process's.
    for metric in METRICS.iter().filter(|metric| !metric.name.starts_with("shopd_http_") && metric.name.starts_with("shopd_")) {
        assert!(found.iter().any(|(name, _)| name == metric.name), "nothing records {}", metric.name);
    }
}

/// What a scrape says: by family, the labels of its series with their values.
type Exposed = BTreeMap<String, Vec<(BTreeMap<String, String>, f64)>>;

fn parse(text: &str, exposed: &mut Exposed) {
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|suffix| name.strip_suffix(suffix))
            .find(|family| known(family).is_some_and(|metric| matches!(metric.kind, Kind::Histogram(_))))
            .unwrap_or(name);
        let labels = labels.trim_end_matches('}').split("\",").filter(|label| !label.is_empty()).map(|label| {
            let (name, value) = label.split_once("=\"").unwrap();
            (name.to_owned(), value.trim_end_matches('"').to_owned())
        });
        exposed
            .entry(family.to_owned())
            .or_default()
            .push((labels.filter(|(name, _)| name != "le").collect(), value.parse().unwrap()));
    }
}

async fn scrape(shop: &Four) -> Exposed {
    let mut exposed = Exposed::new();
    for (process, role) in
        [(&shop.gateway, "gateway"), (&shop.orders, "orders"), (&shop.payments, "payments"), (&shop.relay, "relay")]
    {
        parse(&Client::new(process.address(role).await).get("/metrics").await.expect(200).text, &mut exposed);
    }
    exposed
}

fn values(exposed: &Exposed, name: &str, label: (&str, &str)) -> Vec<f64> {
    let series = exposed.get(name).unwrap_or_else(|| panic!("{name} is not exposed"));
    let those = series.iter().filter(|(labels, _)| label.0.is_empty() || labels.get(label.0).is_some_and(|value| value == label.1));
    those.map(|(_, value)| *value).collect()
}

/// What orders tells of its outbox; all that it exposes is in `exposed` then.
async fn outbox_rows(shop: &Four, exposed: &mut Exposed) -> Vec<f64> {
    *exposed = Exposed::new();
    parse(&Client::new(shop.orders.address("orders").await).get("/metrics").await.expect(200).text, exposed);
    values(exposed, "shopd_outbox_rows", ("outbox", "orders"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_shop_exposes_what_the_catalogue_says_and_figures_that_are_true() {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    let mut shop = Four::start(&kafka::shared().await, &orders, &payments, &kafka::prefix()).await;
    shop.client.account("ann", "1000").await;
    for _ in 0..3 {
        let order = place(&shop.client, "ann", "1").await;
        shop.client.ended(&order).await;
    }

    // What a client sees of a record is counted just after.
    let counted = |exposed: &Exposed, name: &str, label: &str, value: &str| -> f64 {
        let those = exposed.get(name).into_iter().flatten().filter(|(labels, _)| labels.get(label).is_some_and(|of| of == value));
        those.map(|(_, value)| *value).sum()
    };
    let mut exposed = Exposed::new();
    until("everything is counted", async || {
        exposed = scrape(&shop).await;
        let consumed = |topic| counted(&exposed, "shopd_consumer_records_total", "topic", topic) >= 3.0;
        let published = |outbox| counted(&exposed, "shopd_relay_rows_total", "outbox", outbox) >= 3.0;
        ["order-payment-requests", "payment-status-updates"].into_iter().all(consumed)
            && ["orders", "payments"].into_iter().all(published)
    })
    .await;
    for (name, series) in &exposed {
        let metric = known(name).unwrap_or_else(|| panic!("{name} is exposed and not in the catalogue"));
        for (labels, _) in series {
            let names: BTreeSet<&str> = labels.keys().map(String::as_str).collect();
            assert_eq!(names, metric.labels.iter().copied().collect(), "{name}");
        }
    }
    for topic in ["order-payment-requests", "payment-status-updates"] {
        assert_eq!(values(&exposed, "shopd_consumer_records_total", ("topic", topic)).iter().sum::<f64>(), 3.0);
        let epochs = values(&exposed, "shopd_consumer_lease_epoch", ("topic", topic));
        assert!(!epochs.is_empty() && epochs.iter().all(|epoch| *epoch >= 1.0), "{epochs:?}");
    }
    for outbox in ["orders", "payments"] {
        assert_eq!(values(&exposed, "shopd_relay_rows_total", ("outbox", outbox)), [3.0]);
        assert!(values(&exposed, "shopd_relay_lease_epoch", ("outbox", outbox))[0] >= 1.0);
    }
    let busiest = values(&exposed, "shopd_db_pool_connections_max", ("pool", "batches"));
    assert_eq!(busiest, [2.0, 2.0], "orders' and payments'");
    assert_eq!(values(&exposed, "shopd_gateway_breaker_open", ("", "")), [0.0, 0.0]);
    assert_eq!(values(&exposed, "shopd_build_info", ("version", env!("CARGO_PKG_VERSION"))), [1.0; 4]);
    let resident = values(&exposed, "process_resident_memory_bytes", ("", ""));
    assert!(resident.len() == 4 && resident.iter().all(|bytes| *bytes > 1e6), "{resident:?}");

    // While nothing has failed, nothing is said of incidents. One that is over leaves nothing behind, and never less than that.
    let db = connect(&orders);
    let cut = "select count(pg_terminate_backend(pid)) as n from pg_stat_activity
                where datname = current_database() and application_name = 'shopd-relay'";
    assert!(count(&db, cut).await > 0, "the relay has a session");
    until("the incident of a lost session is over", async || {
        exposed = scrape(&shop).await;
        let ongoing: Vec<_> = exposed.get("shopd_incidents_ongoing").into_iter().flatten().collect();
        ongoing.iter().any(|(labels, _)| labels["what"] == "relaying") && ongoing.iter().all(|(_, value)| *value == 0.0)
    })
    .await;

    // Negative control of the figures that alerts go by: they must rise when something is wrong, and be told without the relay.
    // What is published counts until the relay has saved that it is, and the figure may be from before the first order.
    until("the relay's cursor is saved", async || outbox::depth(&db).await.unwrap().rows == 0).await;
    until("the outbox is seen empty", async || outbox_rows(&shop, &mut exposed).await == [0.0]).await;
    shop.relay.kill().await;
    place(&shop.client, "ann", "1").await;
    until("the outbox is seen to grow", async || outbox_rows(&shop, &mut exposed).await == [1.0]).await;
    assert!(values(&exposed, "shopd_outbox_oldest_row_age_seconds", ("outbox", "orders"))[0] > 0.0);
    shop.payments.kill().await;
    until("the gateway sees that payments is away", async || {
        shop.client.get("/api/PaymentsProxy/ann/balance").await;
        exposed = Exposed::new();
        parse(&shop.client.get("/metrics").await.expect(200).text, &mut exposed);
        values(&exposed, "shopd_gateway_replica_ejected", ("service", "payments")) == [1.0]
    })
    .await;
}

/// Every word of a file that looks like a metric of ours or of a process's.
fn named(path: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("shopd_") || word.starts_with("process_")).map(str::to_owned).collect()
}

fn files(folder: &str) -> Vec<PathBuf> {
    std::fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn no_panel_and_no_alert_asks_for_a_metric_that_there_is_not() {
    for (folder, least) in [("deploy/grafana", 20), ("deploy/prometheus", 10)] {
        let mut asked = 0;
        for path in files(folder) {
            for word in named(&path) {
                let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| {
                    word.strip_suffix(suffix).filter(|family| known(family).is_some_and(|m| matches!(m.kind, Kind::Histogram(_))))
                });
                let metric = known(family.unwrap_or(&word));
                let metric = metric.unwrap_or_else(|| panic!("{}: there is no {word}", path.display()));
                assert!(
                    family.is_some() || !matches!(metric.kind, Kind::Histogram(_)),
                    "{}: {word} is a histogram",
                    path.display()
                );
                asked += 1;
            }
        }
        assert!(asked >= least, "{folder} asks for {asked} metrics only");
    }
}

#[test]
fn each_alert_is_explained_where_it_points_to() {
    let (rules, manual) = (read("deploy/prometheus/alerts.yml"), read("docs/OPERATIONS.md"));
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 10, "{alerts:?}");
    for alert in alerts {
        assert!(manual.contains(&format!("### {alert}\n")), "docs/OPERATIONS.md says nothing of {alert}");
        let anchor = format!("docs/OPERATIONS.md#{}", alert.to_lowercase());
        assert!(rules.contains(&anchor), "{alert} has no runbook {anchor}");
    }
}
