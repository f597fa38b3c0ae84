//! One fetch by hand, for the places where the client library cannot read the answer: where a partition's leader is, and
//! what bytes lie there. A connection for each; such places are rare. Bounded by the caller.

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

/// `host:port` of the partition's leader, from the first server that knows.
async fn leader(servers: &[String], topic: &str, partition: i32) -> Result<String> {
    let mut body = Vec::new();
    body.put_i32(1);
    put_string(&mut body, topic);
    body.put_u8(0); // and do not create it
    let mut failed = Error::other("no broker configured");
    for server in servers {
        let asked = async {
            let mut stream = TcpStream::connect(server).await?;
            let mut answer = ask(&mut stream, METADATA, &body).await?;
            leader_in(&mut answer, partition).ok_or_else(|| Error::other("no leader known"))
        };
        match asked.await {
            Ok(leader) => return Ok(leader),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn leader_in(answer: &mut Bytes, wanted: i32) -> Option<String> {
    let _throttle = answer.try_get_i32().ok()?;
    let mut brokers = Vec::new();
    for _ in 0..answer.try_get_i32().ok()? {
        let (id, host, port) = (answer.try_get_i32().ok()?, string(answer)?, answer.try_get_i32().ok()?);
        let _rack = string(answer)?;
        brokers.push((id, format!("{host}:{port}")));
    }
    let _cluster = string(answer)?;
    let _controller = answer.try_get_i32().ok()?;
    let _topics = answer.try_get_i32().ok()?;
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
        if partition == wanted {
            return brokers.into_iter().find(|(id, _)| *id == leader).map(|(_, address)| address);
        }
    }
    None
}

async fn ask(stream: &mut TcpStream, (api, version): (i16, i16), body: &[u8]) -> Result<Bytes> {
    let mut request = Vec::new();
    request.put_i16(api);
    request.put_i16(version);
    request.put_i32(1);
    put_string(&mut request, "shopd");
    request.put_slice(body);
    stream.write_u32(request.len() as u32).await?;
    stream.write_all(&request).await?;
    let length = stream.read_u32().await?;
    if !(4..=ANSWER_BYTES_MAX).contains(&length) {
        return Err(Error::other(format!("an answer of {length} bytes")));
    }
    let mut answer = vec![0; length as usize];
    stream.read_exact(&mut answer).await?;
    Ok(Bytes::from(answer).split_off(4))
}

fn put_string(to: &mut Vec<u8>, text: &str) {
    to.put_i16(text.len() as i16);
    to.put_slice(text.as_bytes());
}

/// A text, empty where it is null.
fn string(from: &mut Bytes) -> Option<String> {
    let Ok(length) = usize::try_from(from.try_get_i16().ok()?) else { return Some(String::new()) };
    (length <= from.len()).then(|| String::from_utf8_lossy(&from.split_to(length)).into_owned())
}
