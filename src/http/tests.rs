//! The mechanics on a real port, with small routes of their own.

use std::net::SocketAddr;
use std::time::Duration;

use actix_web::http::Method;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use super::*;
use crate::config::{Config, HttpConfig};
use crate::shutdown::Shutdown;

/// What a request's deadline leaves it in these tests.
const DEADLINE: Duration = Duration::from_millis(100);

struct Running {
    addr: SocketAddr,
    stop: Shutdown,
    task: JoinHandle<Result<(), ServeError>>,
}

fn http_config() -> HttpConfig {
    HttpConfig { workers: 1, ..Config::default().http }
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    /// Empty where it is absent.
    fn header(&self, name: &str) -> &str {
        let found = self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        found.unwrap_or_default()
    }
}

async fn start(routes: Routes) -> Running {
    let readiness = Readiness::new(|| async { vec!["database".to_owned()] });
    let (any, drain) = (SocketAddr::from(([127, 0, 0, 1], 0)), Duration::from_secs(5));
    let port = Port::open("orders", any).unwrap();
    let (addr, stop) = (port.local_addr, Shutdown::new());
    let bound = bind(port, &http_config(), drain, routes, readiness).unwrap();
    Running { addr, task: tokio::spawn(bound.run(stop.clone())), stop }
}

impl Running {
    async fn stop(self) {
        self.stop.stop();
        tokio::time::timeout(Duration::from_secs(8), self.task).await.unwrap().unwrap().unwrap();
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], "").await
    }

    async fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
        let answer = self.raw(request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let (status, head) = head.split_once("\r\n").unwrap();
        let status = status.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
    }

    /// Sends bytes as they are on a connection of their own and reads until the server closes it.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        tokio::time::timeout(Duration::from_secs(8), read).await.unwrap().unwrap();
        String::from_utf8(answer).unwrap()
    }
}

/// Any bytes.
struct Echo(Vec<u8>);

impl ReadBody for Echo {
    fn read(body: &[u8]) -> Result<Self, Problem> {
        Ok(Self(body.to_vec()))
    }
}

