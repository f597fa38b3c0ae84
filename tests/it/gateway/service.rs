//! Services that do as they are told, and a gateway in front of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use shopd::config::{Config, GatewayConfig, HttpConfig};
use shopd::gateway::Gateway;
use shopd::http;
use shopd::shutdown::Shutdown;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// How a service treats one request.
pub enum Reply {
    /// An answer; the connection stays.
    Answer(String),
    /// So much of an answer, then the end.
    Cut(String),
    Close,
    Hang,
    /// An answer, after a while.
    Slow(Duration, String),
    /// An answer that is no text; the connection stays.
    Bytes(Vec<u8>),
    /// `head`, then `piece` for as long as anybody takes it; `sent` counts the bytes.
    Endless {
        head: String,
        piece: Vec<u8>,
        sent: Arc<AtomicU64>,
    },
    /// Pieces of an answer as they come, then the end.
    Pieces(tokio::sync::mpsc::Receiver<String>),
}

pub fn answer(status: &str, headers: &str, body: &str) -> Reply {
    Reply::Answer(format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()))
}

pub fn json_answer(body: &str) -> Reply {
    answer("200 OK", "Content-Type: application/json\r\n", body)
}

/// A service that does as it is told and remembers every request's text.
#[derive(Clone)]
pub struct Service {
    pub url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Service {
    /// `reply` gets the request's text and its number on its connection, from 0.
    pub async fn start(reply: impl Fn(&str, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = Self { url, requests: Arc::default() };
        let (requests, reply) = (service.requests.clone(), Arc::new(reply));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(converse(stream, requests.clone(), reply.clone()));
            }
        });
        service
    }

    /// One that takes connections and says nothing, to checks neither: a process that was stopped.
    pub async fn start_hung() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = Self { url, requests: Arc::default() };
        let requests = service.requests.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let requests = requests.clone();
                tokio::spawn(async move {
                    let Some(request) = read_message(&mut stream).await else { return };
                    if !request.starts_with("GET /health/live ") {
                        requests.lock().unwrap().push(request);
                    }
                    // Until the other side is tired of it.
                    read_message(&mut stream).await;
                });
            }
        });
        service
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    pub fn is_asked(&self, times: usize) -> bool {
        self.requests().len() == times
    }
}

async fn converse<R: Fn(&str, usize) -> Reply>(mut stream: TcpStream, requests: Arc<Mutex<Vec<String>>>, reply: Arc<R>) {
    for number in 0.. {
        let Some(request) = read_message(&mut stream).await else { return };
        if request.starts_with("GET /health/live ") {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            continue;
        }
        requests.lock().unwrap().push(request.clone());
        match reply(&request, number) {
            // Who asked may have gone.
            Reply::Answer(text) => match stream.write_all(text.as_bytes()).await {
                Ok(()) => {}
                Err(_) => return,
            },
            Reply::Bytes(bytes) => stream.write_all(&bytes).await.unwrap(),
            Reply::Endless { head, piece, sent } => {
                let mut written = stream.write_all(head.as_bytes()).await;
                while written.is_ok() {
                    written = stream.write_all(&piece).await;
                    sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
                }
                return;
            }
            Reply::Cut(text) => return stream.write_all(text.as_bytes()).await.unwrap(),
            Reply::Close => return,
            Reply::Hang => std::future::pending().await,
            Reply::Slow(time, text) => {
                tokio::time::sleep(time).await;
                // Who asked may have gone.
                if stream.write_all(text.as_bytes()).await.is_err() {
                    return;
                }
            }
            Reply::Pieces(mut pieces) => {
                while let Some(piece) = pieces.recv().await {
                    if stream.write_all(piece.as_bytes()).await.is_err() {
                        return;
                    }
                }
                return;
            }
        }
    }
}

/// Head and body of one HTTP message; `None` at the end of the connection.
pub async fn read_message(stream: &mut TcpStream) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let whole = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = whole.split_once("\r\n\r\n") {
            let length =
                head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
            if body.len() >= length.unwrap_or(0usize) {
                return Some(whole);
            }
        }
        match stream.read_buf(&mut text).await {
            Ok(read) if read > 0 => {}
            _ => return None,
        }
    }
}

