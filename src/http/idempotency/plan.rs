//! What of a batch is due, and what each of its requests is answered: pure but for [`Plan::claim`], which asks.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use uuid::Uuid;

use super::store::{self, Record};
use super::{Key, Keyed, REPLAYED, Settled};
use crate::db::{Conn, DbError};
use crate::http::reply::Answer;

/// What is known of one key once it was claimed.
#[derive(Clone, Debug)]
pub(super) struct Claim {
    /// Nobody else runs it until our transaction ends.
    pub acquired: bool,
    pub stored: Option<Stored>,
}

#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub body_hash: Vec<u8>,
    pub answer: Answer,
    /// Of the request that it was made for.
    pub stamp: Option<Uuid>,
}

#[derive(Debug)]
enum Step {
    /// It has no key, or is the first of its key.
    Due,
    /// As the request at this place: it has the same key.
    After(usize),
    Replay(Answer),
    Mismatch,
    InProgress,
}

/// One batch, request by request.
#[derive(Debug)]
pub struct Plan<'b, R> {
    requests: Vec<(Option<&'b Keyed<R>>, Step)>,
}

impl<'b, R: Clone> Plan<'b, R> {
    /// Locks the batch's keys until the transaction ends and reads what is stored under them: one statement, none without keys.
    /// `keys` are the requests' in their order.
    ///
    /// # Errors
    /// As the statement's.
    pub async fn claim(conn: &Conn, keys: Vec<Option<&'b Keyed<R>>>) -> Result<Self, DbError> {
        let mut distinct: Vec<&Key> = keys.iter().flatten().map(|keyed| &keyed.key).collect();
        // In one order everywhere, so that of two batches with the same keys one gets them all.
        distinct.sort_unstable_by_key(|key| key.id());
        distinct.dedup_by_key(|key| key.id());
        let claims = if distinct.is_empty() { Vec::new() } else { store::claim(conn, &distinct).await? };
        let claims = distinct.into_iter().map(Key::id).zip(claims).collect();
        Ok(Self::of(keys, &claims))
    }

    fn of(keys: Vec<Option<&'b Keyed<R>>>, claims: &HashMap<(&str, &str), Claim>) -> Self {
        let mut first: HashMap<(&str, &str), usize> = HashMap::new();
        let step = |(place, keyed): (usize, &Option<&'b Keyed<R>>)| {
            let Some(Keyed { key, .. }) = keyed else { return Step::Due };
            match claims.get(&key.id()) {
                Some(Claim { stored: Some(stored), .. }) if stored.body_hash == key.body_hash => {
                    Step::Replay(again(key, stored.stamp, &stored.answer))
                }
                Some(Claim { stored: Some(_), .. }) => Step::Mismatch,
                Some(Claim { acquired: true, .. }) => match first.entry(key.id()) {
                    Entry::Occupied(first) => Step::After(*first.get()),
                    Entry::Vacant(here) => {
                        here.insert(place);
                        Step::Due
                    }
                },
                _ => Step::InProgress,
            }
        };
        let steps: Vec<Step> = keys.iter().enumerate().map(step).collect();
        Self { requests: keys.into_iter().zip(steps).collect() }
    }

