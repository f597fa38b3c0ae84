//! Writing letters down, in the transaction that passes them.

use std::collections::HashMap;
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Integer, Nullable, Text, Timestamptz};
use diesel_async::RunQueryDsl;

use crate::db::{Conn, DbError, sql};
use crate::messaging::consumer::{Delivery, Position};
use crate::messaging::outbox::{self, Copy};

use super::copy::{self, SUFFIX};
use super::headers::to_json;
use super::replay::settle;
use super::{Row, reason_text, row_columns};

/// Of a decoded record: whose order is kept, and what a repeat is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub ordering: String,
    pub business: String,
}

/// What a record becomes that was not applied.
#[derive(Clone, Debug)]
pub enum Keep<'d> {
    /// It could not be decoded.
    Dead { delivery: &'d Delivery, reason: String },
    /// It failed for the first time; tried again after `retry_in`.
    Parked { delivery: &'d Delivery, keys: Keys, reason: String, retry_in: Option<Duration> },
    /// It waits behind its key's head.
    Waiting { delivery: &'d Delivery, keys: Keys },
}

impl Keep<'_> {
    fn delivery(&self) -> &Delivery {
        match self {
            Self::Dead { delivery, .. } | Self::Parked { delivery, .. } | Self::Waiting { delivery, .. } => delivery,
        }
    }

    pub fn position(&self) -> &Position {
        &self.delivery().position
    }

    pub fn state(&self) -> &'static str {
        match self {
            Self::Dead { .. } => "dead",
            Self::Parked { .. } => "parked",
            Self::Waiting { .. } => "waiting",
        }
    }

    fn keys(&self) -> Option<&Keys> {
        match self {
            Self::Dead { .. } => None,
            Self::Parked { keys, .. } | Self::Waiting { keys, .. } => Some(keys),
        }
    }

    /// Why it failed; one that waits was never tried.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Dead { reason, .. } | Self::Parked { reason, .. } => Some(reason),
            Self::Waiting { .. } => None,
        }
    }

    fn retry_in(&self) -> Option<Duration> {
        match self {
            Self::Parked { retry_in, .. } => *retry_in,
            Self::Dead { .. } | Self::Waiting { .. } => None,
        }
    }
}

#[derive(QueryableByName)]
struct Kept {
    #[diesel(sql_type = Text)]
    state: String,
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = Nullable<Text>)]
    ordering_key: Option<String>,
}

