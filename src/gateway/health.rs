//! Whether each service has a live replica. Asks their `/health/live`; changes nothing.
//!
//! A connection of its own for each probe: readiness runs on whichever thread, and the pool's connections stay on theirs.

use std::time::Duration;

use actix_web::http::Uri;
use futures::future::{join, join_all};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::replicas::Replicas;

/// For one probe, connecting included.
const PROBE_TIME_MAX: Duration = Duration::from_secs(1);

/// The services of which no replica is live.
pub async fn missing(orders: &Replicas, payments: &Replicas) -> Vec<String> {
    let (orders, payments) = join(any_live(orders), any_live(payments)).await;
    [("orders", orders), ("payments", payments)].into_iter().filter(|(_, live)| !live).map(|(name, _)| name.to_owned()).collect()
}

async fn any_live(replicas: &Replicas) -> bool {
    join_all(replicas.bases().map(is_live)).await.contains(&true)
}

async fn is_live(base: &str) -> bool {
    let Ok(base) = base.parse::<Uri>() else { return false };
    matches!(tokio::time::timeout(PROBE_TIME_MAX, probe(&base)).await, Ok(Ok(true)))
}

async fn probe(base: &Uri) -> std::io::Result<bool> {
    let host = base.host().unwrap_or_default();
    let port = base.port_u16().unwrap_or(80);
    let mut stream = TcpStream::connect((host.trim_matches(['[', ']']), port)).await?;
    let request = format!("GET /health/live HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut status_line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status_line).await?;
    Ok(status_line.starts_with(b"HTTP/1.") && status_line.ends_with(b" 200"))
}
