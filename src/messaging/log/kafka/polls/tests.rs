//! Against a broker of the test's own, which counts what it is asked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::{Buf, BufMut, Bytes};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::super::encode;
use super::*;
use crate::messaging::log::Record;

const WAIT: Duration = Duration::from_millis(400);
const REQUEST: Duration = Duration::from_millis(600);
/// However busy the machine, whoever was answered has asked again by then.
const GATHER: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(20);

/// Leads every partition of `t`. Answers a fetch when one of its partitions has a record at the offset, or after the time.
#[derive(Clone)]
struct Broker {
    address: String,
    /// How many records each partition has.
    ends: watch::Sender<Vec<i64>>,
    /// The partitions of each request.
    asked: Arc<Mutex<Vec<Vec<i32>>>>,
    /// It reads requests and answers none.
    hangs: Arc<AtomicBool>,
    /// Connections over which it was asked for records.
    connections: Arc<AtomicUsize>,
}

impl Broker {
    async fn start(partitions: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let ends = watch::Sender::new(vec![0; partitions]);
        let broker = Self { address, ends, asked: Arc::default(), hangs: Arc::default(), connections: Arc::default() };
        let serving = broker.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serving.clone().serve(stream));
            }
        });
        broker
    }

    fn polls(&self) -> Arc<LongPolls> {
        self.polls_from(vec![self.address.clone()], REQUEST)
    }

    fn polls_from(&self, bootstrap_servers: Vec<String>, request: Duration) -> Arc<LongPolls> {
        self.polls_with(bootstrap_servers, Times { wait: WAIT, request, gather: GATHER_MAX })
    }

    fn polls_with(&self, bootstrap_servers: Vec<String>, times: Times) -> Arc<LongPolls> {
        let config = KafkaConfig { bootstrap_servers, ..crate::config::Config::default().kafka };
        let dialer = Arc::new(Dialer::new(&config));
        Arc::new(LongPolls::with(Arc::new(Leaders::new(&config.bootstrap_servers, dialer.clone())), dialer, times))
    }

    fn append(&self, partition: usize) {
        self.ends.send_modify(|ends| ends[partition] += 1);
    }

    fn asked(&self) -> Vec<Vec<i32>> {
        self.asked.lock().unwrap().clone()
    }

    async fn serve(self, mut stream: TcpStream) -> Option<()> {
        let mut fetched = false;
        loop {
            let mut request = vec![0; stream.read_u32().await.ok()? as usize];
            stream.read_exact(&mut request).await.ok()?;
            let mut request = Bytes::from(request);
            let (api, _version, correlation) = (request.get_i16(), request.get_i16(), request.get_i32());
            let _client = raw::string(&mut request)?;
            if api != 3 && !std::mem::replace(&mut fetched, true) {
                self.connections.fetch_add(1, Ordering::SeqCst);
            }
            let body = if api == 3 { self.metadata() } else { self.fetch(request).await? };
            let mut answer = Vec::new();
            answer.put_i32(body.len() as i32 + 4);
            answer.put_i32(correlation);
            answer.put_slice(&body);
            stream.write_all(&answer).await.ok()?;
        }
    }

    fn metadata(&self) -> Vec<u8> {
        let (host, port) = self.address.split_once(':').unwrap();
        let partitions = self.ends.borrow().len();
        let mut body = Vec::new();
        body.put_i32(0);
        body.put_i32(1);
        body.put_i32(7);
        raw::put_string(&mut body, host);
        body.put_i32(port.parse().unwrap());
        body.put_i16(-1); // no rack
        body.put_i16(-1); // no cluster
        body.put_i32(7);
        body.put_i32(1);
        body.put_i16(0);
        raw::put_string(&mut body, "t");
        body.put_u8(0);
        body.put_i32(partitions as i32);
        for partition in 0..partitions as i32 {
            body.put_i16(0);
            body.put_i32(partition);
            body.put_i32(7);
            body.put_i32(0);
            body.put_i32(0);
        }
        body
    }

    async fn fetch(&self, mut request: Bytes) -> Option<Vec<u8>> {
        let (_replica, wait) = (request.get_i32(), request.get_i32());
        request.advance(4 + 4 + 1 + 4);
        let topic = raw::string(&mut request)?;
        let places: Vec<(i32, i64)> = (0..request.get_i32())
            .map(|_| {
                let place = (request.get_i32(), request.get_i64());
                request.advance(4);
                place
            })
            .collect();
        self.asked.lock().unwrap().push(places.iter().map(|(partition, _)| *partition).collect());
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let mut ends = self.ends.subscribe();
        let there = |ends: &Vec<i64>| places.iter().any(|(partition, from)| *from < ends[*partition as usize]);
        let _ = timeout(Duration::from_millis(wait as u64), ends.wait_for(there)).await;
        let ends = self.ends.borrow().clone();
        let mut body = Vec::new();
        body.put_i32(0);
        body.put_i32(1);
        raw::put_string(&mut body, &topic);
        body.put_i32(places.len() as i32);
        for (partition, from) in places {
            let end = ends[partition as usize];
            body.put_i32(partition);
            body.put_i16(0);
            body.put_i64(end);
            body.put_i64(end);
            body.put_i32(0);
            let batches: Vec<u8> = (from..end).flat_map(|offset| stored(offset, partition)).collect();
            body.put_i32(batches.len() as i32);
            body.put_slice(&batches);
        }
        Some(body)
    }
}

