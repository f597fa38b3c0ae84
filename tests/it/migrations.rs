//! Migrations only expand: a role of the version before goes on working on the new schema, so that versions are exchanged without downtime
//! (docs/OPERATIONS.md, "Upgrades"; `make upgrade-test` does it).
//!
//! What takes something away is refused, unless its file says, on a line of its own, why no running version minds:
//! `-- Takes away: …`.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use diesel_async::{RunQueryDsl, SimpleAsyncConnection};
use shopd::db::{self, Conn, Schema};

use crate::support::books::connect;
use crate::support::postgres;
use crate::support::shop::PATIENCE;

/// Begins the line that lets a file take something away.
const EXCUSE: &str = "-- takes away:";

/// What of a migration the version before may mind.
fn takes_away(text: &str) -> BTreeSet<String> {
    let lower = text.to_lowercase();
    if lower.lines().any(|line| line.trim().strip_prefix(EXCUSE).is_some_and(|why| !why.trim().is_empty())) {
        return BTreeSet::new();
    }
    let statements = statements(&lower);
    let made: BTreeSet<&str> = statements.iter().filter_map(|one| name_after(one, "create table ")).collect();
    let of_another = |statement: &&String| !table_of(statement).is_some_and(|table| made.contains(table));
    statements.iter().filter(of_another).flat_map(|statement| found_in(statement)).collect()
}

fn found_in(statement: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut refuse = |what: &str, why: &str| found.push(format!("{why}: {what}"));
    if let Some(action) = statement.strip_prefix("drop ")
        && !action.starts_with("index ")
    {
        refuse(statement, "it drops what the version before may use");
    }
    if statement.starts_with("truncate ") || statement.starts_with("delete from ") {
        refuse(statement, "it deletes rows");
    }
    if statement.starts_with("create unique index ") {
        refuse(statement, "rows that the version before writes may now be refused");
    }
    if statement.starts_with("create trigger ") || statement.starts_with("create constraint trigger ") {
        refuse(statement, "what the version before writes now does more");
    }
    let Some(actions) = statement.strip_prefix("alter ").filter(|rest| !rest.starts_with("index ")) else { return found };
    for action in parts(actions) {
        let words: Vec<&str> = action.split_whitespace().collect();
        let has = |sequence: &[&str]| words.windows(sequence.len()).any(|window| window == sequence);
        if has(&["drop", "column"]) || has(&["drop", "attribute"]) || has(&["no", "inherit"]) || has(&["detach", "partition"]) {
            refuse(&action, "it takes a column or rows away");
        }
        if has(&["rename"]) || has(&["set", "schema"]) {
            refuse(&action, "the version before knows it under the old name");
        }
        if has(&["type"]) && has(&["alter", "column"]) || has(&["set", "data", "type"]) {
            refuse(&action, "the version before binds the old type");
        }
        if has(&["set", "not", "null"]) || has(&["drop", "default"]) {
            refuse(&action, "the version before may leave it out");
        }
        let adds = words.iter().position(|word| *word == "add");
        let what = adds.and_then(|at| words.get(at + 1).copied()).unwrap_or_default();
        let constrains = ["constraint", "check", "unique", "primary", "foreign", "exclude"].contains(&what);
        if constrains {
            refuse(&action, "rows that the version before writes may now be refused");
        }
        if adds.is_some() && !constrains && has(&["not", "null"]) && !words.contains(&"default") && !words.contains(&"generated") {
            refuse(&action, "the version before does not write it");
        }
    }
    found
}

/// Without comments, each in one line; what stands between `$$` is a function's body, which is not looked into.
fn statements(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().map(|line| line.split("--").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    let outside: Vec<&str> = code.split("$$").step_by(2).collect();
    let flat = |statement: &str| statement.split_whitespace().collect::<Vec<_>>().join(" ");
    outside.join(" body ").split(';').map(flat).filter(|statement| !statement.is_empty()).collect()
}

/// By the commas that are in no parentheses.
fn parts(actions: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for letter in actions.chars() {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        // There is one from the beginning.
        if let Some(last) = parts.last_mut() {
            last.push(letter);
        }
    }
    parts.into_iter().map(|part| part.trim().to_owned()).collect()
}

fn name_after<'s>(statement: &'s str, words: &str) -> Option<&'s str> {
    let rest = &statement[statement.find(words)? + words.len()..];
    rest.trim_start_matches("if not exists ").trim_start_matches("only ").split([' ', '(']).next().filter(|name| !name.is_empty())
}

