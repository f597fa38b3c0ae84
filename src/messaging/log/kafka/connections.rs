//! Connections to the cluster: made when first needed, bounded in time, dropped after an error and made anew.
//!
//! A partition client is taken out of the pool while it is used and put back only after an answer. So a call that was
//! dropped or timed out closes its connection instead of leaving an old request in front of the next one, and who asks for
//! offsets never waits behind a produce. Records are fetched over others ([`super::polls`]).

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rskafka::BackoffConfig;
use rskafka::client::error::{Error, ProtocolError};
use rskafka::client::partition::{PartitionClient, UnknownTopicHandling};
use rskafka::client::{Client, ClientBuilder};
use tokio::sync::Mutex;

use super::LogError;
use super::dial::Dialer;
use crate::config::KafkaConfig;

/// How old a known number of partitions may get.
const TOPICS_AGE_MAX: Duration = Duration::from_secs(30);
/// The largest answer that is read from a broker.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Waits for `answer`, but not longer than `wait`.
pub(super) async fn bounded<T>(wait: Duration, what: &str, answer: impl Future<Output = T>) -> Result<T, LogError> {
    match tokio::time::timeout(wait, answer).await {
        Ok(answer) => Ok(answer),
        Err(_) => Err(LogError::Unavailable(format!("{what}: no answer within {} ms", wait.as_millis()))),
    }
}

/// What an error of the client means for a caller that asked about `topic`.
pub(super) fn meaning(topic: &str, error: &Error) -> LogError {
    use ProtocolError as P;
    match error {
        Error::ServerError { protocol_error: P::UnknownTopicOrPartition, .. } => LogError::UnknownTopic(topic.to_owned()),
        Error::ServerError {
            protocol_error:
                P::InvalidTopicException
                | P::TopicAuthorizationFailed
                | P::ClusterAuthorizationFailed
                | P::InvalidPartitions
                | P::PolicyViolation
                | P::InvalidConfig
                | P::UnsupportedVersion,
            ..
        } => LogError::Defect(error.to_string()),
        // Too few brokers for the copies, too: we ask for the broker's default, so they are away or have only just started.
        _ => LogError::Unavailable(error.to_string()),
    }
}

/// What a partition client is for; each use has connections of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Use {
    Produce,
    Fetch,
}

type Place = (Use, String, i32);

/// A partition client on loan from [`Connections`].
pub(super) struct Loan {
    pub client: PartitionClient,
    parent: Arc<Client>,
    place: Place,
}

pub(super) struct Connections {
    bootstrap_servers: Vec<String>,
    dialer: Arc<Dialer>,
    request_timeout: Duration,
    client: Mutex<Option<Arc<Client>>>,
    idle: std::sync::Mutex<HashMap<Place, Loan>>,
    /// Numbers of partitions by the broker's name of the topic, and when that was asked.
    topics: Mutex<Option<(Instant, HashMap<String, i32>)>>,
}

impl Connections {
    pub fn new(config: &KafkaConfig, dialer: Arc<Dialer>) -> Self {
        Self {
            bootstrap_servers: config.bootstrap_servers.clone(),
            dialer,
            request_timeout: config.request_timeout,
            client: Mutex::default(),
            idle: std::sync::Mutex::default(),
            topics: Mutex::default(),
        }
    }

    /// `host:port` of the brokers to begin with.
    pub fn servers(&self) -> &[String] {
        &self.bootstrap_servers
    }

