//! What is said to brokers by hand: where a topic's leaders are, and one fetch for the places where the client library cannot read the
//! answer. A connection for each; such places are rare. Bounded by the caller.

use std::io::{Error, Result};

use bytes::{Buf, BufMut, Bytes};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const METADATA: (i16, i16) = (3, 4);
const FETCH: (i16, i16) = (1, 4);
/// The largest answer that is read.
const ANSWER_BYTES_MAX: u32 = 64 * 1024 * 1024;
const READ_COMMITTED: i8 = 1;

/// What a partition's leader answered.
pub(super) struct Raw {
    pub end_offset: i64,
    /// Producer and first offset of the transactions that were aborted and lie among the records.
    pub aborted: Vec<(i64, i64)>,
    /// Record batches, the last one perhaps cut off.
    pub batches: Bytes,
}

/// What lies at `from` and after it, up to `bytes_max` or one batch.
pub(super) async fn fetch(servers: &[String], topic: &str, partition: i32, from: i64, bytes_max: i32) -> Result<Raw> {
    let leader = leader(servers, topic, partition).await?;
    let mut body = Vec::new();
    body.put_i32(-1);
    body.put_i32(0);
    body.put_i32(1);
    body.put_i32(bytes_max);
    body.put_i8(READ_COMMITTED);
    body.put_i32(1);
    put_string(&mut body, topic);
    body.put_i32(1);
    body.put_i32(partition);
    body.put_i64(from);
    body.put_i32(bytes_max);
    let mut stream = TcpStream::connect(leader).await?;
    let mut answer = ask(&mut stream, FETCH, &body).await?;
    fetched(&mut answer).ok_or_else(|| Error::other("an answer to a fetch that cannot be read"))?
}

fn fetched(answer: &mut Bytes) -> Option<Result<Raw>> {
    let _throttle = answer.try_get_i32().ok()?;
    let _topics = answer.try_get_i32().ok()?;
    let _name = string(answer)?;
    let _partitions = answer.try_get_i32().ok()?;
    let _partition = answer.try_get_i32().ok()?;
    let error = answer.try_get_i16().ok()?;
    let end_offset = answer.try_get_i64().ok()?;
    let _stable = answer.try_get_i64().ok()?;
    let mut aborted = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        aborted.push((answer.try_get_i64().ok()?, answer.try_get_i64().ok()?));
    }
    let length = usize::try_from(answer.try_get_i32().ok()?).unwrap_or_default();
    if error != 0 {
        return Some(Err(Error::other(format!("the broker answered a fetch with error {error}"))));
    }
    let batches = answer.split_to(length.min(answer.len()));
    Some(Ok(Raw { end_offset, aborted, batches }))
}

/// `host:port` of the partition's leader.
async fn leader(servers: &[String], topic: &str, partition: i32) -> Result<String> {
    let leaders = leaders(servers, topic).await?;
    let leader = leaders.into_iter().find(|(of, _)| *of == partition).map(|(_, address)| address);
    leader.ok_or_else(|| Error::other("no leader known"))
}

/// `host:port` of the leader of each of the topic's partitions that has one, from the first server that answers.
pub(super) async fn leaders(servers: &[String], topic: &str) -> Result<Vec<(i32, String)>> {
    let mut body = Vec::new();
    body.put_i32(1);
    put_string(&mut body, topic);
    body.put_u8(0); // and do not create it
    let mut failed = Error::other("no broker configured");
    for server in servers {
        let asked = async {
            let mut stream = TcpStream::connect(server).await?;
            let mut answer = ask(&mut stream, METADATA, &body).await?;
            leaders_in(&mut answer).ok_or_else(|| Error::other("an answer about leaders that cannot be read"))
        };
        match asked.await {
            Ok(leaders) => return Ok(leaders),
            Err(error) => failed = error,
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

async fn ask(stream: &mut TcpStream, request: (i16, i16), body: &[u8]) -> Result<Bytes> {
    let mut head = Vec::new();
    put_head(&mut head, request);
    stream.write_u32((head.len() + body.len()) as u32).await?;
    stream.write_all(&head).await?;
    stream.write_all(body).await?;
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
pub(super) async fn answer(stream: &mut TcpStream) -> Result<Bytes> {
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
