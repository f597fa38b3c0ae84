//! `/metrics`: Prometheus text. One recorder a process, whatever roles it runs; labels tell the roles apart.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::OnceLock;
use std::time::Duration;

use actix_web::http::{Method, StatusCode};
use actix_web::{HttpResponse, web};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::problem::Problem;
use super::render::only;
use crate::telemetry::{self, Kind, METRICS, Metric};

const REQUESTS: &str = "shopd_http_requests_total";
const DURATION: &str = "shopd_http_request_duration_seconds";
/// How often what was recorded is folded together where nobody scrapes.
const UPKEEP: Duration = Duration::from_secs(10);

/// Installs the process's recorder at the first call; `None` where another one is installed.
pub fn install() -> Option<PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    let handle = HANDLE.get_or_init(|| {
        let buckets = METRICS.iter().filter_map(|metric| match metric.kind {
            Kind::Histogram(buckets) => Some((metric.name, buckets)),
            Kind::Counter | Kind::Gauge => None,
        });
        let builder = buckets.into_iter().try_fold(PrometheusBuilder::new(), |builder, (name, buckets)| {
            builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)
        });
        let handle = builder.and_then(PrometheusBuilder::install_recorder);
        let handle = handle.inspect_err(|error| tracing::warn!(%error, "no metrics")).ok()?;
        for Metric { name, kind, help, .. } in METRICS {
            match kind {
                Kind::Counter => metrics::describe_counter!(*name, *help),
                Kind::Gauge => metrics::describe_gauge!(*name, *help),
                Kind::Histogram(_) => metrics::describe_histogram!(*name, *help),
            }
        }
        metrics::gauge!("shopd_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        let process = metrics_process::Collector::default();
        telemetry::observe(move || {
            process.collect();
            true
        });
        Some(handle)
    });
    handle.clone()
}

/// Keeps what was recorded from piling up between scrapes; never ends.
pub(super) async fn upkeep() {
    let Some(handle) = install() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(UPKEEP).await;
        handle.run_upkeep();
    }
}

/// What is recorded of one kind of request. Looking these up in the recorder costs more than recording.
struct Recorders {
    kind: (&'static str, &'static str, StatusCode),
    duration: metrics::Histogram,
    answered: metrics::Counter,
}

/// By route; of each only a few kinds. Bounded: a route is one of the application's patterns.
type ByRoute = HashMap<String, Vec<Recorders>>;

thread_local! {
    static RECORDERS: RefCell<ByRoute> = RefCell::default();
}

/// Counts one answered request. Labels are bounded: `route` is the pattern, and unusual methods share a name.
pub(super) fn request(role: &'static str, method: &Method, route: Option<&str>, status: StatusCode, elapsed: Duration) {
    let (kind, route) = ((role, name(method), status), route.unwrap_or("unmatched"));
    RECORDERS.with_borrow_mut(|recorders| {
        if !recorders.contains_key(route) {
            recorders.insert(route.to_owned(), Vec::new());
        }
        let Some(kinds) = recorders.get_mut(route) else { return };
        let at = kinds.iter().position(|recorders| recorders.kind == kind).unwrap_or_else(|| {
            kinds.push(Recorders::new(kind, route));
            kinds.len() - 1
        });
        kinds[at].duration.record(elapsed.as_secs_f64());
        kinds[at].answered.increment(1);
    });
}

impl Recorders {
    fn new(kind: (&'static str, &'static str, StatusCode), route: &str) -> Self {
        let (role, method, status) = kind;
        let labels = [("role", role.to_owned()), ("method", method.to_owned()), ("route", route.to_owned())];
        let duration = metrics::histogram!(DURATION, &labels);
        let [a, b, c] = labels;
        let answered = metrics::counter!(REQUESTS, &[a, b, c, ("status", status.as_str().to_owned())]);
        Self { kind, duration, answered }
    }
}

fn name(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

pub(super) fn configure(config: &mut web::ServiceConfig) {
    let scrape = || async {
        let handle = install().ok_or_else(|| Problem::unavailable("another metrics recorder is installed"))?;
        telemetry::look();
        Ok::<_, Problem>(HttpResponse::Ok().content_type("text/plain; version=0.0.4; charset=utf-8").body(handle.render()))
    };
    config.service(web::resource("/metrics").route(web::get().to(scrape)).default_service(only(&[Method::GET])));
}