/// Writes the letters in one statement, and the copies of those that failed into the outbox. One that is there already stays as it is, but
/// for one that could not be read before and can be now, where its offset was set back: then it heads its key, or waits, as any other.
/// Returns those that lay at the place of another record: of a topic that was deleted and made anew. They are gone.
pub async fn keep(mut conn: &Conn, letters: &[Keep<'_>]) -> Result<Vec<Row>, DbError> {
    fn column<'k, T>(letters: &'k [Keep<'k>], field: impl Fn(&'k Keep<'k>) -> T) -> Vec<T> {
        letters.iter().map(field).collect()
    }
    let Some(first) = letters.first() else { return Ok(Vec::new()) };
    let displaced = displace(conn, letters).await?;
    let kept: Vec<Kept> = sql("with letter as (
             select unnest($1) as topic, unnest($2) as partition, unnest($3) as log_offset, unnest($4) as key, unnest($5) as value,
                    unnest($6)::jsonb as headers, unnest($7) as reason, unnest($8) as attempts, unnest($9) as state,
                    unnest($10) as undecodable, unnest($11) as ordering_key, unnest($12) as business_key,
                    unnest($13) as published_at, unnest($14) as received_at,
                    clock_timestamp() + unnest($15) * interval '1 millisecond' as next_attempt_at),
         readable as (
             update dead_letter d
                set state = l.state, key = l.key, value = l.value, headers = l.headers, reason = l.reason,
                    attempts = d.attempts + l.attempts, ordering_key = l.ordering_key, business_key = l.business_key,
                    requested = case when d.requested = 'discard' then d.requested end, next_attempt_at = l.next_attempt_at
               from letter l
              where d.topic = l.topic and d.partition = l.partition and d.log_offset = l.log_offset and not l.undecodable
                and d.state in ('dead', 'resolved')
             returning d.state, d.partition, d.ordering_key),
         new as (
             insert into dead_letter (topic, partition, log_offset, key, value, headers, reason, attempts, state,
                                      undecodable, ordering_key, business_key, published_at, received_at, next_attempt_at)
             select * from letter
             on conflict do nothing
             returning state, partition, ordering_key)
         select * from readable union all select * from new")
    .bind::<Array<Text>, _>(column(letters, |k| &*k.delivery().position.topic))
    .bind::<Array<Integer>, _>(column(letters, |k| k.delivery().position.partition))
    .bind::<Array<BigInt>, _>(column(letters, |k| k.delivery().position.offset))
    .bind::<Array<Nullable<Binary>>, _>(column(letters, |k| k.delivery().key.as_deref()))
    .bind::<Array<Nullable<Binary>>, _>(column(letters, |k| k.delivery().value.as_deref()))
    .bind::<Array<Text>, _>(column(letters, |k| to_json(&k.delivery().headers).to_string()))
    .bind::<Array<Text>, _>(column(letters, |k| k.reason().map_or_else(|| WAITING.to_owned(), reason_text)))
    .bind::<Array<Integer>, _>(column(letters, |k| i32::from(k.reason().is_some())))
    .bind::<Array<Text>, _>(column(letters, Keep::state))
    .bind::<Array<Bool>, _>(column(letters, |k| k.keys().is_none()))
    .bind::<Array<Nullable<Text>>, _>(column(letters, |k| k.keys().map(|keys| keys.ordering.as_str())))
    .bind::<Array<Nullable<Text>>, _>(column(letters, |k| k.keys().map(|keys| keys.business.as_str())))
    .bind::<Array<Timestamptz>, _>(column(letters, |k| k.delivery().published_at))
    .bind::<Array<Timestamptz>, _>(column(letters, |k| k.delivery().received_at))
    .bind::<Array<Nullable<BigInt>>, _>(column(letters, |k| k.retry_in().map(|delay| delay.as_millis() as i64)))
    .load(&mut conn)
    .await?;
    let mut more: HashMap<(i32, String), i32> = HashMap::new();
    for one in kept.into_iter().filter(|one| one.state == "waiting") {
        *more.entry((one.partition, one.ordering_key.unwrap_or_default())).or_default() += 1;
    }
    if !more.is_empty() {
        sql("update dead_letter d set followers = d.followers + m.n
               from (select unnest($2) as partition, unnest($3) as ordering_key, unnest($4) as n) m
              where d.topic = $1 and d.partition = m.partition and d.ordering_key = m.ordering_key and d.state = 'parked'")
        .bind::<Text, _>(&*first.delivery().position.topic)
        .bind::<Array<Integer>, _>(more.keys().map(|(partition, _)| *partition).collect::<Vec<_>>())
        .bind::<Array<Text>, _>(more.keys().map(|(_, key)| key.as_str()).collect::<Vec<_>>())
        .bind::<Array<Integer>, _>(more.values().copied().collect::<Vec<_>>())
        .execute(&mut conn)
        .await?;
    }
    let lines: Vec<(i32, String)> = displaced.iter().filter_map(|row| Some((row.partition, row.ordering_key.clone()?))).collect();
    settle(conn, &first.delivery().position.topic, &lines).await?;
    let failed = letters.iter().filter_map(|letter| Some((letter.delivery(), letter.reason()?)));
    send_copies(conn, failed, 1).await?;
    Ok(displaced)
}

/// Removes the letters whose place another record has now: its time on the log tells.
async fn displace(mut conn: &Conn, letters: &[Keep<'_>]) -> Result<Vec<Row>, DbError> {
    let Some(first) = letters.first() else { return Ok(Vec::new()) };
    let rows = sql(concat!(
        "delete from dead_letter d
          using (select unnest($2) as partition, unnest($3) as log_offset, unnest($4) as published_at) now
          where d.topic = $1 and d.partition = now.partition and d.log_offset = now.log_offset and d.published_at <> now.published_at
      returning ",
        row_columns!()
    ))
    .bind::<Text, _>(&*first.delivery().position.topic)
    .bind::<Array<Integer>, _>(letters.iter().map(|k| k.position().partition).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(letters.iter().map(|k| k.position().offset).collect::<Vec<_>>())
    .bind::<Array<Timestamptz>, _>(letters.iter().map(|k| k.delivery().published_at).collect::<Vec<_>>())
    .load(&mut conn)
    .await?;
    Ok(rows)
}

/// The reason of what was not tried yet.
pub(super) const WAITING: &str = "waits behind an earlier record of its key";

/// Puts the records' copies into the outbox.
pub(super) async fn send_copies<'d>(
    conn: &Conn,
    failed: impl Iterator<Item = (&'d Delivery, &'d str)>,
    attempts: i32,
) -> Result<(), DbError> {
    let copies: Vec<Copy<'d>> = failed
        .map(|(delivery, reason)| Copy {
            topic: format!("{}{SUFFIX}", delivery.position.topic),
            key: delivery.key.as_deref(),
            value: delivery.value.as_deref(),
            headers: to_json(&copy::headers(delivery, &reason_text(reason), attempts)).to_string(),
        })
        .collect();
    outbox::append_copies(conn, &copies).await
}

/// A queue that a batch's records may have to join, or only that its partition has some.
#[derive(Clone, Debug, QueryableByName)]
pub struct Head {
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    /// One of the keys asked for; `None`: the partition has heads, of whatever keys.
    #[diesel(sql_type = Nullable<Text>)]
    pub ordering_key: Option<String>,
    #[diesel(sql_type = Integer)]
    pub followers: i32,
}

/// Which of these keys are parked in these partitions, and which of the partitions have any that is.
pub async fn heads(mut conn: &Conn, topic: &str, partitions: &[i32], keys: &[&str]) -> Result<Vec<Head>, DbError> {
    let heads = sql("select h.partition, h.ordering_key, h.followers from dead_letter h
                      where h.topic = $1 and h.partition = any($2) and h.ordering_key = any($3) and h.state = 'parked'
                     union all
                     select p.partition, null, 0 from unnest($2) as p (partition)
                      where exists (select from dead_letter h
                                     where h.topic = $1 and h.partition = p.partition and h.state = 'parked')")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(partitions)
    .bind::<Array<Text>, _>(keys)
    .load(&mut conn)
    .await?;
    Ok(heads)
}

#[derive(QueryableByName)]
pub struct Member {
    #[diesel(sql_type = Integer)]
    pub partition: i32,
    #[diesel(sql_type = Text)]
    pub ordering_key: String,
    #[diesel(sql_type = Text)]
    pub business_key: String,
}

/// Which of these (partition, keys) are parked or waiting.
pub async fn members(mut conn: &Conn, topic: &str, asked: &[(i32, Keys)]) -> Result<Vec<Member>, DbError> {
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let members = sql("select d.partition, d.ordering_key, d.business_key
                         from (select unnest($2) as partition, unnest($3) as ordering_key, unnest($4) as business_key) asked
                         join dead_letter d using (partition, ordering_key, business_key)
                        where d.topic = $1 and d.state in ('parked', 'waiting')")
    .bind::<Text, _>(topic)
    .bind::<Array<Integer>, _>(asked.iter().map(|(partition, _)| *partition).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(asked.iter().map(|(_, keys)| keys.ordering.as_str()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(asked.iter().map(|(_, keys)| keys.business.as_str()).collect::<Vec<_>>())
    .load(&mut conn)
    .await?;
    Ok(members)
}
