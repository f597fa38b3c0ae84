//! The gateway role: the one public port.

use std::time::Duration;

use crate::config::{Config, GatewayConfig};
use crate::gateway::Gateway;
use crate::http::{self, Bound, Readiness, ServeError};
use crate::shutdown::Shutdown;

use super::{DRAIN_ALONE, RoleError};

pub async fn run(config: Config, stop: Shutdown) -> Result<(), RoleError> {
    let (bound, readiness) = bind(&config, &config.gateway, super::share(&config, DRAIN_ALONE))?;
    tokio::spawn(super::announce("gateway", readiness, stop.clone()));
    Ok(bound.run(stop).await?)
}

/// `gateway` names the replicas' addresses, which `all` knows only once they listen.
pub(super) fn bind(config: &Config, gateway: &GatewayConfig, drain: Duration) -> Result<(Bound, Readiness), ServeError> {
    let gateway = Gateway::new(gateway);
    let readiness = gateway.readiness();
    let routes = gateway.routes();
    let bound = http::bind(http::GATEWAY, config.gateway.listen, &config.http, drain, routes, readiness.clone())?;
    Ok((bound, readiness))
}
