//! Clients of event streams as they should be: each comes back behind its last event, at another gateway, when its stream ends.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use shopd::shutdown::Shutdown;

use crate::live::client::{Event, Events};
use crate::support::shop::poll;

/// What one client saw, over all its streams.
#[derive(Default)]
pub struct Seen {
    pub events: Vec<Event>,
    pub streams: usize,
}

/// A client and what it saw so far.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Seen>>);

/// What a client takes along when it comes back.
#[derive(Clone, Copy, PartialEq)]
pub enum Resumes {
    BehindItsLast,
    /// The negative control: it begins anew each time.
    Forgetful,
}

impl Watch {
    /// Watches `path` at one of `bases` after the other, from the `first` on, until it is told that nothing more can come, or `stop`.
    pub async fn run(self, bases: [String; 2], path: String, first: usize, resumes: Resumes, stop: Shutdown) {
        let (mut at, mut last) = (first, String::new());
        loop {
            let over = tokio::select! {
                over = self.one(&bases[at % 2], &path, &mut last, resumes) => over,
                () = stop.stopped() => true,
            };
            if over {
                return;
            }
            at += 1;
            poll().await;
        }
    }

    /// One stream, to its end; whether that was the end of all.
    async fn one(&self, base: &str, path: &str, last: &mut String, resumes: Resumes) -> bool {
        let Ok(mut stream) = Events::try_open(base, path, last).await else { return false };
        if stream.status != 200 {
            return stream.status == 204;
        }
        self.0.lock().unwrap().streams += 1;
        while let Ok(Some(event)) = stream.try_next().await {
            // Any name says something of the stream itself.
            if event.name.is_empty() {
                if resumes == Resumes::BehindItsLast {
                    last.clone_from(&event.id);
                }
                self.0.lock().unwrap().events.push(event);
            }
        }
        false
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    pub fn streams(&self) -> usize {
        self.0.lock().unwrap().streams
    }

    /// Order and status of every event, sorted.
    pub fn said(&self) -> Vec<String> {
        let mut said: Vec<_> =
            self.0.lock().unwrap().events.iter().map(|event| format!("{} {}", event.order(), event.status())).collect();
        said.sort();
        said
    }

    pub fn has(&self, said: &str) -> bool {
        self.said().iter().any(|one| one == said)
    }

    /// How many events came under an id that had come before.
    pub fn doubles(&self) -> usize {
        let seen = self.0.lock().unwrap();
        seen.events.len() - seen.events.iter().map(|event| &event.id).collect::<HashSet<_>>().len()
    }
}