    /// Those of `batch` whose effect is to be done, in their order.
    pub fn due<'q, Q>(&self, batch: &'q [Q]) -> Vec<&'q Q> {
        let due = batch.iter().zip(&self.requests).filter(|(_, (_, step))| matches!(step, Step::Due));
        due.map(|(request, _)| request).collect()
    }

    /// Every request's answer from the `results` of those that were due, and what must be stored before the commit.
    ///
    /// # Errors
    /// [`DbError::Defect`] where a result is missing.
    pub fn settle(self, results: Vec<R>) -> Result<(Vec<Settled<R>>, Vec<Record<'b>>), DbError> {
        let mut results = results.into_iter();
        let mut settled: Vec<Settled<R>> = Vec::with_capacity(self.requests.len());
        let mut records = Vec::new();
        for (keyed, step) in &self.requests {
            let next = match (step, keyed) {
                (Step::Due, keyed) => {
                    let result = results.next().ok_or_else(|| DbError::Defect("a batch has fewer results than requests".into()))?;
                    match keyed.map(|keyed| (&keyed.key, (keyed.answer)(&result))) {
                        Some((key, answer)) if !answer.status.is_server_error() => {
                            records.push(Record { key, answer: answer.clone() });
                            Settled::Answered(answer)
                        }
                        _ => Settled::Done(result),
                    }
                }
                (Step::After(first), Some(keyed)) => match (&settled[*first], self.requests[*first].0) {
                    (Settled::Answered(_), Some(other)) if other.key.body_hash != keyed.key.body_hash => Settled::Mismatch,
                    (Settled::Answered(answer), other) => {
                        let stamp = other.and_then(|other| other.key.stamp);
                        Settled::Answered(again(&keyed.key, stamp, answer))
                    }
                    // Its first has no answer to be stored, so this one has none either.
                    (other, _) => other.clone(),
                },
                (Step::Replay(answer), _) => Settled::Answered(answer.clone()),
                (Step::Mismatch, _) => Settled::Mismatch,
                (Step::InProgress | Step::After(_), _) => Settled::InProgress,
            };
            settled.push(next);
        }
        Ok((settled, records))
    }
}

