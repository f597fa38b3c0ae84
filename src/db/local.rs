//! A connection to a server on this machine. It is told of what there is to read, and of room for what it writes only while it waits for some.
//!
//! The runtime's own asks for both at all times, and Linux says that there is room whenever the server has read a request: a thread that waits
//! for the answer is woken for each one in vain, often on the core on which the server was about to work on it.

use std::io::{ErrorKind, Result};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

/// The runtime's two ends of a pipe ask for one of the two each, and read and write a socket as they do a pipe.
pub(super) struct LocalStream {
    socket: pipe::Receiver,
    /// The same socket, while a write waits for room.
    room: Option<pipe::Sender>,
}

impl LocalStream {
    /// Bounded by the caller.
    pub async fn connect(path: &Path) -> Result<Self> {
        Self::new(UnixStream::connect(path).await?.into_std()?.into())
    }

    /// `socket` does not block.
    fn new(socket: OwnedFd) -> Result<Self> {
        Ok(Self { socket: pipe::Receiver::from_owned_fd_unchecked(socket)?, room: None })
    }
}

impl AsyncRead for LocalStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, to)
    }
}

impl AsyncWrite for LocalStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let stream = &mut *self;
        if stream.room.is_none() {
            match SockRef::from(&stream.socket).send(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
        let room = match &mut stream.room {
            Some(room) => room,
            none => none.insert(pipe::Sender::from_owned_fd_unchecked(stream.socket.as_fd().try_clone_to_owned()?)?),
        };
        let written = Pin::new(room).poll_write(context, bytes);
        if written.is_ready() {
            stream.room = None;
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(SockRef::from(&self.socket).shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as Plain;
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::runtime::Builder;

    use super::*;

    fn pair() -> (Plain, Plain) {
        let (ours, theirs) = Plain::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, theirs)
    }

    /// How often a thread that waits for an answer is woken while the other side reads requests, one every few milliseconds.
    fn wakes(reads: usize, waiting: impl AsyncFnOnce(Plain)) -> u64 {
        let (mut ours, mut theirs) = pair();
        (0..reads).for_each(|_| ours.write_all(&[7; 100]).unwrap());
        let reading = std::thread::spawn(move || {
            for _ in 0..reads {
                theirs.read_exact(&mut [0; 100]).unwrap();
                std::thread::park_timeout(Duration::from_millis(3));
            }
            theirs.write_all(&[1]).unwrap();
        });
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(waiting(ours));
        reading.join().unwrap();
        runtime.metrics().worker_park_count(0)
    }

    /// The runtime's own stream shows that what is counted here happens.
    #[test]
    fn who_waits_for_an_answer_is_not_woken_when_the_server_reads_a_request() {
        const READS: usize = 20;
        let own = wakes(READS, async |socket| {
            let mut stream = UnixStream::from_std(socket).unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), 1);
        });
        let local = wakes(READS, async |socket| {
            let mut stream = LocalStream::new(socket.into()).unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), 1);
        });
        assert!(local <= 3, "{local}");
        // What other systems say of room is not known here.
        assert!(own > 5 || !cfg!(target_os = "linux"), "{own}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// More than a socket holds, so that writes wait for room, and both ways at once.
        #[test]
        fn whatever_is_written_arrives_and_whatever_comes_is_read(
            out in prop::collection::vec(1usize..300_000, 1..6), back in prop::collection::vec(1usize..300_000, 1..6),
        ) {
            let (ours, theirs) = pair();
            let (sent, answered): (usize, usize) = (out.iter().sum(), back.iter().sum());
            let (mut reader, mut writer) = (theirs.try_clone().unwrap(), theirs);
            let reading = std::thread::spawn(move || {
                let mut heard = Vec::new();
                reader.read_to_end(&mut heard).unwrap();
                heard
            });
            let writing = std::thread::spawn(move || back.into_iter().for_each(|length| writer.write_all(&vec![9; length]).unwrap()));
            Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let (mut from, mut to) = tokio::io::split(LocalStream::new(ours.into()).unwrap());
                let saying = async {
                    let mut said = 0u8;
                    for length in out {
                        let bytes: Vec<u8> = (0..length).map(|_| { said = said.wrapping_add(1); said }).collect();
                        to.write_all(&bytes).await.unwrap();
                    }
                    to.shutdown().await.unwrap();
                };
                let hearing = async {
                    let mut heard = vec![0; answered];
                    from.read_exact(&mut heard).await.unwrap();
                    assert!(heard.iter().all(|byte| *byte == 9));
                };
                tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(saying, hearing) }).await.unwrap();
            });
            writing.join().unwrap();
            let heard = reading.join().unwrap();
            prop_assert_eq!(heard.len(), sent);
            prop_assert!(heard.iter().zip(1u64..).all(|(byte, at)| *byte == at as u8));
        }
    }

    #[tokio::test]
    async fn a_server_that_is_gone_is_noticed() {
        let (ours, theirs) = pair();
        let mut stream = LocalStream::new(ours.into()).unwrap();
        drop(theirs);
        assert_eq!(stream.read(&mut [0; 10]).await.unwrap(), 0);
        assert_eq!(stream.write(&[1]).await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    }
}
