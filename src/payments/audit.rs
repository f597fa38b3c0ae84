//! What an audit asks of payments' own tables: the checks that they alone can answer, and the decisions that are compared with
//! orders. Reads only.

use diesel::prelude::*;
use diesel::sql_types::{Array, BigInt, Nullable, Text, Uuid as SqlUuid};
use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use uuid::Uuid;

use crate::db::types::{Xid, Xid8};
use crate::db::{Check, Conn, DbError, Subject, offenders, sql};

/// A decision as far as orders must agree with it.
#[derive(Clone, Debug, PartialEq, Eq, QueryableByName)]
pub struct PaymentFact {
    #[diesel(sql_type = SqlUuid)]
    pub order_id: Uuid,
    #[diesel(sql_type = Text)]
    pub user_id: String,
    /// Minor units.
    #[diesel(sql_type = BigInt)]
    pub amount: i64,
    #[diesel(sql_type = Text)]
    pub status: String,
    #[diesel(sql_type = Nullable<Text>)]
    pub failure_reason: Option<String>,
    /// Who sent its request.
    #[diesel(sql_type = Nullable<Text>)]
    pub source: Option<String>,
    #[diesel(sql_type = SqlUuid)]
    pub result_event_id: Uuid,
    /// The transaction that decided it and wrote its result; only from [`facts`].
    #[diesel(sql_type = Nullable<Xid8>)]
    pub xid: Option<Xid>,
}

/// The checks over `account`, `transfer` and `payment`.
pub const CHECKS: [Check; 10] = [
    BALANCE_NOT_LEDGER,
    BALANCE_NEGATIVE,
    DEBITED_TWICE,
    DEBIT_WITHOUT_PAYMENT,
    PAYMENT_WITHOUT_DEBIT,
    DEBIT_DIFFERS,
    LEDGER_CHAIN,
    LEDGER_TIME,
    LEDGER_ORDER,
    ACCOUNT_TWICE,
];

/// Money is conserved: what an account holds is what its ledger brought and took.
const BALANCE_NOT_LEDGER: Check = Check {
    name: "balance_not_ledger",
    promise: "S1",
    subject: Subject::User,
    statement: offenders!(
        "select coalesce(a.user_id, 'account ' || l.account_id) as offender,
                'balance ' || coalesce(a.balance::text, 'none') || ', ledger ' || coalesce(l.total, 0) || ', in minor units' as detail
           from account a
           full join (select account_id, sum(case when to_account = account_id then amount else -amount end) as total
                        from transfer group by account_id) l on l.account_id = a.id
          where a.balance is distinct from coalesce(l.total, 0)"
    ),
};

const BALANCE_NEGATIVE: Check = Check {
    name: "balance_negative",
    promise: "S2",
    subject: Subject::User,
    statement: offenders!(
        "select user_id as offender, 'balance ' || balance || ' minor units' as detail from account where balance < 0
         union all
         select coalesce(a.user_id, 'account ' || t.account_id), 'balance ' || t.balance_after || ' minor units after entry ' || t.id
           from transfer t left join account a on a.id = t.account_id where t.balance_after < 0"
    ),
};

const DEBITED_TWICE: Check = Check {
    name: "debited_twice",
    promise: "S3",
    subject: Subject::Order,
    statement: offenders!(
        "select order_id::text as offender, count(*) || ' debits' as detail
           from transfer where order_id is not null group by order_id having count(*) > 1"
    ),
};

const DEBIT_WITHOUT_PAYMENT: Check = Check {
    name: "debit_without_payment",
    promise: "S4",
    subject: Subject::Order,
    statement: offenders!(
        "select t.order_id::text as offender, 'a debit of ' || t.amount || ' minor units, decided ' || coalesce(p.status, 'never') as detail
           from transfer t left join payment p on p.order_id = t.order_id
          where t.order_id is not null and p.status is distinct from 'Finished'"
    ),
};

const PAYMENT_WITHOUT_DEBIT: Check = Check {
    name: "payment_without_debit",
    promise: "S4",
    subject: Subject::Order,
    statement: offenders!(
        "select p.order_id::text as offender, 'Finished without a debit' as detail
           from payment p left join transfer t on t.order_id = p.order_id
          where p.status = 'Finished' and t.order_id is null"
    ),
};

const DEBIT_DIFFERS: Check = Check {
    name: "debit_differs",
    promise: "S4",
    subject: Subject::Order,
    statement: offenders!(
        "select p.order_id::text as offender,
                'decided ' || p.amount || ' of ' || p.user_id || ', debited ' || t.amount || ' of ' || coalesce(a.user_id, 'nobody') as detail
           from payment p join transfer t on t.order_id = p.order_id left join account a on a.id = t.account_id
          where p.amount <> t.amount or a.user_id is distinct from p.user_id"
    ),
};