fn stored(offset: i64, partition: i32) -> Vec<u8> {
    let value = Some(Bytes::from(partition.to_string()));
    let record = Record { topic: "t".into(), key: None, value, headers: Vec::new(), timestamp: chrono::DateTime::UNIX_EPOCH };
    let mut batch = Vec::new();
    encode::batch(&mut batch, &mut Vec::new(), [&record].into_iter(), false).unwrap();
    batch[..8].copy_from_slice(&offset.to_be_bytes());
    batch
}

fn place(partition: i32, from: i64) -> Place {
    Place { topic: "t".into(), partition, from, bytes_max: 1_000 }
}

/// Reads its partition for ever, and tells how far it came.
fn follow(polls: &Arc<LongPolls>, partition: i32, at: watch::Sender<i64>) {
    let polls = polls.clone();
    tokio::spawn(async move {
        let mut from = 0;
        loop {
            let fetched = polls.fetch(place(partition, from)).await.unwrap().expect("plain records");
            for record in &fetched.records {
                assert_eq!(record.value.as_deref(), Some(partition.to_string().as_bytes()));
            }
            from = fetched.next_offset;
            at.send_replace(from);
        }
    });
}

async fn until(what: impl Fn() -> bool) {
    let waited = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waited).await.expect("in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_is_waited_for_is_asked_for_together_and_each_gets_its_own_records() {
    let broker = Broker::start(12).await;
    let polls = broker.polls_with(vec![broker.address.clone()], Times { wait: WAIT, request: PATIENCE, gather: GATHER });
    let at: Vec<watch::Sender<i64>> = (0..12).map(|_| watch::Sender::new(-1)).collect();
    for (partition, at) in at.iter().enumerate() {
        follow(&polls, partition as i32, at.clone());
    }
    // However they began: when nothing came for as long as the broker may wait they are together.
    until(|| broker.asked().last().is_some_and(|last| last.len() == 12)).await;
    let before = broker.asked().len();
    let rounds = 30;
    for round in 0..rounds {
        for partition in [round % 12, (round * 5 + 1) % 12] {
            broker.append(partition);
        }
        let ends = broker.ends.borrow().clone();
        until(|| at.iter().zip(&ends).all(|(at, end)| *at.borrow() >= *end)).await;
    }
    let requests = broker.asked()[before..].to_vec();
    assert!(requests.len() <= rounds * 4, "{} requests for {rounds} rounds: {requests:?}", requests.len());
    let asked: usize = requests.iter().map(Vec::len).sum();
    assert!(asked >= requests.len() * 4, "{requests:?}");
    // Idle again: one request an interval.
    until(|| broker.asked().last().is_some_and(|last| last.len() == 12)).await;
    let before = broker.asked().len();
    tokio::time::sleep(WAIT * 4).await;
    assert!(broker.asked().len() - before <= 6, "{:?}", &broker.asked()[before..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_comes_later_does_not_wait_for_those_who_are_waiting() {
    let broker = Broker::start(2).await;
    let wait = Duration::from_secs(4);
    let polls = broker.polls_with(vec![broker.address.clone()], Times { wait, request: PATIENCE, gather: GATHER_MAX });
    let waits = tokio::spawn({
        let polls = polls.clone();
        async move { polls.fetch(place(0, 0)).await }
    });
    until(|| !broker.asked().is_empty()).await;
    broker.append(1);
    let began = Instant::now();
    let fetched = timeout(PATIENCE, polls.fetch(place(1, 0))).await.unwrap().unwrap().unwrap();
    assert_eq!((fetched.records.len(), fetched.next_offset), (1, 1));
    assert!(began.elapsed() < wait / 2, "{:?}", began.elapsed());
    let nothing = timeout(PATIENCE, waits).await.unwrap().unwrap().unwrap().unwrap();
    assert_eq!((nothing.records.len(), nothing.next_offset), (0, 0));
}

/// Red where fewer connections are kept than there are requests on their way: then some make a new one each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_several_requests_on_their_way_has_a_connection_and_the_next_ones_use_them_again() {
    let broker = Broker::start(5).await;
    let polls =
        broker.polls_with(vec![broker.address.clone()], Times { wait: PATIENCE, request: PATIENCE, gather: Duration::ZERO });
    for round in 0..4 {
        let mut waits = Vec::new();
        for partition in 0..5 {
            let asked = broker.asked().len();
            let polls = polls.clone();
            waits.push(tokio::spawn(async move { polls.fetch(place(partition, round)).await.unwrap().unwrap().records.len() }));
            until(|| broker.asked().len() > asked).await;
        }
        (0..5).for_each(|partition| broker.append(partition));
        for wait in waits {
            assert_eq!(timeout(PATIENCE, wait).await.unwrap().unwrap(), 1);
        }
    }
    assert_eq!((broker.asked().len(), broker.connections.load(Ordering::SeqCst)), (20, 5));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_hangs_or_is_gone_is_said_to_be_in_time() {
    let broker = Broker::start(1).await;
    let polls = broker.polls();
    broker.hangs.store(true, Ordering::SeqCst);
    let began = Instant::now();
    let late = timeout(PATIENCE, polls.fetch(place(0, 0))).await.unwrap();
    assert!(late.unwrap_err().is_transient());
    assert!(began.elapsed() >= WAIT + REQUEST);
    // Nobody listens there: the client library finds out what is wrong.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = Broker { address: listener.local_addr().unwrap().to_string(), ..broker };
    drop(listener);
    assert!(timeout(PATIENCE, gone.polls().fetch(place(0, 0))).await.unwrap().unwrap().is_none());
}

/// Red where the first one may use up all of the time: then nobody finds the others, though they lead everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_says_nothing_leaves_time_for_those_behind_it_and_is_not_asked_first_again() {
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (broker, address) = (Broker::start(1).await, mute.local_addr().unwrap().to_string());
    let connected = Arc::<AtomicUsize>::default();
    let counted = connected.clone();
    tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = mute.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            kept.push(stream);
        }
    });
    let polls = broker.polls_from(vec![address, broker.address.clone()], Duration::from_secs(4));
    for offset in [0, 1] {
        broker.append(0);
        let fetched = timeout(PATIENCE, polls.fetch(place(0, offset))).await.expect("in time").unwrap().unwrap();
        assert_eq!(fetched.records.len(), 1);
        assert_eq!(connected.load(Ordering::SeqCst), 1);
        polls.leaders.forget("t");
    }
}