/// Whose index, trigger or alteration it is.
fn table_of(statement: &str) -> Option<&str> {
    if let Some(name) = name_after(statement, "alter table ") {
        return Some(name);
    }
    (statement.starts_with("create ")).then(|| name_after(statement, " on ")).flatten()
}

#[test]
fn every_migration_only_expands() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let (mut read, mut wrong) = (0, Vec::new());
    for database in std::fs::read_dir(folder).expect("migrations").flatten() {
        for migration in std::fs::read_dir(database.path()).expect("a folder").flatten() {
            let path = migration.path().join("up.sql");
            let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            read += 1;
            wrong.extend(takes_away(&text).into_iter().map(|what| format!("{}: {what}", path.display())));
        }
    }
    assert!(read >= 13, "{read} migrations were found");
    assert!(wrong.is_empty(), "{}\nSee docs/OPERATIONS.md, \"Upgrades\".", wrong.join("\n"));
}

#[test]
fn whatever_takes_something_away_is_found() {
    for bad in [
        "drop table orders;",
        "DROP TABLE IF EXISTS orders;",
        "drop function purge_outbox(bigint, pg_snapshot);",
        "alter table orders drop column stamp;",
        "alter table orders add column x int, drop column stamp;",
        "alter table orders rename column stamp to mark;",
        "alter table orders rename to purchase;",
        "alter table orders alter column amount type numeric;",
        "alter table orders alter column amount set data type numeric;",
        "alter table orders alter column stamp set not null;",
        "alter table orders alter column status drop default;",
        "alter table orders add column x int not null;",
        "alter table orders add x int not null check (x in (1, 2));",
        "alter table orders add constraint c check (amount < 5);",
        "alter table orders add check (amount < 5);",
        "create unique index o on orders (stamp);",
        "create trigger t before insert on orders for each row execute function f();",
        "delete from orders where status = 'New';",
        "truncate orders;",
        "-- drop it\nalter table orders\n    drop\n    column stamp;",
        "create table a (x int); alter table orders drop column stamp;",
    ] {
        assert!(!takes_away(bad).is_empty(), "{bad}");
    }
}

#[test]
fn what_only_adds_passes_and_so_does_what_says_why() {
    for good in [
        "create table a (x int not null check (x > 0), unique (x)); create unique index a_x on a (x); alter table a add check (x < 9);",
        "alter table orders add column x int;",
        "alter table orders add column x int not null default 0, add column y text check (y <> '');",
        "alter table orders add column x bigint generated always as identity not null;",
        "alter table outbox alter column payload drop not null;",
        "create index i on orders (user_id); drop index j; alter index i rename to j;",
        "create function f() returns void language plpgsql as $$ begin delete from a; drop table b; end $$;",
        "-- Drop table orders; it is a comment.\nselect 1;",
        "-- Takes away: the column that 0.3 stopped reading.\nalter table orders drop column stamp;",
    ] {
        assert_eq!(takes_away(good), BTreeSet::new(), "{good}");
    }
    // A reason must be given.
    assert!(!takes_away("-- Takes away:\nalter table orders drop column stamp;").is_empty());
}

