//! One role's port: it listens first, so that its address is known and who connects waits, then it serves until the process stops. HTTP/1.1, and HTTP/2 with prior
//! knowledge; `serving.rs` joins the parts.

mod batch;
mod connection;
mod exchange;
mod expect;
mod greeting;
mod h2;
mod listen;
mod refusal;
mod serving;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use actix_server::Server;
use actix_web::http::Method;
use actix_web::middleware::{Condition, from_fn};
use actix_web::{App, HttpResponse, web};
use paperclip::actix::OpenApiExt;
use paperclip::actix::web::ServiceConfig as ApiConfig;

pub(super) use self::exchange::{Exchange, InProgress};
use self::serving::Serving;
use super::health::{self, Readiness};
use super::paths::Paths;
use super::{cors, layer, metrics, render};
use crate::config::HttpConfig;
use crate::shutdown::Shutdown;

/// The role whose port clients see; the others are behind it and take its inner headers.
pub const GATEWAY: &str = "gateway";

/// Why a port does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{role} cannot listen on {listen}: {source}; its address is the setting {role}.listen")]
    Bind { role: &'static str, listen: SocketAddr, source: std::io::Error },
    /// The server ended though nobody stopped it.
    #[error("the server of {role} ended: {cause}")]
    Ended { role: &'static str, cause: String },
    /// It was stopped and did not finish what was in flight: no clean end.
    #[error("{role} had requests in flight when their time to finish was over")]
    Unfinished { role: &'static str },
}

/// What a role serves beside health and metrics; cheap to clone, configured once a worker thread.
#[derive(Clone, Default)]
pub struct Routes {
    api: Vec<Arc<ConfigureApi>>,
    plain: Vec<Arc<Configure>>,
    cors_origins: Arc<[String]>,
    pattern: Option<fn(&str) -> Option<&'static str>>,
    paths: Option<Paths>,
}

type ConfigureApi = dyn Fn(&mut ApiConfig) + Send + Sync;
type Configure = dyn Fn(&mut web::ServiceConfig) + Send + Sync;

impl Routes {
    pub fn new() -> Self {
        Self::default()
    }

    /// Documented routes.
    #[must_use]
    pub fn api(mut self, configure: impl Fn(&mut ApiConfig) + Send + Sync + 'static) -> Self {
        self.api.push(Arc::new(configure));
        self
    }

    /// Routes as the framework has them.
    #[must_use]
    pub fn plain(mut self, configure: impl Fn(&mut web::ServiceConfig) + Send + Sync + 'static) -> Self {
        self.plain.push(Arc::new(configure));
        self
    }

    /// Names the routes that the framework's router does not know, by the raw path; for the metrics.
    #[must_use]
    pub fn patterns(mut self, pattern: fn(&str) -> Option<&'static str>) -> Self {
        self.pattern = Some(pattern);
        self
    }

    /// The framework's router knows one spelling of these; they are found in any that [`Paths`] reads.
    #[must_use]
    pub fn spelled(mut self, paths: Paths) -> Self {
        self.paths = Some(paths);
        self
    }

    /// Web pages of these origins may use it, `*` for all.
    #[must_use]
    pub fn cors(mut self, origins: &[String]) -> Self {
        self.cors_origins = origins.into();
        self
    }

    /// Serves `document` at `/openapi.json`.
    #[must_use]
    pub fn document(self, document: &serde_json::Value) -> Self {
        let text = bytes::Bytes::from(document.to_string());
        self.plain(move |config| {
            let text = text.clone();
            let get = web::get().to(move || {
                let text = text.clone();
                async move { HttpResponse::Ok().content_type("application/json").body(text) }
            });
            config.service(web::resource("/openapi.json").route(get).default_service(render::only(&[Method::GET])));
        })
    }
}

/// A port that listens. Who connects waits until something serves here.
pub struct Port {
    /// The port that was picked where 0 was asked for.
    pub local_addr: SocketAddr,
    role: &'static str,
    socket: TcpListener,
}

/// A port with what it serves; nothing is answered before [`Bound::run`].
pub struct Bound {
    role: &'static str,
    drain: Duration,
    server: Server,
}

impl Port {
    pub fn open(role: &'static str, listen: SocketAddr) -> Result<Self, ServeError> {
        let bind_error = |source| ServeError::Bind { role, listen, source };
        let socket = listen::listen(listen).map_err(bind_error)?;
        let local_addr = socket.local_addr().map_err(bind_error)?;
        tracing::info!(role, address = %local_addr, "listening");
        Ok(Self { local_addr, role, socket })
    }
}

/// Serves `routes` at the port. `drain` is the time that requests in flight have once the process stops.
pub fn bind(port: Port, config: &HttpConfig, drain: Duration, routes: Routes, readiness: Readiness) -> Result<Bound, ServeError> {
    let Port { local_addr, role, socket } = port;
    metrics::install();
    let inner = role != GATEWAY;
    let app = move || {
        let (api, plain, readiness) = (routes.api.clone(), routes.plain.clone(), readiness.clone());
        // Around everything, so that a page can read a refusal, too.
        let pages = !routes.cors_origins.is_empty();
        let cors = Condition::new(pages, cors::layer(&routes.cors_origins));
        let refusals = Condition::new(pages, from_fn(cors::refusals));
        let mut app = App::new().wrap_api();
        for configure in api {
            app = app.configure(|config| configure(config));
        }
        let mut app = app.build();
        for configure in plain {
            app = app.configure(|config| configure(config));
        }
        let app = app.configure(health::configure(role, readiness)).configure(metrics::configure);
        let layer = layer::Layer { role, inner, pattern: routes.pattern.unwrap_or(|_| None), paths: routes.paths };
        app.wrap(layer).wrap(cors).wrap(refusals)
    };
    let workers = config.workers.max(1);
    let server = Server::build()
        .workers(workers)
        .max_concurrent_connections(config.connections_max.div_ceil(workers).max(1))
        .shutdown_timeout(drain.as_secs() + 1)
        .disable_signals();
    let serving = Serving { role, inner, bounds: exchange::Bounds::of(config), stop: server.graceful_shutdown_signal() };
    let server = server.listen(role, socket, move || serving.clone().factory(app.clone()));
    let server = server.map_err(|source| ServeError::Bind { role, listen: local_addr, source })?;
    Ok(Bound { role, drain, server: server.run() })
}

impl Bound {
    /// Serves until `stop`, then lets what is in flight finish within the drain's bound.
    ///
    /// # Errors
    /// The server ended by itself, or not everything was finished in time.
    pub async fn run(self, stop: Shutdown) -> Result<(), ServeError> {
        let (role, handle) = (self.role, self.server.handle());
        let ended = |cause: String| ServeError::Ended { role, cause };
        let mut server = tokio::spawn(self.server);
        tokio::select! {
            () = stop.stopped() => {}
            () = metrics::upkeep() => {}
            result = &mut server => {
                return Err(ended(match result {
                    Ok(Ok(())) => "nobody asked it to".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(error) => error.to_string(),
                }));
            }
        }
        if tokio::time::timeout(self.drain, handle.stop(true)).await.is_err() {
            server.abort();
            return Err(ServeError::Unfinished { role });
        }
        match server.await {
            Ok(Err(error)) => Err(ended(error.to_string())),
            Err(error) if error.is_panic() => Err(ended(error.to_string())),
            _ => Ok(()),
        }
    }
}
