//! What no flow over these servers can go below: a commit of one row, a record's way over Kafka.

use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::Utc;
use rskafka::client::partition::{Compression, PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client as Library, ClientBuilder};
use shopd::messaging::log::{KafkaLog, Log, Record};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};

use super::super::{Bench, Result};

const DATABASE: &str = "floor";
const TOPIC: &str = "floor";
/// What goes through the client library.
const TOPIC_LIBRARY: &str = "floor-library";
const PATIENCE: Duration = Duration::from_secs(20);
const FETCH_BYTES_MAX: i32 = 64 * 1024;
const FETCH_WAIT_MS: i32 = 5_000;
const PAYLOAD_BYTES: usize = 180;

/// Whose client carries a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// The log of the product.
    Ours,
    /// The library that it is built on, which knows nothing of it.
    Library,
}

pub struct Floor {
    client: Client,
    insert: Statement,
    log: KafkaLog,
    library: PartitionClient,
    arrivals: mpsc::Receiver<Instant>,
    arrivals_library: mpsc::Receiver<Instant>,
    tails: [JoinHandle<()>; 2],
}

impl Floor {
    pub async fn open(bench: &Bench) -> Result<Self> {
        bench.servers.create_database(DATABASE).await?;
        let client = bench.servers.connect(DATABASE).await?;
        client
            .batch_execute("create table row (id bigint generated always as identity primary key, payload bytea not null)")
            .await?;
        let insert = client.prepare("insert into row (payload) values ($1)").await?;
        let prefix = format!("floor{}-", bench.servers.next_shop());
        let log = bench.servers.log(&prefix);
        log.create_topics(&[TOPIC, TOPIC_LIBRARY], 1).await?;
        let (to, arrivals) = mpsc::channel(16);
        let tail = tokio::spawn(tail(bench.servers.log(&prefix), to));
        let topic = format!("{prefix}{TOPIC_LIBRARY}");
        let library = partition(&bench.servers.kafka.address, &topic).await?;
        let (to, arrivals_library) = mpsc::channel(16);
        let tail_library = tokio::spawn(tail_library(partition(&bench.servers.kafka.address, &topic).await?, to));
        Ok(Self { client, insert, log, library, arrivals, arrivals_library, tails: [tail, tail_library] })
    }

    /// A transaction of one row, in milliseconds.
    pub async fn commit(&self) -> Result<f64> {
        let payload = vec![7u8; PAYLOAD_BYTES];
        let since = Instant::now();
        let done = timeout(PATIENCE, self.client.execute(&self.insert, &[&payload])).await;
        done.map_err(|_| "a commit of one row does not end")??;
        Ok(since.elapsed().as_secs_f64() * 1e3)
    }

    /// From a produce to the record in the hand of a waiting reader, in milliseconds.
    pub async fn trip(&mut self, through: Through) -> Result<f64> {
        let (key, value) = (Bytes::from_static(b"key"), Bytes::from(vec![7u8; PAYLOAD_BYTES]));
        let since = Instant::now();
        let arrivals = match through {
            Through::Ours => {
                let (key, value) = (Some(key), Some(value));
                let record = Record { topic: TOPIC.into(), key, value, headers: Vec::new(), timestamp: Utc::now() };
                self.log.append(vec![record]).await?;
                &mut self.arrivals
            }
            Through::Library => {
                let (key, value) = (Some(key.to_vec()), Some(value.to_vec()));
                let record = rskafka::record::Record { key, value, headers: Default::default(), timestamp: Utc::now() };
                self.library.produce(vec![record], Compression::NoCompression).await?;
                &mut self.arrivals_library
            }
        };
        let arrived = timeout(PATIENCE, arrivals.recv()).await.map_err(|_| "a record does not arrive")?;
        Ok((arrived.ok_or("the floor's reader ended")? - since).as_secs_f64() * 1e3)
    }

    pub async fn close(self, bench: &Bench) -> Result<()> {
        self.tails.iter().for_each(JoinHandle::abort);
        drop(self.client);
        bench.servers.drop_database(DATABASE).await
    }
}

/// Over connections of its own.
async fn partition(broker: &str, topic: &str) -> Result<PartitionClient> {
    let client: Library = ClientBuilder::new(vec![broker.to_owned()]).build().await?;
    Ok(client.partition_client(topic, 0, UnknownTopicHandling::Retry).await?)
}

/// Says when each record is in hand, for ever.
async fn tail(log: KafkaLog, to: mpsc::Sender<Instant>) {
    let mut from = 0;
    loop {
        match log.fetch(TOPIC, 0, from, FETCH_BYTES_MAX).await {
            Ok(fetched) => {
                from = fetched.next_offset;
                for _ in fetched.records {
                    if to.send(Instant::now()).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => eprintln!("bench: the floor's reader: {error}"),
        }
    }
}

async fn tail_library(partition: PartitionClient, to: mpsc::Sender<Instant>) {
    let mut from = 0;
    loop {
        match partition.fetch_records(from, 1..FETCH_BYTES_MAX, FETCH_WAIT_MS).await {
            Ok((records, _)) => {
                for record in records {
                    from = record.offset + 1;
                    if to.send(Instant::now()).await.is_err() {
                        return;
                    }
                }
            }
            Err(error) => eprintln!("bench: the floor's reader through the library: {error}"),
        }
    }
}
