//! The gateway role: the one public port.

use std::time::Duration;

use crate::config::Config;
use crate::gateway::Gateway;
use crate::http::{self, Bound, Readiness, ServeError};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let gateway = Gateway::new(&config.gateway, stop.clone())?;
    let (bound, readiness) = bind(&config, &gateway, super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("gateway", readiness, stop.clone()));
    super::together(bound.run(stop.clone()), gateway.run_checks(), &stop).await
}

pub(super) fn bind(config: &Config, gateway: &Gateway, drain: Duration) -> Result<(Bound, Readiness), ServeError> {
    let (readiness, routes) = (gateway.readiness(), gateway.routes());
    let bound = http::bind(http::GATEWAY, config.gateway.listen, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}