/// Each entry's balance follows from the one before.
const LEDGER_CHAIN: Check = Check {
    name: "ledger_chain",
    promise: "S8",
    subject: Subject::User,
    statement: offenders!(
        "select coalesce(a.user_id, 'account ' || l.account_id) as offender,
                'entry ' || l.id || ': ' || l.before || ' and ' || l.step || ' make ' || l.balance_after as detail
           from (select account_id, id, balance_after, lag(balance_after, 1, 0::bigint) over (partition by account_id order by id) as before,
                        case when to_account = account_id then amount else -amount end as step
                   from transfer) l
           left join account a on a.id = l.account_id
          where l.before::numeric + l.step <> l.balance_after"
    ),
};

const LEDGER_TIME: Check = Check {
    name: "ledger_time",
    promise: "S8",
    subject: Subject::User,
    statement: offenders!(
        "select coalesce(a.user_id, 'account ' || l.account_id) as offender, 'entry ' || l.id || ' is before its predecessor' as detail
           from (select account_id, id, created_at, lag(created_at) over (partition by account_id order by id) as before
                   from transfer) l
           left join account a on a.id = l.account_id
          where l.created_at < l.before"
    ),
};

/// The debits of an account follow their partition's order. A topic that was made anew counts from 0 again, so an offset that goes
/// back is wrong only where the record is not younger; and a letter that was sent again comes after what was behind it.
const LEDGER_ORDER: Check = Check {
    name: "ledger_order",
    promise: "S8",
    subject: Subject::Order,
    statement: offenders!(
        "select l.order_id::text as offender, 'decided from offset ' || l.log_offset || ' after offset ' || l.before as detail
           from (select t.order_id, p.topic, p.partition, p.log_offset, p.published_at, lag(t.order_id) over ledger as before_order,
                        lag(p.partition) over ledger as before_partition, lag(p.log_offset) over ledger as before,
                        lag(p.published_at) over ledger as before_at
                   from transfer t join payment p on p.order_id = t.order_id
                 window ledger as (partition by t.account_id order by t.id)) l
          where l.partition = l.before_partition and l.order_id <> l.before_order and l.log_offset <= l.before
            and l.published_at <= l.before_at
            and not exists (select from dead_letter d
                             where d.topic = l.topic and d.partition = l.partition and d.log_offset = l.log_offset)"
    ),
};

const ACCOUNT_TWICE: Check = Check {
    name: "account_twice",
    promise: "S10",
    subject: Subject::User,
    statement: offenders!(
        "select user_id as offender, count(*) || ' accounts' as detail from account group by user_id having count(*) > 1"
    ),
};

/// Begins to read every decision, by order id, within the connection's snapshot; [`next`] goes on.
pub async fn begin(conn: &mut Conn) -> Result<(), DbError> {
    conn.batch_execute(
        "declare audited_payments no scroll cursor for
         select order_id, user_id, amount, status, failure_reason, source, result_event_id, null::xid8 as xid
           from payment order by order_id",
    )
    .await?;
    Ok(())
}

/// The next page; empty at the end.
pub async fn next(conn: &mut Conn) -> Result<Vec<PaymentFact>, DbError> {
    Ok(sql("fetch forward 5000 from audited_payments").load(conn).await?)
}

/// These orders' decisions, in no order. A row's own transaction id has 32 bits; the rest follows from the one that is next.
pub async fn facts(conn: &mut Conn, ids: &[Uuid]) -> Result<Vec<PaymentFact>, DbError> {
    let facts = sql("select order_id, user_id, amount, status, failure_reason, source, result_event_id,
                            (now.xid - ((now.xid - p.xmin::text::bigint) & 4294967295))::text::xid8 as xid
                       from (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint as xid) now, payment p
                      where order_id = any($1)")
    .bind::<Array<SqlUuid>, _>(ids)
    .load(conn)
    .await?;
    Ok(facts)
}

/// How many accounts and ledger entries there are.
#[derive(Clone, Copy, Debug, QueryableByName)]
pub struct Size {
    #[diesel(sql_type = BigInt)]
    pub accounts: i64,
    #[diesel(sql_type = BigInt)]
    pub transfers: i64,
}

pub async fn size(conn: &mut Conn) -> Result<Size, DbError> {
    Ok(sql("select (select count(*) from account) as accounts, (select count(*) from transfer) as transfers")
        .get_result(conn)
        .await?)
}
