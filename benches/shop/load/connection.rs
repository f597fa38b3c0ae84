//! One keep-alive connection of the load: a request out, an answer in, without waiting.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Instant;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::super::Result;

/// Answers here are an order or an account.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

pub struct Connection {
    socket: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    /// Of the stream's requests, the one under way.
    request: usize,
    written: usize,
    /// When the request under way was due.
    due: Option<Instant>,
    shape: Shape,
}

/// Where the last answer's head ended and its length stood. The next one's are mostly at the same place, with the same length.
#[derive(Default)]
struct Shape {
    head: usize,
    length_at: Range<usize>,
    length: Vec<u8>,
    total: usize,
}

/// An answer that has come in whole.
pub struct Answer {
    pub due: Instant,
    pub is_accepted: bool,
}

impl Connection {
    pub fn open(address: SocketAddr, registry: &Registry, token: Token) -> Result<Self> {
        let socket = std::net::TcpStream::connect(address).map_err(|error| format!("{address}: {error}"))?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let mut socket = TcpStream::from_std(socket);
        registry.register(&mut socket, token, Interest::READABLE | Interest::WRITABLE)?;
        let buffer = vec![0; ANSWER_BYTES_MAX];
        Ok(Self { socket, buffer, filled: 0, request: 0, written: 0, due: None, shape: Shape::default() })
    }

    pub fn send(&mut self, requests: &[Vec<u8>], request: usize, due: Instant) -> Result<()> {
        (self.request, self.written, self.filled, self.due) = (request, 0, 0, Some(due));
        self.write(requests)
    }

    fn write(&mut self, requests: &[Vec<u8>]) -> Result<()> {
        let bytes = &requests[self.request];
        while self.written < bytes.len() {
            match self.socket.write(&bytes[self.written..]) {
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("a request could not be sent: {error}").into()),
            }
        }
        Ok(())
    }

    /// Goes on with what is under way; an answer once it is whole.
    pub fn advance(&mut self, requests: &[Vec<u8>]) -> Result<Option<Answer>> {
        let Some(due) = self.due else { return Ok(None) };
        self.write(requests)?;
        loop {
            let room = self.buffer.len() - self.filled;
            if room == 0 {
                return Err(format!("an answer is longer than {ANSWER_BYTES_MAX} bytes").into());
            }
            match self.socket.read(&mut self.buffer[self.filled..]) {
                Ok(0) => return Err("a connection was closed before its answer".into()),
                Ok(read) => {
                    self.filled += read;
                    if self.total()?.is_some_and(|total| self.filled >= total) {
                        self.due = None;
                        let is_accepted = matches!(self.buffer.get(9..12), Some(b"200" | b"201"));
                        return Ok(Some(Answer { due, is_accepted }));
                    }
                    // Less than there was room for: the socket is empty, and says so when it is not any more.
                    if read < room {
                        return Ok(None);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("an answer could not be read: {error}").into()),
            }
        }
    }

    /// The last answer, for people.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.buffer[..self.filled]).into_owned()
    }

    /// Bytes of head and body, once the head is there.
    fn total(&mut self) -> Result<Option<usize>> {
        let (answer, shape) = (&self.buffer[..self.filled], &self.shape);
        let same = shape.total > 0
            && answer.get(shape.head - 4..shape.head) == Some(b"\r\n\r\n")
            && answer.get(shape.length_at.clone()) == Some(&shape.length);
        if same {
            return Ok(Some(shape.total));
        }
        let Some(head) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
        let head = head + 4;
        let name = b"content-length:";
        let at = answer[..head].windows(name.len()).position(|window| window.eq_ignore_ascii_case(name));
        let at = at.ok_or_else(|| format!("an answer without a length: {}", String::from_utf8_lossy(&answer[..head])))?;
        let end = answer[at..head].iter().position(|byte| *byte == b'\r').map_or(head, |line| at + line);
        let length = std::str::from_utf8(&answer[at + name.len()..end])?.trim().parse::<usize>();
        let total = head + length.map_err(|error| format!("an answer's length: {error}"))?;
        // With the line's end, so that a longer number is another one.
        let length_at = at..end + 1;
        self.shape = Shape { head, length: answer[length_at.clone()].to_vec(), length_at, total };
        Ok(Some(total))
    }
}
