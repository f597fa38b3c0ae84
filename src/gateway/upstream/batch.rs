//! Requests that leave in the same turn of a worker thread travel as one to a service that takes batches.
//!
//! Nobody waits for others: what is there when the thread has looked at everything that has come goes. A request that is the only one under
//! way at its replica goes alone, and so does one whose batch the replica does not take, at once. Every request of a batch has
//! a stamp or a key under which its service does it once, so it may be asked again, as after any try without an answer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use actix_http::ServiceConfig;
use actix_http::h1::{ClientCodec, MessageType};
use actix_web::http::StatusCode;
use actix_web::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use actix_web::rt::spawn;
use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::oneshot;
use tokio_util::codec::Decoder;

use super::attempt::{Answer, AnswerBody, Failure, ask_kept};
use super::connection::Broken;
use super::{Ours, attempt};
use crate::gateway::forward::line;
use crate::gateway::replicas::{Replica, Seen};
use crate::http::{BATCH_ANSWERS, BATCH_COUNT_MAX, BATCH_PATH, BATCH_REQUESTS};

/// Of a batch's answers together; a POST's is a few hundred bytes.
const ANSWERS_BYTES_MAX: usize = 4 * 1024 * 1024;

/// What became of a request that joined.
pub enum Carried {
    Answered(Answer),
    Failed(Failure),
    /// The batch did, and one other request says so of the replica. It may have been done, as after any try without an answer.
    Broke(Failure),
    /// There were no others, or the replica takes no batches: nothing was done.
    Alone,
}

struct Member {
    request: Bytes,
    until: Instant,
    to: oneshot::Sender<Carried>,
}

/// Where a request gathers: its replica, and its route by the number of its segments. What is posted to one route commits together, and
/// nothing else of a service is held up by it.
type Place = (usize, usize);

/// What gathers on one worker thread.
#[derive(Default)]
pub struct Batches(RefCell<HashMap<Place, Vec<Member>>>);

impl Batches {
    /// True for the first, who sees to it that they leave.
    fn gather(&self, place: Place, member: Member) -> bool {
        let mut gathering = self.0.borrow_mut();
        let members = gathering.entry(place).or_default();
        members.push(member);
        members.len() == 1
    }

    fn take(&self, place: Place) -> Vec<Member> {
        self.0.borrow_mut().remove(&place).unwrap_or_default()
    }
}

/// Travels with whoever leaves now as well; `request` is whole as it goes in a batch, and asks for `path`.
pub async fn join(ours: &Rc<Ours>, replica: &Arc<Replica>, path: &str, request: Bytes, until: Instant) -> Carried {
    let (to, carried) = oneshot::channel();
    let place = (replica.id(), path.matches('/').count());
    if ours.batches.gather(place, Member { request, until, to }) {
        // A task of its own: it goes on where the first one's client goes away.
        spawn(leave(ours.clone(), replica.clone(), place));
    }
    carried.await.unwrap_or_else(|_| Carried::Failed(Failure::broken("its batch was given up")))
}

async fn leave(ours: Rc<Ours>, replica: Arc<Replica>, place: Place) {
    // After whatever has come by now.
    tokio::task::yield_now().await;
    let mut members = ours.batches.take(place);
    members.retain(|member| !member.to.is_closed());
    while members.len() > BATCH_COUNT_MAX {
        let more = members.split_off(members.len() - BATCH_COUNT_MAX);
        spawn(carry(ours.clone(), replica.clone(), more));
    }
    carry(ours, replica, members).await;
}

async fn carry(ours: Rc<Ours>, replica: Arc<Replica>, members: Vec<Member>) {
    let Some(until) = members.iter().map(|member| member.until).max().filter(|_| members.len() > 1) else {
        members.into_iter().for_each(|member| member.told(Carried::Alone));
        return;
    };
    metrics::histogram!("shopd_gateway_batch_requests").record(members.len() as f64);
    let asked = ours.deadlines.bound(until, pin!(ask(&ours, &replica, &members))).await;
    let mut members = members.into_iter();
    match asked {
        Some(Ok(Some(answers))) => {
            members.by_ref().zip(answers).for_each(|(member, answer)| member.told(Carried::Answered(answer)))
        }
        Some(Ok(None)) => replica.takes_batches(false),
        // Nothing was sent.
        Some(Err(failure)) if failure.seen == Seen::Refused => {
            members.by_ref().for_each(|member| member.told(Carried::Failed(failure.clone())));
        }
        // One connection broke, so one request says so of the replica.
        Some(Err(failure)) => {
            members.by_ref().take(1).for_each(|member| member.told(Carried::Failed(failure.clone())));
            members.by_ref().for_each(|member| member.told(Carried::Broke(failure.clone())));
        }
        None => members.by_ref().for_each(|member| member.told(Carried::Failed(Failure::late("no answer")))),
    }
    members.for_each(|member| member.told(Carried::Alone));
}

impl Member {
    fn told(self, carried: Carried) {
        // Who has gone away is not told.
        let _ = self.to.send(carried);
    }
}

