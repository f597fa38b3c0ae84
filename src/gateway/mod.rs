//! The gateway: the one public port. Routes, passes on, merges the services' documents and names what is down.
//!
//! Owns nothing but connections and the last good OpenAPI documents. Reads and writes no database. May import http, config and
//! the values; never a service.

mod admission;
mod body;
mod documents;
mod forward;
mod health;
mod limits;
mod live;
mod openapi;
mod replicas;
mod respond;
mod routes;
mod summary;
mod swagger_ui;
mod timeline;
mod upstream;
mod worker;

pub use openapi::{PARTIAL, conflicts, document, merge};
pub use routes::ServiceName;

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::{ALLOW, HeaderName, LOCATION};
use actix_web::{Error, HttpRequest, HttpResponse, web};
use futures::future::join;
use tokio::sync::SemaphorePermit;

use crate::config::GatewayConfig;
use crate::http::{Code, MethodNotAllowed, Problem, Readiness, RequestContext, Routes};
use crate::shutdown::Shutdown;
use crate::telemetry;
use admission::Admission;
use documents::Documents;
use limits::Limits;
use replicas::Replicas;
use routes::{Refusal, Target};
use worker::Worker;

/// The gateway; cheap to clone, shared by all worker threads.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    orders: Service,
    payments: Service,
    limits: Limits,
    upstream_timeout: Duration,
    documents: Documents,
    cors_origins: Vec<String>,
    stop: Shutdown,
}

struct Service {
    replicas: Replicas,
    admission: Admission,
}

/// A setting that only the gateway can judge.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct GatewayError {
    key: &'static str,
    problem: String,
}

impl Gateway {
    /// What the gateway alone can tell of its settings, before anything is opened.
    ///
    /// # Errors
    /// A rate limit for a route that there is not.
    pub fn check(config: &GatewayConfig) -> Result<(), GatewayError> {
        Self::limits(config).map(drop)
    }

    fn limits(config: &GatewayConfig) -> Result<Limits, GatewayError> {
        let limits = Limits::new(&config.rate_limits, &config.trusted_proxies);
        limits.map_err(|problem| GatewayError { key: "gateway.rate_limits", problem })
    }

    /// Takes the addresses of the services from `config`; asks nobody yet. What streams ends with `stop`.
    ///
    /// # Errors
    /// A rate limit for a route that there is not, or an address that is none.
    pub fn new(config: &GatewayConfig, stop: Shutdown) -> Result<Self, GatewayError> {
        let service = |urls: &[String], key| {
            let replicas = Replicas::new(urls).map_err(|error| GatewayError { key, problem: error.to_string() })?;
            Ok(Service { replicas, admission: Admission::new(config.in_flight_max, config.queue_time_max) })
        };
        let gateway = Arc::new(Inner {
            orders: service(&config.orders_urls, "gateway.orders_urls")?,
            payments: service(&config.payments_urls, "gateway.payments_urls")?,
            limits: Self::limits(config)?,
            upstream_timeout: config.upstream_timeout,
            documents: Documents::default(),
            cors_origins: config.cors_origins.clone(),
            stop,
        });
        let watched = Arc::downgrade(&gateway);
        telemetry::observe(move || {
            let Some(gateway) = watched.upgrade() else { return false };
            gateway.orders.replicas.gauge(ServiceName::Orders.as_str());
            gateway.payments.replicas.gauge(ServiceName::Payments.as_str());
            true
        });
        Ok(Self(gateway))
    }

    /// Follows where the services' names lead and asks every replica whether it is alive, again and again, until the gateway stops.
    pub async fn run_checks(self) {
        let Inner { orders, payments, stop, .. } = &*self.0;
        join(orders.replicas.watch(stop), payments.replicas.watch(stop)).await;
    }

    /// Everything the gateway serves beside health and metrics.
    pub fn routes(&self) -> Routes {
        let gateway = self.clone();
        Routes::new().plain(move |config| gateway.configure(config)).patterns(routes::pattern).cors(&self.0.cors_origins)
    }