    pub fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    /// The client, connected now if it was not. Bounded by the caller.
    pub async fn client(&self) -> Result<Arc<Client>, LogError> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let security = self.dialer.admitted_by_one_of(&self.bootstrap_servers).await?;
        // Left alone the client retries for ever, with ever longer pauses; a broker that returns must be found at once.
        let backoff = BackoffConfig {
            init_backoff: Duration::from_millis(50),
            max_backoff: Duration::from_millis(500),
            base: 2.0,
            deadline: Some(self.request_timeout),
        };
        let mut builder = ClientBuilder::new(self.bootstrap_servers.clone())
            .client_id("shopd")
            .max_message_size(ANSWER_BYTES_MAX)
            .backoff_config(backoff);
        if let Some(tls) = &security.tls {
            builder = builder.tls_config(tls.clone());
        }
        if let Some(sasl) = &security.sasl {
            builder = builder.sasl_config(sasl.for_the_client_library());
        }
        let built = builder.build().await.map_err(|error| LogError::Unavailable(error.to_string()))?;
        Ok(client.insert(Arc::new(built)).clone())
    }

    /// Forgets `failed`, so that the next call starts at the bootstrap servers again. A newer client stays.
    pub async fn forget(&self, failed: &Arc<Client>) {
        let mut client = self.client.lock().await;
        if client.as_ref().is_some_and(|current| Arc::ptr_eq(current, failed)) {
            *client = None;
        }
    }

    /// Asks the cluster something that is about no partition.
    pub async fn ask<T, F>(&self, wait: Duration, what: &str, question: impl FnOnce(Arc<Client>) -> F) -> Result<T, LogError>
    where
        F: Future<Output = Result<T, LogError>>,
    {
        let mut asked = None;
        let answer = bounded(wait, what, async {
            let client = self.client().await?;
            asked = Some(client.clone());
            question(client).await
        })
        .await;
        let answer = answer.and_then(|answer| answer);
        if let (Err(error), Some(client)) = (&answer, asked)
            && error.is_transient()
        {
            self.forget(&client).await;
        }
        answer
    }

    /// A client for one partition; bounded.
    pub async fn lend(&self, usage: Use, topic: &str, partition: i32) -> Result<Loan, LogError> {
        let place = (usage, topic.to_owned(), partition);
        let idle = self.idle().remove(&place);
        if let Some(loan) = idle {
            return Ok(loan);
        }
        self.ask(self.request_timeout, "connecting", |parent| async move {
            match parent.partition_client(topic, partition, UnknownTopicHandling::Error).await {
                Ok(client) => Ok(Loan { client, parent, place }),
                Err(error) => Err(meaning(topic, &error)),
            }
        })
        .await
    }

    /// Takes back a client whose last request was answered.
    pub fn give_back(&self, loan: Loan) {
        self.idle().entry(loan.place.clone()).or_insert(loan);
    }

    /// Gives up a client whose last request was not answered, or answered by an error of the connection.
    pub async fn give_up(&self, loan: Loan) {
        self.forget(&loan.parent).await;
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, HashMap<Place, Loan>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How many partitions a topic has, by the broker's name of it.
    pub async fn partitions(&self, topic: &str) -> Result<i32, LogError> {
        // The lock is held while asking: many callers that find it old ask once. Each ask is bounded.
        let mut topics = self.topics.lock().await;
        let known = topics.as_ref().filter(|(asked, _)| asked.elapsed() < TOPICS_AGE_MAX).and_then(|(_, known)| known.get(topic));
        if let Some(partitions) = known {
            return Ok(*partitions);
        }
        let listed = self.list_topics(self.request_timeout).await?;
        let partitions = listed.get(topic).copied();
        *topics = Some((Instant::now(), listed));
        partitions.filter(|n| *n > 0).ok_or_else(|| LogError::UnknownTopic(topic.to_owned()))
    }

    /// Every topic of the cluster with its number of partitions. Asking about one by name would make brokers that create
    /// topics on sight create it.
    pub async fn list_topics(&self, wait: Duration) -> Result<HashMap<String, i32>, LogError> {
        self.ask(wait, "listing topics", |client| async move {
            let listed = client.list_topics().await.map_err(|error| LogError::Unavailable(error.to_string()))?;
            Ok(listed.into_iter().map(|topic| (topic.name, i32::try_from(topic.partitions.len()).unwrap_or(i32::MAX))).collect())
        })
        .await
    }

    /// Forgets what is known about topics, after some were made.
    pub async fn forget_topics(&self) {
        *self.topics.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use rskafka::client::error::RequestContext;

    use super::*;

    fn refused(protocol_error: ProtocolError) -> LogError {
        let request = RequestContext::Topic("t".into());
        meaning("t", &Error::ServerError { protocol_error, error_message: None, request, response: None, is_virtual: false })
    }

    #[test]
    fn too_few_brokers_for_a_topics_copies_are_waited_for_and_what_no_broker_will_ever_do_is_not() {
        assert!(refused(ProtocolError::InvalidReplicationFactor).is_transient());
        for hopeless in [ProtocolError::InvalidTopicException, ProtocolError::PolicyViolation, ProtocolError::InvalidPartitions] {
            assert!(matches!(refused(hopeless), LogError::Defect(_)), "{hopeless:?}");
        }
    }
}
