//! The statements over `idempotency_key`: one named function each.

use std::borrow::Cow;

use actix_web::http::StatusCode;
use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Bool, Jsonb, Nullable, SmallInt, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use serde_json::Value;
use uuid::Uuid;

use super::Key;
use super::plan::{Claim, Stored};
use crate::db::{Conn, Db, DbError, sql};
use crate::http::reply::Answer;

/// An answer on its way into the table.
#[derive(Debug)]
pub struct Record<'k> {
    pub key: &'k Key,
    pub answer: Answer,
}

#[derive(QueryableByName)]
struct ClaimRow {
    #[diesel(sql_type = BigInt)]
    n: i64,
    #[diesel(sql_type = Bool)]
    acquired: bool,
    #[diesel(sql_type = Nullable<Binary>)]
    body_hash: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<SmallInt>)]
    status: Option<i16>,
    #[diesel(sql_type = Nullable<Jsonb>)]
    headers: Option<Value>,
    #[diesel(sql_type = Nullable<Binary>)]
    body: Option<Vec<u8>>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    stamp: Option<Uuid>,
}

/// Locks the keys until the transaction ends, never waiting, and reads what is stored under them; in their order. They must be
/// distinct.
pub(super) async fn claim(mut conn: &Conn, keys: &[&Key]) -> Result<Vec<Claim>, DbError> {
    let mut rows: Vec<ClaimRow> =
        sql("select n, acquired, body_hash, status, headers, body, stamp from claim_stamped_keys($1, $2, $3)")
            .bind::<Array<Text>, _>(keys.iter().map(|key| key.text.as_str()).collect::<Vec<_>>())
            .bind::<Array<Text>, _>(keys.iter().map(|key| key.scope.as_str()).collect::<Vec<_>>())
            .bind::<Array<BigInt>, _>(keys.iter().map(|key| key.lock()).collect::<Vec<_>>())
            .load(&mut conn)
            .await?;
    rows.sort_unstable_by_key(|row| row.n);
    rows.into_iter().map(Claim::try_from).collect()
}

impl TryFrom<ClaimRow> for Claim {
    type Error = DbError;

    fn try_from(row: ClaimRow) -> Result<Self, DbError> {
        let acquired = row.acquired;
        let (Some(body_hash), Some(status), Some(headers), Some(body)) = (row.body_hash, row.status, row.headers, row.body) else {
            return Ok(Self { acquired, stored: None });
        };
        let odd = |what: &str| DbError::Defect(format!("a stored answer's {what} cannot be read"));
        let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
        let headers: Vec<(String, String)> = serde_json::from_value(headers).map_err(|_| odd("headers"))?;
        let answer = Answer {
            status: status.ok_or_else(|| odd("status"))?,
            headers: headers.into_iter().map(|(name, value)| (Cow::Owned(name), Cow::Owned(value))).collect(),
            body: Some(body.into()),
        };
        Ok(Self { acquired, stored: Some(Stored { body_hash, answer, stamp: row.stamp }) })
    }
}

/// Stores answers under their keys, which must be claimed; no statement where there are none.
///
/// # Errors
/// [`DbError::Duplicate`] where one is stored already: the transaction is to be tried again.
pub async fn store(mut conn: &Conn, mut records: Vec<Record<'_>>) -> Result<(), DbError> {
    if records.is_empty() {
        return Ok(());
    }
    records.sort_unstable_by(|a, b| a.key.id().cmp(&b.key.id()));
    let headers = records.iter().map(|record| serde_json::to_value(&record.answer.headers)).collect::<Result<Vec<_>, _>>();
    let headers = headers.map_err(|error| DbError::Defect(format!("headers: {error}")))?;
    sql("insert into idempotency_key (key, scope, body_hash, status, headers, body, stamp)
         select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6), unnest($7)")
    .bind::<Array<Text>, _>(records.iter().map(|r| r.key.text.as_str()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(records.iter().map(|r| r.key.scope.as_str()).collect::<Vec<_>>())
    .bind::<Array<Binary>, _>(records.iter().map(|r| &r.key.body_hash[..]).collect::<Vec<_>>())
    .bind::<Array<SmallInt>, _>(records.iter().map(|r| r.answer.status.as_u16().cast_signed()).collect::<Vec<_>>())
    .bind::<Array<Jsonb>, _>(headers)
    .bind::<Array<Binary>, _>(records.iter().map(|r| r.answer.body.as_deref().unwrap_or_default()).collect::<Vec<_>>())
    .bind::<Array<Nullable<SqlUuid>>, _>(records.iter().map(|r| r.key.stamp).collect::<Vec<_>>())
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// Deletes at most `rows_max` of the answers that are older than `age_ms` by the database's clock and by `now`, the oldest first; returns how
/// many. What another process is deleting is left to it. One clock that jumps ahead for a minute must not make every key forgotten: a deposit
/// that is repeated then would be made twice.
pub(super) async fn delete_older(db: &Db, now: DateTime<Utc>, age_ms: i64, rows_max: i64) -> Result<u64, DbError> {
    let mut conn = db.get().await?;
    // By the rows' places, found once and before: never joined.
    let deleted = sql("delete from idempotency_key where ctid = any(array(
                           select ctid from idempotency_key where created_at < least(now(), $3) - $1 * interval '1 millisecond'
                            order by created_at limit $2 for update skip locked))")
    .bind::<BigInt, _>(age_ms)
    .bind::<BigInt, _>(rows_max)
    .bind::<Timestamptz, _>(now)
    .execute(&mut conn)
    .await?;
    Ok(deleted as u64)
}
