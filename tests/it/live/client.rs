//! A client of event streams and of WebSockets, as little of one as the tests need.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::shop::PATIENCE;

/// One event as it came.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Event {
    pub id: String,
    /// Empty: `message`.
    pub name: String,
    pub data: String,
}

impl Event {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn order(&self) -> String {
        self.json()["id"].as_str().unwrap_or_default().to_owned()
    }

    pub fn status(&self) -> String {
        self.json()["status"].as_str().unwrap_or_default().to_owned()
    }
}

pub struct Events {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    body: Pin<Box<dyn Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    text: String,
}

impl Events {
    /// `path` at `base`, behind `last_id` where that is not empty.
    pub async fn open(base: &str, path: &str, last_id: &str) -> Self {
        timeout(PATIENCE, Self::try_open(base, path, last_id)).await.expect("in time").expect("an answer")
    }

    pub async fn try_open(base: &str, path: &str, last_id: &str) -> reqwest::Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut request = reqwest::Client::new().get(format!("{base}{path}"));
        if !last_id.is_empty() {
            request = request.header("Last-Event-ID", last_id);
        }
        let answer = request.send().await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Ok(Self { status, headers, body: Box::pin(answer.bytes_stream()), text: String::new() })
    }

    /// `None` at the stream's end.
    pub async fn next(&mut self) -> Option<Event> {
        let read = timeout(PATIENCE, self.try_next()).await.unwrap_or_else(|_| panic!("no event in time"));
        read.expect("a whole stream")
    }

    /// As `next`, however long it takes; a stream that breaks is an error.
    pub async fn try_next(&mut self) -> reqwest::Result<Option<Event>> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                let mut event = Event::default();
                for line in block.lines() {
                    match line.split_once(": ") {
                        Some(("id", value)) => event.id = value.to_owned(),
                        Some(("event", value)) => event.name = value.to_owned(),
                        Some(("data", value)) => event.data = value.to_owned(),
                        Some(("retry", "1000")) | Some(("", _)) => {}
                        other => panic!("{other:?}"),
                    }
                }
                if event != Event::default() {
                    return Ok(Some(event));
                }
                continue;
            }
            let Some(chunk) = self.body.next().await.transpose()? else { return Ok(None) };
            self.text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        }
    }

    pub async fn take(&mut self, n: usize) -> Vec<Event> {
        let mut taken = Vec::new();
        while taken.len() < n {
            taken.push(self.next().await.expect("more events"));
        }
        taken
    }

    pub async fn rest(&mut self) -> Vec<Event> {
        let mut rest = Vec::new();
        while let Some(event) = self.next().await {
            rest.push(event);
        }
        rest
    }
}

/// The server's side of a WebSocket: its messages, then the code and the reason of its close.
pub struct WebSocket(TcpStream);

#[derive(Debug, PartialEq)]
pub enum Frame {
    Text(String),
    Close(u16, String),
    Pong(Vec<u8>),
}

impl WebSocket {
    /// The status line where it is not 101.
    pub async fn open(base: &str, path: &str) -> Result<Self, String> {
        let host = base.trim_start_matches("http://");
        let mut stream = TcpStream::connect(host).await.expect("a connection");
        let head = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(timeout(PATIENCE, stream.read_u8()).await.expect("in time").expect("an answer"));
        }
        let answer = String::from_utf8(answer).expect("text");
        if answer.starts_with("HTTP/1.1 101 ") { Ok(Self(stream)) } else { Err(answer) }
    }

    /// A client's frame; masked with zeros, which changes nothing.
    pub async fn send(&mut self, opcode: u8, payload: &[u8]) {
        let mut frame = vec![0x80 | opcode];
        match u8::try_from(payload.len()) {
            Ok(short) if short < 126 => frame.push(0x80 | short),
            _ => {
                frame.push(0x80 | 126);
                frame.extend(u16::try_from(payload.len()).expect("short").to_be_bytes());
            }
        }
        frame.extend([0; 4]);
        frame.extend(payload);
        self.0.write_all(&frame).await.expect("sent");
    }

    pub async fn next(&mut self) -> Frame {
        timeout(PATIENCE, self.read()).await.expect("a frame in time").expect("a frame")
    }

    async fn read(&mut self) -> std::io::Result<Frame> {
        loop {
            let opcode = self.0.read_u8().await? & 0x0f;
            let length = match self.0.read_u8().await? {
                126 => usize::from(self.0.read_u16().await?),
                short => usize::from(short),
            };
            let mut payload = vec![0; length];
            self.0.read_exact(&mut payload).await?;
            match opcode {
                1 => return Ok(Frame::Text(String::from_utf8(payload).expect("UTF-8"))),
                8 => {
                    let code = u16::from_be_bytes([payload[0], payload[1]]);
                    return Ok(Frame::Close(code, String::from_utf8_lossy(&payload[2..]).into_owned()));
                }
                10 => return Ok(Frame::Pong(payload)),
                9 => {}
                other => panic!("opcode {other}"),
            }
        }
    }
}
