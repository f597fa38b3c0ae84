//! Pages of lists at a depth, by cursor.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::super::Result;
use super::super::figures::{Latency, Spread};
use super::super::load::Client;
use super::fill::USER;

const LIMIT: u64 = 20;
const DEPTHS: [u64; 3] = [1, 100, 10_000];
/// How often a page is asked for in a round.
const ASKED: usize = 30;
const ROUNDS: usize = 9;

/// One list's pages.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pages {
    pub name: String,
    /// Pages deep, and the time of one in milliseconds.
    pub depths: Vec<(u64, Latency)>,
    /// By round, the deepest page's time over the first one's; none of a list with one depth.
    #[serde(default)]
    ratios: Vec<f64>,
}

/// Of the filled lists, as deep as they go: `orders` in all, of which `own` are the reader's.
pub async fn measure(client: &mut Client, orders: u64, own: u64) -> Result<Vec<Pages>> {
    let lists = [
        ("all orders", "/api/OrdersProxy?".to_owned(), orders),
        ("a user's orders", format!("/api/OrdersProxy?userId={USER}&"), own),
        ("a user's transactions", format!("/api/PaymentsProxy/{USER}/transactions?"), own),
    ];
    let mut all = Vec::new();
    for (name, path, rows) in lists {
        let (mut page, mut cursor, mut depths) = (0, String::new(), Vec::new());
        for depth in DEPTHS.into_iter().filter(|depth| depth * LIMIT <= rows) {
            let mut at = format!("{path}limit={LIMIT}{cursor}");
            while page + 1 < depth {
                let answered = client.get(&at).await?.expect(200)?;
                let next = answered.header("x-next-cursor").ok_or_else(|| format!("{name} ends after {page} pages"))?;
                cursor = format!("&cursor={next}");
                at = format!("{path}limit={LIMIT}{cursor}");
                page += 1;
            }
            depths.push((depth, at));
        }
        // In turns: a page takes a fifth of a millisecond, and how long a wake-up takes changes from one second to the next.
        let (mut all_millis, mut ratios) = (vec![Vec::new(); depths.len()], Vec::new());
        for _ in 0..ROUNDS {
            let mut medians = Vec::new();
            for ((_, at), all_millis) in depths.iter().zip(&mut all_millis) {
                let millis = asked(client, at).await?;
                medians.push(Latency::of_millis(millis.clone()).p50);
                all_millis.extend(millis);
            }
            if let [first, .., last] = medians[..] {
                ratios.push(last / first);
            }
        }
        let depths = depths.iter().zip(all_millis).map(|((depth, _), millis)| (*depth, Latency::of_millis(millis))).collect();
        all.push(Pages { name: name.to_owned(), depths, ratios });
    }
    Ok(all)
}

impl Pages {
    /// The deepest page's time over the first one's.
    pub fn ratio(&self) -> Option<Spread> {
        (!self.ratios.is_empty()).then(|| Spread::of(self.ratios.iter().copied()))
    }
}

/// Times in milliseconds.
async fn asked(client: &mut Client, at: &str) -> Result<Vec<f64>> {
    let mut millis = Vec::with_capacity(ASKED);
    for _ in 0..ASKED {
        let since = Instant::now();
        client.get(at).await?.expect(200)?;
        millis.push(since.elapsed().as_secs_f64() * 1e3);
    }
    Ok(millis)
}
