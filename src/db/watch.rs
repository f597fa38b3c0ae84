//! Gives up connections to a server that owes an answer and is not the one to go to any more.
//!
//! A primary that hangs, while its kernel still acknowledges what is sent, never ends a connection; its standby may be the primary by
//! now. After a silence as long as a statement may take, a new connection is made as any other: only where that leads elsewhere, or
//! nowhere, those to the old server are ended. What waited on one hears of it, and is done again on a new one. A server that lets us in may be
//! slow for a reason (a commit waits for its synchronous standby, a migration for a lock), and another connection to it would wait as well.

use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::line::{Stand, Traffic};

/// Looks in the silence after which a server is suspected: it may last longer by one of them.
const LOOKS: u32 = 8;

/// Where a connection leads.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// An address and port, or a socket's path: for people. Behind it there may be another server by now, and one may have several.
    pub address: Arc<str>,
    /// When its postmaster began, as the server says: what a server is known by.
    pub server: Arc<str>,
}

/// What became of another connection.
pub(super) enum Dialed {
    /// It was let in by this server.
    In(Peer),
    /// These addresses answered, and not for lack of a primary: too many connections, a stop, another password.
    Refused(Vec<Arc<str>>),
}

impl Dialed {
    /// Whether this one is there, and to be waited for.
    fn shows_life_of(&self, peer: &Peer) -> bool {
        match self {
            Self::In(found) => found.server == peer.server,
            Self::Refused(addresses) => addresses.contains(&peer.address),
        }
    }

    fn leads_to(&self) -> &str {
        match self {
            Self::In(found) => &found.address,
            Self::Refused(_) => "nowhere",
        }
    }
}

/// All connections of one [`super::Db`].
#[derive(Default)]
pub(super) struct Watch(Mutex<Vec<Watched>>);

struct Watched {
    peer: Peer,
    traffic: Arc<Traffic>,
    driver: AbortHandle,
    silence: Silence,
}

/// How long a server has owed an answer and said nothing. Pure.
#[derive(Default)]
struct Silence {
    heard_bytes: u64,
    /// Since the look at which the silence was there for the first time.
    looks: Option<u32>,
}

impl Silence {
    /// A look, one of [`LOOKS`] in the bound; whether that is over. Where it is, the next one begins.
    fn look(&mut self, stand: Stand) -> bool {
        let before = mem::replace(&mut self.heard_bytes, stand.heard_bytes);
        self.looks = match self.looks {
            _ if !stand.owes => None,
            Some(looks) if before == stand.heard_bytes && looks < LOOKS => Some(looks + 1),
            _ => Some(0),
        };
        self.looks == Some(LOOKS)
    }

    /// It was over at the last look, and goes on.
    fn lasts(&self, stand: Stand) -> bool {
        self.looks == Some(LOOKS) && stand.owes && stand.heard_bytes == self.heard_bytes
    }
}

impl Watch {
    pub fn add(&self, peer: Peer, traffic: Arc<Traffic>, driver: AbortHandle) {
        self.locked().push(Watched { peer, traffic, driver, silence: Silence::default() });
    }

    /// Runs as long as somebody has the watch. `bound` is the longest silence; `dial` makes a connection and says what became of it.
    pub fn start<F>(self: &Arc<Self>, runtime: &Handle, bound: Duration, dial: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = Dialed> + Send,
    {
        let watch = Arc::downgrade(self);
        runtime.spawn(async move {
            let mut ticks = interval(bound / LOOKS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                let Some(silent) = watch.upgrade().map(|watch| watch.look()) else { return };
                if silent.is_empty() {
                    continue;
                }
                let dialed = dial().await;
                let Some(watch) = watch.upgrade() else { return };
                for peer in silent.iter().filter(|peer| !dialed.shows_life_of(peer)) {
                    let ended = watch.end(peer);
                    if ended > 0 {
                        tracing::warn!(
                            peer = %peer.address, connections = ended, new_ones_lead_to = dialed.leads_to(),
                            "a database server has said nothing for {} s to what it was asked; its connections are given up",
                            bound.as_secs_f32()
                        );
                    }
                }
            }
        });
    }

    /// The servers that owe an answer for too long.
    fn look(&self) -> Vec<Peer> {
        let mut all = self.locked();
        all.retain(|one| !one.driver.is_finished());
        let mut silent: Vec<Peer> = Vec::new();
        for one in all.iter_mut() {
            if one.silence.look(one.traffic.stand()) && silent.iter().all(|peer| peer.server != one.peer.server) {
                silent.push(one.peer.clone());
            }
        }
        silent
    }

    /// Ends all connections to this server, also those that are asked nothing now: each would be found out by somebody who waits. None of them
    /// where it has answered meanwhile.
    fn end(&self, peer: &Peer) -> usize {
        let mut all = self.locked();
        let is_its = |one: &Watched| one.peer.server == peer.server;
        if !all.iter().any(|one| is_its(one) && one.silence.lasts(one.traffic.stand())) {
            return 0;
        }
        let before = all.len();
        all.retain(|one| {
            if is_its(one) {
                one.driver.abort();
            }
            !is_its(one)
        });
        before - all.len()
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Watched>> {
        // It is whole at any time: nothing panics in the middle of a change of it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is owed at each look, and whether something was heard before it.
        #[test]
        fn a_server_is_suspected_where_it_owed_and_was_silent_for_the_whole_bound_and_only_there(
            looks in prop::collection::vec((prop::bool::weighted(0.95), prop::bool::weighted(0.05)), 0..80),
        ) {
            let (mut silence, mut heard_bytes, mut since) = (Silence::default(), 0, None);
            for (now, (owes, hears)) in looks.into_iter().enumerate() {
                heard_bytes += u64::from(hears) * 6;
                let begins = if owes { Some(now) } else { None };
                since = if owes && !hears { since.or(begins) } else { begins };
                let suspected = silence.look(Stand { owes, heard_bytes });
                prop_assert_eq!(suspected, since.is_some_and(|since| now - since == LOOKS as usize));
                // Until it is heard of again, or has answered.
                prop_assert_eq!(silence.lasts(Stand { owes, heard_bytes }), suspected);
                let heard_more = Stand { owes, heard_bytes: heard_bytes + 1 };
                let over = [heard_more, Stand { owes: false, heard_bytes }];
                prop_assert!(over.into_iter().all(|stand| !silence.lasts(stand)));
                if suspected {
                    since = None;
                }
            }
        }
    }
}
