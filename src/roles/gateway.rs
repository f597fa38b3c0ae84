//! The gateway role: the one public port.

use std::time::Duration;

use crate::config::Config;
use crate::gateway::Gateway;
use crate::http::{self, Bound, Port, Readiness, ServeError};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let port = open(&config)?;
    let gateway = Gateway::new(&config.gateway, stop.clone())?;
    let (bound, readiness) = bind(port, &config, &gateway, super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("gateway", readiness, stop.clone()));
    super::together(bound.run(stop.clone()), gateway.run_checks(), &stop).await
}

pub(super) fn open(config: &Config) -> Result<Port, ServeError> {
    Port::open(http::GATEWAY, config.gateway.listen)
}

pub(super) fn bind(port: Port, config: &Config, gateway: &Gateway, drain: Duration) -> Result<(Bound, Readiness), ServeError> {
    let (readiness, routes) = (gateway.readiness(), gateway.routes());
    let bound = http::bind(port, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}