/// `answer`, made for `stamp`, to a later request under its key: to another try of the same request as it is, to any other marked
/// as a replay. An answer that was a replay when it was made keeps its mark.
fn again(key: &Key, stamp: Option<Uuid>, answer: &Answer) -> Answer {
    let mut answer = answer.clone();
    if !key.is_of(stamp) {
        answer.set(REPLAYED, "true");
    }
    answer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(status: u16, body: &str) -> Answer {
        let status = actix_web::http::StatusCode::from_u16(status).unwrap();
        Answer { status, headers: vec![("content-type".into(), "text/plain".into())], body: Some(body.to_owned().into()) }
    }

    /// A request: its key, its stamp, its body, the status that its effect would be answered.
    type Asked = (Option<u8>, Option<u8>, u8, u16);

    fn keyed(key: u8, stamp: Option<u8>, body: u8) -> Keyed<(u16, usize)> {
        let key = Key::new("POST /x", format!("k{key}"), &[body]).stamped(stamp.map(|n| Uuid::from_u128(n.into())));
        Keyed::new(key, |(status, n): &(u16, usize)| {
            let mut answer = plain(*status, &n.to_string());
            if *status == REPLAYS {
                answer.set(REPLAYED, "true");
            }
            answer
        })
    }

    /// The status of an effect that says of itself that it was there before, as an order's id does.
    const REPLAYS: u16 = 208;

    /// What a client can tell apart: status, body, replayed.
    fn seen(settled: &Settled<(u16, usize)>) -> (u16, String, bool) {
        match settled {
            Settled::Done((status, n)) => (*status, n.to_string(), *status == REPLAYS),
            Settled::Answered(answer) => {
                let body = String::from_utf8(answer.body.clone().unwrap().to_vec()).unwrap();
                (answer.status.as_u16(), body, answer.headers.iter().any(|(name, _)| name == REPLAYED))
            }
            Settled::Mismatch => (422, String::new(), false),
            Settled::InProgress => (409, String::new(), false),
        }
    }

    fn asked() -> impl Strategy<Value = Asked> {
        let status = prop_oneof![Just(200u16), Just(201), Just(REPLAYS), Just(404), Just(409), Just(503)];
        (proptest::option::of(0u8..4), proptest::option::of(0u8..3), 0u8..2, status)
    }

    /// The batches one after the other through plans and a store; the effects done, and the answers.
    fn run(batches: &[Vec<Asked>]) -> (usize, Vec<(u16, String, bool)>) {
        let mut stored: HashMap<(String, String), Stored> = HashMap::new();
        let (mut effects, mut answers) = (0, Vec::new());
        for batch in batches {
            let keys: Vec<_> = batch.iter().map(|(key, stamp, body, _)| key.map(|key| keyed(key, *stamp, *body))).collect();
            let owned: Vec<_> = stored.iter().collect();
            let mut claims: HashMap<(&str, &str), Claim> = HashMap::new();
            for keyed in keys.iter().flatten() {
                let found = owned.iter().find(|((text, scope), _)| (text.as_str(), scope.as_str()) == keyed.key.id());
                claims.insert(keyed.key.id(), Claim { acquired: true, stored: found.map(|(_, stored)| (*stored).clone()) });
            }
            let plan = Plan::of(keys.iter().map(Option::as_ref).collect(), &claims);
            let results = plan.due(batch).into_iter().map(|(.., status)| {
                effects += 1;
                (*status, effects)
            });
            let results = results.collect();
            let (settled, records) = plan.settle(results).unwrap();
            answers.extend(settled.iter().map(seen));
            let records: Vec<_> = records.into_iter().map(|Record { key, answer }| (key.clone(), answer)).collect();
            for (key, answer) in records {
                let here = Stored { body_hash: key.body_hash.to_vec(), answer, stamp: key.stamp };
                let was = stored.insert((key.text, key.scope), here);
                assert!(was.is_none(), "a key is stored once");
            }
        }
        (effects, answers)
    }

    /// One request after the other. Those of one batch share a fate where the first of their key is not stored, so the model
    /// is told where batches end.
    fn model(batches: &[Vec<Asked>]) -> (usize, Vec<(u16, String, bool)>) {
        let mut stored: HashMap<u8, (Option<u8>, u8, u16, String)> = HashMap::new();
        let (mut effects, mut answers) = (0, Vec::new());
        for batch in batches {
            let mut failed: HashMap<u8, (u16, String)> = HashMap::new();
            for (key, stamp, body, status) in batch {
                let known = key.and_then(|key| stored.get(&key));
                let fails = key.and_then(|key| failed.get(&key));
                answers.push(match (known, fails) {
                    (Some((of, with, status, text)), _) if with == body => {
                        let same_request = stamp.is_some() && stamp == of;
                        (*status, text.clone(), *status == REPLAYS || !same_request)
                    }
                    (Some(_), _) => (422, String::new(), false),
                    (None, Some((status, text))) => (*status, text.clone(), false),
                    (None, None) => {
                        effects += 1;
                        let text = effects.to_string();
                        match key {
                            Some(key) if *status < 500 => drop(stored.insert(*key, (*stamp, *body, *status, text.clone()))),
                            Some(key) => drop(failed.insert(*key, (*status, text.clone()))),
                            None => {}
                        }
                        (*status, text, *status == REPLAYS)
                    }
                });
            }
        }
        (effects, answers)
    }

    proptest! {
        #[test]
        fn batches_answer_as_if_the_requests_came_one_by_one(batches in proptest::collection::vec(proptest::collection::vec(asked(), 0..12), 0..8)) {
            prop_assert_eq!(run(&batches), model(&batches));
        }
    }

    #[test]
    fn a_key_that_runs_elsewhere_is_in_progress_and_one_that_is_stored_is_replayed_though_it_is_locked() {
        let (running, stored) = (keyed(1, None, 1), keyed(2, None, 1));
        let there = Stored { body_hash: stored.key.body_hash.to_vec(), answer: plain(200, "7"), stamp: None };
        let claims = HashMap::from([
            (running.key.id(), Claim { acquired: false, stored: None }),
            (stored.key.id(), Claim { acquired: false, stored: Some(there) }),
        ]);
        let plan = Plan::of(vec![Some(&running), Some(&running), Some(&stored)], &claims);
        assert!(plan.due(&[1, 2, 3]).is_empty());
        let (settled, records) = plan.settle(Vec::new()).unwrap();
        assert!(matches!(settled[..2], [Settled::InProgress, Settled::InProgress]));
        assert_eq!(seen(&settled[2]), (200, "7".into(), true));
        assert!(records.is_empty());
    }

    #[test]
    fn one_text_in_two_scopes_is_two_keys() {
        let of = |scope: &str| Keyed::<(u16, usize)>::new(Key::new(scope, "k", b""), |_| plain(200, ""));
        let (a, b) = (of("POST /a"), of("POST /b"));
        assert_ne!(a.key.lock(), b.key.lock());
        let claims: HashMap<_, _> = [&a, &b].map(|k| (k.key.id(), Claim { acquired: true, stored: None })).into();
        assert_eq!(Plan::of(vec![Some(&a), Some(&b)], &claims).due(&[0, 1]).len(), 2);
    }
}
