//! Dead letters: records that can never be applied, kept whole in the consumer's database. They are written with the offset
//! in the batch's own transaction, so one is neither lost nor written without being passed. Owns `dead_letter`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Binary, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;

use crate::contracts::Headers;
use crate::db::{Conn, DbError, sql};

use super::consumer::Delivery;

/// Why a record can never be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Poison(pub String);

/// Characters of a reason that are kept.
const REASON_CHARS_MAX: usize = 1_000;

/// Writes the letters in one statement; one that is there already stays as it is.
pub async fn keep(mut conn: &Conn, letters: &[(&Delivery, &Poison)]) -> Result<(), DbError> {
    if letters.is_empty() {
        return Ok(());
    }
    let reason = |poison: &Poison| poison.0.chars().filter(|c| *c != '\0').take(REASON_CHARS_MAX).collect::<String>();
    sql("insert into dead_letter (topic, partition, log_offset, key, value, headers, reason, attempts)
         select unnest($1), unnest($2), unnest($3), unnest($4), unnest($5), unnest($6)::jsonb, unnest($7), 1
         on conflict do nothing")
    .bind::<Array<Text>, _>(letters.iter().map(|(d, _)| &*d.position.topic).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(letters.iter().map(|(d, _)| d.position.partition).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(letters.iter().map(|(d, _)| d.position.offset).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(letters.iter().map(|(d, _)| d.key.as_deref()).collect::<Vec<_>>())
    .bind::<Array<Nullable<Binary>>, _>(letters.iter().map(|(d, _)| d.value.as_deref()).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(letters.iter().map(|(d, _)| headers_json(&d.headers)).collect::<Vec<_>>())
    .bind::<Array<Text>, _>(letters.iter().map(|(_, p)| reason(p)).collect::<Vec<_>>())
    .execute(&mut conn)
    .await?;
    Ok(())
}

/// The values of the letters of `topic` under these keys.
pub async fn letters(conn: &mut Conn, topic: &str, keys: &[&str]) -> Result<Vec<Vec<u8>>, DbError> {
    #[derive(QueryableByName)]
    struct Letter {
        #[diesel(sql_type = Binary)]
        value: Vec<u8>,
    }
    let letters: Vec<Letter> = sql("select value from dead_letter where topic = $1 and key = any($2) and value is not null")
        .bind::<Text, _>(topic)
        .bind::<Array<Binary>, _>(keys.iter().map(|key| key.as_bytes()).collect::<Vec<_>>())
        .load(conn)
        .await?;
    Ok(letters.into_iter().map(|letter| letter.value).collect())
}

/// `{"name":"text"}`, and `{"name":{"base64":"..."}}` where the value is no text that Postgres can hold.
fn headers_json(headers: &Headers) -> String {
    let entries = headers.iter().map(|(name, value)| {
        let value = match std::str::from_utf8(value) {
            Ok(text) if !text.contains('\0') => serde_json::Value::from(text),
            _ => serde_json::json!({ "base64": STANDARD.encode(value) }),
        };
        (name.replace('\0', "\u{fffd}"), value)
    });
    serde_json::Value::Object(entries.collect()).to_string()
}
