//! The server that `all` brings along, run for real.

use std::time::{Duration, Instant};

use shopd::embedded;

use crate::support::postgres::{database, options, own_dir};

const STOP: Duration = Duration::from_secs(20);

async fn query(url: &str, sql: &str) -> String {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.expect("a connection");
    tokio::spawn(connection);
    let rows = client.simple_query(sql).await.expect(sql);
    let mut values = rows.into_iter().filter_map(|row| match row {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    values.next().unwrap_or_default()
}

#[tokio::test]
async fn a_test_gets_an_empty_database_of_its_own() {
    let (one, other) = (database("own").await, database("own").await);
    assert_ne!(one, other);
    query(&one, "create table t (x int)").await;
    assert_eq!(query(&other, "select count(*) from pg_tables where schemaname = 'public'").await, "0");
    assert_eq!(query(&one, "show server_encoding").await, "UTF8");
}

#[tokio::test]
async fn a_restart_keeps_the_data_and_is_fast() {
    let dir = own_dir();
    let server = embedded::start(&options(&dir)).await.expect("the first start");
    server.ensure_database("shop").await.expect("a database");
    server.ensure_database("shop").await.expect("again is no error");
    query(server.url("shop").expose(), "create table t as select 42 as x").await;
    server.stop(STOP).await.expect("a clean stop");

    let began = Instant::now();
    let server = embedded::start(&options(&dir)).await.expect("the second start");
    println!("warm start in {:?}", began.elapsed());
    assert_eq!(query(server.url("shop").expose(), "select x from t").await, "42");
    server.stop(STOP).await.expect("a clean stop");
}
