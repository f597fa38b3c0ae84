//! A second Kafka client: duplicates, replays, contradictions and rubbish, on the topics that the shop reads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client, ClientBuilder};
use rskafka::record::Record;
use shopd::config::KafkaConfig;
use shopd::messaging::log::partitioner::partition_of;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::clients::Load;
use super::cluster::{REQUESTS, RESULTS};
use super::history::ForeignDebit;

const WAIT: Duration = Duration::from_secs(2);
/// Records of a partition that a replay repeats at most.
const REPLAYED_MAX: usize = 400;
const FETCH_BYTES: i32 = 200_000;

#[derive(Default)]
pub struct Forged {
    pub debits: Vec<ForeignDebit>,
    pub kinds: BTreeMap<&'static str, usize>,
}

struct Forger {
    kafka: KafkaConfig,
    load: Arc<Load>,
    rng: StdRng,
    client: Option<Client>,
    forged: Forged,
}

/// Forges until the load is told to stop; the broker may be away at any time.
pub async fn run(kafka: KafkaConfig, load: Arc<Load>, seed: u64) -> Forged {
    let mut forger = Forger { kafka, load, rng: StdRng::seed_from_u64(seed), client: None, forged: Forged::default() };
    while !forger.load.stop.load(Ordering::Relaxed) {
        let pause = forger.rng.random_range(20..300);
        sleep(Duration::from_millis(pause)).await;
        // A replay is some hundred records at once.
        let what = if forger.rng.random_bool(0.01) { 0 } else { forger.rng.random_range(1..25) };
        match timeout(WAIT * 4, forger.forge(what)).await {
            Ok(Ok((kind, records))) => *forger.forged.kinds.entry(kind).or_default() += records,
            // Away, or away in the middle.
            Ok(Err(_)) | Err(_) => forger.client = None,
        }
    }
    forger.forged
}

