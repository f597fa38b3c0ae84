//! The service behind every proxy: answers at once, always the same, on a thread of this process.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Result;

const ORDER: &str = r#"{"id":"3f2504e0-4f89-11d3-9a0c-0305e82c3301","userId":"user-0001","amount":100.5,"description":"a small book","status":"New","failureReason":null,"createdAt":"2025-06-12T10:11:12.123456Z","updatedAt":"2025-06-12T10:11:12.123456Z"}"#;
const DOCUMENT: &str = r#"{"openapi":"3.0.3","info":{"title":"x","version":"1"},"paths":{}}"#;

pub fn start() -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || runtime.block_on(accept(listener)));
    Ok(address)
}

async fn accept(listener: std::net::TcpListener) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        // A proxy that goes away ends its connection; nobody asks how.
        tokio::spawn(serve(stream));
    }
}

fn answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let date = "Thu, 12 Jun 2025 10:11:12 GMT";
    format!(
        "HTTP/1.1 {status}\r\ncontent-length: {length}\r\ncontent-type: application/json\r\n{headers}date: {date}\r\n\r\n{body}"
    )
    .into_bytes()
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    let found = answer("200 OK", "etag: \"1a2b3c\"\r\n", ORDER);
    let placed = answer("201 Created", "location: /api/OrdersProxy/3f2504e0-4f89-11d3-9a0c-0305e82c3301\r\n", ORDER);
    let (live, document) = (answer("200 OK", "", r#"{"status":"live"}"#), answer("200 OK", "", DOCUMENT));
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let head = loop {
            if let Some(head) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break head + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let whole = head + body_bytes(&buffer[..head]);
        while buffer.len() < whole {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let asked = |start: &[u8]| buffer.starts_with(start);
        let answered = match () {
            () if asked(b"POST /api/") => &placed,
            () if asked(b"GET /openapi.json") => &document,
            () if asked(b"GET /health/") => &live,
            () => &found,
        };
        stream.write_all(answered).await?;
        buffer.drain(..whole);
    }
}

fn body_bytes(head: &[u8]) -> usize {
    let lines = head.split(|byte| *byte == b'\n');
    let mut headers = lines.filter_map(|line| line.split_at_checked(b"content-length:".len()));
    let value = headers.find(|(name, _)| name.eq_ignore_ascii_case(b"content-length:")).map(|(_, value)| value.trim_ascii());
    value.and_then(|value| std::str::from_utf8(value).ok()?.parse().ok()).unwrap_or_default()
}
