//! How big tables and their indexes are, what is dead in them, and what autovacuum did.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::Client;

use super::super::Result;

/// A table; several that differ in their number only count as one.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    pub table_bytes: u64,
    pub index_bytes: u64,
    pub live: u64,
    pub dead: u64,
    pub autovacuums: u64,
    pub updated: u64,
    /// Without a new index entry.
    pub updated_hot: u64,
}

impl Table {
    pub fn bytes(&self) -> u64 {
        self.table_bytes + self.index_bytes
    }
}

/// `database.table`, by what the statistics say now.
pub type Tables = BTreeMap<String, Table>;

/// Of one database, called `name`.
pub async fn look(client: &Client, name: &str, into: &mut Tables) -> Result<()> {
    let asked =
        "select c.relname::text, pg_table_size(c.oid), pg_indexes_size(c.oid), s.n_live_tup, s.n_dead_tup, s.autovacuum_count,
                        s.n_tup_upd, s.n_tup_hot_upd
                   from pg_class c join pg_stat_user_tables s on s.relid = c.oid where c.relkind = 'r'";
    for row in client.query(asked, &[]).await? {
        let table: String = row.try_get(0)?;
        let table = table.trim_end_matches(|at: char| at.is_ascii_digit() || at == '_');
        let number = |at: usize| row.try_get::<_, i64>(at).map(|number| number.max(0).unsigned_abs());
        let of = into.entry(format!("{name}.{table}")).or_default();
        of.table_bytes += number(1)?;
        of.index_bytes += number(2)?;
        of.live += number(3)?;
        of.dead += number(4)?;
        of.autovacuums += number(5)?;
        of.updated += number(6)?;
        of.updated_hot += number(7)?;
    }
    Ok(())
}
