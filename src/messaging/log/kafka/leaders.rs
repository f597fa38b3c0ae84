//! Which broker leads a partition: asked by hand, known for half a minute.

use std::collections::HashMap;
use std::io::Result;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::dial::Dialer;
use super::raw;

/// How old a known leader may get.
const AGE_MAX: Duration = Duration::from_secs(30);

/// When a topic was asked about, and its partitions with their leaders' addresses.
type Asked = (Instant, Vec<(i32, String)>);

/// Topics by the broker's names of them.
pub(super) struct Leaders {
    servers: Vec<String>,
    dialer: Arc<Dialer>,
    known: Mutex<HashMap<String, Asked>>,
}

impl Leaders {
    pub fn new(servers: &[String], dialer: Arc<Dialer>) -> Self {
        Self { servers: servers.to_vec(), dialer, known: Mutex::default() }
    }

    /// `host:port` of the partition's leader, where it has one. Bounded by the caller.
    pub async fn of(&self, topic: &str, partition: i32) -> Result<Option<String>> {
        let find = |(_, leaders): &Asked| leaders.iter().find(|(of, _)| *of == partition).map(|(_, leader)| leader.clone());
        if let Some(known) = self.known().get(topic).filter(|(asked, _)| asked.elapsed() < AGE_MAX) {
            return Ok(find(known));
        }
        let asked = (Instant::now(), raw::leaders(&self.dialer, &self.servers, topic).await?);
        let leader = find(&asked);
        self.known().insert(topic.to_owned(), asked);
        Ok(leader)
    }

    /// Asks again where the leaders of this topic are.
    pub fn forget(&self, topic: &str) {
        self.known().remove(topic);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Asked>> {
        // A poisoned map is still a map: nothing panics in the middle of a change of it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
