//! Names with several addresses, as containers of one service have: each address is a replica of its own.
//!
//! A name is looked up every second. Where it has one address only, that is looked up again for each connection, so that a service
//! which moved is found at once; several are chosen from, checked and ejected one by one, as if each had been configured.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::http::uri::Authority;
use futures::future::join_all;

use super::replica::host_and_port;
use super::{Replica, Replicas};
use crate::shutdown::Shutdown;

/// Between two lookups of a name.
const INTERVAL: Duration = Duration::from_secs(1);
/// Of one name; further ones are not asked.
const ADDRESSES_MAX: usize = 64;

/// By the system's resolver, which bounds itself. Never two at a time for a name: each holds a thread.
pub async fn lookup(name: Authority) -> io::Result<Vec<SocketAddr>> {
    Ok(tokio::net::lookup_host(host_and_port(&name)).await?.collect())
}

/// Keeps the replicas as their names say, until `stop`.
pub async fn follow<F>(replicas: &Replicas, lookup: impl Fn(Authority) -> F, stop: &Shutdown)
where
    F: Future<Output = io::Result<Vec<SocketAddr>>>,
{
    let is_name = |name: &Authority| host_and_port(name).0.parse::<std::net::IpAddr>().is_err();
    let names = replicas.names.iter().enumerate().filter(|(_, name)| is_name(name));
    let lookup = &lookup;
    join_all(names.map(|(index, name)| async move {
        loop {
            tokio::select! {
                found = lookup(name.clone()) => replicas.lead(index, found),
                () = stop.stopped() => return,
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = stop.stopped() => return,
            }
        }
    }))
    .await;
}

impl Replicas {
    /// The name at `index` leads to what was `found`. Where nothing was, what is known of it stays while any of it is well: the
    /// resolver may be what is away.
    fn lead(&self, index: usize, found: io::Result<Vec<SocketAddr>>) {
        let (name, now_ms) = (&self.names[index], self.now_ms());
        let mine = |replica: &&Arc<Replica>| replica.name() == index;
        let addresses = match found {
            Ok(found) => several(found),
            Err(error) => {
                tracing::debug!(%name, %error, "a service's name cannot be looked up");
                if self.known.borrow().iter().filter(mine).any(|replica| replica.is_well(now_ms)) {
                    return;
                }
                Vec::new()
            }
        };
        self.known.send_if_modified(|known| {
            let wanted: Vec<_> = if addresses.is_empty() { vec![None] } else { addresses.iter().copied().map(Some).collect() };
            let (mut stay, leave): (Vec<_>, Vec<_>) =
                known.iter().cloned().partition(|replica| replica.name() != index || wanted.contains(&replica.address()));
            let has: Vec<_> = stay.iter().filter(mine).map(|replica| replica.address()).collect();
            let come = wanted.into_iter().filter(|address| !has.contains(address)).map(|address| match address {
                Some(address) => Replica::at(index, name, address, now_ms),
                None => Replica::named(index, name),
            });
            stay.extend(come.map(Arc::new));
            if leave.is_empty() && stay.len() == known.len() {
                return false;
            }
            leave.iter().for_each(|replica| replica.leave());
            tracing::info!(%name, ?addresses, "a service's name leads to other addresses");
            *known = stay;
            true
        });
    }
}