/// As many answers as members, in their order; `None` where the replica takes no batch.
async fn ask(ours: &Ours, replica: &Arc<Replica>, members: &[Member]) -> Result<Option<Vec<Answer>>, Failure> {
    let (mut connection, head) = ask_kept(&ours.pool, replica, &written(replica, members)).await?;
    let answers = head.headers.get(CONTENT_TYPE).is_some_and(|value| value.as_bytes() == BATCH_ANSWERS.as_bytes());
    if head.status != StatusCode::OK || !answers {
        // What it says of a batch is for nobody. The connection goes with it.
        return Ok(None);
    }
    let mut bytes = BytesMut::new();
    while let Some(chunk) = connection.chunk().await.map_err(Failure::broken)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > ANSWERS_BYTES_MAX {
            return Err(Failure::broken("the answers of a batch have no end"));
        }
    }
    ours.pool.put(replica, connection);
    let answers = answers_in(bytes, &ours.pool.config).map_err(Failure::broken)?;
    // Which is whose is not known then.
    if answers.len() != members.len() {
        return Err(Failure::broken(format_args!("{} answers to a batch of {}", answers.len(), members.len())));
    }
    Ok(Some(answers))
}

fn written(replica: &Replica, members: &[Member]) -> BytesMut {
    let length: usize = members.iter().map(|member| member.request.len()).sum();
    let mut out = BytesMut::with_capacity(attempt::HEAD_BYTES + length);
    out.put_slice(b"POST ");
    out.put_slice(BATCH_PATH.as_bytes());
    out.put_slice(b" HTTP/1.1\r\n");
    line(&mut out, "host", replica.authority().as_bytes());
    line(&mut out, "content-type", BATCH_REQUESTS.as_bytes());
    line(&mut out, "content-length", length.to_string().as_bytes());
    out.put_slice(b"\r\n");
    members.iter().for_each(|member| out.put_slice(&member.request));
    out
}

/// The answers that stand in `bytes`, all of them whole.
fn answers_in(mut bytes: BytesMut, config: &ServiceConfig) -> Result<Vec<Answer>, Broken> {
    let unreadable = |error: &dyn std::fmt::Display| Broken::Unreadable(error.to_string());
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let mut codec = ClientCodec::new(config.clone());
        let head = codec.decode(&mut bytes).map_err(|error| unreadable(&error))?.ok_or(Broken::Cut)?;
        let mut body = Bytes::new();
        // They have no body, whatever length they name.
        let is_bodyless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&head.status);
        if !is_bodyless && !head.headers.contains_key(CONTENT_LENGTH) {
            return Err(Broken::Unreadable("an answer of a batch without a length".to_owned()));
        }
        if !is_bodyless && codec.message_type() == MessageType::Payload {
            let mut codec = codec.into_payload_codec();
            // Of a known length: one piece, where it is there whole.
            while let Some(chunk) = codec.decode(&mut bytes).map_err(|error| unreadable(&error))?.ok_or(Broken::Cut)? {
                body = if body.is_empty() { chunk } else { [body, chunk].concat().into() };
            }
        }
        answers.push(Answer { status: head.status, headers: head.headers, body: AnswerBody::Whole(body) });
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &[u8]) -> Result<Vec<(u16, Bytes)>, String> {
        // A service of dates needs the framework's runtime.
        actix_web::rt::System::new().block_on(async {
            let answers = answers_in(BytesMut::from(text), &ServiceConfig::default()).map_err(|error| error.to_string())?;
            let body = |answer: Answer| match answer.body {
                AnswerBody::Whole(body) => (answer.status.as_u16(), body),
                AnswerBody::Stream { .. } => panic!("an answer of a batch is there whole"),
            };
            Ok(answers.into_iter().map(body).collect())
        })
    }

    fn answer(status: u16, body: &[u8]) -> Vec<u8> {
        [format!("HTTP/1.1 {status} Said\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn answers_are_read_in_their_order_and_one_that_is_cut_is_none(
            all in proptest::collection::vec((prop_oneof![Just(201u16), Just(409), Just(503)], proptest::collection::vec(any::<u8>(), 0..40)), 1..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let written: Vec<Vec<u8>> = all.iter().map(|(status, body)| answer(*status, body)).collect();
            let whole = written.concat();
            let expected: Vec<_> = all.iter().map(|(status, body)| (*status, Bytes::from(body.clone()))).collect();
            prop_assert_eq!(read(&whole), Ok(expected));
            let at = cut.index(whole.len());
            let mut end = 0;
            let fits = written.iter().any(|each| { end += each.len(); end == at });
            prop_assert_eq!(read(&whole[..at]).is_ok(), fits || at == 0);
        }
    }

    #[test]
    fn an_answer_whose_end_nothing_tells_is_none() {
        assert_eq!(read(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().len(), 1);
        assert!(read(b"HTTP/1.1 200 OK\r\n\r\nrest").is_err());
        assert!(read(b"HTTP/1.1 100 Continue\r\n\r\n").is_err());
        assert!(read(&[answer(200, b"1"), b"garbage\r\n\r\n".to_vec()].concat()).is_err());
    }
}
