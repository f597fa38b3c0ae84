//! `shopd dlq`: the dead letters of both databases, for people and, as JSON, for programs. It only marks what is to be done: the owner
//! of the partition does it, in order.

use std::collections::HashSet;
use std::io::Write;
use std::time::Duration;

use chrono::SecondsFormat;
use comfy_table::{Table, presets};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cli::{Act, Dlq, LetterId, Letters};
use crate::config::{Config, Secret};
use crate::db::Db;
use crate::embedded;
use crate::messaging::dead_letter::operate::{self, Filter, Outcome, Place, Request, Which};
use crate::messaging::dead_letter::{Row, bytes_json, headers_from_json, headers_json};
use crate::shutdown::Shutdown;

use super::{RoleError, all};

/// How often it is looked whether the owner has acted.
const POLL: Duration = Duration::from_millis(50);
/// Characters of a cell.
const CELL_CHARS_MAX: usize = 60;

/// Whether everything is as was asked for: no id unknown, nothing failed again.
pub async fn run(config: Config, command: Dlq, stop: Shutdown) -> Result<bool, RoleError> {
    tokio::select! {
        done = dlq(&config, &command) => done,
        () = stop.stopped() => Err(RoleError::Interrupted),
    }
}

async fn dlq(config: &Config, command: &Dlq) -> Result<bool, RoleError> {
    if !config.data_dir_given {
        let url = |url: &Option<Secret>, key| url.clone().ok_or(RoleError::NotConfigured(key));
        let orders = url(&config.orders.database_url, "orders.database_url")?;
        let payments = url(&config.payments.database_url, "payments.database_url")?;
        return on(config, [&orders, &payments], command).await;
    }
    let options = all::options(config);
    if !embedded::exists(&options) {
        return Err(RoleError::NothingThere(config.data_dir.clone()));
    }
    let attached = embedded::attach(&options).await?;
    let done = on(config, [&attached.url(all::ORDERS), &attached.url(all::PAYMENTS)], command).await;
    attached.detach(config.shutdown.timeout).await?;
    done
}

async fn on(config: &Config, urls: [&Secret; 2], command: &Dlq) -> Result<bool, RoleError> {
    let mut databases = Vec::new();
    for url in urls {
        databases.push(Db::new(url, "dlq", &config.database)?);
    }
    match command {
        Dlq::List { letters, limit, json } => list(&databases, &filter(letters), *limit, *json).await,
        Dlq::Show { ids, json } => show(&databases, ids, *json).await,
        Dlq::Redrive(act_on) => act(&databases, act_on, Request::Redrive).await,
        Dlq::Discard(act_on) => act(&databases, act_on, Request::Discard).await,
    }
}

fn filter(letters: &Letters) -> Filter {
    let state = letters.state.map(|state| state.as_str().to_owned());
    Filter { topic: letters.topic.clone(), state, reason: letters.reason.clone(), key: letters.key.clone() }
}

/// Of a table, where nobody says how many.
const TABLE_ROWS: i64 = 1_000;
const PAGE_ROWS: i64 = 1_000;

async fn list(databases: &[Db], filter: &Filter, limit: Option<i64>, as_json: bool) -> Result<bool, RoleError> {
    let limit = limit.unwrap_or(if as_json { i64::MAX } else { TABLE_ROWS });
    let mut table = table(["id", "state", "key", "reason", "attempts", "waiting", "at"]);
    let (mut shown, mut more) = (0, false);
    for db in databases {
        let mut after: Option<Place> = None;
        // One more than is shown tells whether there is more.
        while !more {
            let asked = PAGE_ROWS.min((limit - shown).saturating_add(1));
            let mut page = operate::list(&mut *db.get().await?, filter, after.as_ref(), asked).await?;
            let is_last = (page.len() as i64) < asked;
            more = page.len() as i64 > limit - shown;
            page.truncate(usize::try_from(limit - shown).unwrap_or(usize::MAX));
            shown += page.len() as i64;
            after = page.last().map(|row| (row.topic.clone(), row.partition, row.log_offset));
            if as_json {
                say(&page.iter().map(|row| format!("{}\n", summary(row))).collect::<String>())?;
            } else {
                table.add_rows(page.iter().map(cells));
            }
            if is_last {
                break;
            }
        }
    }
    match (as_json, more) {
        (true, true) => drop(writeln!(std::io::stderr(), "shopd: there are more; see --limit ({limit})")),
        (true, false) => {}
        (false, _) => {
            let more = if more { format!(", and more; see --limit ({limit})") } else { String::new() };
            say(&format!("{table}\n{shown} letters{more}\n"))?;
        }
    }
    Ok(true)
}

fn cells(row: &Row) -> [String; 7] {
    let waiting = if row.state == "parked" { row.followers.to_string() } else { String::new() };
    let (key, reason) = (cell(&text(row.key.as_deref())), cell(&row.reason));
    [id(row), row.state.clone(), key, reason, row.attempts.to_string(), waiting, time(row)]
}

async fn show(databases: &[Db], ids: &[LetterId], as_json: bool) -> Result<bool, RoleError> {
    let places = places(ids);
    let mut rows = Vec::new();
    for db in databases {
        rows.extend(operate::find(&mut *db.get().await?, &places).await?);
    }
    let (mut said, mut all_there) = (String::new(), true);
    for place in &places {
        let row = rows.iter().find(|row| (row.topic.as_str(), row.partition, row.log_offset) == (&*place.0, place.1, place.2));
        match row {
            None => {
                all_there = false;
                unknown(place);
            }
            Some(row) if as_json => {
                let mut line = summary(row);
                line["headers"] = headers_json(&headers_from_json(&row.headers));
                line["value"] = optional(row.value.as_deref());
                said.push_str(&format!("{line}\n"));
            }
            Some(row) => said.push_str(&page(row)),
        }
    }
    say(&said)?;
    Ok(all_there)
}