fn routes() -> Routes {
    Routes::new().plain(|config| {
        config.route("/echo", web::post().to(|body: Json<Echo>| async move { HttpResponse::Ok().body(body.value.0) }));
        config.route(
            "/api/Orders",
            web::get().to(|req: HttpRequest, context: RequestContext| async move {
                let params = Params::of(&req)?;
                let next = (limit(&params)? == 1).then(|| cursor_of([7; 8]));
                Ok::<_, Problem>(with_next(Reply::ok(&1)?, &context, "/api/Orders", &params, next))
            }),
        );
        let item = web::resource("/items/{id}")
            .route(web::get().to(|| async { "an item" }))
            .route(web::post().to(|| async { HttpResponse::Ok().finish() }))
            .default_service(only(&[Method::GET, Method::POST]));
        config.service(item);
        config.route("/fails", web::get().to(|| async { Err::<HttpResponse, _>(Problem::unavailable("the secret cause")) }));
        config.route(
            "/panics",
            web::get().to(|| async {
                if true {
                    panic!("on purpose");
                }
                HttpResponse::Ok().finish()
            }),
        );
        config.route("/hangs/{id}", web::get().to(std::future::pending::<HttpResponse>));
        config.route(
            "/streams",
            web::get().to(|| async {
                let late = futures::stream::once(async {
                    tokio::time::sleep(DEADLINE * 3).await;
                    Ok::<_, actix_web::Error>(bytes::Bytes::from_static(b"late"))
                });
                HttpResponse::Ok().streaming(late)
            }),
        );
        config.route("/context", web::get().to(|context: RequestContext| async move { context.public_path("/api/Orders/1") }));
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_error_is_a_problem_with_the_ids_of_its_request() {
    let server = start(routes()).await;
    let ids = [("x-request-id", "mine"), ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")];
    for (method, path, status, code) in [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("DELETE", "/items/1", 405, "method_not_allowed"),
        ("GET", "/fails", 503, "unavailable"),
        ("GET", "/panics", 500, "internal"),
    ] {
        let answer = server.ask(method, path, &ids, "").await;
        assert_eq!(answer.status, status, "{path}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        assert_eq!(answer.header("x-request-id"), "mine");
        assert_eq!(answer.header("allow"), if status == 405 { "get, post, head, options" } else { "" });
        assert_eq!(answer.header("retry-after"), if path == "/fails" { "1" } else { "" });
        let text = answer.body;
        assert!(text.starts_with(&format!("{{\"type\":\"urn:shopd:problem:{code}\",\"title\":")), "{text}");
        assert!(!text.contains("secret") && !text.contains("purpose"), "{text}");
        let body: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&body["status"], &body["code"], &body["instance"]), (&status.into(), &code.into(), &path.into()));
        assert_eq!(body["traceId"], "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(body["detail"].is_string() && body.get("errors").is_none());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn head_answers_as_get_without_a_body() {
    let server = start(routes()).await;
    let answer = server.raw(b"HEAD /items/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\n"), "{answer}");
    assert!(answer.contains("content-length: 7\r\n"), "{answer}");
    let answer = server.raw(b"HEAD /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.ends_with("\r\n\r\n"), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_known_route_allows_can_be_asked() {
    let server = start(routes()).await;
    let options = server.ask("OPTIONS", "/items/1", &[], "").await;
    assert_eq!((options.status, options.header("allow"), options.body.as_str()), (204, "get, post, head, options", ""));
    assert_eq!(server.ask("OPTIONS", "/metrics", &[], "").await.header("allow"), "get, head, options");
    assert_eq!(server.ask("OPTIONS", "/nowhere", &[], "").await.status, 404);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_inner_prefix_leads_back_through_the_gateway() {
    let server = start(routes()).await;
    let answer = server.ask("GET", "/context", &[(PREFIX_HEADER, "/api/OrdersProxy")], "").await;
    assert_eq!(answer.body, "/api/OrdersProxy/1");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateways_deadline_bounds_an_answers_head_and_not_its_body() {
    let server = start(routes()).await;
    let deadline = [(DEADLINE_HEADER, &*DEADLINE.as_millis().to_string()), ("x-request-id", "mine")];
    for method in ["GET", "HEAD"] {
        let late = server.ask(method, "/hangs/1", &deadline, "").await;
        assert_eq!((late.status, late.header("x-request-id"), late.header("retry-after")), (503, "mine", "1"));
        assert!(method == "HEAD" || late.body.contains(r#""code":"unavailable""#), "{}", late.body);
    }
    let streamed = server.ask("GET", "/streams", &deadline, "").await;
    assert!(streamed.status == 200 && streamed.body.contains("late"), "{}", streamed.body);
    let text = server.get("/metrics").await.body;
    assert!(text.contains(r#"method="HEAD",route="/hangs/{id}",status="503"}"#), "it is counted under its route: {text}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_body_was_read_still_arrives_and_the_connection_lives_on() {
    let server = start(routes()).await;
    let mut request = format!("POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", 500_000).into_bytes();
    request.resize(request.len() + 500_000, b'x');
    request.extend_from_slice(b"GET /items/1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    let answer = server.raw(&request).await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.ends_with("an item"), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_costs_a_bounded_time_and_the_connection() {
    let server = start(routes()).await;
    let answer = server.raw(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 500000\r\n\r\nxx").await;
    assert!(answer.starts_with("HTTP/1.1 404") && answer.contains("connection: close\r\n"), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_answer_on_every_port() {
    let server = start(routes()).await;
    let live = server.get("/health/live").await;
    assert_eq!((live.status, live.body.as_str()), (200, r#"{"status":"live","role":"orders"}"#));
    let ready = server.get("/health/ready").await;
    assert_eq!(ready.status, 503);
    assert_eq!(ready.body, r#"{"status":"unavailable","role":"orders","missing":["database"]}"#);
    server.get("/items/7").await;
    let text = server.get("/metrics").await.body;
    assert!(text.contains(r#"shopd_http_requests_total{role="orders",method="GET",route="/items/{id}",status="200"}"#), "{text}");
    assert!(
        text.contains(r#"shopd_http_request_duration_seconds_bucket{role="orders",method="GET",route="/items/{id}",le="0.001"}"#)
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_what_is_in_flight_finish() {
    let (entered, mut wait) = tokio::sync::mpsc::channel::<()>(1);
    let (release, released) = tokio::sync::watch::channel(false);
    let server = start(Routes::new().plain(move |config| {
        let (entered, released) = (entered.clone(), released.clone());
        config.route(
            "/slow",
            web::get().to(move || {
                let (entered, mut released) = (entered.clone(), released.clone());
                async move {
                    entered.send(()).await.unwrap();
                    released.wait_for(|go| *go).await.unwrap();
                    "done"
                }
            }),
        );
    }))
    .await;
    let stop = server.stop.clone();
    let (answer, ()) = tokio::join!(server.get("/slow"), async {
        tokio::time::timeout(Duration::from_secs(5), wait.recv()).await.unwrap();
        stop.stop();
        release.send(true).unwrap();
    });
    assert_eq!(answer.body, "done");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_refused_by_type_encoding_and_size_and_the_refusal_arrives() {
    let server = start(routes()).await;
    let (json, full, over) = (("content-type", "application/json"), "x".repeat(BODY_BYTES_MAX), "x".repeat(900_000));
    let answer = server.ask("POST", "/echo", &[json], &full).await;
    assert_eq!((answer.status, answer.body.len()), (200, BODY_BYTES_MAX));
    for (headers, body, status, code) in [
        (vec![json], over.as_str(), 413, "payload_too_large"),
        (vec![json], &over[..=BODY_BYTES_MAX], 413, "payload_too_large"),
        (vec![], "1", 415, "unsupported_media_type"),
        (vec![], over.as_str(), 415, "unsupported_media_type"),
        (vec![("content-type", "text/plain")], "1", 415, "unsupported_media_type"),
        (vec![json, ("content-encoding", "gzip")], "1", 415, "unsupported_media_type"),
    ] {
        let answer = server.ask("POST", "/echo", &headers, body).await;
        assert_eq!(answer.status, status, "{headers:?}");
        assert!(answer.body.contains(&format!("\"code\":\"{code}\"")), "{}", answer.body);
    }
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    let head =
        "POST /echo HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: text/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = server.raw(format!("{head}{chunk}{chunk}0\r\n\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let answer = server.raw(format!("{head}{chunk}0\r\n\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{}", &answer[..200]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_dribbles_is_answered_in_bounded_time() {
    let server = start(routes()).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    let head = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-type: text/json\r\ncontent-length: 100\r\n\r\nx";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(20), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("in time"), "{answer}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_links_to_its_next_with_all_other_parameters() {
    let server = start(routes()).await;
    let answer =
        server.ask("GET", "/api/Orders?limit=1&userId=a%26b+c&CURSOR=old", &[(PREFIX_HEADER, "/api/OrdersProxy")], "").await;
    let next = cursor_of([7; 8]);
    assert_eq!(answer.header("x-next-cursor"), next.to_ascii_lowercase());
    let link = format!("</api/OrdersProxy?limit=1&userId=a%26b%20c&cursor={next}>; rel=\"next\"");
    assert_eq!(answer.header("link"), link.to_ascii_lowercase());
    assert_eq!(server.get("/api/Orders").await.header("link"), "");
    for bad in ["limit=0", "limit=%2B5", "limit=1&x=%zz", "limit=99999999999999999999"] {
        assert_eq!(server.get(&format!("/api/Orders?{bad}")).await.status, 400, "{bad}");
    }
    server.stop().await;
}

#[test]
fn the_documented_error_codes_are_those_there_are() {
    let documented = include_str!("../../docs/API.md");
    let rows = documented.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
    let rows: Vec<_> = rows.map(str::to_owned).collect();
    let there_are = Code::ALL.iter().map(|c| format!("{c}` | {} | {}", c.status().as_u16(), c.meaning().trim()));
    assert_eq!(rows, there_are.collect::<Vec<_>>(), "docs/API.md and Code::ALL differ");
}
