//! The gateway: the one public port. Routes, passes on, merges the services' documents and names what is down.
//!
//! Owns nothing but connections and the last good OpenAPI documents. Reads and writes no database. May import http, config and
//! the values; never a service.

mod documents;
mod forward;
mod health;
mod openapi;
mod replicas;
mod routes;
mod summary;
mod swagger_ui;
mod upstream;
mod worker;

pub use openapi::{PARTIAL, conflicts, document, merge};
pub use routes::ServiceName;

use std::sync::Arc;
use std::time::Duration;

use actix_web::http::header::LOCATION;
use actix_web::{Error, HttpRequest, HttpResponse, web};

use crate::config::GatewayConfig;
use crate::http::{Code, MethodNotAllowed, Problem, Readiness, RequestContext, Routes};
use documents::Documents;
use replicas::Replicas;
use routes::{Refusal, Target};
use worker::Worker;

/// The gateway; cheap to clone, shared by all worker threads.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

struct Inner {
    orders: Replicas,
    payments: Replicas,
    upstream_timeout: Duration,
    documents: Documents,
}

impl Gateway {
    /// Takes the addresses of the services from `config`; asks nobody yet.
    pub fn new(config: &GatewayConfig) -> Self {
        Self(Arc::new(Inner {
            orders: Replicas::new(&config.orders_urls),
            payments: Replicas::new(&config.payments_urls),
            upstream_timeout: config.upstream_timeout,
            documents: Documents::default(),
        }))
    }

    /// Everything the gateway serves beside health and metrics.
    pub fn routes(&self) -> Routes {
        let gateway = self.clone();
        Routes::new().plain(move |config| gateway.configure(config))
    }

    /// Called once a worker thread, which keeps connections of its own.
    pub fn configure(&self, config: &mut web::ServiceConfig) {
        config.app_data(web::Data::new(Worker::new(self.clone())));
        for pattern in routes::PATTERNS {
            config.service(web::resource(*pattern).to(handle));
        }
        config.default_service(web::to(handle));
    }

    /// Ready when each service has a live replica.
    pub fn readiness(&self) -> Readiness {
        let gateway = self.clone();
        Readiness::new(move || {
            let gateway = gateway.clone();
            async move { health::missing(&gateway.0.orders, &gateway.0.payments).await }
        })
    }

    fn replicas(&self, service: ServiceName) -> &Replicas {
        match service {
            ServiceName::Orders => &self.0.orders,
            ServiceName::Payments => &self.0.payments,
        }
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
    let not_found = || Problem::new(Code::RouteNotFound, "There is no such route.");
    let target = routes::resolve(req.method(), req.uri().path()).map_err(|refusal| match refusal {
        Refusal::NotFound => Error::from(not_found()),
        Refusal::MethodNotAllowed { allow } => Error::from(MethodNotAllowed { allow: allow.to_owned() }),
    })?;
    match target {
        Target::Proxy { service, rest } => Ok(worker.proxy(service, rest, &req, &context, body).await?),
        Target::Summary { user } => Ok(summary::summary(&worker, user, &context).await?),
        Target::Root => Ok(HttpResponse::Found().insert_header((LOCATION, "/swagger")).finish()),
        Target::SwaggerPage => Ok(swagger_ui::page()),
        Target::SwaggerAsset(name) => {
            let asset = swagger_ui::asset(name).map_err(Problem::internal)?;
            Ok(asset.ok_or_else(not_found)?)
        }
        Target::SwaggerDocument => Ok(HttpResponse::Ok().json(worker.gateway.0.documents.current(&worker, &context).await)),
    }
}