async fn act(databases: &[Db], act: &Act, request: Request) -> Result<bool, RoleError> {
    let which = if act.ids.is_empty() { Which::All(filter(&act.letters)) } else { Which::These(places(&act.ids)) };
    let mut marked: Vec<Vec<Place>> = Vec::new();
    for db in databases {
        marked.push(operate::mark(&mut *db.get().await?, &which, request).await?);
    }
    let deadline = Instant::now() + Duration::from_millis(act.wait_ms);
    let mut outcomes;
    loop {
        outcomes = Vec::new();
        for (db, places) in databases.iter().zip(&marked) {
            let of_one = operate::outcomes(&mut *db.get().await?, places, request).await?;
            outcomes.extend(places.iter().cloned().zip(of_one));
        }
        if Instant::now() >= deadline || outcomes.iter().all(|(_, outcome)| *outcome != Outcome::Marked) {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    let (mut said, mut well) = (String::new(), true);
    let known: HashSet<&Place> = outcomes.iter().map(|(place, _)| place).collect();
    if let Which::These(places) = &which {
        for place in places.iter().filter(|place| !known.contains(place)) {
            well = false;
            unknown(place);
            if act.json {
                said.push_str(&format!("{}\n", json!({"id": place_id(place), "outcome": "unknown"})));
            }
        }
    }
    let mut table = table(["id", "outcome", "reason"]);
    for (place, outcome) in &outcomes {
        let (word, reason) = match outcome {
            Outcome::Marked => ("marked", "its owner has not acted yet"),
            Outcome::Applied => ("applied", ""),
            Outcome::Discarded => ("discarded", ""),
            Outcome::Failed(reason) => ("failed", reason.as_str()),
            Outcome::Waits => ("waiting", "behind an earlier letter of its key"),
        };
        well &= !matches!(outcome, Outcome::Failed(_) | Outcome::Waits);
        if act.json {
            said.push_str(&format!("{}\n", json!({"id": place_id(place), "outcome": word, "reason": reason})));
        } else {
            table.add_row([place_id(place), word.to_owned(), cell(reason)]);
        }
    }
    if !act.json {
        said = if outcomes.is_empty() { "no such letters\n".to_owned() } else { format!("{table}\n") };
    }
    say(&said)?;
    Ok(well)
}

fn places(ids: &[LetterId]) -> Vec<Place> {
    ids.iter().map(|id| (id.topic.clone(), id.partition, id.offset)).collect()
}

fn place_id((topic, partition, offset): &Place) -> String {
    format!("{topic}/{partition}/{offset}")
}

fn id(row: &Row) -> String {
    format!("{}/{}/{}", row.topic, row.partition, row.log_offset)
}

fn time(row: &Row) -> String {
    row.at.to_rfc3339_opts(SecondsFormat::Micros, true)
}

/// What `list` says of a letter.
fn summary(row: &Row) -> Value {
    json!({
        "id": id(row),
        "topic": row.topic,
        "partition": row.partition,
        "offset": row.log_offset,
        "key": optional(row.key.as_deref()),
        "reason": row.reason,
        "attempts": row.attempts,
        "at": time(row),
        "state": row.state,
        "orderingKey": row.ordering_key,
        "followers": row.followers,
        "requested": row.requested,
        "nextAttemptAt": row.next_attempt_at.map(|at| at.to_rfc3339_opts(SecondsFormat::Micros, true)),
    })
}

/// Text, `{"base64":"..."}`, or null.
fn optional(bytes: Option<&[u8]>) -> Value {
    bytes.map_or(Value::Null, bytes_json)
}

fn text(bytes: Option<&[u8]>) -> String {
    match optional(bytes) {
        Value::Null => String::new(),
        Value::String(text) => text,
        encoded => encoded.to_string(),
    }
}

/// A letter for people.
fn page(row: &Row) -> String {
    let mut table = table(["", &id(row)]);
    let next = row.next_attempt_at.map(|at| at.to_rfc3339_opts(SecondsFormat::Micros, true)).unwrap_or_default();
    for (name, value) in [
        ("state", row.state.clone()),
        ("reason", row.reason.clone()),
        ("attempts", row.attempts.to_string()),
        ("at", time(row)),
        ("next attempt", next),
        ("asked for", row.requested.clone().unwrap_or_default()),
        ("waiting behind it", row.followers.to_string()),
        ("key", text(row.key.as_deref())),
    ] {
        table.add_row([name.to_owned(), printable(&value)]);
    }
    for (name, value) in headers_from_json(&row.headers).iter() {
        table.add_row([format!("header {}", cell(&name)), printable(&text(Some(value)))]);
    }
    let value = row.value.as_deref().map_or_else(|| "none".to_owned(), |value| printable(&text(Some(value))));
    let bytes = row.value.as_ref().map_or(0, Vec::len);
    table.add_row([format!("value ({bytes} bytes)"), value]);
    format!("{table}\n")
}

/// Another producer's text may hold what moves a terminal's cursor.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Printable and short.
fn cell(text: &str) -> String {
    let mut cell = printable(&text.chars().take(CELL_CHARS_MAX).collect::<String>());
    if text.chars().nth(CELL_CHARS_MAX).is_some() {
        cell.push('…');
    }
    cell
}

fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(header);
    table
}

fn unknown(place: &Place) {
    drop(writeln!(std::io::stderr(), "shopd: {}: no such letter", place_id(place)));
}

fn say(text: &str) -> Result<(), RoleError> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(RoleError::Output)
}
