//! The load: a closed loop over keep-alive connections on one thread, which costs next to nothing beside what it measures.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::task::LocalSet;
use tokio::time::timeout;

use super::Result;

/// Nothing here takes so long; a request that does fails the run.
const PATIENCE: Duration = Duration::from_secs(20);
const ORDER_ID: &str = "3f2504e0-4f89-11d3-9a0c-0305e82c3301";
const PLACED: &str =
    r#"{"orderId":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","userId":"user-0001","amount":100.50,"description":"a small book"}"#;

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ask {
    Get,
    Post,
}

/// One request, as it goes over the wire, and the status it must get.
pub struct Request {
    bytes: Vec<u8>,
    status: &'static str,
}

impl Ask {
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }

    /// At a proxy's port.
    pub fn public(self) -> Request {
        self.at("/api/OrdersProxy")
    }

    /// At the service itself.
    pub fn upstream(self) -> Request {
        self.at("/api/Orders")
    }

    fn at(self, path: &str) -> Request {
        let headers = "Host: shop.example\r\nUser-Agent: bench\r\nAccept: application/json\r\n";
        let (text, status) = match self {
            Self::Get => (format!("GET {path}/{ORDER_ID} HTTP/1.1\r\n{headers}\r\n"), "200"),
            Self::Post => {
                let length = PLACED.len();
                let own = format!("Content-Type: application/json\r\nContent-Length: {length}\r\n");
                (format!("POST {path} HTTP/1.1\r\n{headers}{own}\r\n{PLACED}"), "201")
            }
        };
        Request { bytes: text.into_bytes(), status }
    }
}

/// How a run went.
pub struct Ran {
    pub elapsed: Duration,
    /// Of every request.
    pub latencies: Vec<Duration>,
}

pub struct Load(Runtime);

impl Load {
    pub fn new() -> Result<Self> {
        Ok(Self(tokio::runtime::Builder::new_current_thread().enable_all().build()?))
    }

    pub fn pause(&self, time: Duration) {
        self.0.block_on(async { tokio::time::sleep(time).await });
    }

    /// `requests` in all, as fast as the answers come. An answer with another status is an error.
    pub fn run(&self, address: &str, request: Request, connections: usize, requests: usize) -> Result<Ran> {
        let (request, left) = (Rc::new(request), Rc::new(Cell::new(requests)));
        LocalSet::new().block_on(&self.0, async {
            let mut open = Vec::new();
            for _ in 0..connections {
                open.push(Connection::open(address).await?);
            }
            let since = Instant::now();
            let clients = open.into_iter().map(|mut connection| {
                let (request, left) = (request.clone(), left.clone());
                async move {
                    let mut latencies = Vec::with_capacity(requests / connections * 2);
                    while left.get() > 0 {
                        left.set(left.get() - 1);
                        let since = Instant::now();
                        connection.ask(&request).await?;
                        latencies.push(since.elapsed());
                    }
                    Result::Ok(latencies)
                }
            });
            let all = futures::future::try_join_all(clients);
            let latencies = timeout(PATIENCE * 6, all).await??.concat();
            Ok(Ran { elapsed: since.elapsed(), latencies })
        })
    }
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Connection {
    async fn open(address: &str) -> Result<Self> {
        let stream = timeout(PATIENCE, TcpStream::connect(address)).await??;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    async fn ask(&mut self, request: &Request) -> Result<()> {
        self.stream.write_all(&request.bytes).await?;
        self.buffer.clear();
        let mut expected = None;
        while expected.is_none_or(|length| self.buffer.len() < length) {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err("the connection was closed".into());
            }
            if expected.is_none() {
                expected = length_of(&self.buffer)?;
            }
        }
        let status = self.buffer.get(9..12).unwrap_or_default();
        if status != request.status.as_bytes() {
            return Err(format!("answered {}", String::from_utf8_lossy(&self.buffer)).into());
        }
        Ok(())
    }
}

/// Of head and body together, once the head is there.
fn length_of(answer: &[u8]) -> Result<Option<usize>> {
    let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&answer[..head])?;
    let length = text.lines().find_map(|line| line.split_once(':').filter(|(name, _)| name.eq_ignore_ascii_case("content-length")));
    let (_, length) = length.ok_or("an answer without a length")?;
    Ok(Some(head + 4 + length.trim().parse::<usize>()?))
}
