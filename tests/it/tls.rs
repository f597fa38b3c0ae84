//! Postgres and Kafka over TLS and with passwords: the whole shop, every way to be let in, and what is said where one is not.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut};
use shopd::config::{Config, KafkaConfig, SaslMechanism, Secret, SecurityProtocol};
use shopd::db::{Db, DbError};
use shopd::messaging::log::{KafkaLog, Log, LogError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::log::{read, record, until_it_answers, values};
use crate::support::inside::until;
use crate::support::secure::{DATABASES, Database, NAME, OTHER_DATABASES, PASSWORD, SESSION, SecureBroker, files, variables};
use crate::support::shop::{Client, Four, Process, poll};

/// What waits for servers that are away waits longer.
const AT_ONCE: Duration = Duration::from_secs(20);
const WRONG: &str = "hunter2";

fn full() -> String {
    format!("sslmode=verify-full&sslrootcert={}", files().path("ca.pem").display())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_is_paid_where_neither_server_lets_anybody_in_without_tls_and_a_password() {
    let (database, broker) = tokio::join!(Database::shared(), SecureBroker::shared());
    let kafka = broker.config(SecurityProtocol::SaslSsl, SaslMechanism::ScramSha512);
    // The password is bound to this one connection, too.
    let urls = DATABASES.map(|name| database.url(name, &format!("{}&channel_binding=require", full())));
    let shop = Four::start_with(&kafka.bootstrap_servers[0], &urls[0], &urls[1], &kafka.topic_prefix, &variables(&kafka)).await;
    shop.client.account("ann", "100.5").await;
    let order = shop.client.post("/api/OrdersProxy", r#"{"userId":"ann","amount":42.5}"#).await.expect(201).json();
    assert_eq!(shop.client.ended(order["id"].as_str().unwrap()).await["status"], "Finished");
    assert_eq!(shop.client.balance("ann").await, "58");
    for process in [&shop.gateway, &shop.orders, &shop.payments, &shop.relay] {
        assert!(!process.log().contains(PASSWORD), "{}", process.log());
    }
}

/// What comes of one statement over this URL.
async fn ask(url: &str) -> Result<(), String> {
    let config = Config::default().database;
    let db = Db::new(&Secret::new(url), "test", &config).map_err(|error| error.to_string())?;
    let pinged = db.ping(AT_ONCE).await.map_err(|error| error.to_string());
    let session = db.session(std::sync::Arc::default()).await;
    assert_eq!(session.is_ok(), pinged.is_ok(), "both kinds of connections: {pinged:?}");
    let dedicated = db.dedicated().await;
    assert_eq!(dedicated.is_ok(), pinged.is_ok(), "all kinds of connections: {pinged:?}");
    pinged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_is_trusted_as_far_as_its_url_says() {
    let database = Database::shared().await;
    let ask = |user: &str, host: &str, parameters: String| {
        let url = database.url_of(&format!("{user}@{host}"), DATABASES[0], &parameters);
        async move { ask(&url).await }
    };
    let user = format!("shop:{}", PASSWORD.replace(' ', "%20"));
    let path = |name: &str| files().path(name).display().to_string();
    let (ours, other) = (path("ca.pem"), path("other.pem"));
    let address = "127.0.0.1";

    for (host, parameters) in [
        (NAME, String::new()),
        (NAME, "sslmode=prefer".into()),
        (NAME, "sslmode=require".into()),
        (address, "sslmode=require".into()),
        (address, format!("sslmode=require&sslrootcert={ours}")),
        (address, format!("sslmode=verify-ca&sslrootcert={ours}")),
        (NAME, full()),
        (NAME, format!("{}&channel_binding=require", full())),
    ] {
        assert_eq!(ask(&user, host, parameters.clone()).await, Ok(()), "{host} {parameters}");
    }
    for (host, parameters, said) in [
        (address, full(), "not valid for name \"127.0.0.1\""),
        (NAME, format!("sslmode=verify-full&sslrootcert={other}"), "nobody who is trusted signed its certificate"),
        (NAME, format!("sslmode=verify-ca&sslrootcert={other}"), "nobody who is trusted signed its certificate"),
        (NAME, format!("sslmode=require&sslrootcert={other}"), "nobody who is trusted signed its certificate"),
        // The control: it is the server that lets nobody in without TLS.
        (NAME, "sslmode=disable".into(), "no pg_hba.conf entry"),
    ] {
        let error = ask(&user, host, parameters.clone()).await.unwrap_err();
        assert!(error.contains(said), "{host} {parameters}: {error}");
    }

    let identity = format!("{}&sslcert={}&sslkey={}", full(), path("client.pem"), path("client.key"));
    assert_eq!(ask("certified", NAME, identity.clone()).await, Ok(()));
    let without = ask("certified", NAME, full()).await.unwrap_err();
    assert!(without.contains("client certificate"), "{without}");
}

/// Everything that a process logged, once `said` is in it.
async fn says(process: &Process, said: &str) -> String {
    let since = Instant::now();
    while !process.log().contains(said) {
        assert!(since.elapsed() < AT_ONCE, "{said} is not in\n{}", process.log());
        poll().await;
    }
    process.log()
}

async fn migrate_fails(env: &[(String, String)], said: &str) {
    let since = Instant::now();
    let mut migrate = Process::start(&["migrate"], env);
    assert!(!migrate.ended().await.success());
    assert!(since.elapsed() < AT_ONCE, "{:?}", since.elapsed());
    let log = says(&migrate, said).await;
    assert!(!log.contains(WRONG) && !log.contains(PASSWORD), "{log}");
    assert!(!log.contains("waiting for"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrate_fails_at_once_where_a_password_or_a_certificate_is_wrong() {
    let (database, broker) = tokio::join!(Database::shared(), SecureBroker::shared());
    let env = |urls: [String; 2], kafka: &KafkaConfig| {
        let mut env = variables(kafka);
        env.push(("SHOPD__KAFKA__TOPIC_PREFIX".into(), kafka.topic_prefix.clone()));
        let keys = ["SHOPD__ORDERS__DATABASE_URL", "SHOPD__PAYMENTS__DATABASE_URL"];
        env.extend(keys.into_iter().map(str::to_owned).zip(urls));
        env
    };
    let good_urls = || DATABASES.map(|name| database.url(name, &full()));
    let good = broker.config(SecurityProtocol::SaslSsl, SaslMechanism::ScramSha512);

    let user = format!("shop:{WRONG}@{NAME}");
    let wrong_password = DATABASES.map(|name| database.url_of(&user, name, &full()));
    migrate_fails(&env(wrong_password, &good), "(SQLSTATE 28P01)").await;
    let other = format!("sslmode=verify-full&sslrootcert={}", files().path("other.pem").display());
    let wrong_authority = DATABASES.map(|name| database.url(name, &other));
    migrate_fails(&env(wrong_authority, &good), "nobody who is trusted signed its certificate").await;

    let wrong = KafkaConfig { sasl_password: Some(Secret::new(WRONG)), ..good.clone() };
    migrate_fails(&env(good_urls(), &wrong), "invalid credentials with SASL mechanism SCRAM-SHA-512").await;
    let wrong = KafkaConfig { ssl_ca_file: Some(files().path("other.pem")), ..good.clone() };
    migrate_fails(&env(good_urls(), &wrong), "nobody who is trusted signed its certificate").await;

    // The control: with the right ones it does not fail.
    let mut migrate = Process::start(&["migrate"], &env(good_urls(), &good));
    assert!(migrate.ended().await.success(), "{}", migrate.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_the_broker_does_not_let_in_says_so_once_and_is_not_ready() {
    let (database, broker) = tokio::join!(Database::shared(), SecureBroker::shared());
    let good = broker.config(SecurityProtocol::SaslSsl, SaslMechanism::Plain);
    let mut env = variables(&KafkaConfig { sasl_password: Some(Secret::new(WRONG)), ..good });
    env.push(("SHOPD__ORDERS__DATABASE_URL".into(), database.url(OTHER_DATABASES[0], &full())));
    env.push(("SHOPD__PAYMENTS__DATABASE_URL".into(), database.url(OTHER_DATABASES[1], &full())));
    let payments = Process::start(&["payments"], &env);
    says(&payments, "not let in by the broker").await;
    // Again and again it is tried, and said no more.
    let metrics = Client::new(payments.address("payments").await);
    until("it fails again", async || {
        let text = metrics.get("/metrics").await.text;
        let counts = text.lines().filter(|line| line.starts_with("shopd_failures_total{"));
        counts.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).any(|failures| failures >= 3.0)
    })
    .await;
    let said = payments.log();
    let warnings = said.lines().filter(|line| line.contains("not let in by the broker") && line.contains("\"WARN\"")).count();
    assert_eq!(warnings, 1, "{said}");
    assert!(!said.contains(WRONG), "{said}");

    let relay = Process::start(&["relay"], &env);
    let client = Client::new(relay.address("relay").await);
    let mut missing = String::new();
    until("the relay misses the broker", async || {
        let answer = client.get("/health/ready").await;
        assert_ne!(answer.status, 200, "{answer:?}");
        missing = answer.text;
        missing.contains("\"broker\"")
    })
    .await;
    assert!(!missing.contains(WRONG) && !relay.log().contains(WRONG), "{missing}");
}

/// Appends, and reads what was appended: by hand, and through the client library.
async fn works(config: &KafkaConfig) {
    let log = KafkaLog::new(config);
    log.create_topics(&["events"], 1).await.unwrap();
    log.append(vec![record("events", "key", "value")]).await.unwrap();
    assert_eq!(values(&read(&log, "events", 0, 0, 1).await), ["value"]);
    assert_eq!(log.bounds("events", 0).await, Ok((0, 1)));
}

async fn is_refused(config: KafkaConfig, said: &str) {
    let answer = tokio::time::timeout(AT_ONCE, KafkaLog::new(&config).create_topics(&["events"], 1)).await.expect("at once");
    match answer {
        Err(LogError::Refused(cause)) => {
            assert!(cause.contains(said) && !cause.contains(WRONG) && !cause.contains(PASSWORD), "{cause}");
        }
        other => panic!("{said} was expected: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_way_into_a_broker_works_and_where_it_does_not_the_cause_is_said() {
    use SaslMechanism::{Plain, ScramSha256, ScramSha512};
    let broker = SecureBroker::shared().await;
    let sasl = |mechanism| broker.config(SecurityProtocol::SaslSsl, mechanism);
    works(&broker.config(SecurityProtocol::Plaintext, Plain)).await;
    works(&sasl(ScramSha512)).await;
    let mutual = KafkaConfig {
        ssl_certificate_file: Some(files().path("client.pem")),
        ssl_key_file: Some(files().path("client.key")),
        ..broker.config(SecurityProtocol::Ssl, Plain)
    };
    works(&mutual).await;

    let no_certificate = KafkaConfig { ssl_certificate_file: None, ssl_key_file: None, ..mutual.clone() };
    is_refused(no_certificate, "refuses the client's certificate, or asks for one").await;
    for (mechanism, said) in [(Plain, "Invalid username or password"), (ScramSha512, "invalid credentials")] {
        is_refused(KafkaConfig { sasl_password: Some(Secret::new(WRONG)), ..sasl(mechanism) }, said).await;
    }
    is_refused(sasl(ScramSha256), "it does not know SCRAM-SHA-256, but").await;
    let other = KafkaConfig { ssl_ca_file: Some(files().path("other.pem")), ..sasl(Plain) };
    is_refused(other, "nobody who is trusted signed its certificate").await;
    let address = broker.bootstrap(SecurityProtocol::SaslSsl).replace(NAME, "127.0.0.1");
    is_refused(KafkaConfig { bootstrap_servers: vec![address], ..sasl(Plain) }, "not valid for name").await;
    let plain = vec![broker.bootstrap(SecurityProtocol::Plaintext)];
    let log = KafkaLog::new(&KafkaConfig { bootstrap_servers: plain.clone(), ..sasl(Plain) });
    let mut error = String::new();
    // A ping has a second, which a busy machine may take away.
    until("a cause", async || {
        error = log.ping().await.unwrap_err().to_string();
        !error.contains("no answer within")
    })
    .await;
    assert!(error.contains("perhaps it does not speak TLS there"), "{error}");
    let no_tls = broker.config(SecurityProtocol::SaslPlaintext, ScramSha256);
    is_refused(KafkaConfig { bootstrap_servers: plain, ..no_tls }, "it asks for no password there").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_ends_sessions_costs_no_record_and_no_call() {
    let broker = SecureBroker::shared().await;
    let config = broker.config(SecurityProtocol::SaslPlaintext, SaslMechanism::ScramSha256);
    let log = Arc::new(KafkaLog::new(&config));
    log.create_topics(&["events"], 1).await.unwrap();
    let since = Instant::now();
    let mut appended = Vec::new();
    while since.elapsed() < 3 * SESSION {
        let value = appended.len().to_string();
        log.append(vec![record("events", "key", value.clone())]).await.unwrap();
        log.bounds("events", 0).await.unwrap();
        assert_eq!(values(&read(&*log, "events", 0, appended.len() as i64, 1).await), [value.as_str()]);
        appended.push(value);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Nothing was used meanwhile, and all of it is over.
    tokio::time::sleep(2 * SESSION).await;
    until_it_answers(&*log).await;
    log.append(vec![record("events", "key", "last")]).await.unwrap();
    appended.push("last".into());
    assert_eq!(values(&read(&*log, "events", 0, 0, appended.len()).await), appended);
}

/// The control of the test above: what goes on being used is ended. By hand, with the password in the clear.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_broker_of_these_tests_does_end_sessions() {
    async fn ask(stream: &mut TcpStream, api: i16, version: i16, body: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut request = Vec::new();
        request.put_i16(api);
        request.put_i16(version);
        request.put_i32(1);
        request.put_i16(-1); // nobody's name
        request.put_slice(body);
        stream.write_u32(request.len() as u32).await?;
        stream.write_all(&request).await?;
        let mut answer = vec![0; stream.read_u32().await? as usize];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }
    let broker = SecureBroker::shared().await;
    let mut body = Vec::new();
    let message = format!("\0shop\0{PASSWORD}");
    body.put_i32(message.len() as i32);
    body.put_slice(message.as_bytes());
    let mut tries = 0;
    let mut stream = loop {
        let mut stream = TcpStream::connect(broker.bootstrap(SecurityProtocol::SaslPlaintext)).await.unwrap();
        ask(&mut stream, 17, 1, b"\0\x05PLAIN").await.unwrap();
        let answer = ask(&mut stream, 36, 1, &body).await.unwrap();
        let lifetime_ms = (&answer[answer.len() - 8..]).get_i64();
        assert!((1..=SESSION.as_millis() as i64).contains(&lifetime_ms), "{lifetime_ms}");
        match ask(&mut stream, 18, 0, &[]).await {
            Ok(_) => break stream,
            // On a busy machine it may be over by now.
            Err(_) if tries < 5 => tries += 1,
            Err(error) => panic!("it never lasts: {error}"),
        }
    };
    tokio::time::sleep(SESSION).await;
    ask(&mut stream, 18, 0, &[]).await.expect_err("it is over");
}

/// What every log must do, over TLS and with a password.
mod suite {
    use super::*;
    use crate::log::Subject;
    use crate::log::suite::contract;

    async fn subject() -> Subject {
        let config = SecureBroker::shared().await.config(SecurityProtocol::SaslSsl, SaslMechanism::Plain);
        Subject::new(move |fetch_wait| Arc::new(KafkaLog::new(&KafkaConfig { fetch_wait, ..config.clone() })))
    }

    contract!(subject);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_cannot_be_used_is_a_defect_that_names_its_file() {
    let gone = Secret::new("postgres://shop@localhost/d?sslmode=verify-full&sslrootcert=/nowhere/ca.pem");
    let error = Db::new(&gone, "test", &Config::default().database).err();
    assert!(matches!(&error, Some(DbError::Defect(text)) if text.starts_with("/nowhere/ca.pem: ")), "{error:?}");
    let config = KafkaConfig {
        security_protocol: SecurityProtocol::Ssl,
        ssl_ca_file: Some("/nowhere/ca.pem".into()),
        ..crate::support::kafka::config("127.0.0.1:1")
    };
    let error = KafkaLog::new(&config).ping().await;
    assert!(matches!(&error, Err(LogError::Defect(text)) if text.starts_with("/nowhere/ca.pem: ")), "{error:?}");
}
