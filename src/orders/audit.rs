//! What an audit asks of orders' own tables: the checks that they alone can answer, and the facts that are compared with
//! payments'. Reads only.

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Bool, Nullable, Text, Uuid as SqlUuid};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use uuid::Uuid;

use crate::db::types::{Xid, Xid8};
use crate::db::{Check, Conn, DbError, Subject, offenders, sql};

/// An order as far as payments must agree with it.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct OrderFact {
    #[diesel(sql_type = SqlUuid)]
    pub id: Uuid,
    #[diesel(sql_type = Text)]
    pub user_id: String,
    /// Minor units.
    #[diesel(sql_type = BigInt)]
    pub amount: i64,
    #[diesel(sql_type = Text)]
    pub status: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub failure_reason: Option<String>,
    /// There is an event of its status.
    #[diesel(sql_type = Bool)]
    pub has_event: bool,
    /// Who sent the result that ended it.
    #[diesel(sql_type = Nullable<Text>)]
    pub source: Option<String>,
    #[diesel(sql_type = Nullable<Text>)]
    pub result_event_id: Option<String>,
    /// The transaction that accepted it and wrote its request; only from [`facts`].
    #[diesel(sql_type = Nullable<Xid8>)]
    pub xid: Option<Xid>,
    /// It has not ended, and the sweeper has it in hand or has still to come by it: it is asked for again; only from [`facts`].
    #[diesel(sql_type = Bool)]
    pub asked_again: bool,
}

impl OrderFact {
    pub fn is_final(&self) -> bool {
        matches!(self.status.as_str(), "Finished" | "Cancelled")
    }
}

/// The checks over `orders` and `order_event`.
pub const CHECKS: [Check; 4] = [EVENT_MISSING, EVENT_DIFFERS, EVENT_WITHOUT_ORDER, ORDER_REASON];

/// An order began once, and what it is now was an event.
const EVENT_MISSING: Check = Check {
    name: "event_missing",
    promise: "S5",
    subject: Subject::Order,
    statement: offenders!(
        "select o.id::text as offender,
                'no event ' || case when (o.accepted_xid is null or o.accepted_id is null) and n.order_id is null then 'New' else o.status end as detail
           from orders o
           left join order_event n on n.order_id = o.id and n.status = 'New'
           left join order_event e on e.order_id = o.id and e.status = o.status
          where ((o.accepted_xid is null or o.accepted_id is null) and n.order_id is null) or (o.status <> 'New' and e.order_id is null)"
    ),
};

/// No event contradicts its order: none of another end, the same reason and times, and only one that it was accepted.
const EVENT_DIFFERS: Check = Check {
    name: "event_differs",
    promise: "S5",
    subject: Subject::Order,
    statement: offenders!(
        "select e.order_id::text as offender,
                'event ' || e.status || coalesce(' ' || e.failure_reason, '') || ' at ' || e.at::text || ', order ' || o.status
                || coalesce(' ' || o.failure_reason, '') || ' at ' || o.updated_at::text as detail
           from order_event e join orders o on o.id = e.order_id
          where case when e.status = 'New' then e.at <> o.created_at or o.accepted_xid is not null
                     when e.status = o.status then e.failure_reason is distinct from o.failure_reason or e.at <> o.updated_at
                     else e.status <> 'Processing' end"
    ),
};

const EVENT_WITHOUT_ORDER: Check = Check {
    name: "event_without_order",
    promise: "S5",
    subject: Subject::Order,
    statement: offenders!(
        "select e.order_id::text as offender, 'event ' || e.status as detail
           from order_event e left join orders o on o.id = e.order_id where o.id is null"
    ),
};

/// Only a cancelled order has a reason, and times go forward.
const ORDER_REASON: Check = Check {
    name: "order_odd",
    promise: "S5",
    subject: Subject::Order,
    statement: offenders!(
        "select id::text as offender, status || coalesce(' ' || failure_reason, '') as detail
           from orders where (failure_reason is not null and status <> 'Cancelled') or updated_at < created_at"
    ),
};

/// Begins to read every order, by id, within the connection's snapshot; [`next`] goes on.
pub async fn begin(conn: &mut Conn) -> Result<(), DbError> {
    conn.batch_execute(
        "declare audited_orders no scroll cursor for
         select o.id, o.user_id, o.amount, o.status, o.failure_reason,
                (o.status = 'New' and o.accepted_xid is not null) or e.order_id is not null as has_event,
                e.source, e.event_id as result_event_id, null::xid8 as xid, false as asked_again
           from orders o left join order_event e on e.order_id = o.id and e.status = o.status
          order by o.id",
    )
    .await?;
    Ok(())
}

/// The next page; empty at the end.
pub async fn next(conn: &mut Conn) -> Result<Vec<OrderFact>, DbError> {
    Ok(sql("fetch forward 5000 from audited_orders").load(conn).await?)
}

/// These orders, in no order; one that is not there is left out.
pub async fn facts(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<OrderFact>, DbError> {
    let facts = sql("select o.id, o.user_id, o.amount, o.status, o.failure_reason,
                            (o.status = 'New' and o.accepted_xid is not null) or e.order_id is not null as has_event,
                            e.source, e.event_id as result_event_id, coalesce(o.accepted_xid, n.xid) as xid,
                            o.status in ('New', 'Processing')
                            and (r.order_id is not null or coalesce((o.created_at, o.id) > (c.swept_to, c.swept_id), false)) as asked_again
                       from unnest($1) as asked (id)
                       join orders o on o.id = asked.id
                       left join order_event e on e.order_id = o.id and e.status = o.status
                       left join order_event n on n.order_id = o.id and n.status = 'New'
                       left join order_retry r on r.order_id = o.id
                       left join sweep_cursor c on c.name = 'orders'")
    .bind::<Array<SqlUuid>, _>(ids)
    .load(conn)
    .await?;
    Ok(facts)
}
