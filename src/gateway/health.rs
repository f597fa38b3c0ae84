//! Whether each service has a live replica: the gateway's readiness. Changes nothing.

use futures::future::join;

use super::replicas::{Replicas, any_live};
use super::routes::ServiceName;

/// The services of which no replica is live.
pub async fn missing(orders: &Replicas, payments: &Replicas) -> Vec<String> {
    let (orders, payments) = join(any_live(orders), any_live(payments)).await;
    let all = [(ServiceName::Orders, orders), (ServiceName::Payments, payments)];
    all.into_iter().filter(|(_, live)| !live).map(|(service, _)| service.as_str().to_owned()).collect()
}
