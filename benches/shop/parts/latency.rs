//! Latency on an idle system: one client, POST to `Finished`, beside the commits and the trips over Kafka that it cannot do without.

use std::fmt::Write;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::figures::{Latency, Spread, Target};
use super::super::load::Client;
use super::super::report::Section;
use super::super::rig::{ROLES, Shop};
use super::super::{Bench, Result, step};
use super::SPREAD;
use super::floor::{Floor, Through};

/// Commits and trips in the floor: accepted, decided, ended; the request's way and the result's.
const COMMITS: f64 = 3.0;
const TRIPS: f64 = 2.0;
/// The first ones prepare statements and open connections.
const WARM: usize = 30;
/// Seconds of orders, in a short run and else, before any is measured: a broker compiles what it does for an order that comes alone for about a
/// minute, on a core that others wait for, and that is a start and not an idle system.
const WARM_S: (u64, u64) = (3, 60);

#[derive(Debug, Serialize, Deserialize)]
pub struct Figures {
    /// Seconds of orders before the first one counts.
    #[serde(default)]
    warm_s: u64,
    finished: Latency,
    /// By round, milliseconds.
    p50: Spread,
    commit: Spread,
    trip: Spread,
    /// The same through the client library, which has nothing of ours in it.
    #[serde(default)]
    trip_library: Spread,
}

pub async fn measure(bench: &Bench) -> Result<Figures> {
    let (rounds, samples) = (bench.options.rounds(3, 5), bench.options.orders(60, 400));
    let floors = samples / 4;
    let shop = Shop::open(&bench.servers, &ROLES).await?;
    shop.accounts(SPREAD).await?;
    let mut floor = Floor::open(bench).await?;
    let mut client = shop.client("gateway").await?;
    step("latency: until the broker has compiled what it does for an order alone");
    let (warm, began) = (bench.options.time(WARM_S.0, WARM_S.1), Instant::now());
    while began.elapsed() < warm {
        finished(&mut client, WARM).await?;
    }
    step("latency: one order after the other on an idle system, and the floor");
    for _ in 0..WARM {
        floor.commit().await?;
        floor.trip(Through::Ours).await?;
        floor.trip(Through::Library).await?;
    }
    let (mut all, mut p50, mut commit) = (Vec::new(), Vec::new(), Vec::new());
    let (mut trip, mut trip_library) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (mut commits, mut trips, mut trips_library) = (Vec::new(), Vec::new(), Vec::new());
        for n in 0..floors {
            commits.push(floor.commit().await?);
            pause().await;
            // By turns: the second one finds a broker that has just run.
            let first_ours = n % 2 == 0;
            for ours in [first_ours, !first_ours] {
                let (through, millis) = if ours { (Through::Ours, &mut trips) } else { (Through::Library, &mut trips_library) };
                millis.push(floor.trip(through).await?);
                pause().await;
            }
        }
        commit.push(Latency::of_millis(commits).p50);
        trip.push(Latency::of_millis(trips).p50);
        trip_library.push(Latency::of_millis(trips_library).p50);
        let millis = finished(&mut client, samples).await?;
        p50.push(Latency::of_millis(millis.clone()).p50);
        all.extend(millis);
    }
    floor.close(bench).await?;
    drop(client);
    shop.close().await?;
    let [p50, commit, trip, trip_library] = [p50, commit, trip, trip_library].map(Spread::of);
    Ok(Figures { warm_s: warm.as_secs(), finished: Latency::of_millis(all), p50, commit, trip, trip_library })
}

/// Milliseconds from POST to `Finished`, one after the other, through the gateway.
pub async fn finished(client: &mut Client, samples: usize) -> Result<Vec<f64>> {
    let mut millis = Vec::with_capacity(samples);
    for n in 0..samples {
        let body = format!(r#"{{"userId":"u{}","amount":0.01,"description":"a small book"}}"#, n % SPREAD);
        let since = Instant::now();
        let answered = client.post("/api/OrdersProxy", "Prefer: wait=30\r\n", &body).await?.expect(201)?;
        millis.push(since.elapsed().as_secs_f64() * 1e3);
        if !answered.body.contains(r#""status":"Finished""#) {
            return Err(format!("an order did not finish: {}", answered.body).into());
        }
        pause().await;
    }
    Ok(millis)
}

/// What follows must not come in step with anything of the last.
async fn pause() {
    tokio::time::sleep(Duration::from_micros(fastrand::u64(2_000..7_000))).await;
}

impl Figures {
    /// With the quicker of the two trips, round by round: what makes ours slower must not make the floor higher.
    fn floor(&self) -> Spread {
        let library = self.trip_library.each.iter().copied().chain(std::iter::repeat(f64::INFINITY));
        let trips = self.trip.each.iter().zip(library).map(|(ours, library)| ours.min(library));
        Spread::of(self.commit.each.iter().zip(trips).map(|(commit, trip)| COMMITS * commit + TRIPS * trip))
    }

    pub fn section(&self) -> Result<Section> {
        let mut section = Section { title: "Latency", ..Section::default() };
        let text = &mut section.text;
        writeln!(
            text,
            "One client on an idle system posts one order after the other through the gateway with `Prefer: wait=30`; the answer comes when the order \
is final, and nobody polls. The floor is measured by turns on the same servers: a transaction of one row with `fsync`, {COMMITS} of them, and the way of \
a record from a produce to a waiting reader, {TRIPS} of them: through our client and through the library's (rskafka), each coming first every other time, and the quicker of the two counts. The floor has no HTTP, no wake-up of a relay and no rule in it. Both are measured when \
orders have gone through for {} s: a broker that has just started compiles.\n",
            self.warm_s
        )?;
        writeln!(text, "| | p50 ms | p99 | p99.9 | greatest | samples |\n|---|---|---|---|---|---|")?;
        writeln!(text, "| POST to `Finished` | {} |", self.finished.cells())?;
        let floor = self.floor();
        let ratio = Spread::of(self.p50.each.iter().zip(&floor.each).map(|(ours, floor)| ours / floor));
        writeln!(text, "\n| by round, p50 ms | |\n|---|---|\n| a commit of one row | {} |", self.commit.show(3))?;
        writeln!(text, "| a produce to a waiting reader | {} |", self.trip.show(3))?;
        writeln!(text, "| the same through the library | {} |\n| the floor | {} |", self.trip_library.show(3), floor.show(2))?;
        writeln!(text, "| POST to `Finished` | {} |\n| over the floor | {} |", self.p50.show(2), ratio.show(2))?;
        let tail = self.finished.p99 / self.finished.p50;
        let targets = [
            Target::median_at_most("latency, POST to `Finished` p50 over the floor", 1.5, &ratio, 2, ""),
            Target::at_most("latency, POST to `Finished` p50", 8.0, self.finished.p50, format!("{:.2}", self.finished.p50), " ms"),
            Target::at_most("latency, POST to `Finished` p99 over p50", 3.0, tail, format!("{tail:.2}"), ""),
        ];
        section.targets.extend(targets);
        Ok(section)
    }
}
