//! A client for single requests, whose answers are read.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::super::Result;
use super::post;

/// `Prefer: wait` holds an answer back for at most 30 s.
const PATIENCE: Duration = Duration::from_secs(40);

pub struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

pub struct Answered {
    pub status: u16,
    head: String,
    pub body: String,
}

impl Answered {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        lines.filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }

    /// # Errors
    /// Says what the answer was.
    pub fn expect(self, status: u16) -> Result<Self> {
        if self.status == status {
            Ok(self)
        } else {
            Err(format!("answered {} instead of {status}: {}", self.status, self.body).into())
        }
    }
}

impl Client {
    /// `address` is `host:port`.
    pub async fn open(address: &str) -> Result<Self> {
        let connected = timeout(PATIENCE, TcpStream::connect(address)).await.map_err(|_| format!("no connection to {address}"))?;
        let stream = connected.map_err(|error| format!("{address}: {error}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(16 * 1024) })
    }

    pub async fn get(&mut self, path: &str) -> Result<Answered> {
        self.ask(format!("GET {path} HTTP/1.1\r\nHost: shop.example\r\n\r\n").as_bytes()).await
    }

    /// `headers`, each with its line's end.
    pub async fn post(&mut self, path: &str, headers: &str, body: &str) -> Result<Answered> {
        self.ask(&post(path, headers, body)).await
    }

    async fn ask(&mut self, request: &[u8]) -> Result<Answered> {
        timeout(PATIENCE, self.exchange(request)).await.map_err(|_| format!("no answer within {PATIENCE:?}"))?
    }

    async fn exchange(&mut self, request: &[u8]) -> Result<Answered> {
        self.stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            if let Some(end) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            self.more().await?;
        };
        let text = std::str::from_utf8(&self.buffer[..head])?.to_owned();
        let status = text.split(' ').nth(1).ok_or("an answer without a status")?.parse()?;
        let mut answered = Answered { status, head: text, body: String::new() };
        if answered.header("transfer-encoding").is_some() {
            return Err("an answer in chunks, which this client does not read".into());
        }
        let length: usize = answered.header("content-length").unwrap_or("0").parse()?;
        while self.buffer.len() < head + length {
            self.more().await?;
        }
        answered.body = String::from_utf8(self.buffer[head..].to_vec())?;
        Ok(answered)
    }

    async fn more(&mut self) -> Result<()> {
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            return Err("the connection was closed".into());
        }
        Ok(())
    }
}
