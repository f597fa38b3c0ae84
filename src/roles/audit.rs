//! `shopd audit`: whether anything was lost or charged twice, said to people or, as JSON, to programs.

use std::io::Write;

use comfy_table::{Table, presets};
use serde_json::{Value, json};

use crate::audit::{Audit, AuditError, Offence, Report};
use crate::config::{Config, Secret};
use crate::db::{Db, Subject};
use crate::embedded;
use crate::shutdown::Shutdown;

use super::{RoleError, all};

/// Whether all checks hold; what they found is on standard output.
pub async fn run(config: Config, as_json: bool, stop: Shutdown) -> Result<bool, RoleError> {
    let report = tokio::select! {
        report = audit(&config) => report?,
        () = stop.stopped() => return Err(RoleError::Interrupted),
    };
    let mut out = std::io::stdout().lock();
    let said = if as_json { write_json(&mut out, &report) } else { write_tables(&mut out, &report) };
    said.and_then(|()| out.flush()).map_err(RoleError::Output)?;
    Ok(report.is_clean())
}

async fn audit(config: &Config) -> Result<Report, RoleError> {
    if !config.data_dir_given {
        let url = |url: &Option<Secret>, key| url.clone().ok_or(RoleError::NotConfigured(key));
        let orders = url(&config.orders.database_url, "orders.database_url")?;
        let payments = url(&config.payments.database_url, "payments.database_url")?;
        // Without a broker, `all` keeps its log beside the orders.
        return on(config, &orders, &payments, &orders).await;
    }
    let options = all::options(config);
    if !embedded::exists(&options) {
        return Err(RoleError::NothingThere(config.data_dir.clone()));
    }
    let attached = embedded::attach(&options).await?;
    let report = on(config, &attached.url(all::ORDERS), &attached.url(all::PAYMENTS), &attached.url(all::LOG)).await;
    attached.detach(config.shutdown.timeout).await?;
    report
}

async fn on(config: &Config, orders: &Secret, payments: &Secret, log: &Secret) -> Result<Report, RoleError> {
    let log = super::log(config, log, "audit")?;
    let (orders, payments) = (Db::for_audits(orders, &config.database)?, Db::for_audits(payments, &config.database)?);
    Ok(Audit { orders, payments, log }.run().await?)
}

/// One line an offence, then the summary.
fn write_json(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    for tally in &report.checks {
        for offence in &tally.offences {
            let name = match offence.subject {
                Subject::Order => "orderId",
                Subject::User => "userId",
            };
            let mut line = json!({"check": tally.check, "promise": tally.promise, "detail": offence.detail});
            line[name] = Value::from(offence.id.as_str());
            writeln!(out, "{line}")?;
        }
    }
    let checks: serde_json::Map<String, Value> =
        report.checks.iter().map(|tally| (tally.check.to_owned(), Value::from(tally.total))).collect();
    let (flight, foreign) = (&report.in_flight, &report.foreign);
    let summary = json!({"summary": {
        "ok": report.is_clean(),
        "offences": report.offences(),
        "orders": report.orders,
        "payments": report.payments,
        "accounts": report.accounts,
        "transfers": report.transfers,
        "records": report.records,
        "inFlight": {
            "requestUnsent": flight.request_unsent,
            "requestUnread": flight.request_unread,
            "resultUnsent": flight.result_unsent,
            "resultUnread": flight.result_unread,
            "parked": flight.parked,
            "askedAgain": flight.asked_again,
        },
        "otherProducers": {"orders": foreign.orders, "payments": foreign.payments},
        "checks": checks,
        "ms": u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX),
    }});
    writeln!(out, "{summary}")
}

fn write_tables(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    let mut checks = table(["check", "promise", "offences"]);
    for tally in &report.checks {
        checks.add_row([tally.check.to_owned(), tally.promise.to_owned(), tally.total.to_string()]);
    }
    writeln!(out, "{checks}\n")?;
    let (flight, foreign) = (&report.in_flight, &report.foreign);
    let mut numbers = table(["looked at", "number"]);
    for (name, number) in [
        ("orders", report.orders),
        ("decisions", report.payments),
        ("accounts", report.accounts),
        ("ledger entries", report.transfers),
        ("records on the log", report.records),
        ("in flight: request not sent yet", flight.request_unsent),
        ("in flight: request not read yet", flight.request_unread),
        ("in flight: result not sent yet", flight.result_unsent),
        ("in flight: result not read yet", flight.result_unread),
        ("waiting behind a dead letter", flight.parked),
        ("waiting to be asked for again", flight.asked_again),
        ("orders ended by other producers", foreign.orders),
        ("decisions asked for by other producers", foreign.payments),
    ] {
        numbers.add_row([name.to_owned(), number.to_string()]);
    }
    writeln!(out, "{numbers}\n")?;
    if !report.is_clean() {
        write_offences(out, report)?;
    }
    let verdict = match report.offences() {
        0 => "All true: nothing was lost, nothing was charged twice.".to_owned(),
        offences => format!("{offences} offences."),
    };
    writeln!(out, "{verdict} ({} ms)", report.elapsed.as_millis())
}

/// Of one check, to people; `--json` has all that are listed.
const OFFENDERS_SHOWN_MAX: usize = 100;

fn write_offences(out: &mut impl Write, report: &Report) -> std::io::Result<()> {
    let mut offences = table(["check", "order or user", "what is wrong"]);
    for tally in &report.checks {
        let shown = tally.offences.len().min(OFFENDERS_SHOWN_MAX);
        for Offence { id, detail, .. } in &tally.offences[..shown] {
            offences.add_row([tally.check, &printable(id), &printable(detail)]);
        }
        let more = tally.total - shown as u64;
        if more > 0 {
            offences.add_row([tally.check, "", &format!("and {more} more")]);
        }
    }
    writeln!(out, "{offences}\n")
}

/// A user's id may hold what moves a terminal's cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(header);
    table
}

impl From<AuditError> for RoleError {
    fn from(error: AuditError) -> Self {
        Self::Audit(error)
    }
}
