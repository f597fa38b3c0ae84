//! The server that `all` brings along, run for real.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use shopd::embedded::{self, EmbeddedError, Fetch, Options, Search};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::postgres::{database, eventually, options, own_dir};
use crate::support::shop::{PATIENCE, poll};

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
    let group = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(server.pid()))).expect("its process group");
    assert_eq!(group.as_raw(), server.pid(), "Ctrl-C must reach only us");
    assert_eq!(query(server.url("shop").expose(), "select x from t").await, "42");
    server.stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn a_second_start_on_the_same_directory_is_refused_and_names_the_first() {
    let dir = own_dir();
    let first = embedded::start(&options(&dir)).await.expect("a start");
    let refused = embedded::start(&options(&dir)).await.expect_err("two at once");
    assert!(matches!(refused, EmbeddedError::InUse { .. }), "{refused}");
    let text = refused.to_string();
    assert!(text.contains(&format!("in use by another shopd (process {})", std::process::id())), "{text}");
    let known = embedded::in_use(&options(&dir)).expect("the first").to_string();
    assert_eq!(known, text);
    assert_eq!(query(first.url("postgres").expose(), "select 1").await, "1");
    first.stop(STOP).await.expect("a clean stop");
    embedded::start(&options(&dir)).await.expect("free again").stop(STOP).await.expect("a clean stop");
}

/// The body of the next test's child; by itself it does nothing.
#[tokio::test]
async fn a_child_that_holds_a_server_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let server = embedded::start(&durable(dir.as_ref())).await.expect("a start");
    server.ensure_database("shop").await.expect("a database");
    query(server.url("shop").expose(), "create table t as select 42 as x").await;
    std::fs::write(Path::new(&dir).join("child-is-ready"), "").expect("a file");
    // Should nobody kill it, it ends by itself.
    let _ = tokio::time::timeout(Duration::from_secs(60), std::future::pending::<()>()).await;
}

const CHILD: &str = "SHOPD_IT_HOLD_A_SERVER";

