//! What no flow over these servers can go below: a commit of one row, a record's way over Kafka.

use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::Utc;
use shopd::messaging::log::{KafkaLog, Log, Record};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, Statement};

use super::super::{Bench, Result};

const DATABASE: &str = "floor";
const TOPIC: &str = "floor";
const PATIENCE: Duration = Duration::from_secs(20);
const FETCH_BYTES_MAX: i32 = 64 * 1024;
const PAYLOAD_BYTES: usize = 180;

pub struct Floor {
    client: Client,
    insert: Statement,
    log: KafkaLog,
    arrivals: mpsc::Receiver<Instant>,
    tail: JoinHandle<()>,
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
        log.create_topics(&[TOPIC], 1).await?;
        let (to, arrivals) = mpsc::channel(16);
        let reader = bench.servers.log(&prefix);
        let tail = tokio::spawn(async move {
            let mut from = 0;
            loop {
                match reader.fetch(TOPIC, 0, from, FETCH_BYTES_MAX).await {
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
        });
        Ok(Self { client, insert, log, arrivals, tail })
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
    pub async fn trip(&mut self) -> Result<f64> {
        let record = Record {
            topic: TOPIC.into(),
            key: Some(Bytes::from_static(b"key")),
            value: Some(Bytes::from(vec![7u8; PAYLOAD_BYTES])),
            headers: Vec::new(),
            timestamp: Utc::now(),
        };
        let since = Instant::now();
        self.log.append(vec![record]).await?;
        let arrived = timeout(PATIENCE, self.arrivals.recv()).await.map_err(|_| "a record does not arrive")?;
        Ok((arrived.ok_or("the floor's reader ended")? - since).as_secs_f64() * 1e3)
    }

    pub async fn close(self, bench: &Bench) -> Result<()> {
        self.tail.abort();
        drop(self.client);
        bench.servers.drop_database(DATABASE).await
    }
}
