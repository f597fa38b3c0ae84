//! Payments' own statements over its own schema, without a broker: batches made in memory, committed through the consumer's inbox.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::Utc;
use shopd::config::Config;
use shopd::contracts::{Envelope, ORDER_PAYMENT_REQUESTS, PaymentRequested};
use shopd::db::Notifier;
use shopd::messaging::consumer::{Batch, Inbox, Move, Owned};
use shopd::messaging::log::partitioner::partition_of;
use shopd::messaging::{Delivery, PgInbox, Position, Received};
use shopd::money::Amount;
use shopd::payments::{Known, OnOrder};
use shopd::trace::TraceContext;
use shopd::user_id::UserId;
use uuid::Uuid;

use super::super::figures::Rate;
use super::super::rig::{Cpu, Shop};
use super::super::{Bench, Result, machine};

/// Decisions a second of commits alone, and their CPU: Postgres', and this process's as `bench`.
pub async fn decisions(bench: &Bench, count: usize, accounts: usize) -> Result<Rate> {
    let mut shop = Shop::open(&bench.servers, &["payments"]).await?;
    shop.accounts(accounts).await?;
    shop.stop("payments").await?;
    bench.servers.checkpoint().await?;

    let config = Config::default();
    let handler = OnOrder::new(Notifier::local([]), Known::default());
    let inbox = PgInbox::new(shop.batches_of_payments()?, ORDER_PAYMENT_REQUESTS, "bench".into(), &config.consumer, handler);
    inbox.ensure(config.kafka.partitions).await?;
    let mut owned = inbox.acquire(config.kafka.partitions, config.kafka.partitions as usize).await?;
    owned.sort_by_key(|one| one.partition);

    let (mut time, mut cpu, mut done) = (Duration::ZERO, (Duration::ZERO, Duration::ZERO), 0);
    while done < count {
        let size = config.consumer.batch_records_max.min(count - done);
        let batch = Arc::new(batch(&mut owned, done, size, accounts)?);
        let (server, own, since) = (used_by_postgres(bench), used_here(), Instant::now());
        inbox.commit(&batch).await?;
        time += since.elapsed();
        cpu.1 += used_here().saturating_sub(own);
        cpu.0 += used_by_postgres(bench).saturating_sub(server);
        done += size;
    }
    let mut spent = Cpu::default();
    spent.add("postgres", 0, cpu.0);
    spent.add("bench", 0, cpu.1);
    let rate = Rate::new(count as f64 / time.as_secs_f64(), count as f64, &Cpu::default(), &spent);

    drop(inbox);
    let paid = shop.ask(&shop.payments_database(), "select count(*) from payment where status = 'Finished'").await?;
    if paid != count as i64 {
        return Err(format!("of {count} bare decisions {paid} are there").into());
    }
    shop.close().await?;
    Ok(rate)
}

fn used_by_postgres(bench: &Bench) -> Duration {
    bench.servers.cpu().since(&Cpu::default()).get("postgres").copied().unwrap_or_default()
}

fn used_here() -> Duration {
    machine::cpu_alone(std::process::id())
}

/// Requests `from..from + size`, as the consumer would have assembled them: by partition, in log order within it.
fn batch(owned: &mut [Owned], from: usize, size: usize, accounts: usize) -> Result<Batch<PaymentRequested>> {
    let moves: Vec<Move> = owned
        .iter()
        .map(|one| Move { partition: one.partition, from: one.next_offset, to: one.next_offset, epoch: one.epoch })
        .collect();
    let mut batch = Batch { moves, received: Vec::with_capacity(size), poisoned: Vec::new() };
    let (topic, now): (Arc<str>, _) = (ORDER_PAYMENT_REQUESTS.into(), Utc::now());
    let partitions = owned.len() as i32;
    for n in from..from + size {
        let user = format!("u{}", n % accounts);
        let partition = partition_of(user.as_bytes(), partitions);
        let step = batch.moves.iter_mut().find(|m| m.partition == partition).ok_or("a partition is not owned")?;
        let event = PaymentRequested {
            order_id: Uuid::now_v7(),
            user_id: UserId::new(user.as_str())?,
            amount: Amount::from_minor(1).ok_or("an amount")?,
            description: Some("a small book".into()),
            timestamp: now,
        };
        let (trace, event_id, request_id) = (TraceContext::new_root(), Uuid::now_v7(), Uuid::now_v7());
        let envelope = Envelope {
            event_id: Some(event_id.to_string()),
            source: Some(shopd::orders::SOURCE.into()),
            time: Some(now),
            trace: Some(trace),
            request_id: Some(request_id.to_string()),
        };
        let delivery = Delivery {
            position: Position { topic: topic.clone(), partition, offset: step.to },
            key: Some(Bytes::from(user)),
            value: Some(Bytes::from(event.encode())),
            headers: Default::default(),
            envelope,
            trace,
            published_at: now,
            received_at: now,
        };
        step.to += 1;
        batch.received.push(Received { event, delivery });
    }
    batch.received.sort_by_key(|one| one.delivery.position.partition);
    batch.moves.retain(|m| m.to > m.from);
    for one in owned {
        one.next_offset = batch.moves.iter().find(|m| m.partition == one.partition).map_or(one.next_offset, |m| m.to);
    }
    Ok(batch)
}
