//! The reads of `order_change` for streams: one named function a statement. Of its rows those with a position are events; where a statement
//! does not say so, its other conditions do.
//!
//! Rows that another server wrote before a dump was restored into this one may bear transaction ids that this one has not reached:
//! nobody can see those in a snapshot, nor compare them. Up to the number `legacy` every row is theirs, seen by everyone; its xid
//! counts as 0.

use chrono::{DateTime, Utc};
use diesel::QueryableByName;
use diesel::sql_types::{Array, BigInt, Bool, Integer, Nullable, Text, Timestamptz, Uuid as SqlUuid};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use crate::db::types::{Xid, Xid8};
use crate::db::{Conn, DbError, Snapshot, sql};
use crate::money::Amount;
use crate::user_id::UserId;

use super::super::order::{FailureReason, Order, OrderStatus};
use super::position::{Position, Seen};

/// An event with the order as it was then.
#[derive(Clone, Debug)]
pub struct Row {
    pub position: Position,
    /// `None` where this version cannot read it.
    pub order: Option<Order>,
}

/// Where a reader stands between two looks; streams begin there.
#[derive(Clone, Debug)]
pub struct Boundary {
    pub seen: Seen,
    /// Rows up to this number are of another server.
    pub legacy: i64,
}

#[derive(QueryableByName)]
struct EventRow {
    #[diesel(sql_type = Xid8)]
    xid: Xid,
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = SqlUuid)]
    order_id: Uuid,
    #[diesel(sql_type = Text)]
    status: String,
    #[diesel(sql_type = Nullable<Text>)]
    failure_reason: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    at: DateTime<Utc>,
    #[diesel(sql_type = Text)]
    user_id: String,
    #[diesel(sql_type = BigInt)]
    amount: i64,
    #[diesel(sql_type = Nullable<Text>)]
    description: Option<String>,
    #[diesel(sql_type = Timestamptz)]
    created_at: DateTime<Utc>,
}

impl EventRow {
    fn order(self) -> Result<Order, DbError> {
        let odd = |what: &str| DbError::Defect(format!("event {} of order {}: {what} breaks its rule", self.id, self.order_id));
        let reason = self.failure_reason.as_deref().map(|text| FailureReason::parse(text).ok_or_else(|| odd("failure_reason")));
        Ok(Order {
            id: self.order_id,
            status: OrderStatus::parse(&self.status).ok_or_else(|| odd("status"))?,
            failure_reason: reason.transpose()?,
            amount: Amount::from_minor(self.amount).ok_or_else(|| odd("amount"))?,
            user_id: UserId::new(self.user_id.as_str()).map_err(|_| odd("user_id"))?,
            description: self.description,
            created_at: self.created_at,
            updated_at: self.at,
        })
    }
}

/// What cannot be read (a later version's, say) keeps its place: everything behind it is read all the same.
fn rows(found: Vec<EventRow>) -> Vec<Row> {
    let row = |row: EventRow| {
        let position = Position { xid: row.xid.0, id: row.id };
        let order = row.order().inspect_err(|error| tracing::error!(%error, "an event was passed over"));
        Row { position, order: order.ok() }
    };
    found.into_iter().map(row).collect()
}

#[derive(QueryableByName)]
struct BeginningRow {
    #[diesel(sql_type = Text)]
    snapshot: String,
    #[diesel(sql_type = Xid8)]
    high: Xid,
    #[diesel(sql_type = BigInt)]
    legacy: i64,
}

/// For a session that looks: what it reads comes from the indexes in their order. A plan that was made while the tables were small must not
/// collect and sort a backlog for each page.
pub async fn in_order(conn: &mut Conn) -> Result<(), DbError> {
    sql("set enable_bitmapscan = off").execute(conn).await?;
    Ok(())
}

