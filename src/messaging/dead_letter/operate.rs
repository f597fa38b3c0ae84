//! What operators' commands do with letters: read them, and mark what the owner of the partition is to do. Outside any lease; a mark
//! is all that is written here.

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Integer, Nullable, Text};
use diesel_async::RunQueryDsl;

use crate::db::{Conn, DbError, sql};

use super::{CHANNEL, Row, row_columns};

/// Topic, partition, offset.
pub type Place = (String, i32, i64);

/// Which letters; what is `None` does not matter.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub topic: Option<String>,
    /// dead, parked, waiting or resolved; without it all but what is resolved.
    pub state: Option<String>,
    /// In any case, anywhere in the reason.
    pub reason: Option<String>,
    /// The record's key, or the key whose order it keeps.
    pub key: Option<String>,
}

#[derive(Clone, Debug)]
pub enum Which {
    These(Vec<Place>),
    All(Filter),
}

/// What an owner may be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Redrive,
    Discard,
}

impl Request {
    fn as_str(self) -> &'static str {
        match self {
            Self::Redrive => "redrive",
            Self::Discard => "discard",
        }
    }
}

/// What became of a request, as of now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The owner has not acted yet.
    Marked,
    Applied,
    Discarded,
    /// It failed again, and why.
    Failed(String),
    /// One of its key that is before it failed.
    Waits,
}

/// The letters without their values, by topic, partition and offset, those behind `after`.
pub async fn list(conn: &mut Conn, filter: &Filter, after: Option<&Place>, limit: i64) -> Result<Vec<Row>, DbError> {
    let rows = sql(concat!(
        "select ",
        row_columns!("null::bytea as value"),
        " from dead_letter d
          where ($1 is null or d.topic = $1) and ($2 is null and d.state <> 'resolved' or d.state = $2)
            and ($3 is null or strpos(lower(d.reason), lower($3)) > 0)
            and ($4 is null or d.key = convert_to($4, 'UTF8') or d.ordering_key = $4)
            and ($6 is null or (d.topic, d.partition, d.log_offset) > ($6, $7, $8))
          order by d.topic, d.partition, d.log_offset limit $5"
    ))
    .bind::<Nullable<Text>, _>(filter.topic.as_deref())
    .bind::<Nullable<Text>, _>(filter.state.as_deref())
    .bind::<Nullable<Text>, _>(filter.reason.as_deref())
    .bind::<Nullable<Text>, _>(filter.key.as_deref())
    .bind::<BigInt, _>(limit)
    .bind::<Nullable<Text>, _>(after.map(|(topic, ..)| topic.as_str()))
    .bind::<Nullable<Integer>, _>(after.map(|(_, partition, _)| *partition))
    .bind::<Nullable<BigInt>, _>(after.map(|(.., offset)| *offset))
    .load(conn)
    .await?;
    Ok(rows)
}

