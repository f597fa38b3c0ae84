//! What is said to brokers by hand: where a topic's leaders are, and one fetch for a place that is asked for by itself. A connection for
//! each; such places are rare. Bounded by the caller.

use std::io::{Error, Result};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::dial::Dialer;
use super::fetch::{self, Place};
use super::part::Part;

const METADATA: (i16, i16) = (3, 4);
/// The largest answer that is read.
const ANSWER_BYTES_MAX: u32 = 64 * 1024 * 1024;

/// What lies at a place and after it, up to its bytes or one batch; with nothing there the broker waits for so long.
pub(super) async fn fetch(dialer: &Dialer, servers: &[String], place: &Place, wait: Duration) -> Result<Part> {
    let leader = leader(dialer, servers, &place.topic, place.partition).await?;
    let mut stream = dialer.dial(&leader, dialer.until()).await?.stream;
    let mut request = Vec::new();
    fetch::request(&mut request, &[place], i32::try_from(wait.as_millis()).unwrap_or(i32::MAX));
    stream.write_all(&request).await?;
    stream.flush().await?;
    let parts = fetch::parts(&mut answer(&mut stream).await?);
    parts.and_then(|mut parts| parts.pop()).ok_or_else(|| Error::other("an answer to a fetch that cannot be read"))
}

/// `host:port` of the partition's leader.
async fn leader(dialer: &Dialer, servers: &[String], topic: &str, partition: i32) -> Result<String> {
    let leaders = leaders(dialer, servers, topic).await?;
    let leader = leaders.into_iter().find(|(of, _)| *of == partition).map(|(_, address)| address);
    leader.ok_or_else(|| Error::other("no leader known"))
}

/// `host:port` of the leader of each of the topic's partitions that has one, from the first server that answers.
pub(super) async fn leaders(dialer: &Dialer, servers: &[String], topic: &str) -> Result<Vec<(i32, String)>> {
    let mut body = Vec::new();
    body.put_i32(1);
    put_string(&mut body, topic);
    body.put_u8(0); // and do not create it
    let mut failed = Error::other("no broker configured");
    let mut turns = dialer.turns(servers);
    while let Some((server, until)) = turns.next() {
        let asked = async {
            let mut answer = ask(&mut dialer.dial(server, until).await?.stream, METADATA, &body).await?;
            leaders_in(&mut answer).ok_or_else(|| Error::other("an answer about leaders that cannot be read"))
        };
        match dialer.in_turn(server, until, asked).await {
            Ok(leaders) => return Ok(leaders),
            Err(error) => failed = Error::new(error.kind(), format!("{server}: {error}")),
        }
    }
    Err(failed)
}

fn leaders_in(answer: &mut Bytes) -> Option<Vec<(i32, String)>> {
    let _throttle = answer.try_get_i32().ok()?;
    let mut brokers = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        let (id, host, port) = (answer.try_get_i32().ok()?, string(answer)?, answer.try_get_i32().ok()?);
        let _rack = string(answer)?;
        brokers.push((id, format!("{host}:{port}")));
    }
    let _cluster = string(answer)?;
    let _controller = answer.try_get_i32().ok()?;
    let mut leaders = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        let _error = answer.try_get_i16().ok()?;
        let _name = string(answer)?;
        let _internal = answer.try_get_u8().ok()?;
        for _ in 0..answer.try_get_i32().ok()? {
            let _error = answer.try_get_i16().ok()?;
            let (partition, leader) = (answer.try_get_i32().ok()?, answer.try_get_i32().ok()?);
            for _replicas_then_in_sync in 0..2 {
                for _ in 0..answer.try_get_i32().ok()? {
                    answer.try_get_i32().ok()?;
                }
            }
            leaders.extend(brokers.iter().find(|(id, _)| *id == leader).map(|(_, address)| (partition, address.clone())));
        }
    }
    Some(leaders)
}

/// The body of the answer to a request of this kind and version, within the bound on answers.
pub(super) async fn ask(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), kind: (i16, i16), body: &[u8]) -> Result<Bytes> {
    let mut request = Vec::new();
    request.put_i32(0); // its length, below
    put_head(&mut request, kind);
    request.put_slice(body);
    let length = (request.len() - 4) as i32;
    request[..4].copy_from_slice(&length.to_be_bytes());
    stream.write_all(&request).await?;
    stream.flush().await?;
    answer(stream).await
}

/// The head of a request of this kind and version.
pub(super) fn put_head(to: &mut Vec<u8>, (api, version): (i16, i16)) {
    to.put_i16(api);
    to.put_i16(version);
    to.put_i32(1);
    put_string(to, "shopd");
}

/// The body of the next answer.
pub(super) async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> Result<Bytes> {
    let length = stream.read_u32().await?;
    if !(4..=ANSWER_BYTES_MAX).contains(&length) {
        return Err(Error::other(format!("an answer of {length} bytes")));
    }
    let mut answer = vec![0; length as usize];
    stream.read_exact(&mut answer).await?;
    Ok(Bytes::from(answer).split_off(4))
}

pub(super) fn put_string(to: &mut Vec<u8>, text: &str) {
    to.put_i16(text.len() as i16);
    to.put_slice(text.as_bytes());
}

/// A text, empty where it is null.
pub(super) fn string(from: &mut Bytes) -> Option<String> {
    let Ok(length) = usize::try_from(from.try_get_i16().ok()?) else { return Some(String::new()) };
    (length <= from.len()).then(|| String::from_utf8_lossy(&from.split_to(length)).into_owned())
}