/// A header of a request's text.
pub fn header(request: &str, name: &str) -> Option<String> {
    let head = request.split("\r\n\r\n").next()?;
    head.lines()
        .find_map(|line| line.split_once(':').filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.trim().to_owned()))
}

/// An address where nobody listens, and the socket that keeps it from everyone else.
pub fn reserved() -> (String, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (format!("http://{}", socket.local_addr().unwrap()), socket)
}

/// An address where nobody listens, until the process ends.
pub fn nobody() -> String {
    let (url, socket) = reserved();
    std::mem::forget(socket);
    url
}

/// An address that takes no connection and refuses none, as one whose packets are dropped: its queue is full. As long as what is returned lives.
pub async fn silent() -> (String, Vec<TcpStream>, TcpListener) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(connected) = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await {
        waiting.push(connected.unwrap());
        assert!(waiting.len() < 100, "its queue has no end");
    }
    (format!("http://{address}"), waiting, listener)
}

pub struct Shop {
    address: String,
    pub stop: Shutdown,
    pub client: reqwest::Client,
}

impl Drop for Shop {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

/// How long the gateway waits for a service where a test does not say: far beyond any stall of a busy machine.
pub const TIMEOUT: Duration = Duration::from_secs(20);

impl Shop {
    pub async fn start(orders: &[&str], payments: &[&str]) -> Self {
        Self::start_with(orders, payments, |_| {}).await
    }

    /// As `start`, for tests in which somebody is waited for in vain.
    pub async fn start_waiting(orders: &[&str], payments: &[&str], timeout: Duration) -> Self {
        Self::start_with(orders, payments, |config| config.upstream_timeout = timeout).await
    }

    /// As `start`, with settings changed.
    pub async fn start_with(orders: &[&str], payments: &[&str], change: impl FnOnce(&mut GatewayConfig)) -> Self {
        Self::start_draining(orders, payments, Duration::from_millis(100), change).await
    }

    /// As `start_with`; what is under way when it is stopped has so long.
    pub async fn start_draining(
        orders: &[&str],
        payments: &[&str],
        drain: Duration,
        change: impl FnOnce(&mut GatewayConfig),
    ) -> Self {
        let urls = |urls: &[&str]| urls.iter().map(|url| (*url).to_owned()).collect();
        let (config, stop) = (Config::default().gateway, Shutdown::new());
        let mut config = GatewayConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            orders_urls: urls(orders),
            payments_urls: urls(payments),
            upstream_timeout: TIMEOUT,
            ..config
        };
        change(&mut config);
        let gateway = Gateway::new(&config, stop.clone()).unwrap();
        tokio::spawn(gateway.clone().run_checks());
        let config = HttpConfig { workers: 1, ..Config::default().http };
        let listen = "127.0.0.1:0".parse().unwrap();
        let port = http::Port::open(http::GATEWAY, listen).unwrap();
        let address = port.local_addr.to_string();
        let bound = http::bind(port, &config, drain, gateway.routes(), gateway.readiness()).unwrap();
        tokio::spawn(bound.run(stop.clone()));
        // The client wants one though no test speaks TLS; another test may have installed it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build().unwrap();
        Self { address, stop, client }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn stop(&self) {
        self.stop.stop();
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn get(&self, path: &str) -> reqwest::Response {
        self.client.get(self.url(path)).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::Response {
        self.client.post(self.url(path)).header("content-type", "application/json").body(body).send().await.unwrap()
    }

    /// Sends a request as it is written and reads one answer.
    pub async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        read_message(&mut stream).await.unwrap_or_default()
    }
}

/// Status, code and trace id of a problem; a 5xx may be tried again.
pub async fn problem(response: reqwest::Response) -> (u16, String) {
    let status = response.status();
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    assert!(response.headers().contains_key("x-request-id"));
    assert_eq!(response.headers().contains_key("retry-after"), status.is_server_error());
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["traceId"].as_str().unwrap().len(), 32);
    (status.as_u16(), body["code"].as_str().unwrap().to_owned())
}

pub fn code(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}
