//! Statements that diesel's query language cannot state (set-based ones over `unnest`, data-modifying CTEs), with typed binds
//! and, unlike `diesel::sql_query`, with their prepared plan kept on the connection: `sql_query` prepares anew each time.

use std::marker::PhantomData;

use diesel::pg::Pg;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::result::QueryResult;
use diesel::serialize::ToSql;
use diesel::sql_types::{HasSqlType, Untyped};

/// A statement's text with `$1..$n`, and its binds in order.
#[derive(Debug, Clone)]
#[must_use]
pub struct Sql<B = ()> {
    text: &'static str,
    binds: B,
}

/// `text` is fixed at compile time: one plan a text.
pub fn sql(text: &'static str) -> Sql {
    Sql { text, binds: () }
}

/// One bound value of the SQL type `ST`.
#[derive(Debug, Clone)]
pub struct Bind<ST, V>(V, PhantomData<ST>);

impl<B> Sql<B> {
    pub fn bind<ST, V>(self, value: V) -> Sql<(B, Bind<ST, V>)> {
        Sql { text: self.text, binds: (self.binds, Bind(value, PhantomData)) }
    }
}

/// The binds of a statement, first to last.
pub trait Binds {
    fn walk<'b>(&'b self, out: AstPass<'_, 'b, Pg>) -> QueryResult<()>;
}

impl Binds for () {
    fn walk<'b>(&'b self, _: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        Ok(())
    }
}

impl<B: Binds, ST, V: ToSql<ST, Pg>> Binds for (B, Bind<ST, V>)
where
    Pg: HasSqlType<ST>,
{
    fn walk<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        self.0.walk(out.reborrow())?;
        out.push_bind_param_value_only(&self.1.0)
    }
}

impl<B: Binds> QueryFragment<Pg> for Sql<B> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(self.text);
        self.binds.walk(out)
    }
}

/// No static id: the plan is found by the text.
impl<B> QueryId for Sql<B> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<B> Query for Sql<B> {
    type SqlType = Untyped;
}
