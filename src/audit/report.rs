//! What an audit says: each check with its count, the first offenders, and what is no offence.

use std::time::Duration;

use crate::db::{Check, Found, OFFENDERS_LISTED_MAX, Subject};

use super::compare::{CROSS, Finding};
use super::judge::Progress;

#[derive(Clone, Debug)]
pub struct Offence {
    pub subject: Subject,
    /// An order's or a user's.
    pub id: String,
    pub detail: String,
}

/// One check.
#[derive(Clone, Debug)]
pub struct Tally {
    pub check: &'static str,
    pub promise: &'static str,
    pub total: u64,
    /// The first of them.
    pub offences: Vec<Offence>,
}

/// Orders that have not ended and will by themselves, or, where parked, with an operator's help.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    pub request_unsent: u64,
    pub request_unread: u64,
    pub result_unsent: u64,
    pub result_unread: u64,
    pub parked: u64,
    /// Its request or its result is gone, and the sweeper asks again.
    pub asked_again: u64,
}

/// Rows that other producers' records made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    pub orders: u64,
    pub payments: u64,
}

#[derive(Clone, Debug)]
pub struct Report {
    pub checks: Vec<Tally>,
    pub in_flight: InFlight,
    pub foreign: Foreign,
    pub orders: u64,
    pub payments: u64,
    pub accounts: u64,
    pub transfers: u64,
    /// Read from the log.
    pub records: u64,
    pub elapsed: Duration,
}

impl Default for Report {
    fn default() -> Self {
        let cross = CROSS.map(|check| Tally { check: check.name, promise: check.promise, total: 0, offences: Vec::new() });
        Self {
            checks: cross.to_vec(),
            in_flight: InFlight::default(),
            foreign: Foreign::default(),
            orders: 0,
            payments: 0,
            accounts: 0,
            transfers: 0,
            records: 0,
            elapsed: Duration::ZERO,
        }
    }
}

impl Report {
    /// Nothing was lost or charged twice.
    pub fn is_clean(&self) -> bool {
        self.offences() == 0
    }

    /// Of all checks; one order may offend more than one.
    pub fn offences(&self) -> u64 {
        self.checks.iter().map(|tally| tally.total).sum()
    }

    pub(super) fn tally(&mut self, check: &Check, found: Found) {
        let offence = |found: crate::db::Offender| Offence {
            subject: check.subject,
            id: found.offender,
            detail: found.detail.unwrap_or_default(),
        };
        let offences = found.offenders.into_iter().map(offence).collect();
        self.checks.push(Tally { check: check.name, promise: check.promise, total: found.total, offences });
    }

    pub(super) fn add(&mut self, order: uuid::Uuid, finding: Finding) {
        // Every check of `CROSS` is there from the beginning.
        let Some(tally) = self.checks.iter_mut().find(|tally| tally.check == finding.check.name) else { return };
        tally.total += 1;
        if tally.offences.len() < OFFENDERS_LISTED_MAX {
            tally.offences.push(Offence { subject: Subject::Order, id: order.to_string(), detail: finding.detail });
        }
    }

    pub(super) fn request_in_flight(&mut self, progress: Progress) {
        let flight = &mut self.in_flight;
        *match progress {
            Progress::Unsent => &mut flight.request_unsent,
            Progress::Parked => &mut flight.parked,
            Progress::AskedAgain => &mut flight.asked_again,
            Progress::Unread | Progress::Passed => &mut flight.request_unread,
        } += 1;
    }

    pub(super) fn result_in_flight(&mut self, progress: Progress) {
        let flight = &mut self.in_flight;
        *match progress {
            Progress::Unsent => &mut flight.result_unsent,
            Progress::Parked => &mut flight.parked,
            Progress::AskedAgain => &mut flight.asked_again,
            Progress::Unread | Progress::Passed => &mut flight.result_unread,
        } += 1;
    }
}