/// The addresses to tell apart: those of one family, for a machine that has both is one replica and not two; none where there is one.
fn several(mut found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    found.sort_unstable();
    found.dedup();
    let (mut v4, mut v6): (Vec<_>, Vec<_>) = found.into_iter().partition(SocketAddr::is_ipv4);
    let chosen = if v4.len() > 1 { &mut v4 } else { &mut v6 };
    if chosen.len() < 2 {
        chosen.clear();
    }
    chosen.truncate(ADDRESSES_MAX);
    std::mem::take(chosen)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    use actix_web::http::Method;
    use bytes::Bytes;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::Seen;
    use super::*;
    use crate::gateway::upstream::{AnswerBody, Client, Kind, Outgoing};

    const BOUND: Duration = Duration::from_secs(10);

    fn addresses(of: &[&str]) -> Vec<SocketAddr> {
        of.iter().map(|address| address.parse().unwrap()).collect()
    }

    fn one(url: &str) -> Replicas {
        Replicas::new(&[url.to_owned()]).unwrap()
    }

    fn known(replicas: &Replicas) -> Vec<Option<SocketAddr>> {
        replicas.known.borrow().iter().map(|replica| replica.address()).collect()
    }

    #[test]
    fn addresses_of_one_family_count_and_one_alone_is_the_name() {
        let (a, b) = ("10.0.0.1:80", "10.0.0.2:80");
        let (c, d) = ("[fd00::1]:80", "[fd00::2]:80");
        assert_eq!(several(addresses(&[b, d, a, c, a])), addresses(&[a, b]));
        assert_eq!(several(addresses(&[d, a, c])), addresses(&[c, d]));
        for few in [&[][..], &[a][..], &[a, c][..]] {
            assert_eq!(several(addresses(few)), []);
        }
        let many = (0..200).map(|port| SocketAddr::from(([10, 0, 0, 1], port))).collect();
        assert_eq!(several(many).len(), ADDRESSES_MAX);
    }

    #[test]
    fn replicas_come_and_go_with_their_addresses_and_the_rest_stay_who_they_are() {
        let replicas = Replicas::new(&["http://orders:80".into(), "http://10.9.9.9:80".into()]).unwrap();
        let other = Some(replicas.known.borrow()[1].id());
        let id = |address: Option<&str>| {
            let address = address.map(|address| address.parse().unwrap());
            replicas.known.borrow().iter().find(|replica| replica.address() == address).map(|replica| replica.id())
        };
        let lead = |to: &[&str]| replicas.lead(0, Ok(addresses(to)));
        lead(&["10.0.0.1:80"]);
        assert_eq!(known(&replicas), [None, None], "one address is the name itself");
        lead(&["10.0.0.1:80", "10.0.0.2:80"]);
        let second = id(Some("10.0.0.2:80")).unwrap();
        let picked =
            std::iter::from_fn(|| replicas.pick(&[])).find(|picked| picked.replica.base() == "http://10.0.0.1:80").unwrap();
        assert_eq!(picked.replica.authority(), "orders:80", "it is asked by its name");
        lead(&["10.0.0.3:80", "10.0.0.2:80"]);
        assert_eq!(id(Some("10.0.0.2:80")), Some(second), "who stays is not met anew");
        assert!(id(Some("10.0.0.1:80")).is_none() && picked.replica.is_gone());
        assert_eq!((picked.replica.in_flight(), replicas.len()), (1, 3), "what is under way there goes on");
        lead(&["10.0.0.2:80"]);
        assert_eq!((known(&replicas), id(None)), (vec![None, None], other));
    }

    #[test]
    fn while_nothing_can_be_looked_up_what_is_well_is_kept_and_nothing_else() {
        let replicas = one("http://orders:80");
        let away = || Err(io::Error::other("the resolver is away"));
        replicas.lead(0, away());
        assert_eq!(known(&replicas), [None]);
        replicas.lead(0, Ok(addresses(&["10.0.0.1:80", "10.0.0.2:80"])));
        let each = replicas.known.borrow().clone();
        replicas.see(&each[0], Seen::CheckMissed);
        replicas.lead(0, away());
        assert_eq!(replicas.len(), 2);
        replicas.see(&each[1], Seen::Refused);
        replicas.lead(0, away());
        assert_eq!(known(&replicas), [None], "they are refused at once then, and not after each was waited for");
    }

    /// Answers each request with its own address, or by closing.
    async fn serve(listener: TcpListener, count: &AtomicUsize, breaks: bool) {
        let own = listener.local_addr().unwrap().to_string();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") && stream.read_buf(&mut request).await.unwrap() > 0 {}
            if request.starts_with(b"GET /health") {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
                continue;
            }
            assert!(String::from_utf8_lossy(&request).contains("host: orders.example:"));
            count.fetch_add(1, Ordering::Relaxed);
            if !breaks {
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{own}", own.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        }
    }

    /// Listeners at one port of two addresses of this machine.
    async fn two() -> [TcpListener; 2] {
        loop {
            let first = TcpListener::bind("127.0.0.2:0").await.unwrap();
            let port = first.local_addr().unwrap().port();
            if let Ok(second) = TcpListener::bind(("127.0.0.3", port)).await {
                return [first, second];
            }
        }
    }

    async fn ask(client: &Client, replicas: &Replicas) -> Option<String> {
        let target = "/".parse().unwrap();
        let (body, wait) = (Bytes::new(), Duration::ZERO);
        let outgoing = Outgoing { method: Method::GET, target, headers: &|_, _| {}, body, kind: Kind::Plain, wait, again: false };
        match client.send(replicas, &outgoing, Instant::now() + BOUND).await.ok()?.body {
            AnswerBody::Whole(body) => Some(String::from_utf8(body.to_vec()).unwrap()),
            AnswerBody::Stream { .. } => None,
        }
    }

    async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
        let deadline = Instant::now() + BOUND;
        while !is_so().await {
            assert!(Instant::now() < deadline, "not within {BOUND:?}: {what}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[actix_web::test]
    async fn what_breaks_at_one_address_of_a_name_is_asked_at_another() {
        let [well, broken] = two().await;
        let at = [&well, &broken].map(|listener| listener.local_addr().unwrap());
        let replicas = one(&format!("http://orders.example:{}", at[0].port()));
        let (stop, client) = (Shutdown::new(), Client::start());
        let counts = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let lookup = |_| std::future::ready(Ok(at.to_vec()));
        let asking = async {
            until("both are known", async || replicas.len() == 2).await;
            for _ in 0..50 {
                assert_eq!(ask(&client, &replicas).await, Some(at[0].to_string()));
            }
            stop.stop();
        };
        let followed = futures::future::join(follow(&replicas, lookup, &stop), asking);
        tokio::select! {
            _ = followed => {}
            () = serve(well, &counts[0], false) => unreachable!("it serves for ever"),
            () = serve(broken, &counts[1], true) => unreachable!("it serves for ever"),
        }
        let counts = counts.map(AtomicUsize::into_inner);
        assert_eq!(counts[0], 50);
        assert!(counts[1] > 0, "the broken one was never asked");
    }

    #[actix_web::test]
    async fn a_new_address_is_checked_and_asked_and_one_that_is_gone_is_not() {
        let [first, second] = two().await;
        let at = [&first, &second].map(|listener| listener.local_addr().unwrap());
        let nobody: SocketAddr = format!("127.0.0.4:{}", at[0].port()).parse().unwrap();
        let replicas = one(&format!("http://orders.example:{}", at[0].port()));
        let (stop, client) = (Shutdown::new(), Client::start());
        let counts = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let found = Mutex::new(vec![at[0], nobody]);
        let lookup = |_| std::future::ready(Ok(found.lock().unwrap().clone()));
        let is_ejected = |address: SocketAddr| {
            let known = replicas.known.borrow();
            known.iter().any(|replica| replica.address() == Some(address) && replica.health().is_ejected(replicas.now_ms()))
        };
        let asking = async {
            until("a check misses whoever is not there", async || is_ejected(nobody)).await;
            *found.lock().unwrap() = vec![at[0], at[1]];
            until("the new one answers", async || ask(&client, &replicas).await == Some(at[1].to_string())).await;
            *found.lock().unwrap() = vec![nobody, at[1]];
            until("the first is gone", async || !known(&replicas).contains(&Some(at[0]))).await;
            for _ in 0..20 {
                assert_eq!(ask(&client, &replicas).await, Some(at[1].to_string()));
            }
            stop.stop();
        };
        let watched =
            futures::future::join3(follow(&replicas, lookup, &stop), super::super::checks::watch(&replicas, &stop), asking);
        tokio::select! {
            _ = watched => {}
            () = serve(first, &counts[0], false) => unreachable!("it serves for ever"),
            () = serve(second, &counts[1], false) => unreachable!("it serves for ever"),
        }
        assert!(counts.map(AtomicUsize::into_inner).iter().all(|count| *count > 0));
    }
}
