//! Clients that place orders while something is done to the shop, and know what was acknowledged.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::shop::{Client, PATIENCE, poll};

/// An order that was answered 200 or 201.
#[derive(Clone, Debug)]
pub struct Accepted {
    pub id: Uuid,
    pub user: &'static str,
    /// As it stands in the request.
    pub amount: &'static str,
}

impl Accepted {
    pub fn body(&self) -> String {
        format!(r#"{{"orderId":"{}","userId":"{}","amount":{},"description":"a book"}}"#, self.id, self.user, self.amount)
    }
}

/// What the clients know together.
#[derive(Default)]
struct Known {
    accepted: Vec<Accepted>,
    /// Answers other than 200 and 201, and calls without an answer; each was followed by another try under the same order id.
    refused: usize,
    /// From the first try to the acknowledgement.
    slowest: Duration,
}

/// Clients at work: each order is tried under its own id until it is acknowledged, and only as many are begun as were allowed.
pub struct Load {
    allowed: Arc<Semaphore>,
    known: Arc<Mutex<Known>>,
    client: Arc<RwLock<Client>>,
    tasks: Vec<JoinHandle<()>>,
}

/// What came of it.
pub struct Done {
    pub accepted: Vec<Accepted>,
    pub refused: usize,
    pub slowest: Duration,
}

impl Done {
    pub fn ids(&self) -> BTreeSet<String> {
        self.accepted.iter().map(|order| order.id.to_string()).collect()
    }
}

impl Load {
    /// So many clients, of these users by turns.
    pub fn start(client: &Client, clients: usize, users: &'static [&'static str], amount: &'static str) -> Self {
        let (allowed, known) = (Arc::new(Semaphore::new(0)), Arc::<Mutex<Known>>::default());
        let client = Arc::new(RwLock::new(client.clone()));
        let task = |n: usize| {
            let (client, allowed, known) = (client.clone(), allowed.clone(), known.clone());
            tokio::spawn(async move {
                let mut user = n;
                // Closed: that was all.
                while let Ok(permit) = allowed.acquire().await {
                    permit.forget();
                    let client = client.read().unwrap().clone();
                    let order = Accepted { id: Uuid::now_v7(), user: users[user % users.len()], amount };
                    user += clients;
                    place(&client, order, &known).await;
                }
            })
        };
        let tasks = (0..clients).map(task).collect();
        Self { allowed, known, client, tasks }
    }

    pub fn accepted(&self) -> usize {
        self.known.lock().unwrap().accepted.len()
    }

    pub fn refused(&self) -> usize {
        self.known.lock().unwrap().refused
    }

    /// Every order that is begun from now on is placed there.
    pub fn go_to(&self, client: &Client) {
        *self.client.write().unwrap() = client.clone();
    }

    /// Lets them begin so many more.
    pub fn allow(&self, orders: usize) {
        self.allowed.add_permits(orders);
    }

    /// The same, and waits for as many acknowledgements.
    pub async fn place(&self, orders: usize) {
        let wanted = self.accepted() + orders;
        self.allow(orders);
        let since = Instant::now();
        while self.accepted() < wanted {
            assert!(since.elapsed() < PATIENCE, "{} of {wanted} orders accepted", self.accepted());
            poll().await;
        }
    }

    /// Waits until what was begun is acknowledged; what was allowed and not begun stays undone.
    pub async fn stop(self) -> Done {
        self.allowed.close();
        for task in self.tasks {
            tokio::time::timeout(PATIENCE, task).await.expect("what was begun ends").expect("the load");
        }
        let mut known = self.known.lock().unwrap();
        Done { accepted: std::mem::take(&mut known.accepted), refused: known.refused, slowest: known.slowest }
    }
}

async fn place(client: &Client, order: Accepted, known: &Mutex<Known>) {
    let (body, since) = (order.body(), Instant::now());
    loop {
        match client.send("POST", "/api/OrdersProxy", &[], Some(&body)).await {
            Ok(answer) if matches!(answer.status, 200 | 201) => break,
            Ok(answer) if answer.status < 500 => panic!("{answer:?}"),
            _ => known.lock().unwrap().refused += 1,
        }
        poll().await;
    }
    let mut known = known.lock().unwrap();
    known.accepted.push(order);
    known.slowest = known.slowest.max(since.elapsed());
}
