//! The Postgres server, with the limits' own settings, and beside it the broker.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use rskafka::client::ClientBuilder;
use shopd::config::KafkaConfig;
use shopd::contracts::TOPICS;
use shopd::embedded::{self, Options, Server};
use shopd::messaging::log::KafkaLog;
use tokio_postgres::Client;

use super::super::{Result, machine};
use super::{Broker, Cpu, broker};

/// As in `benches/limits/postgres_limits.py`; the rest of what stands there is the default.
const SETTINGS: [(&str, &str); 8] = [
    ("shared_buffers", "512MB"),
    ("max_wal_size", "4GB"),
    // What was there once is used again and never removed.
    ("min_wal_size", "4GB"),
    ("checkpoint_timeout", "15min"),
    ("max_connections", "120"),
    ("autovacuum_naptime", "10s"),
    ("dynamic_shared_memory_type", "mmap"),
    // The default; the embedded server has them off.
    ("huge_pages", "try"),
];
const KAFKA_REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// Dropping a database waits for a checkpoint.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(120);

/// Dropped in this order: the script that ends the broker reads its number in the folder, and a server is told to stop by its files.
pub struct Servers {
    pub kafka: Broker,
    postgres: Option<Server>,
    postgres_pid: u32,
    shops: Cell<u32>,
    dir: tempfile::TempDir,
}

impl Servers {
    /// A server that has just been made writes 16 MB of zeros to the disk whenever it begins a file of its write-ahead log, and every commit
    /// waits: 40 ms each second under load, on a fast disk. One that has run for a while uses old files again. So this one begins with `recycled`
    /// of them ([`recycle`]).
    pub async fn start(recycled: u32) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("shopd-bench-").tempdir()?;
        let mut options = Options::new(dir.path().join("data"));
        options.settings = SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        options.progress = false;
        recycle(&options, recycled).await?;
        let postgres = embedded::start(&options).await?;
        let postgres_pid = postgres.pid().cast_unsigned();
        let kafka = Broker::start(dir.path().join("kafka")).await?;
        Ok(Self { kafka, postgres: Some(postgres), postgres_pid, shops: Cell::new(0), dir })
    }

    /// Another shop's number on these servers.
    pub fn next_shop(&self) -> u32 {
        self.shops.set(self.shops.get() + 1);
        self.shops.get()
    }

    fn postgres(&self) -> Result<&Server> {
        Ok(self.postgres.as_ref().ok_or("the database server was stopped")?)
    }

    pub fn url(&self, database: &str) -> Result<String> {
        Ok(self.postgres()?.url(database).expose().to_owned())
    }

    pub async fn create_database(&self, name: &str) -> Result<()> {
        Ok(self.postgres()?.ensure_database(name).await?)
    }

    /// With whatever is still connected to it.
    pub async fn drop_database(&self, name: &str) -> Result<()> {
        self.execute("postgres", &format!("drop database if exists {name} with (force)")).await
    }

    /// Statements on a connection of their own.
    pub async fn execute(&self, database: &str, statements: &str) -> Result<()> {
        execute(&self.connect(database).await?, statements).await
    }

    /// Where the servers keep what they keep.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A connection for the benchmark's own questions.
    pub async fn connect(&self, database: &str) -> Result<Client> {
        connect(self.postgres()?, database).await
    }

    /// What is dirty goes to the disk before a measurement, and not within it.
    pub async fn checkpoint(&self) -> Result<()> {
        self.execute("postgres", "checkpoint").await
    }

    /// Of both, in words.
    pub async fn versions(&self) -> Result<String> {
        let client = self.connect("postgres").await?;
        let postgres: String = client.query_one("show server_version", &[]).await?.try_get(0)?;
        Ok(format!("Postgres {postgres}, Kafka {}", broker::version()?))
    }

    /// The log under a prefix of its own.
    pub fn log(&self, prefix: &str) -> KafkaLog {
        KafkaLog::new(&self.kafka_config(prefix))
    }

    pub fn kafka_config(&self, prefix: &str) -> KafkaConfig {
        let mut config = shopd::config::Config::default().kafka;
        config.bootstrap_servers = vec![self.kafka.address.clone()];
        prefix.clone_into(&mut config.topic_prefix);
        config
    }

    /// All of one shop's: a broker with many partitions is another one.
    pub async fn delete_topics(&self, prefix: &str) -> Result<()> {
        let deleted = async {
            let client = ClientBuilder::new(vec![self.kafka.address.clone()]).build().await?;
            let controller = client.controller_client()?;
            for topic in TOPICS {
                controller.delete_topic(format!("{prefix}{topic}"), KAFKA_REQUEST_TIMEOUT.as_millis() as i32).await?;
            }
            Ok(())
        };
        tokio::time::timeout(KAFKA_REQUEST_TIMEOUT * 2, deleted).await.map_err(|_| "topics are not deleted")?
    }

    pub fn cpu(&self) -> Cpu {
        let mut cpu = Cpu::default();
        cpu.add("postgres", self.postgres_pid, machine::cpu_of_tree(self.postgres_pid));
        cpu.add("kafka", self.kafka.pid, machine::cpu(self.kafka.pid));
        cpu
    }

    pub async fn stop(mut self) -> Result<()> {
        if let Some(postgres) = self.postgres.take() {
            postgres.stop(STOP_TIMEOUT).await?;
        }
        Ok(())
    }
}

/// Makes `files` of the write-ahead log to be used again, in a run of the server whose log may grow without a checkpoint: one that its size asks
/// for on the way would take the first files for the last ones, and 134 of 256 would be there.
///
/// # Errors
/// Says how many there are, where they are fewer.
async fn recycle(options: &Options, files: u32) -> Result<()> {
    let mut options = options.clone();
    options.settings.push(("max_wal_size".to_owned(), "64GB".to_owned()));
    let postgres = embedded::start(&options).await?;
    let client = connect(&postgres, "postgres").await?;
    for _ in 0..files {
        execute(&client, "select pg_logical_emit_message(false, '', ''); select pg_switch_wal()").await?;
    }
    execute(&client, "checkpoint").await?;
    let count = "select count(*) from pg_ls_waldir() where name > pg_walfile_name(pg_current_wal_lsn())";
    let there: i64 = client.query_one(count, &[]).await?.try_get(0)?;
    drop(client);
    postgres.stop(STOP_TIMEOUT).await?;
    // Without the one in use.
    match there + 1 >= i64::from(files) {
        true => Ok(()),
        false => Err(format!("{there} of {files} files of the write-ahead log are there to be used again").into()),
    }
}

async fn connect(postgres: &Server, database: &str) -> Result<Client> {
    let url = postgres.url(database);
    let connected = tokio::time::timeout(STATEMENT_TIMEOUT, tokio_postgres::connect(url.expose(), tokio_postgres::NoTls)).await;
    let (client, connection) = connected.map_err(|_| "the database server does not answer")??;
    // Ends with the client; its errors reach the client's calls.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

async fn execute(client: &Client, statements: &str) -> Result<()> {
    let done = tokio::time::timeout(STATEMENT_TIMEOUT, client.batch_execute(statements)).await;
    done.map_err(|_| format!("{statements}: no answer within {STATEMENT_TIMEOUT:?}"))??;
    Ok(())
}
