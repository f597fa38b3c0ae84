//! A process that was stopped by its host for longer than its bounds: a virtual machine that moves, a laptop's lid, SIGSTOP.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt;

use super::wire::{Edge, SHORT_HEAD, read_until, statuses};

const GET: &[u8] = b"GET /api/OrdersProxy/1 HTTP/1.1\r\nHost: x\r\n\r\n";

/// Red where time is looked at before what has come: the framework's own timers answer 408 to the fresh connection, and end the idle
/// one unanswered.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_to_a_frozen_process_is_answered_when_it_goes_on() {
    let head = SHORT_HEAD * 3 / 2;
    let edge = Edge::with_head_time(head).await;
    let (first, second) = GET.split_at(20);
    let mut tries = 0;
    let (mut idle, mut fresh, mut begun) = loop {
        let began = Instant::now();
        let (mut idle, fresh, mut begun) = (edge.open().await, edge.open().await, edge.open().await);
        idle.write_all(GET).await.unwrap();
        read_until(&mut idle, r#"{"id":1}"#).await;
        begun.write_all(first).await.unwrap();
        // By its own connection, so that everything above has been accepted.
        edge.serves().await;
        edge.process.freeze().await;
        // A busy machine may not get to the freeze within the bound; these connections say nothing then.
        if began.elapsed() < head / 2 {
            break (idle, fresh, begun);
        }
        tries += 1;
        assert!(tries < 5, "it takes {:?} to freeze it", began.elapsed());
        edge.process.signal(Signal::SIGCONT);
    };
    idle.write_all(GET).await.unwrap();
    fresh.write_all(GET).await.unwrap();
    begun.write_all(second).await.unwrap();
    let mut late = edge.open().await;
    late.write_all(GET).await.unwrap();
    // Beyond the head's bound and the idle connection's: it is time itself that is tested here.
    tokio::time::sleep(head * 5 / 2).await;
    edge.process.signal(Signal::SIGCONT);
    for (name, stream) in [("idle", &mut idle), ("fresh", &mut fresh), ("begun", &mut begun), ("late", &mut late)] {
        let answered = read_until(stream, r#"{"id":1}"#).await;
        assert_eq!(statuses(&answered), ["200"], "{name}: {answered}");
    }
}

/// A proxy would take a late 408 for the answer to the request that it sends at that moment.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_on_which_nothing_was_asked_ends_without_a_word() {
    let edge = Edge::with_head_time(SHORT_HEAD).await;
    let began = Instant::now();
    let (mut silent, mut idle) = (edge.open().await, edge.open().await);
    idle.write_all(GET).await.unwrap();
    assert_eq!(statuses(&read_until(&mut idle, r#"{"id":1}"#).await), ["200"]);
    assert_eq!(super::rest(&mut silent).await, "");
    assert!(began.elapsed() >= SHORT_HEAD - Duration::from_millis(100), "{:?}", began.elapsed());
    assert_eq!(super::rest(&mut idle).await, "");
    edge.serves().await;
}