#[tokio::test]
async fn after_sigkill_the_next_start_takes_the_server_over_and_keeps_it_running() {
    let dir = own_dir();
    let mut child = std::process::Command::new(std::env::current_exe().expect("our path"))
        .args(["--exact", "embedded::a_child_that_holds_a_server_until_it_is_killed", "--nocapture"])
        .env(CHILD, &dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("a child");
    eventually("the child's server", || dir.join("child-is-ready").exists()).await;
    let orphan = first_line(&dir);
    child.kill().expect("SIGKILL");
    child.wait().expect("its end");

    let mut server = embedded::start(&durable(&dir)).await.expect("a take-over");
    assert_eq!(server.pid(), orphan, "the same server goes on");
    assert_eq!(query(server.url("shop").expose(), "select x from t").await, "42");

    // A server that is not our child, killed with its sessions open.
    kill(server.pid());
    tokio::time::timeout(STOP, server.exited()).await.expect("its end is noticed");
    assert!(server.ensure_running().await.expect("a restart"));
    assert!(!server.ensure_running().await.expect("nothing to do"));
    assert_ne!(server.pid(), orphan);
    assert_eq!(query(server.url("shop").expose(), "select x from t").await, "42");

    // And one that is.
    let killed = server.pid();
    kill(killed);
    tokio::time::timeout(STOP, server.exited()).await.expect("its end is noticed");
    assert!(server.ensure_running().await.expect("a restart"));
    server.stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn a_supervised_server_comes_back_under_the_same_url() {
    let dir = own_dir();
    let mut server = embedded::start(&options(&dir)).await.expect("a start");
    let (url, pid) = (server.url("postgres"), server.pid());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let supervisor = tokio::spawn(async move {
        server.supervise(async { drop(stopped.await) }).await;
        server
    });
    kill(pid);
    eventually("another server", || dir.join("postgres/postmaster.pid").exists() && first_line(&dir) != pid).await;
    let mut answer = String::new();
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if let Ok((client, connection)) = tokio_postgres::connect(url.expose(), tokio_postgres::NoTls).await {
            drop((client, connection));
            answer = query(url.expose(), "select 1").await;
            break;
        }
        poll().await;
    }
    assert_eq!(answer, "1");
    stop.send(()).expect("a listener");
    supervisor.await.expect("an end").stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn a_dropped_server_stops_and_the_next_start_waits_for_that() {
    let dir = own_dir();
    let server = embedded::start(&options(&dir)).await.expect("a start");
    let pid = server.pid();
    drop(server);
    let server = embedded::start(&options(&dir)).await.expect("a start while the other one stops");
    assert_ne!(server.pid(), pid);
    server.stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn a_stale_pid_file_is_no_obstacle_even_if_a_stranger_has_its_number() {
    let dir = own_dir();
    let pid_file = dir.join("postgres/postmaster.pid");
    // Beyond any process number; and our own, which is alive and no database server.
    for number in [i32::MAX.to_string(), std::process::id().to_string()] {
        let server = embedded::start(&options(&dir)).await.expect("a start");
        let text = std::fs::read_to_string(&pid_file).expect("a pid file");
        kill(server.pid());
        server.exited().await;
        drop(server);
        let (_, rest) = text.split_once('\n').expect("lines");
        std::fs::write(&pid_file, format!("{number}\n{rest}")).expect("a stale pid file");
        let socket_lock = PathBuf::from(rest.lines().nth(3).expect("the socket's directory")).join(".s.PGSQL.5432.lock");
        std::fs::write(&socket_lock, format!("{number}\n{rest}")).expect("a stale lock file");
        let server = embedded::start(&options(&dir)).await.expect("a start beside a stale pid file");
        assert_eq!(query(server.url("postgres").expose(), "select 1").await, "1");
        server.stop(STOP).await.expect("a clean stop");
    }
}

#[tokio::test]
async fn an_interrupted_beginning_heals() {
    let dir = own_dir();
    let unfinished = dir.join("postgres.unfinished-1");
    std::fs::create_dir_all(unfinished.join("base")).expect("a half-made database");
    let server = embedded::start(&options(&dir)).await.expect("a start");
    assert!(!unfinished.exists());
    server.stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn a_private_directory_works_and_a_closed_one_above_it_is_named() {
    let dir = own_dir();
    let mode = |path: &Path| std::fs::metadata(path).expect("a directory").permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700, "as mktemp -d makes it");
    let server = embedded::start(&options(&dir)).await.expect("a start");
    assert_eq!(mode(&dir.join("postgres")), 0o700);
    server.stop(STOP).await.expect("a clean stop");

    if nix::unistd::Uid::effective().is_root() {
        let closed = own_dir();
        let error = embedded::start(&options(&closed.join("below"))).await.expect_err("a closed folder");
        assert!(matches!(error, EmbeddedError::NotEnterable { .. }), "{error}");
        assert!(error.to_string().contains(&format!("may not enter {};", closed.display())), "{error}");
    }
}

#[tokio::test]
async fn a_socket_directory_that_somebody_else_made_is_not_used() {
    let dir = own_dir();
    let server = embedded::start(&options(&dir)).await.expect("a start");
    let socket = socket_dir(&dir);
    server.stop(STOP).await.expect("a clean stop");
    assert!(!socket.exists(), "it goes with the server");

    // Open to everybody: whoever made it could put a socket of their own there.
    std::fs::create_dir(&socket).expect("a directory");
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o777)).expect("its mode");
    let server = embedded::start(&options(&dir)).await.expect("a start");
    assert_ne!(socket_dir(&dir), socket);
    assert_eq!(query(server.url("postgres").expose(), "select 1").await, "1");
    server.stop(STOP).await.expect("a clean stop");
    std::fs::remove_dir(&socket).expect("it was left alone");
}

#[tokio::test]
async fn commands_attach_to_a_running_server_and_leave_it_running() {
    let dir = own_dir();
    let server = embedded::start(&options(&dir)).await.expect("a start");
    server.ensure_database("shop").await.expect("a database");
    let attached = embedded::attach(&options(&dir)).await.expect("an attachment");
    assert!(!attached.is_host());
    assert_eq!(attached.url("shop"), server.url("shop"));
    assert_eq!(query(attached.url("shop").expose(), "select 1").await, "1");
    attached.detach(STOP).await.expect("an end");
    assert_eq!(query(server.url("shop").expose(), "select 1").await, "1");
    server.stop(STOP).await.expect("a clean stop");
}

#[tokio::test]
async fn commands_without_a_running_server_start_one_and_the_last_one_out_stops_it() {
    let dir = own_dir();
    let host = embedded::attach(&options(&dir)).await.expect("an attachment");
    host.ensure_database("shop").await.expect("a database");
    assert!(host.is_host());
    let guest = embedded::attach(&options(&dir)).await.expect("another one meanwhile");
    assert!(!guest.is_host());
    let url = guest.url("shop");
    let leaving = tokio::spawn(host.detach(STOP));
    // `all` waits its turn behind commands.
    let starting = tokio::spawn({
        let options = options(&dir);
        async move { embedded::start(&options).await }
    });
    assert_eq!(query(url.expose(), "select 1").await, "1", "the host waits for its guest");
    guest.detach(STOP).await.expect("an end");
    leaving.await.expect("no panic").expect("a clean stop");
    let server = starting.await.expect("no panic").expect("a start once the commands are done");
    server.stop(STOP).await.expect("a clean stop");
    assert!(!dir.join("postgres/postmaster.pid").exists());
}

#[tokio::test]
async fn offline_without_a_server_says_what_to_do() {
    let (dir, cache) = (own_dir(), own_dir());
    let error = embedded::start(&fetching(&dir, &cache, Some("http://127.0.0.1:9/registry"))).await.expect_err("nobody there");
    assert!(matches!(error, EmbeddedError::Download { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("install Postgres 15 or later, or try again with access to the internet"), "{text}");
    assert!(!dir.join("postgres").exists());
}

#[tokio::test]
async fn another_archive_than_the_pinned_one_is_refused() {
    let (dir, cache) = (own_dir(), own_dir());
    let error = embedded::start(&fetching(&dir, &cache, Some(&forger().await))).await.expect_err("a forged archive");
    assert!(error.to_string().contains("is not the one this shopd was made with"), "{error}");
    assert_eq!(std::fs::read_dir(&cache).expect("the cache").count(), 0, "nothing of it is kept");
}

#[tokio::test]
async fn without_a_server_on_the_machine_one_is_fetched_once() {
    let (dir, cache) = (own_dir(), own_dir());
    let server = embedded::start(&fetching(&dir, &cache, None)).await.expect("a fetched server");
    assert_eq!(query(server.url("postgres").expose(), "show server_version").await, "18.4");
    server.stop(STOP).await.expect("a clean stop");

    // From the cache, with nobody to fetch from; and by the data's version, whatever else is on the machine.
    let began = Instant::now();
    let mut offline = fetching(&dir, &cache, Some("http://127.0.0.1:9/registry"));
    offline.search = Search::Machine;
    let server = embedded::start(&offline).await.expect("the cached server");
    println!("warm start in {:?}", began.elapsed());
    assert_eq!(query(server.url("postgres").expose(), "show server_version_num").await.get(..2), Some("18"));
    server.stop(STOP).await.expect("a clean stop");
}

/// As for people: what is committed survives.
fn durable(dir: &Path) -> Options {
    let mut options = options(dir);
    options.settings.clear();
    options
}

fn fetching(dir: &Path, cache: &Path, registry: Option<&str>) -> Options {
    let mut options = options(dir);
    options.search = Search::Only(Vec::new());
    // The server's user must be able to enter it.
    std::fs::set_permissions(cache, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    options.fetch = Fetch { cache_dir: Some(cache.to_path_buf()), registry: registry.map(str::to_owned) };
    options
}

/// A registry whose archive is not the pinned one, but has the checksum that the registry says.
async fn forger() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 2048];
            let length = stream.read(&mut request).await.unwrap_or_default();
            let path = String::from_utf8_lossy(&request[..length]).split_whitespace().nth(1).unwrap_or_default().to_owned();
            let (status, body) = match path.rsplit('.').next() {
                Some("xml") => (200, METADATA),
                Some("jar") => (200, "forged"),
                Some("sha256") => (200, "ccdd35168ab474fa5764a526cfb83621351e23682c5075b2e18d56bddf96aa30"),
                _ => (404, ""),
            };
            let answer = format!("HTTP/1.1 {status} Answer\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
            // A client that left early saw enough.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    url
}

const METADATA: &str = "<metadata><groupId>g</groupId><artifactId>a</artifactId><versioning><latest>18.4.0</latest>\
    <release>18.4.0</release><versions><version>18.4.0</version></versions><lastUpdated>1</lastUpdated></versioning></metadata>";

fn first_line(dir: &Path) -> i32 {
    let text = std::fs::read_to_string(dir.join("postgres/postmaster.pid")).unwrap_or_default();
    text.lines().next().and_then(|line| line.parse().ok()).unwrap_or_default()
}

fn socket_dir(dir: &Path) -> PathBuf {
    let text = std::fs::read_to_string(dir.join("postgres/postmaster.pid")).expect("a pid file");
    PathBuf::from(text.lines().nth(4).expect("its fifth line"))
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("a process");
}
