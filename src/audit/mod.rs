//! The audit: whether anything was lost or charged twice, asked of both databases and the log. Reads only, beside running roles.
//!
//! Two databases have no common snapshot. Each is read once, in one snapshot of its own, both by order id, and joined as they come
//! ([`compare`] is the rule); memory does not grow with the shop. Orders that do not agree are looked at again, in both databases
//! and against the log ([`suspects`]): what is on its way is no offence, and a final state that still disagrees is one, because
//! nothing final changes (S7). Age decides nothing.
//!
//! Owns no table. May import the façades of orders, payments and messaging, contracts and db.

mod compare;
mod judge;
mod records;
mod report;
mod suspects;

use std::iter::Peekable;
use std::time::Instant;
use std::vec::IntoIter;

use crate::db::{Check, Conn, Db, DbError, Found, begin_snapshot};
use crate::messaging::log::{LogError, SharedLog};
use crate::orders::audit::{self as orders, OrderFact};
use crate::payments::audit::{self as payments, PaymentFact};

use compare::{agree, ended_by_another, requested_by_another};
pub use report::{Foreign, InFlight, Offence, Report, Tally};
use suspects::Suspects;

/// Why the audit cannot say.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("{database}: {cause}")]
    Db { database: &'static str, cause: DbError },
    /// It does not answer.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Which database did not answer.
fn of_orders(cause: DbError) -> AuditError {
    AuditError::Db { database: "orders", cause }
}

fn of_payments(cause: DbError) -> AuditError {
    AuditError::Db { database: "payments", cause }
}

/// What is audited; both made by [`Db::for_audits`].
pub struct Audit {
    pub orders: Db,
    pub payments: Db,
    pub log: SharedLog,
}

impl Audit {
    /// Every check, once. Makes four connections of its own and needs one statement's time for each check.
    pub async fn run(&self) -> Result<Report, AuditError> {
        let began = Instant::now();
        // Orders' snapshot before payments'.
        let mut orders = self.orders.dedicated().await.map_err(of_orders)?;
        begin_snapshot(&mut orders).await.map_err(of_orders)?;
        let mut payments = self.payments.dedicated().await.map_err(of_payments)?;
        begin_snapshot(&mut payments).await.map_err(of_payments)?;

        let mut report = Report::default();
        let (of_one, of_other) =
            tokio::try_join!(async { run_all(&mut orders, &orders::CHECKS).await.map_err(of_orders) }, async {
                run_all(&mut payments, &payments::CHECKS).await.map_err(of_payments)
            },)?;
        for (check, found) in of_other.into_iter().chain(of_one) {
            report.tally(check, found);
        }
        let size = payments::size(&mut payments).await.map_err(of_payments)?;
        (report.accounts, report.transfers) = (size.accounts.unsigned_abs(), size.transfers.unsigned_abs());

        let mut suspects = Suspects::new(self).await?;
        self.join(orders, payments, &mut suspects, &mut report).await?;
        records::requests(self, &mut report).await?;
        records::results(self, &mut report).await?;
        report.elapsed = began.elapsed();
        Ok(report)
    }

    /// Walks both databases side by side, by order id.
    async fn join(
        &self,
        mut orders: Conn,
        mut payments: Conn,
        suspects: &mut Suspects<'_>,
        report: &mut Report,
    ) -> Result<(), AuditError> {
        orders::begin(&mut orders).await.map_err(of_orders)?;
        payments::begin(&mut payments).await.map_err(of_payments)?;
        let mut of_orders_page = Vec::new().into_iter().peekable();
        let mut of_payments_page = Vec::new().into_iter().peekable();
        let (mut orders_end, mut payments_end) = (false, false);
        loop {
            let (need_orders, need_payments) =
                (of_orders_page.peek().is_none() && !orders_end, of_payments_page.peek().is_none() && !payments_end);
            let (more_orders, more_payments) = tokio::try_join!(
                async { if need_orders { orders::next(&mut orders).await.map_err(of_orders) } else { Ok(Vec::new()) } },
                async { if need_payments { payments::next(&mut payments).await.map_err(of_payments) } else { Ok(Vec::new()) } },
            )?;
            if need_orders {
                orders_end = more_orders.is_empty();
                of_orders_page = more_orders.into_iter().peekable();
            }
            if need_payments {
                payments_end = more_payments.is_empty();
                of_payments_page = more_payments.into_iter().peekable();
            }
            if orders_end && payments_end {
                break;
            }
            while let Some(pair) = next_pair((&mut of_orders_page, orders_end), (&mut of_payments_page, payments_end)) {
                report.orders += u64::from(pair.0.is_some());
                report.payments += u64::from(pair.1.is_some());
                report.foreign.orders += u64::from(pair.0.as_ref().is_some_and(ended_by_another));
                report.foreign.payments += u64::from(pair.1.as_ref().is_some_and(requested_by_another));
                if !agree(pair.0.as_ref(), pair.1.as_ref()) {
                    suspects.add(pair.0.map_or_else(|| pair.1.map(|payment| payment.order_id), |order| Some(order.id)));
                }
            }
            if suspects.are_many() {
                suspects.settle(report).await?;
            }
        }
        suspects.settle(report).await
    }
}

async fn run_all(conn: &mut Conn, checks: &'static [Check]) -> Result<Vec<(&'static Check, Found)>, DbError> {
    let mut all = Vec::with_capacity(checks.len());
    for check in checks {
        let began = Instant::now();
        let found = check.run(conn).await?;
        tracing::debug!(check = check.name, found = found.total, ms = began.elapsed().as_millis(), "checked");
        all.push((check, found));
    }
    Ok(all)
}

type Side<'a, T> = (&'a mut Peekable<IntoIter<T>>, bool);

/// The next order, its decision, or both where they have one id; `None` where a page that is not the last is at its end.
fn next_pair(
    (orders, orders_end): Side<'_, OrderFact>,
    (payments, payments_end): Side<'_, PaymentFact>,
) -> Option<(Option<OrderFact>, Option<PaymentFact>)> {
    match (orders.peek(), payments.peek()) {
        (Some(order), Some(payment)) => Some(match order.id.cmp(&payment.order_id) {
            std::cmp::Ordering::Less => (orders.next(), None),
            std::cmp::Ordering::Greater => (None, payments.next()),
            std::cmp::Ordering::Equal => (orders.next(), payments.next()),
        }),
        (Some(_), None) if payments_end => Some((orders.next(), None)),
        (None, Some(_)) if orders_end => Some((None, payments.next())),
        _ => None,
    }
}
