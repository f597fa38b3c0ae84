//! Connections to replicas: HTTP/1.1 over TCP, the request written in one piece, the answer read by the framework's own decoder.
//!
//! Ours because the framework's client starts a timer and a task for each request and writes head and body apart (measured with
//! `make bench-proxy`: a seventh of what a proxied request cost), and because it ends a body that was cut off as if it were whole.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_http::h1::{ClientCodec, ClientPayloadCodec, MessageType};
use actix_http::{ResponseHead, ServiceConfig};
use actix_web::http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING};
use actix_web::http::{StatusCode, Version};
use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::codec::Decoder;

use crate::gateway::replicas::{Replica, departures};

/// A replica whose host does not even answer the handshake.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// Below the services' keep-alive (75 s), so that it is nearly always us who end an idle connection.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Kept of one replica at most, by one worker thread.
const KEPT_MAX: usize = 1_024;
const READ_BYTES: usize = 8 * 1024;
/// Answers (1xx) before the answer.
const INTERIM_MAX: u32 = 8;

/// Why an exchange ended without a whole answer.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Before a byte of an answer.
    #[error("closed before it answered: {0}")]
    Closed(io::Error),
    #[error("closed in the middle of its answer")]
    Cut,
    #[error("what came is no answer: {0}")]
    Unreadable(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One connection to a replica.
pub struct Connection {
    stream: TcpStream,
    read: BytesMut,
    /// What of an answer's body is still to come.
    body: Option<Body>,
    /// The body ends with the connection, so nobody can tell whether it is whole.
    pub until_close: bool,
    keeps: bool,
    idle_since: Instant,
}

enum Body {
    Framed(ClientPayloadCodec),
    /// Whatever comes until the end.
    Rest,
}

impl Connection {
    /// # Errors
    /// No connection came about: nothing was sent.
    pub async fn open(replica: &Replica) -> io::Result<Self> {
        let stream = timeout(CONNECT_TIME_MAX, replica.connect()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        let read = BytesMut::with_capacity(READ_BYTES);
        Ok(Self { stream, read, body: None, until_close: false, keeps: false, idle_since: Instant::now() })
    }

    /// Sends a whole request and reads the head of its answer; the body follows by [`Connection::chunk`].
    pub async fn ask(&mut self, request: &[u8], config: &ServiceConfig) -> Result<ResponseHead, Broken> {
        self.stream.write_all(request).await.map_err(Broken::Closed)?;
        let mut codec = ClientCodec::new(config.clone());
        let (mut answered, mut interim) = (false, 0);
        let head = loop {
            match codec.decode(&mut self.read).map_err(|error| Broken::Unreadable(error.to_string()))? {
                Some(head) if head.status == StatusCode::SWITCHING_PROTOCOLS => {
                    return Err(Broken::Unreadable("it switches protocols".to_owned()));
                }
                // The answer itself is still to come.
                Some(head) if head.status.is_informational() && interim < INTERIM_MAX => {
                    interim += 1;
                    codec = ClientCodec::new(config.clone());
                }
                Some(head) if head.status.is_informational() => {
                    return Err(Broken::Unreadable("it says without an end that it will answer".to_owned()));
                }
                Some(head) => break head,
                None => {
                    let read = self.fill().await;
                    match read {
                        Ok(0) if answered => return Err(Broken::Cut),
                        Ok(0) => return Err(Broken::Closed(io::ErrorKind::UnexpectedEof.into())),
                        Ok(_) => answered = true,
                        Err(error) if answered => return Err(error.into()),
                        Err(error) => return Err(Broken::Closed(error)),
                    }
                }
            }
        };
        let has = |name| head.headers.contains_key(name);
        // They have no body, whatever length they name.
        let bodyless = [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&head.status);
        let is_framed = has(&CONTENT_LENGTH) || has(&TRANSFER_ENCODING);
        // RFC 9112, 6.3; the decoder takes it for an empty one.
        self.until_close = !bodyless && !is_framed;
        let has_body = !bodyless && codec.message_type() != MessageType::None;
        let says_close = |value: &[u8]| value.to_ascii_lowercase().windows(5).any(|part| part == b"close");
        let closes = head.headers.get_all(CONNECTION).any(|value| says_close(value.as_bytes()));
        self.keeps = head.version == Version::HTTP_11 && !closes && !self.until_close;
        self.body = match has_body || self.until_close {
            true if self.until_close => Some(Body::Rest),
            true => Some(Body::Framed(codec.into_payload_codec())),
            false => None,
        };
        Ok(head)
    }

    /// The next piece of the answer's body; `None` at its end.
    ///
    /// # Errors
    /// [`Broken::Cut`] where it ends short of what its head announced.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            match &mut self.body {
                None => return Ok(None),
                Some(Body::Rest) if !self.read.is_empty() => return Ok(Some(self.read.split().freeze())),
                Some(Body::Rest) => {}
                Some(Body::Framed(codec)) => {
                    match codec.decode(&mut self.read).map_err(|error| Broken::Unreadable(error.to_string()))? {
                        Some(Some(chunk)) => return Ok(Some(chunk)),
                        Some(None) => {
                            self.body = None;
                            return Ok(None);
                        }
                        None => {}
                    }
                }
            }
            if self.fill().await? == 0 {
                if !self.until_close {
                    return Err(Broken::Cut);
                }
                self.body = None;
            }
        }
    }

    async fn fill(&mut self) -> io::Result<usize> {
        if self.read.capacity() - self.read.len() < READ_BYTES / 8 {
            self.read.reserve(READ_BYTES);
        }
        self.stream.read_buf(&mut self.read).await
    }

    /// Nothing of an answer is left, and another request may follow.
    fn is_free(&self) -> bool {
        self.keeps && self.body.is_none() && self.read.is_empty()
    }

    /// Neither closed nor spoken on meanwhile.
    fn is_quiet(&self) -> bool {
        let mut byte = [0];
        self.stream.try_read(&mut byte).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Kept connections of one worker thread, by replica.
#[derive(Default)]
pub struct Pool {
    idle: RefCell<HashMap<usize, Kept>>,
    /// As many replicas were gone when those were last looked for whose connections nobody will take any more.
    departures: Cell<usize>,
    /// One for all: each would have a timer.
    pub config: ServiceConfig,
}

struct Kept {
    replica: Arc<Replica>,
    connections: Vec<Connection>,
}

impl Pool {
    /// The one that was used last.
    pub fn take(&self, replica: &Replica) -> Option<Connection> {
        let mut idle = self.idle.borrow_mut();
        let kept = &mut idle.get_mut(&replica.id())?.connections;
        while let Some(connection) = kept.pop() {
            if connection.idle_since.elapsed() > IDLE_MAX {
                // All others were idle for longer.
                kept.clear();
            } else if connection.is_quiet() {
                return Some(connection);
            }
        }
        None
    }

    /// Keeps it, where another request may follow on it.
    pub fn put(&self, replica: &Arc<Replica>, mut connection: Connection) {
        let mut idle = self.idle.borrow_mut();
        let departures = departures();
        if self.departures.replace(departures) != departures {
            idle.retain(|_, kept| !kept.replica.is_gone());
        }
        if connection.is_free() && !replica.is_gone() {
            connection.idle_since = Instant::now();
            let none = || Kept { replica: replica.clone(), connections: Vec::new() };
            let kept = &mut idle.entry(replica.id()).or_insert_with(none).connections;
            // Those of a burst: only the last ones are taken, and the service has long closed these.
            let stale = kept.iter().take_while(|kept| kept.idle_since.elapsed() > IDLE_MAX).count();
            kept.drain(..stale);
            if kept.len() < KEPT_MAX {
                kept.push(connection);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::gateway::replicas::Replicas;

    #[actix_web::test]
    async fn connections_to_who_is_gone_are_closed_and_those_to_others_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = |host: &str| format!("http://{host}:{}", listener.local_addr().unwrap().port());
        let replicas = Replicas::new(&[url("127.0.0.1"), url("localhost")]).unwrap();
        let gone = replicas.pick(&[]).unwrap().replica.clone();
        let stays = replicas.pick(&[gone.id()]).unwrap().replica.clone();
        let pool = Pool::default();
        let put = async |replica: &Arc<Replica>| {
            let mut connection = Connection::open(replica).await.unwrap();
            connection.keeps = true;
            pool.put(replica, connection);
        };
        put(&gone).await;
        put(&stays).await;
        assert_eq!(pool.idle.borrow().len(), 2);
        gone.leave();
        put(&stays).await;
        assert!(pool.take(&gone).is_none() && pool.take(&stays).is_some());
        put(&gone).await;
        assert!(pool.take(&gone).is_none(), "nor is a later one kept");
    }

    /// Red where only those are looked at that are taken: a burst's stay for as long as there is one request now and then.
    #[actix_web::test]
    async fn connections_that_a_burst_left_are_closed_while_the_last_one_is_used() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let replicas = Replicas::new(&[format!("http://{}", listener.local_addr().unwrap())]).unwrap();
        let replica = replicas.pick(&[]).unwrap().replica.clone();
        let pool = Pool::default();
        let put = async || {
            let mut connection = Connection::open(&replica).await.unwrap();
            connection.keeps = true;
            pool.put(&replica, connection);
        };
        for _ in 0..5 {
            put().await;
        }
        let kept = || pool.idle.borrow()[&replica.id()].connections.len();
        assert_eq!(kept(), 5);
        let long_ago = Instant::now().checked_sub(IDLE_MAX + Duration::from_secs(1)).unwrap();
        for kept in &mut pool.idle.borrow_mut().get_mut(&replica.id()).unwrap().connections[..4] {
            kept.idle_since = long_ago;
        }
        let used = pool.take(&replica).unwrap();
        pool.put(&replica, used);
        assert_eq!(kept(), 1);
    }
}