fn ask(topic: &str, partition: i32) -> (Ask, oneshot::Receiver<Answer>) {
    let (to, answer) = oneshot::channel();
    let place = Place { topic: topic.into(), partition, from: 5, bytes_max: 100 };
    (Ask { place, answer: to }, answer)
}

fn part(topic: &str, partition: i32, end_offset: i64, bytes: usize) -> Part {
    let batches = Bytes::from(vec![0; bytes]);
    Part { topic: topic.into(), partition, error: 0, end_offset, aborted: Vec::new(), batches }
}

fn names(asks: &[Ask]) -> Vec<(&str, i32)> {
    asks.iter().map(|ask| (ask.place.topic.as_str(), ask.place.partition)).collect()
}

#[test]
fn a_request_asks_for_each_partition_once_and_for_nothing_that_nobody_waits_for() {
    let (asks, mut answers): (Vec<Ask>, Vec<_>) =
        [("b", 1), ("a", 2), ("b", 0), ("b", 1), ("a", 0)].map(|(t, p)| ask(t, p)).into_iter().unzip();
    answers.remove(1).close();
    let mut waiting = asks;
    assert_eq!(names(&together(&mut waiting)), [("a", 0), ("b", 1), ("b", 0)]);
    assert_eq!(names(&waiting), [("b", 1)]);
}