/// Waits until somebody waits for a lock on `orders`.
async fn until_somebody_waits(session: &mut Conn) {
    let asking = "do $$ begin
        if not exists (select 1 from pg_locks where not granted and relation = 'orders'::regclass) then raise 'not yet'; end if; end $$";
    let since = Instant::now();
    while session.batch_execute(asking).await.is_err() {
        assert!(since.elapsed() < PATIENCE, "nobody comes");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A lock that is waited for keeps out everybody who comes later, so it is waited for a moment at a time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_waits_for_a_long_reader_keeps_no_writer_waiting_for_long() {
    const INSERT: &str = "insert into orders (id, user_id, amount, created_at, updated_at, traceparent)
                          values (gen_random_uuid(), 'ann', 1, now(), now(), '')";
    let db = connect(&postgres::database("waits").await);
    db::migrate(&db, &[Schema::Orders]).await.expect("a schema");
    let (mut reader, mut writer) = (db.dedicated().await.expect("a session"), db.dedicated().await.expect("a session"));
    // One migration is due again.
    let undone = "alter table orders drop column stamp; delete from __diesel_schema_migrations where version = '00000000000103'";
    reader.batch_execute(undone).await.expect(undone);
    // What an audit does for as long as it reads; its silence here must not end it.
    reader.batch_execute("set idle_in_transaction_session_timeout = 0; begin; select from orders").await.expect("a long reader");

    // The control: somebody who waits for his lock keeps the writer out.
    let mut patient = db.dedicated().await.expect("a session");
    let waiting = tokio::spawn(async move {
        patient.batch_execute("set lock_timeout = '60s'; set statement_timeout = '60s'").await.expect("patience");
        patient.batch_execute("alter table orders add column x int").await
    });
    until_somebody_waits(&mut writer).await;
    writer.batch_execute("set lock_timeout = '1500ms'").await.expect("impatience");
    assert!(writer.batch_execute(INSERT).await.is_err(), "a writer waits behind it");
    let cancel = "select pg_cancel_backend(pid) from pg_locks where not granted and relation = 'orders'::regclass";
    writer.batch_execute(cancel).await.expect(cancel);
    assert!(waiting.await.expect("a task").is_err(), "the reader is still there");

    let migrating = tokio::spawn({
        let db = db.clone();
        async move { db::migrate(&db, &[Schema::Orders]).await }
    });
    until_somebody_waits(&mut writer).await;
    writer.batch_execute("set lock_timeout = '20s'; set statement_timeout = '20s'").await.expect("patience");
    let since = Instant::now();
    writer.batch_execute(INSERT).await.expect("an order is placed all the same");
    assert!(since.elapsed() < Duration::from_secs(15), "the writer waited {:?}", since.elapsed());
    assert!(!migrating.is_finished(), "the reader is still there");
    reader.batch_execute("commit").await.expect("the reader ends");
    let applied = tokio::time::timeout(Duration::from_secs(30), migrating).await.expect("in time").expect("a task");
    assert_eq!(applied.expect("migrated"), 1);
}

/// What of the schema ANALYZE would take a large sample of. Left out are tables of a few rows, and the outbox, whose segments turn it off.
async fn sampled_in_full(session: &mut Conn) -> Vec<String> {
    #[derive(diesel::QueryableByName)]
    struct Column {
        #[diesel(sql_type = diesel::sql_types::Text)]
        name: String,
    }
    let columns: Vec<Column> = diesel::sql_query(
        "select format('%s.%s', c.relname, a.attname) as name
           from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid
          where c.relkind = 'r' and n.nspname in ('public', 'shopd_log') and a.attnum > 0 and not a.attisdropped
            and coalesce(a.attstattarget, -1) not between 0 and 10 and c.relname not like 'outbox%'
            and c.relname not in ('__diesel_schema_migrations', 'consumer_member', 'consumer_offset', 'sweep_cursor', 'topic', 'partition')
          order by 1",
    )
    .load(session)
    .await
    .expect("columns");
    columns.into_iter().map(|column| column.name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_no_table_that_grows_does_the_server_take_a_large_sample() {
    for schema in [Schema::Orders, Schema::Payments, Schema::Log] {
        let db = connect(&postgres::database("sampled").await);
        db::migrate(&db, &[schema]).await.expect("a schema");
        let mut session = db.dedicated().await.expect("a session");
        assert_eq!(sampled_in_full(&mut session).await, Vec::<String>::new());
        // The control: a column that somebody forgot, and a table.
        session.batch_execute("create table forgotten (x int)").await.expect("a table");
        assert_eq!(sampled_in_full(&mut session).await, ["forgotten.x"]);
    }
}