type Result<T> = std::result::Result<T, String>;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl Forger {
    async fn forge(&mut self, what: u32) -> Result<(&'static str, usize)> {
        match what {
            0 => self.replay().await,
            1..4 => self.repeat("same record again", |record, _| record).await,
            4..7 => self.repeat("same payload, new event id", new_event).await,
            7..9 => self.repeat("same payload, no headers", |record, _| Record { headers: BTreeMap::new(), ..record }).await,
            9..11 => self.repeat("encoded twice", twice_encoded).await,
            11..15 => self.contradict().await,
            15 => self.unknown_result().await,
            16..18 => self.rubbish().await,
            18 => self.nobodys_request().await,
            19..22 => self.foreign_debit().await,
            _ => self.conflicting_request().await,
        }
    }

    /// Some of what lies on a partition, again where it lies, changed a little.
    async fn repeat(&mut self, kind: &'static str, change: fn(Record, &mut StdRng) -> Record) -> Result<(&'static str, usize)> {
        let topic = [REQUESTS, RESULTS][self.rng.random_range(0..2)];
        let client = self.partition(topic, None).await?;
        let records = self.some_of(&client).await?;
        let count = self.rng.random_range(1..=10);
        let records: Vec<Record> = records.into_iter().take(count).map(|record| change(record, &mut self.rng)).collect();
        self.produce(kind, &client, records).await
    }

    /// A topic's partitions from offset 0, in another order.
    async fn replay(&mut self) -> Result<(&'static str, usize)> {
        let topic = [REQUESTS, RESULTS][self.rng.random_range(0..2)];
        let mut count = 0;
        for partition in 0..self.partitions(topic).await? {
            let client = self.partition(topic, Some(partition)).await?;
            let mut records = fetch(&client, 0).await?;
            records.truncate(REPLAYED_MAX);
            records.shuffle(&mut self.rng);
            count += self.produce("replay from offset 0", &client, records).await?.1;
        }
        Ok(("replay from offset 0", count))
    }

    /// The other end for an order that has one.
    async fn contradict(&mut self) -> Result<(&'static str, usize)> {
        let Some(order) = self.ended() else { return Ok(("contradicting result", 0)) };
        let status = match (order.status == "Finished", self.rng.random_bool(0.5)) {
            (true, true) => r#""Cancelled","FailureReason":"insufficient_funds""#,
            (true, false) => "3",
            (false, true) => r#""Finished""#,
            (false, false) => "2",
        };
        let value = format!(r#"{{"OrderId":"{}","Status":{status}}}"#, order.id);
        self.send("contradicting result", RESULTS, &order.id.to_string(), value).await
    }

    async fn unknown_result(&mut self) -> Result<(&'static str, usize)> {
        let id = Uuid::now_v7();
        let value = format!(r#"{{"OrderId":"{id}","Status":"Finished"}}"#);
        self.send("result of an unknown order", RESULTS, &id.to_string(), value).await
    }

    /// What no reader can decode, without a key or a value now and then.
    async fn rubbish(&mut self) -> Result<(&'static str, usize)> {
        let topic = [REQUESTS, RESULTS][self.rng.random_range(0..2)];
        let client = self.partition(topic, None).await?;
        let values: [Option<&[u8]>; 6] =
            [None, Some(b""), Some(b"\xff\xfe\x00"), Some(b"{\"OrderId\":7}"), Some(b"null"), Some(b"\"\\\"\"")];
        let value = values[self.rng.random_range(0..values.len())];
        let user = self.user();
        let key = self.rng.random_bool(0.5).then(|| user.into_bytes());
        self.produce("undecodable record", &client, vec![record(key, value.map(<[u8]>::to_vec))]).await
    }

    /// Of an account that is not there, for an order that is not there.
    async fn nobodys_request(&mut self) -> Result<(&'static str, usize)> {
        let value = request(Uuid::now_v7(), "nobody", "1.00");
        self.send("request without an account", REQUESTS, "nobody", value).await
    }

    /// Another producer's order, that a real account pays.
    async fn foreign_debit(&mut self) -> Result<(&'static str, usize)> {
        let (order, user, cents) = (Uuid::now_v7(), self.user(), self.rng.random_range(1..=99));
        // Before it is sent: whether it came through is seen in the ledger.
        self.forged.debits.push(ForeignDebit { order, user: user.clone(), amount: cents });
        let value = request(order, &user, &format!("0.{cents:02}"));
        self.send("foreign order that debits", REQUESTS, &user, value).await
    }

    /// An order that has ended, asked for again with another amount or user.
    async fn conflicting_request(&mut self) -> Result<(&'static str, usize)> {
        let Some(order) = self.ended() else { return Ok(("conflicting request", 0)) };
        let user = if self.rng.random_bool(0.5) { self.user() } else { order.fields.user };
        let value = request(order.id, &user, "0.01");
        self.send("conflicting request", REQUESTS, &user, value).await
    }

    fn user(&mut self) -> String {
        self.load.users[self.rng.random_range(0..self.load.opened)].clone()
    }

    fn ended(&mut self) -> Option<super::history::Order> {
        let ended = self.load.ended.lock().expect("nobody panics with it");
        (!ended.is_empty()).then(|| ended[self.rng.random_range(0..ended.len())].clone())
    }

    /// Where Kafka's own partitioner would put it, under no headers or a foreign source.
    async fn send(&mut self, kind: &'static str, topic: &str, key: &str, value: String) -> Result<(&'static str, usize)> {
        let partition = partition_of(key.as_bytes(), self.partitions(topic).await?);
        let client = self.partition(topic, Some(partition)).await?;
        let mut record = record(Some(key.as_bytes().to_vec()), Some(value.into_bytes()));
        if self.rng.random_bool(0.5) {
            record = new_event(record, &mut self.rng);
        }
        self.produce(kind, &client, vec![record]).await
    }

    async fn produce(
        &mut self,
        kind: &'static str,
        client: &PartitionClient,
        records: Vec<Record>,
    ) -> Result<(&'static str, usize)> {
        let count = records.len();
        if count > 0 {
            timeout(WAIT, client.produce(records, Compression::NoCompression)).await.map_err(text)?.map_err(text)?;
        }
        Ok((kind, count))
    }

    /// Records from somewhere in the partition.
    async fn some_of(&mut self, client: &PartitionClient) -> Result<Vec<Record>> {
        let end = client.get_offset(rskafka::client::partition::OffsetAt::Latest);
        let end = timeout(WAIT, end).await.map_err(text)?.map_err(text)?;
        if end == 0 {
            return Ok(Vec::new());
        }
        let from = self.rng.random_range(0..end);
        fetch(client, from).await
    }

    async fn client(&mut self) -> Result<&Client> {
        if self.client.is_none() {
            let built = timeout(WAIT, ClientBuilder::new(self.kafka.bootstrap_servers.clone()).client_id("forger").build()).await;
            self.client = Some(built.map_err(text)?.map_err(text)?);
        }
        self.client.as_ref().ok_or_else(|| "no client".into())
    }

    async fn partitions(&mut self, topic: &str) -> Result<i32> {
        let name = format!("{}{topic}", self.kafka.topic_prefix);
        let topics = timeout(WAIT, self.client().await?.list_topics()).await.map_err(text)?.map_err(text)?;
        let topic = topics.into_iter().find(|topic| topic.name == name).ok_or("no such topic")?;
        match i32::try_from(topic.partitions.len()).map_err(text)? {
            0 => Err("a topic without partitions".into()),
            count => Ok(count),
        }
    }

    async fn partition(&mut self, topic: &str, partition: Option<i32>) -> Result<PartitionClient> {
        let partition = match partition {
            Some(partition) => partition,
            None => {
                let count = self.partitions(topic).await?;
                self.rng.random_range(0..count)
            }
        };
        let name = format!("{}{topic}", self.kafka.topic_prefix);
        let client = self.client().await?.partition_client(name, partition, UnknownTopicHandling::Error);
        timeout(WAIT, client).await.map_err(text)?.map_err(text)
    }
}

async fn fetch(client: &PartitionClient, from: i64) -> Result<Vec<Record>> {
    let fetched = timeout(WAIT, client.fetch_records(from, 1..FETCH_BYTES, 50)).await.map_err(text)?.map_err(text)?;
    Ok(fetched.0.into_iter().map(|record| record.record).collect())
}

fn record(key: Option<Vec<u8>>, value: Option<Vec<u8>>) -> Record {
    Record { key, value, headers: BTreeMap::new(), timestamp: chrono::Utc::now() }
}

/// Another producer's event about the same.
fn new_event(mut record: Record, rng: &mut StdRng) -> Record {
    record.headers.insert("ce_id".into(), Uuid::from_u128(rng.random()).to_string().into_bytes());
    record.headers.insert("ce_source".into(), b"/another/producer".to_vec());
    record
}

/// As the original system's relay wrote it: the JSON as a JSON string, no headers.
fn twice_encoded(record: Record, _: &mut StdRng) -> Record {
    let value = record.value.and_then(|value| String::from_utf8(value).ok()).and_then(|text| serde_json::to_vec(&text).ok());
    Record { value, headers: BTreeMap::new(), ..record }
}

fn request(order: Uuid, user: &str, amount: &str) -> String {
    format!(
        r#"{{"OrderId":"{order}","UserId":"{user}","Amount":{amount},"Description":null,"Timestamp":"2025-06-12T10:11:12.1234567Z"}}"#
    )
}
