//! Produce requests by hand: one to each broker for all the partitions that it leads, where the client library makes one each and copies
//! every record twice. It does the plain case only; whatever a broker answers beside "taken" is the client library's to find out.

use std::collections::{BTreeMap, HashMap};
use std::io::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use tokio::io::AsyncWriteExt;

use super::dial::Dialer;
use super::leaders::Leaders;
use super::lines::{Line, Lines};
use super::raw;
use crate::messaging::log::Record;

const PRODUCE: (i16, i16) = (0, 7);
const ALL_IN_SYNC: i16 = -1;

/// What goes to one partition: at most one batch of it.
pub(super) struct Part<'r> {
    pub topic: &'r str,
    pub partition: i32,
    pub records: Vec<&'r Record>,
    pub compressed: bool,
}

/// The connections for produce requests, by the brokers' addresses.
pub(super) struct Wire {
    leaders: Arc<Leaders>,
    dialer: Arc<Dialer>,
    idle: Mutex<HashMap<String, Lines>>,
}

impl Wire {
    pub fn new(leaders: Arc<Leaders>, dialer: Arc<Dialer>) -> Self {
        Self { leaders, dialer, idle: Mutex::default() }
    }

    /// Which of `parts` go to which broker; those whose leader is not known are left out.
    pub async fn by_leader(&self, parts: &[Part<'_>]) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut by_leader: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, part) in parts.iter().enumerate() {
            if let Some(leader) = self.leaders.of(part.topic, part.partition).await? {
                by_leader.entry(leader).or_default().push(index);
            }
        }
        Ok(by_leader)
    }