/// Everything that there is now. The highest number of another server's rows is among those of its last transactions, so that a
/// large table costs no more than a small one. And the first transaction id that was not given out yet.
pub async fn beginning(conn: &mut Conn) -> Result<(Boundary, u64), DbError> {
    let row: BeginningRow = sql("select pg_current_snapshot()::text as snapshot,
                coalesce((select e.xid from order_change e where e.xid < pg_snapshot_xmax(pg_current_snapshot())
                           order by e.xid desc limit 1), '0'::xid8) as high,
                coalesce((select max(e.id) from (select id from order_change where xid >= pg_snapshot_xmax(pg_current_snapshot())
                                                  order by xid desc, id desc limit 10000) e), 0) as legacy")
    .get_result(conn)
    .await?;
    let snapshot = Snapshot::parse(&row.snapshot)?;
    Ok((Boundary { seen: Seen::all_up_to(row.high.0, &open(&snapshot)), legacy: row.legacy }, snapshot.xmax))
}

/// A snapshot's open transactions, sorted.
pub fn open(snapshot: &Snapshot) -> Vec<u64> {
    snapshot.open.iter().map(|xid| xid.0).collect()
}

#[derive(QueryableByName)]
struct LookedRow {
    #[diesel(sql_type = Text)]
    snapshot: String,
    #[diesel(embed)]
    event: Option<EventRow>,
}

/// The current snapshot's text, and what it sees of the transactions `late` and of those from `below` on; by position, `rows_max` of either at
/// most. One statement: it has one snapshot.
pub async fn look(conn: &mut Conn, late: &[u64], below: u64, legacy: i64, rows_max: i64) -> Result<(String, Vec<Row>), DbError> {
    let found: Vec<LookedRow> =
        sql("select pg_current_snapshot()::text as snapshot, e.xid, e.id, e.order_id, e.status, e.failure_reason, e.at,
                o.user_id, o.amount, o.description, o.created_at
           from (values (1)) one
           left join ((select * from order_change where xid = any($1) and id > $3 order by xid, id limit $4)
                      union all
                      (select * from order_change where (xid, id) >= ($2, 0) and xid is not null and id > $3 order by xid, id limit $4)) e on true
           left join orders o on o.id = e.order_id
          order by e.xid, e.id")
        .bind::<Array<Xid8>, _>(late.iter().copied().map(Xid).collect::<Vec<_>>())
        .bind::<Xid8, _>(Xid(below))
        .bind::<BigInt, _>(legacy)
        .bind::<BigInt, _>(rows_max)
        .load(conn)
        .await?;
    let none = || DbError::Defect("a look without a snapshot".into());
    let snapshot = found.as_slice().first().ok_or_else(none)?.snapshot.clone();
    Ok((snapshot, rows(found.into_iter().filter_map(|row| row.event).collect())))
}

/// What these transactions wrote behind `after` and `snapshot` sees, by position.
pub async fn events_of(
    conn: &mut Conn,
    xids: &[u64],
    after: Position,
    snapshot: &str,
    legacy: i64,
    rows_max: i64,
) -> Result<Vec<Row>, DbError> {
    let found =
        sql("select e.xid, e.id, e.order_id, e.status, e.failure_reason, e.at, o.user_id, o.amount, o.description, o.created_at
           from order_change e join orders o on o.id = any(array[e.order_id])
          where e.xid = any($1) and (e.xid, e.id) > ($2, $3) and e.id > $4 and pg_visible_in_snapshot(e.xid, $5::pg_snapshot)
          order by e.xid, e.id limit $6")
        .bind::<Array<Xid8>, _>(xids.iter().copied().map(Xid).collect::<Vec<_>>())
        .bind::<Xid8, _>(Xid(after.xid))
        .bind::<BigInt, _>(after.id)
        .bind::<BigInt, _>(legacy)
        .bind::<Text, _>(snapshot)
        .bind::<BigInt, _>(rows_max)
        .load(conn)
        .await?;
    Ok(rows(found))
}

/// What lies behind `after` and `snapshot` sees, by position.
pub async fn events_behind(
    conn: &mut Conn,
    after: Position,
    snapshot: &str,
    legacy: i64,
    rows_max: i64,
) -> Result<Vec<Row>, DbError> {
    let found =
        sql("select e.xid, e.id, e.order_id, e.status, e.failure_reason, e.at, o.user_id, o.amount, o.description, o.created_at
           from order_change e join orders o on o.id = any(array[e.order_id])
          where (e.xid, e.id) > ($1, $2) and e.xid < pg_snapshot_xmax($4::pg_snapshot) and e.id > $3
            and pg_visible_in_snapshot(e.xid, $4::pg_snapshot)
          order by e.xid, e.id limit $5")
        .bind::<Xid8, _>(Xid(after.xid))
        .bind::<BigInt, _>(after.id)
        .bind::<BigInt, _>(legacy)
        .bind::<Text, _>(snapshot)
        .bind::<BigInt, _>(rows_max)
        .load(conn)
        .await?;
    Ok(rows(found))
}

/// All events of these orders up to `boundary`, in no order.
pub async fn events_of_orders(conn: &mut Conn, ids: &[Uuid], boundary: &Boundary) -> Result<Vec<Row>, DbError> {
    let found =
        sql("select case when e.id <= $2 then '0'::xid8 else e.xid end as xid, e.id, e.order_id, e.status, e.failure_reason, e.at,
                o.user_id, o.amount, o.description, o.created_at
           from order_change e join orders o on o.id = any(array[e.order_id])
          where e.order_id = any($1) and e.xid is not null")
        .bind::<Array<SqlUuid>, _>(ids)
        .bind::<BigInt, _>(boundary.legacy)
        .load(conn)
        .await?;
    Ok(rows(found).into_iter().filter(|row| boundary.seen.contains(row.position)).collect())
}

/// As of `boundary`, the last event of each of the user's `orders_max` latest orders, by position.
pub async fn states_of_user(conn: &mut Conn, user: &UserId, boundary: &Boundary, orders_max: i64) -> Result<Vec<Row>, DbError> {
    let found = sql("select e.xid, e.id, o.id as order_id, e.status, e.failure_reason, e.at, o.user_id, o.amount, o.description, o.created_at
           from (select id, user_id, amount, description, created_at from orders where user_id = $1
                  order by created_at desc, id desc limit $2) o
          cross join lateral (
                select s.* from (select case when e.id <= $3 then '0'::xid8 else e.xid end as xid, e.id, e.status, e.failure_reason, e.at
                                   from order_change e where e.order_id = o.id) s
                 where s.xid < $4 and s.xid <> all($5)
                 order by s.status in ('Finished', 'Cancelled') desc, s.xid desc, s.id desc limit 1) e
          order by e.xid, e.id")
    .bind::<Text, _>(user.as_str())
    .bind::<BigInt, _>(orders_max)
    .bind::<BigInt, _>(boundary.legacy)
    .bind::<Xid8, _>(Xid(boundary.seen.below()))
    .bind::<Array<Xid8>, _>(boundary.seen.open().iter().copied().map(Xid).collect::<Vec<_>>())
    .load(conn)
    .await?;
    Ok(rows(found))
}

/// By which indexes the events are found that a user's client missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// All that ever happened to the user's orders is read.
    User,
    /// What happened to anybody's since then.
    Position,
}

/// From so many orders on a user's are not read whole where less than [`WALK_MAX`] happened since.
const ORDERS_MANY: i64 = 1_000;
/// Events, all users' together.
const WALK_MAX: i64 = 20_000;

#[derive(QueryableByName)]
struct ByRow {
    #[diesel(sql_type = Bool)]
    by_position: bool,
}

/// The cheaper of the two; both bring the same. Costs no more than so many entries of two indexes.
pub async fn missed_by(conn: &mut Conn, user: &UserId, seen: &Seen, boundary: &Boundary) -> Result<By, DbError> {
    let row: ByRow = sql(
        "select (select count(*) from (select 1 from orders where user_id = $1 order by created_at desc, id desc limit $2) o) >= $2
            and (select count(*) from (select 1 from order_change where (xid, id) >= ($3, 0) and xid is not null and xid < $4
                                        order by xid, id limit $5) e) < $5 as by_position",
    )
    .bind::<Text, _>(user.as_str())
    .bind::<BigInt, _>(ORDERS_MANY)
    .bind::<Xid8, _>(Xid(seen.below()))
    .bind::<Xid8, _>(Xid(boundary.seen.below()))
    .bind::<BigInt, _>(WALK_MAX)
    .get_result(conn)
    .await?;
    Ok(if row.by_position { By::Position } else { By::User })
}

macro_rules! missed {
    ($events:literal) => {
        concat!(
            "select m.xid, m.id, m.order_id, m.status, m.failure_reason, m.at, m.user_id, m.amount, m.description, m.created_at
               from (select s.*, case when s.xid = $3 then 0 when s.xid < $5 then 1 else 2 end as round
                       from (select case when e.id <= $2 then '0'::xid8 else e.xid end as xid, e.id, e.order_id, e.status, e.failure_reason,
                                    e.at, o.user_id, o.amount, o.description, o.created_at
                               from ",
            $events,
            " where o.user_id = $1) s
                      where s.xid < $7 and s.xid <> all($8)
                        and case when s.xid = $3 then s.id > $4 else s.xid >= $5 or s.xid = any($6) end) m
              where (m.round, m.xid, m.id) > ($9, $10, $11)
              order by m.round, m.xid, m.id limit $12"
        )
    };
}

const MISSED_BY_USER: &str = missed!("orders o join order_change e on e.order_id = any(array[o.id])");
// The limit is `WALK_MAX`: there are less of those that count, and nothing that commits from one page to the next comes among them. What the
// first arm has may be younger than what is open. `offset 0`: else a plan begins with all of the user's orders.
const MISSED_BY_POSITION: &str = missed!(
    "(select * from order_change where xid = any(array_append($6, $3))
      union all
      select * from (select * from order_change where (xid, id) >= ($5, 0) and xid is not null and xid < $7 and xid <> all($8)
                      order by xid, id limit 20000) younger
               where younger.xid <> $3) e
     cross join lateral (select * from orders where id = e.order_id offset 0) o"
);

/// A page of the user's events up to `boundary` that `seen` does not hold, in the order in which they are due ([`Seen::round`]), behind
/// `after` of that order; found as [`missed_by`] says.
pub async fn missed_by_user(
    conn: &mut Conn,
    by: By,
    (user, seen, boundary): (&UserId, &Seen, &Boundary),
    after: Option<(u8, Position)>,
    rows_max: i64,
) -> Result<Vec<Row>, DbError> {
    let at = seen.at().unwrap_or(Position { xid: 0, id: i64::MAX });
    let (round, after) = after.unwrap_or((0, Position { xid: 0, id: 0 }));
    let xids = |xids: &[u64]| xids.iter().copied().map(Xid).collect::<Vec<_>>();
    let statement = match by {
        By::User => MISSED_BY_USER,
        By::Position => MISSED_BY_POSITION,
    };
    let found = sql(statement)
        .bind::<Text, _>(user.as_str())
        .bind::<BigInt, _>(boundary.legacy)
        .bind::<Xid8, _>(Xid(at.xid))
        .bind::<BigInt, _>(at.id)
        .bind::<Xid8, _>(Xid(seen.below()))
        .bind::<Array<Xid8>, _>(xids(seen.open()))
        .bind::<Xid8, _>(Xid(boundary.seen.below()))
        .bind::<Array<Xid8>, _>(xids(boundary.seen.open()))
        .bind::<Integer, _>(i32::from(round))
        .bind::<Xid8, _>(Xid(after.xid))
        .bind::<BigInt, _>(after.id)
        .bind::<BigInt, _>(rows_max)
        .load(conn)
        .await?;
    Ok(rows(found))
}
