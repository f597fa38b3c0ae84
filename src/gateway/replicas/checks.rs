//! Active checks: whether replicas are alive, asked at `/health/live`. Life, not readiness: a database that is away makes every replica
//! unready, and none of them a worse one than the others.
//!
//! A connection of its own for each probe, so that it asks the replica's listener, too.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Replica, Replicas, Seen};
use crate::shutdown::Shutdown;

/// For one probe, connecting included.
const PROBE_TIME_MAX: Duration = Duration::from_millis(500);
/// Between two probes of one that is well, and of one that is not.
const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_EJECTED: Duration = Duration::from_millis(250);
/// For the answer to whether any replica of a service is live.
const ANY_LIVE_TIME_MAX: Duration = Duration::from_secs(1);

/// Checks every replica until `stop`, those that are new from when they are known.
pub async fn watch(replicas: &Replicas, stop: &Shutdown) {
    let mut known = replicas.known.subscribe();
    let (mut checks, mut checked) = (FuturesUnordered::new(), HashSet::new());
    loop {
        for replica in known.borrow_and_update().iter() {
            if checked.insert(replica.id()) {
                checks.push(watch_one(replicas, replica.clone()));
            }
        }
        tokio::select! {
            // It cannot fail: `replicas` holds the other end.
            _ = known.changed() => {}
            Some(id) = checks.next() => {
                checked.remove(&id);
            }
            () = stop.stopped() => return,
        }
    }
}

/// Checks one until it is gone, then answers with its id. One that is alone is not checked: there is no other to ask.
async fn watch_one(replicas: &Replicas, replica: Arc<Replica>) -> usize {
    loop {
        let is_ejected = replica.health().is_ejected(replicas.now_ms());
        tokio::time::sleep(if is_ejected { INTERVAL_EJECTED } else { INTERVAL }).await;
        // What is under way at one that is gone may still have to be given up.
        if replica.is_gone() && replica.in_flight() == 0 {
            return replica.id();
        }
        if replica.is_gone() || replicas.len() > 1 {
            let is_live = is_live(&replica, PROBE_TIME_MAX).await;
            replicas.see(&replica, if is_live { Seen::CheckPassed } else { Seen::CheckMissed });
        }
    }
}

/// Whether any replica is live now; within a second.
pub async fn any_live(replicas: &Replicas) -> bool {
    let known = replicas.known.borrow().clone();
    join_all(known.iter().map(|replica| is_live(replica, ANY_LIVE_TIME_MAX))).await.contains(&true)
}

async fn is_live(replica: &Replica, time_max: Duration) -> bool {
    matches!(tokio::time::timeout(time_max, probe(replica)).await, Ok(Ok(true)))
}

async fn probe(replica: &Replica) -> std::io::Result<bool> {
    let mut stream = replica.connect().await?;
    let request = format!("GET /health/live HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", replica.authority());
    stream.write_all(request.as_bytes()).await?;
    let mut status_line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut status_line).await?;
    // Whatever it says beside a 5xx: it is there and speaks HTTP.
    Ok(status_line.starts_with(b"HTTP/1.") && status_line[8] == b' ' && (b'2'..=b'4').contains(&status_line[9]))
}