/// These letters, whole; one that is not there is left out.
pub async fn find(conn: &mut Conn, places: &[Place]) -> Result<Vec<Row>, DbError> {
    let rows = sql(concat!(
        "select ",
        row_columns!(),
        " from (select unnest($1) as topic, unnest($2) as partition, unnest($3) as log_offset) asked
          join dead_letter d using (topic, partition, log_offset)"
    ))
    .bind::<Array<Text>, _>(places.iter().map(|(topic, ..)| topic.as_str()).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(places.iter().map(|(_, partition, _)| *partition).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(places.iter().map(|(.., offset)| *offset).collect::<Vec<_>>())
    .load(conn)
    .await?;
    Ok(rows)
}

#[derive(QueryableByName)]
struct Marked {
    #[diesel(sql_type = Text)]
    topic: String,
    #[diesel(sql_type = Integer)]
    partition: i32,
    #[diesel(sql_type = BigInt)]
    log_offset: i64,
    #[diesel(sql_type = Text)]
    state: String,
    #[diesel(sql_type = Nullable<Text>)]
    ordering_key: Option<String>,
}

/// Asks the owners of these letters for something, and wakes them; returns which letters there are, in their order. What waits is redriven by its
/// key's head.
pub async fn mark(conn: &mut Conn, which: &Which, request: Request) -> Result<Vec<Place>, DbError> {
    let marked: Vec<Marked> = match which {
        Which::These(places) => {
            sql("update dead_letter d set requested = $4
                   from (select distinct unnest($1) as topic, unnest($2) as partition, unnest($3) as log_offset) asked
                  where d.topic = asked.topic and d.partition = asked.partition and d.log_offset = asked.log_offset
                    and d.state <> 'resolved'
              returning d.topic, d.partition, d.log_offset, d.state, d.ordering_key")
            .bind::<Array<Text>, _>(places.iter().map(|(topic, ..)| topic.as_str()).collect::<Vec<_>>())
            .bind::<Array<Integer>, _>(places.iter().map(|(_, partition, _)| *partition).collect::<Vec<_>>())
            .bind::<Array<BigInt>, _>(places.iter().map(|(.., offset)| *offset).collect::<Vec<_>>())
            .bind::<Text, _>(request.as_str())
            .load(conn)
            .await?
        }
        Which::All(filter) => {
            sql("update dead_letter d set requested = $5
                  where ($1 is null or d.topic = $1) and ($2 is null or d.state = $2) and d.state <> 'resolved'
                    and ($3 is null or strpos(lower(d.reason), lower($3)) > 0)
                    and ($4 is null or d.key = convert_to($4, 'UTF8') or d.ordering_key = $4)
              returning d.topic, d.partition, d.log_offset, d.state, d.ordering_key")
            .bind::<Nullable<Text>, _>(filter.topic.as_deref())
            .bind::<Nullable<Text>, _>(filter.state.as_deref())
            .bind::<Nullable<Text>, _>(filter.reason.as_deref())
            .bind::<Nullable<Text>, _>(filter.key.as_deref())
            .bind::<Text, _>(request.as_str())
            .load(conn)
            .await?
        }
    };
    let behind = || marked.iter().filter(|one| request == Request::Redrive && one.state == "waiting");
    if behind().next().is_some() {
        sql("update dead_letter d set requested = 'redrive'
               from (select distinct unnest($1) as topic, unnest($2) as partition, unnest($3) as ordering_key) line
              where d.topic = line.topic and d.partition = line.partition and d.ordering_key = line.ordering_key
                and d.state = 'parked' and d.requested is null")
        .bind::<Array<Text>, _>(behind().map(|one| one.topic.as_str()).collect::<Vec<_>>())
        .bind::<Array<Integer>, _>(behind().map(|one| one.partition).collect::<Vec<_>>())
        .bind::<Array<Nullable<Text>>, _>(behind().map(|one| one.ordering_key.as_deref()).collect::<Vec<_>>())
        .execute(conn)
        .await?;
    }
    sql("select pg_notify($1, '')").bind::<Text, _>(CHANNEL).execute(conn).await?;
    let mut places: Vec<Place> = marked.into_iter().map(|one| (one.topic, one.partition, one.log_offset)).collect();
    places.sort_unstable();
    Ok(places)
}

/// What became of what was asked for, in the order of `places`.
pub async fn outcomes(conn: &mut Conn, places: &[Place], request: Request) -> Result<Vec<Outcome>, DbError> {
    #[derive(QueryableByName)]
    struct Found {
        #[diesel(sql_type = BigInt)]
        at: i64,
        #[diesel(sql_type = Text)]
        state: String,
        #[diesel(sql_type = Text)]
        reason: String,
        #[diesel(sql_type = Integer)]
        attempts: i32,
        #[diesel(sql_type = Nullable<Text>)]
        requested: Option<String>,
    }
    let found: Vec<Found> = sql("select asked.at, d.state, d.reason, d.attempts, d.requested
                                   from (select unnest($1) as topic, unnest($2) as partition, unnest($3) as log_offset,
                                                unnest($4) as at) asked
                                   join dead_letter d using (topic, partition, log_offset)")
    .bind::<Array<Text>, _>(places.iter().map(|(topic, ..)| topic.as_str()).collect::<Vec<_>>())
    .bind::<Array<Integer>, _>(places.iter().map(|(_, partition, _)| *partition).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>(places.iter().map(|(.., offset)| *offset).collect::<Vec<_>>())
    .bind::<Array<BigInt>, _>((0..places.len() as i64).collect::<Vec<_>>())
    .load(conn)
    .await?;
    // What is not there any more is done.
    let done = if request == Request::Redrive { Outcome::Applied } else { Outcome::Discarded };
    let mut outcomes = vec![done; places.len()];
    for Found { at, state, reason, attempts, requested } in found {
        let outcome = match state.as_str() {
            "resolved" => Outcome::Applied,
            _ if requested.is_some() => Outcome::Marked,
            "waiting" => Outcome::Waits,
            // It has just become its key's head.
            "parked" if attempts == 0 => Outcome::Marked,
            _ => Outcome::Failed(reason),
        };
        if let Some(place) = usize::try_from(at).ok().and_then(|at| outcomes.get_mut(at)) {
            *place = outcome;
        }
    }
    Ok(outcomes)
}