    /// Sends `parts`, ordered by topic, to `broker` in one request; true for each that all in-sync replicas have taken. After an error, or
    /// when it is dropped, nobody knows.
    pub async fn produce(&self, broker: &str, parts: &[&Part<'_>], timeout: Duration) -> Result<Vec<bool>> {
        let idle = locked(&self.idle).get_mut(broker).and_then(Lines::take);
        let mut line = match idle {
            Some(line) => line,
            None => Line::dial(&self.dialer, broker, self.dialer.until()).await?,
        };
        write_request(&mut line.request, &mut line.scratch, parts, timeout)?;
        line.connection.stream.write_all(&line.request).await?;
        line.connection.stream.flush().await?;
        let mut answer = raw::answer(&mut line.connection.stream).await?;
        let taken = taken(&mut answer, parts).ok_or_else(|| Error::other("an answer to a produce that cannot be read"))?;
        let mut idle = locked(&self.idle);
        idle.entry(broker.to_owned()).or_default().put(line);
        // Those to brokers that are asked for nothing any more, too.
        idle.retain(|_, lines| {
            lines.close_unusable();
            !lines.is_empty()
        });
        Ok(taken)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned map is still a map: nothing panics in the middle of a change of it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_request(out: &mut Vec<u8>, scratch: &mut Vec<u8>, parts: &[&Part<'_>], timeout: Duration) -> Result<()> {
    out.put_i32(0); // its length, below
    raw::put_head(out, PRODUCE);
    out.put_i16(-1); // no transaction
    out.put_i16(ALL_IN_SYNC);
    out.put_i32(i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX));
    let topics = parts.chunk_by(|a, b| a.topic == b.topic);
    out.put_i32(topics.clone().count() as i32);
    for parts in topics {
        raw::put_string(out, parts[0].topic);
        out.put_i32(parts.len() as i32);
        for part in parts {
            out.put_i32(part.partition);
            out.put_i32(0); // the batch's length, below
            let start = out.len();
            super::encode::batch(out, scratch, part.records.iter().copied(), part.compressed)?;
            let length = (out.len() - start) as i32;
            out[start - 4..start].copy_from_slice(&length.to_be_bytes());
        }
    }
    let length = i32::try_from(out.len() - 4).map_err(|_| Error::other("a request above 2 GiB"))?;
    out[..4].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

fn taken(answer: &mut Bytes, parts: &[&Part<'_>]) -> Option<Vec<bool>> {
    let mut taken = vec![false; parts.len()];
    for _ in 0..answer.try_get_i32().ok()? {
        let topic = raw::string(answer)?;
        for _ in 0..answer.try_get_i32().ok()? {
            let (partition, error) = (answer.try_get_i32().ok()?, answer.try_get_i16().ok()?);
            let _base_offset = answer.try_get_i64().ok()?;
            let _append_time = answer.try_get_i64().ok()?;
            let _start_offset = answer.try_get_i64().ok()?;
            let index = parts.iter().position(|part| part.partition == partition && part.topic == topic)?;
            taken[index] = error == 0;
        }
    }
    Some(taken)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::lines::IDLE_MAX;
    use super::*;
    use crate::config::{Config, KafkaConfig, SaslMechanism, Secret, SecurityProtocol};
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    proptest! {
        #[test]
        fn any_answer_ends_in_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let part = Part { topic: "t", partition: 0, records: vec![], compressed: false };
            let _ = taken(&mut bytes.into(), &[&part]);
        }
    }

    /// Lets everybody in for `lifetime_ms`, takes no record, and counts its connections.
    async fn broker(lifetime_ms: i64) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, connections) = (listener.local_addr().unwrap().to_string(), Arc::<AtomicUsize>::default());
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(async move {
                    while let Ok(length) = stream.read_u32().await {
                        let mut request = vec![0; length as usize];
                        stream.read_exact(&mut request).await.unwrap();
                        let mut answer = vec![0, 0, 0, 1];
                        match request[1] {
                            17 => answer.put_bytes(0, 6), // no error, nothing offered
                            36 => {
                                answer.put_bytes(0, 8); // no error, nothing said
                                answer.put_i64(lifetime_ms);
                            }
                            _ => answer.put_i32(0), // of no topic
                        }
                        stream.write_u32(answer.len() as u32).await.unwrap();
                        stream.write_all(&answer).await.unwrap();
                    }
                });
            }
        });
        (address, connections)
    }

    #[tokio::test]
    async fn a_connection_is_used_again_until_its_session_is_almost_over() {
        for (lifetime_ms, expected) in [(0, 1), (60_000, 1), (1, 3)] {
            let (address, connections) = broker(lifetime_ms).await;
            let config = KafkaConfig {
                security_protocol: SecurityProtocol::SaslPlaintext,
                sasl_mechanism: SaslMechanism::Plain,
                sasl_username: Some("shop".into()),
                sasl_password: Some(Secret::new("hunter2")),
                ..Config::default().kafka
            };
            let dialer = Arc::new(Dialer::new(&config));
            let wire = Wire::new(Arc::new(Leaders::new(&[], dialer.clone())), dialer);
            let part = Part { topic: "t", partition: 0, records: vec![], compressed: false };
            for _ in 0..3 {
                assert_eq!(wire.produce(&address, &[&part], Duration::from_secs(1)).await.unwrap(), [false]);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(connections.load(Ordering::Relaxed), expected, "{lifetime_ms}");
        }
    }

    /// The relays of two outboxes are in one process. Red where one connection is kept: one of the two makes a new one each time.
    #[tokio::test]
    async fn two_that_produce_at_once_have_a_connection_each_and_keep_them() {
        let (address, connections) = broker(0).await;
        let dialer = Arc::new(Dialer::new(&Config::default().kafka));
        let wire = Wire::new(Arc::new(Leaders::new(&[], dialer.clone())), dialer);
        let part = Part { topic: "t", partition: 0, records: vec![], compressed: false };
        let parts = [&part];
        for _ in 0..5 {
            let produce = || wire.produce(&address, &parts, Duration::from_secs(20));
            let (one, other) = tokio::join!(produce(), produce());
            assert_eq!((one.unwrap(), other.unwrap()), (vec![false], vec![false]));
        }
        assert_eq!(connections.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn connections_that_nobody_uses_are_closed_also_those_to_brokers_that_are_gone() {
        let ((gone, _), (there, connections)) = (broker(0).await, broker(0).await);
        let dialer = Arc::new(Dialer::new(&Config::default().kafka));
        let wire = Wire::new(Arc::new(Leaders::new(&[], dialer.clone())), dialer);
        let part = Part { topic: "t", partition: 0, records: vec![], compressed: false };
        let produce = async |broker: &str| wire.produce(broker, &[&part], Duration::from_secs(20)).await.unwrap();
        produce(&gone).await;
        produce(&there).await;
        tokio::time::pause();
        tokio::time::advance(IDLE_MAX).await;
        tokio::time::resume();
        produce(&there).await;
        assert_eq!(connections.load(Ordering::Relaxed), 2, "it could have been closed by the broker");
        assert_eq!(locked(&wire.idle).keys().collect::<Vec<_>>(), [&there]);
    }

    #[test]
    fn each_partition_is_taken_or_not_by_its_own_error() {
        let part = |partition| Part { topic: "t", partition, records: vec![], compressed: false };
        let (two, seven) = (part(2), part(7));
        let mut answer = Vec::new();
        answer.put_i32(1);
        raw::put_string(&mut answer, "t");
        answer.put_i32(2);
        for (partition, error) in [(7, 0), (2, 6)] {
            answer.put_i32(partition);
            answer.put_i16(error);
            (0..3).for_each(|_| answer.put_i64(0));
        }
        assert_eq!(taken(&mut answer.into(), &[&two, &seven]), Some(vec![false, true]));
    }
}
