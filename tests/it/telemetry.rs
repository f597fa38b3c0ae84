//! One order is one trace over all roles, sent to a collector; and what is logged can be changed while a process runs.

use std::collections::{BTreeSet, HashMap, HashSet};

use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use serde_json::Value;

use crate::support::collector::{Collector, Span};
use crate::support::inside::until;
use crate::support::shop::{All, Four, Process};
use crate::support::{kafka, postgres};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const UNSAMPLED: &str = "5bf92f3577b34da6a3ce929d0e0e4736";
const CLIENT: &str = "00f067aa0ba902b7";
const BODY: &str = r#"{"userId":"ann","amount":1,"description":"a book"}"#;

async fn shop(extra: &[(&str, &str)]) -> Four {
    let (orders, payments) = (postgres::database("orders").await, postgres::database("payments").await);
    Four::start_with(&kafka::shared().await, &orders, &payments, &kafka::prefix(), extra).await
}

/// The order's id.
async fn place(shop: &Four, traceparent: &str) -> String {
    let headers = [("traceparent", traceparent), ("X-Request-Id", "asked-once")];
    let placed = shop.client.send("POST", "/api/OrdersProxy", &headers, Some(BODY)).await.unwrap().expect(201);
    placed.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_order_is_one_trace_over_all_roles() {
    let collector = Collector::start();
    let shop = shop(&[("SHOPD__TELEMETRY__OTLP_ENDPOINT", &collector.url)]).await;
    shop.client.account("ann", "10").await;
    let unwanted = place(&shop, &format!("00-{UNSAMPLED}-{CLIENT}-00")).await;
    shop.client.ended(&unwanted).await;
    let order = place(&shop, &format!("00-{TRACE}-{CLIENT}-01")).await;
    shop.client.ended(&order).await;
    until("all spans came", async || collector.of(TRACE).len() >= 7).await;

    let spans = collector.of(TRACE);
    let by_id: HashMap<&str, &Span> = spans.iter().map(|span| (span.span_id.as_str(), span)).collect();
    let parent = |span: &Span| match by_id.get(span.parent.as_str()) {
        Some(parent) => format!("{} {}", parent.service, parent.name),
        None if span.parent == CLIENT => "the client".to_owned(),
        None => panic!("nobody sent the span above {span:?}"),
    };
    let found: BTreeSet<(String, SpanKind, String, String)> =
        spans.iter().map(|span| (span.service.clone(), span.kind, span.name.clone(), parent(span))).collect();
    let (at_gateway, at_orders) = ("shopd-gateway POST /api/OrdersProxy", "shopd-orders POST /api/Orders");
    let paying = "shopd-payments process order-payment-requests";
    let expected = [
        ("shopd-gateway", SpanKind::Server, "POST /api/OrdersProxy", "the client"),
        ("shopd-gateway", SpanKind::Client, "POST", at_gateway),
        ("shopd-orders", SpanKind::Server, "POST /api/Orders", "shopd-gateway POST"),
        ("shopd-relay", SpanKind::Producer, "send order-payment-requests", at_orders),
        ("shopd-payments", SpanKind::Consumer, "process order-payment-requests", at_orders),
        ("shopd-relay", SpanKind::Producer, "send payment-status-updates", paying),
        ("shopd-orders", SpanKind::Consumer, "process payment-status-updates", paying),
    ];
    let expected = expected.map(|(service, kind, name, parent)| (service.to_owned(), kind, name.to_owned(), parent.to_owned()));
    assert_eq!(found, expected.into_iter().collect(), "{spans:#?}");
    assert_eq!(spans.len(), 7, "each once: {spans:#?}");

    for span in &spans {
        assert!(span.began <= span.ended && span.events.values().all(|at| (span.began..=span.ended).contains(at)), "{span:?}");
        assert!(!span.failed, "{span:?}");
        if span.kind != SpanKind::Client {
            assert_eq!(span.attributes["shopd.request_id"], "asked-once", "{span:?}");
        }
        if span.kind == SpanKind::Consumer {
            assert_eq!(span.attributes["messaging.message.conversation_id"], order);
            assert!(span.events.contains_key("applying"));
        }
    }
    assert!(collector.of(UNSAMPLED).is_empty(), "a client that does not want it recorded: {:#?}", collector.of(UNSAMPLED));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_costs_one_warning_a_role_and_no_order() {
    // Nobody listens on the discard port of a machine of ours.
    let mut shop = shop(&[("SHOPD__TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:9")]).await;
    shop.client.account("ann", "10").await;
    for _ in 0..3 {
        let order = place(&shop, &format!("00-{TRACE}-{CLIENT}-01")).await;
        shop.client.ended(&order).await;
        let failures = |process: &Process| process.log().matches("sending spans").count();
        until("spans were not sent", async || failures(&shop.orders) > 0 && failures(&shop.relay) > 0).await;
    }
    for process in [&mut shop.gateway, &mut shop.orders, &mut shop.payments, &mut shop.relay] {
        process.signal(Signal::SIGTERM);
        assert!(process.ended().await.success(), "{}", process.log());
        let warnings = process.log().lines().filter(|line| line.contains("sending spans") && line.contains("WARN")).count();
        assert_eq!(warnings, 1, "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_the_traces_that_begin_here_one_in_so_many_is_recorded() {
    let collector = Collector::start();
    let dir = postgres::own_dir();
    let env = [("SHOPD__TELEMETRY__OTLP_ENDPOINT", collector.url.as_str()), ("SHOPD__TELEMETRY__TRACE_ONE_IN", "4")];
    let shop = All::start_with(dir, &env).await;
    let asked = 400;
    for _ in 0..asked {
        shop.client.get("/api/OrdersProxy?userId=nobody").await.expect(200);
    }
    shop.client
        .send("GET", "/api/OrdersProxy?userId=nobody", &[("traceparent", &format!("00-{TRACE}-{CLIENT}-01"))], None)
        .await
        .unwrap();
    // A role sends its spans in the order in which they ended, so all earlier roots came, too.
    let is_last = |span: &Span| span.service == "shopd-gateway" && span.kind == SpanKind::Server;
    until("the last one came", async || collector.of(TRACE).iter().any(is_last)).await;
    let roots: Vec<Span> = collector.all().into_iter().filter(|span| span.parent.is_empty()).collect();
    // One in four, give or take six standard deviations of 8.7.
    assert!((48..=152).contains(&roots.len()), "{} of {asked}", roots.len());
    // Each role sends its own, once a second.
    until("the service goes by the gateway's choice", async || {
        roots.iter().all(|root| collector.of(&root.trace_id).iter().any(|span| span.service == "shopd-orders"))
    })
    .await;
    let chosen: HashSet<&str> = roots.iter().map(|root| root.trace_id.as_str()).chain([TRACE]).collect();
    assert!(collector.all().iter().all(|span| chosen.contains(span.trace_id.as_str())), "and no other is recorded");
}

/// Lines with an order's id, as JSON.
fn lines(process: &Process, order: &str) -> Vec<Value> {
    let log = process.log();
    log.lines().filter(|line| line.contains(order)).map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_logged_follows_a_file_while_the_process_runs() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("levels");
    std::fs::write(&file, "info\n").unwrap();
    let shop = shop(&[("SHOPD_LOG_FILE", file.to_str().unwrap())]).await;
    shop.client.account("ann", "10").await;
    let quiet = place(&shop, &format!("00-{TRACE}-{CLIENT}-01")).await;
    shop.client.ended(&quiet).await;

    std::fs::write(&file, "info,shopd::orders=debug\n").unwrap();
    let told = |process: &Process, text: &str| process.log().contains(text);
    until("all heard of it", async || {
        [&shop.orders, &shop.payments, &shop.relay].into_iter().all(|process| told(process, "what is logged has changed"))
    })
    .await;
    let order = place(&shop, &format!("00-{TRACE}-{CLIENT}-01")).await;
    shop.client.ended(&order).await;
    until("both lines came", async || lines(&shop.orders, &order).len() >= 2).await;
    for line in lines(&shop.orders, &order) {
        assert_eq!(
            (&line["order_id"], &line["request_id"], &line["trace_id"]),
            (&order.as_str().into(), &"asked-once".into(), &TRACE.into()),
            "{line}"
        );
    }
    assert!(lines(&shop.orders, &quiet).is_empty() && lines(&shop.payments, &order).is_empty(), "by module");

    std::fs::write(&file, "shopd=loud\n").unwrap();
    until("a mistake is told", async || told(&shop.orders, "stays as it was")).await;
    let order = place(&shop, &format!("00-{TRACE}-{CLIENT}-01")).await;
    until("the levels hold on", async || !lines(&shop.orders, &order).is_empty()).await;
}
