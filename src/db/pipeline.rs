//! Statements that are on their way together: the server works on one while the next one is being made.

use std::task::Poll;

use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use futures::{StreamExt, poll};
use tokio::task::yield_now;

use super::error::DbError;

/// Statements of one transaction over one connection, in the order in which they are sent.
pub struct Pipeline<'s> {
    sent: FuturesOrdered<BoxFuture<'s, Result<(), DbError>>>,
    answered: Result<(), DbError>,
}

impl Default for Pipeline<'_> {
    fn default() -> Self {
        Self { sent: FuturesOrdered::new(), answered: Ok(()) }
    }
}

impl<'s> Pipeline<'s> {
    /// Makes a statement, and lets the connection's task send it before another one is made; waits for no answer.
    ///
    /// What does not fit into the socket's buffer (208 KiB on Linux, unless it is set otherwise) goes out when the next one is made, so a statement
    /// should be smaller than that.
    pub async fn send(&mut self, statement: impl Future<Output = Result<(), DbError>> + Send + 's) {
        self.sent.push_back(Box::pin(statement));
        while let Poll::Ready(Some(answer)) = poll!(self.sent.next()) {
            self.note(answer);
        }
        // That task may have no other thread. (Tried: to give it another one with `block_in_place`. The kernel often wakes that one on the core of
        // this one, where it waits while the other core, and the server, have nothing to do.)
        yield_now().await;
    }

    /// Waits for all answers.
    ///
    /// # Errors
    /// The first one: those after it only say that the transaction has failed.
    pub async fn finish(mut self) -> Result<(), DbError> {
        while let Some(answer) = self.sent.next().await {
            self.note(answer);
        }
        self.answered
    }

    fn note(&mut self, answer: Result<(), DbError>) {
        if self.answered.is_ok() {
            self.answered = answer;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::Semaphore;

    use super::*;

    /// On one thread: what is made goes out only where the maker lets it.
    #[tokio::test]
    async fn each_statement_goes_out_before_the_next_one_is_made_and_none_waits_for_an_answer() {
        let (log, server) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Semaphore::new(0)));
        let (to, mut from) = tokio::sync::mpsc::channel(3);
        let statement = |number: usize| {
            let (log, server, to) = (&log, &server, to.clone());
            async move {
                log.lock().unwrap().push(format!("{number} is made"));
                to.try_send(number).unwrap();
                server.acquire().await.unwrap().forget();
                if number == 0 { Ok(()) } else { Err(DbError::Defect(number.to_string())) }
            }
        };
        let (out, answers) = (log.clone(), server.clone());
        let connection = tokio::spawn(async move {
            while let Some(number) = from.recv().await {
                out.lock().unwrap().push(format!("{number} goes out"));
                if number == 2 {
                    answers.add_permits(3);
                }
            }
        });
        let mut pipeline = Pipeline::default();
        for number in 0..3 {
            pipeline.send(statement(number)).await;
        }
        assert!(pipeline.finish().await.unwrap_err().to_string().contains('1'));
        let expected = ["0 is made", "0 goes out", "1 is made", "1 goes out", "2 is made", "2 goes out"];
        assert_eq!(*log.lock().unwrap(), expected);
        connection.abort();
    }

    #[tokio::test]
    async fn answers_that_are_there_at_once_hold_nothing_up() {
        let mut pipeline = Pipeline::default();
        for answer in [Ok(()), Err(DbError::Defect("first".into())), Err(DbError::Defect("second".into()))] {
            pipeline.send(async { answer }).await;
        }
        assert!(pipeline.finish().await.unwrap_err().to_string().contains("first"));
        assert!(Pipeline::default().finish().await.is_ok());
    }
}
