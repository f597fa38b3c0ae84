//! Negative controls: each guard switched off, and the simulation must go red, under the invariant that the guard is for.

use std::time::{Duration, Instant};

use crate::plan::Plan;
use crate::world::Guard;
use crate::{invariant, report, search};

const SEEDS_MAX: u64 = 3_000;

fn goes_red(off: &[Guard], invariants: &[&str]) {
    let began = Instant::now();
    let (ran, found) = search(1, SEEDS_MAX, Duration::from_secs(300), off);
    let Some((seed, violation)) = found else { panic!("{off:?} are off and {ran} seeds show nothing") };
    println!("{off:?} off: found after {ran} seeds, {:?}\n{}", began.elapsed(), report(seed, &Plan::of(seed), off, &violation));
    assert!(invariants.contains(&invariant(&violation)), "{off:?} off, seed {seed}: {violation}");
}

#[test]
fn without_the_offset_compare_a_batch_is_applied_twice() {
    goes_red(&[Guard::OffsetCompare], &["S12"]);
}

#[test]
fn without_the_lease_epoch_a_worker_that_lost_its_lease_commits() {
    goes_red(&[Guard::LeaseEpoch], &["S12"]);
}

#[test]
fn without_the_unique_debit_two_producers_requests_pay_an_order_twice() {
    // Or decide on it twice, where the first decision was `Cancelled`.
    goes_red(&[Guard::UniqueDebit], &["S3", "S7"]);
}

#[test]
fn without_what_is_decided_a_repeat_pays_an_order_twice() {
    goes_red(&[Guard::UniqueDebit, Guard::KnownDecisions], &["S3", "S7"]);
}

#[test]
fn without_final_decisions_a_cancelled_order_is_decided_anew() {
    goes_red(&[Guard::FinalDecision], &["S7"]);
}

#[test]
fn without_the_open_transactions_the_outbox_cursor_loses_what_commits_late() {
    goes_red(&[Guard::CursorSnapshot], &["S13"]);
}

#[test]
fn without_a_session_of_its_own_the_outbox_cursor_loses_rows_after_a_crash() {
    goes_red(&[Guard::CursorSession], &["S13"]);
}

#[test]
fn a_cursor_that_moves_before_the_acknowledgement_loses_rows() {
    goes_red(&[Guard::AckBeforeCursor], &["S13"]);
}

#[test]
fn without_the_status_guard_a_contradicting_result_moves_a_final_order() {
    goes_red(&[Guard::OrderStatus], &["S5"]);
}

#[test]
fn without_the_idempotency_row_a_repeated_deposit_counts_twice() {
    goes_red(&[Guard::IdempotencyRow], &["S9"]);
}

#[test]
fn a_repeat_under_a_new_event_id_is_seen() {
    goes_red(&[Guard::ResultEventId], &["S14"]);
}

#[test]
fn without_the_sweeper_what_the_log_loses_waits_for_ever() {
    goes_red(&[Guard::Sweeper], &["L1"]);
}

#[test]
fn a_replica_that_alone_has_lost_the_log_and_keeps_what_it_has_holds_it_up_for_ever() {
    goes_red(&[Guard::CutOff], &["L1"]);
}

#[test]
fn without_dead_letters_a_record_that_nobody_can_read_holds_up_its_partition() {
    goes_red(&[Guard::DeadLetter], &["L2"]);
}
