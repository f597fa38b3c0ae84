//! A request's body: read whole before it is passed on, so that it can be sent again to another replica; bounded in bytes and time.

use std::time::Duration;

use actix_web::http::header::{self, HeaderMap};
use actix_web::web::Payload;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::timeout;

use crate::http::{BODY_BYTES_MAX, Code, Problem};

/// The whole body; what is left of a larger one is drained by the layer around us.
pub async fn read(body: Payload, headers: &HeaderMap, time_max: Duration) -> Result<Bytes, Problem> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()).and_then(|value| value.parse().ok());
    if announced.is_some_and(|length: u64| length > BODY_BYTES_MAX as u64) {
        return Err(too_large());
    }
    let late = |_| Problem::invalid("body", "The body did not arrive in time.");
    timeout(time_max, collect(body)).await.map_err(late)?
}

async fn collect(mut body: Payload) -> Result<Bytes, Problem> {
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while let Some(chunk) = body.next().await {
        let broken = |error| Problem::invalid("body", "The body did not arrive whole.").caused_by(error);
        let chunk = chunk.map_err(broken)?;
        if first.len() + whole.len() + chunk.len() > BODY_BYTES_MAX {
            return Err(too_large());
        }
        // Most come in one piece, which is not copied.
        if first.is_empty() && whole.is_empty() {
            first = chunk;
        } else {
            whole.extend_from_slice(&std::mem::take(&mut first));
            whole.extend_from_slice(&chunk);
        }
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

fn too_large() -> Problem {
    Problem::new(Code::PayloadTooLarge, "The body is larger than 64 KiB.")
}