    /// Called once a worker thread, which keeps connections of its own.
    pub fn configure(&self, config: &mut web::ServiceConfig) {
        config.app_data(web::Data::new(Worker::new(self.clone())));
        // One handler for all: matching patterns first would only be thrown away.
        config.default_service(web::to(handle));
    }

    /// Ready when each service has a live replica.
    pub fn readiness(&self) -> Readiness {
        let gateway = self.clone();
        Readiness::new(move || {
            let gateway = gateway.clone();
            async move { health::missing(&gateway.0.orders.replicas, &gateway.0.payments.replicas).await }
        })
    }

    fn service(&self, service: ServiceName) -> &Service {
        match service {
            ServiceName::Orders => &self.0.orders,
            ServiceName::Payments => &self.0.payments,
        }
    }

    fn replicas(&self, service: ServiceName) -> &Replicas {
        &self.service(service).replicas
    }

    /// A place among the requests under way at `service`.
    ///
    /// # Errors
    /// `unavailable` where it would wait too long.
    async fn enter(&self, service: ServiceName) -> Result<SemaphorePermit<'_>, Problem> {
        self.service(service).admission.enter().await.map_err(|shed| {
            metrics::counter!("shopd_gateway_shed_total", "service" => service.as_str()).increment(1);
            Problem::unavailable(format_args!("{}: {shed}", service.as_str()))
        })
    }

    fn upstream_timeout(&self) -> Duration {
        self.0.upstream_timeout
    }
}

/// The one way in: the raw path decides, whatever the framework's router made of it.
async fn handle(
    req: HttpRequest,
    context: RequestContext,
    worker: web::Data<Worker>,
    body: web::Payload,
) -> Result<HttpResponse, Error> {
    let path = &routes::canonical(req.uri().path());
    let target = routes::resolve(req.method(), path).map_err(|refusal| match refusal {
        Refusal::NotFound => Error::from(not_found()),
        Refusal::MethodNotAllowed { allow } => Error::from(MethodNotAllowed { allow: allow.to_owned() }),
    })?;
    let limits = &worker.gateway.0.limits;
    let is_limited = limits.is_any() && !matches!(target, Target::Options { .. });
    let left = match is_limited.then(|| routes::pattern(path)).flatten() {
        Some(pattern) => limits.check(req.method(), pattern, req.peer_addr().map(|peer| peer.ip()), req.headers())?,
        None => None,
    };
    let answered = answer(target, &req, &context, &worker, body).await;
    let headers = left.iter().flat_map(limits::Left::headers);
    let mut response = match answered {
        Ok(response) => respond::compress(&req, response),
        Err(mut problem) => {
            problem.headers.extend(headers);
            return Err(problem.into());
        }
    };
    for (name, value) in headers {
        response.headers_mut().insert(HeaderName::from_static(name), value);
    }
    Ok(response)
}

/// The future of each request is moved twice before it runs, with room for the largest of these: those that are rare stand elsewhere.
async fn answer(
    target: Target<'_>,
    req: &HttpRequest,
    context: &RequestContext,
    worker: &web::Data<Worker>,
    body: web::Payload,
) -> Result<HttpResponse, Problem> {
    Ok(match target {
        Target::Proxy { service, rest } => worker.proxy(service, rest, req, context, body).await?,
        Target::Socket { rest } => Box::pin(live::socket(worker, rest, req, context, body)).await?,
        Target::Summary { user } => Box::pin(summary::summary(worker, user, context)).await?,
        Target::Timeline { order } => Box::pin(timeline::timeline(worker, order, context)).await?,
        Target::Options { allow } => HttpResponse::NoContent().insert_header((ALLOW, allow)).finish(),
        Target::Root => HttpResponse::Found().insert_header((LOCATION, "/swagger")).finish(),
        Target::SwaggerPage => swagger_ui::page(),
        Target::SwaggerAsset(name) => swagger_ui::asset(name).map_err(Problem::internal)?.ok_or_else(not_found)?,
        Target::SwaggerDocument => HttpResponse::Ok().json(Box::pin(worker.gateway.0.documents.current(worker, context)).await),
    })
}

fn not_found() -> Problem {
    Problem::new(Code::RouteNotFound, "There is no such route.")
}