#[test]
fn whoever_has_no_part_of_an_answer_waits_on_until_the_time_is_over() {
    let hand = |parts: Vec<Part>, left: Duration| {
        let (asks, answers): (Vec<Ask>, Vec<_>) = (0..3).map(|n| ask("t", n)).unzip();
        let (mut waiting, mut answered) = (Vec::new(), Vec::new());
        hand_out(asks, parts, Instant::now() + left, &mut waiting, &mut answered);
        let waiting = names(&waiting).into_iter().map(|(_, partition)| partition).collect::<Vec<_>>();
        let told: Vec<_> = answers.into_iter().map(|mut answer| answer.try_recv().ok()).collect();
        (waiting, answered.into_iter().map(|(_, partition)| partition).collect::<Vec<_>>(), told)
    };
    let soon = Duration::from_secs(9);
    let (waiting, answered, told) = hand(vec![part("t", 1, 5, 0), part("t", 0, 9, 80)], soon);
    assert_eq!((waiting, answered), (vec![1], vec![0, 2]));
    assert!(matches!(told[..], [Some(Answer::Part(_)), None, Some(Answer::Unclear)]));
    let (waiting, answered, told) = hand((0..3).map(|n| part("t", n, 5, 0)).collect(), Duration::ZERO);
    assert_eq!((waiting, answered), (vec![], vec![0, 1, 2]));
    assert!(told.iter().all(|answer| matches!(answer, Some(Answer::Nothing))));
    // There is more than was sent: a hole for somebody to look at, or no room in the answer.
    let (waiting, answered, _) = hand(vec![part("t", 0, 5, 0), part("t", 1, 9, 0), part("t", 2, 9, 80)], soon);
    assert_eq!((waiting, answered), (vec![0], vec![1, 2]));
    let (waiting, answered, _) = hand(vec![part("t", 0, 9, 16 << 20), part("t", 1, 9, 0), part("t", 2, 9, 0)], soon);
    assert_eq!((waiting, answered), (vec![1, 2], vec![0]));
}

#[tokio::test]
async fn a_broker_that_is_asked_nothing_any_more_leaves_neither_a_task_nor_a_connection() {
    let broker = Broker::start(1).await;
    let polls = broker.polls();
    broker.append(0);
    let fetch = || async { polls.fetch(place(0, 0)).await.unwrap().expect("an answer").records.len() };
    assert_eq!(fetch().await, 1);
    let asks = polls.brokers.lock().unwrap()[&broker.address].clone();
    tokio::time::pause();
    tokio::time::advance(IDLE_MAX / 2).await;
    assert!(!asks.is_closed());
    // Polled once more, its time begins anew: what matters is that it ends.
    tokio::time::advance(IDLE_MAX).await;
    tokio::time::resume();
    timeout(PATIENCE, asks.closed()).await.expect("it ends");
    assert_eq!(fetch().await, 1, "and is made again when it is asked");
}
