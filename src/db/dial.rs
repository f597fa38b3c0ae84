//! The way to a database's hosts, one after the other, each within its share of the time: one that takes a connection and then says nothing
//! must leave time for the one behind it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rand::seq::SliceRandom;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::Instant;
use tokio_postgres::Config;
use tokio_postgres::config::{Host, LoadBalanceHosts};
use tokio_util::either::Either;

use super::local::LocalStream;

pub(super) type Stream = Either<TcpStream, LocalStream>;

/// Where a URL without one looks.
const PORT: u16 = 5432;
/// So long a host that used up its share of the time is tried behind the others: each new connection would pay for it again.
const LATE_FOR: Duration = Duration::from_secs(30);

/// One of a URL's hosts.
pub(super) struct Place {
    /// What its certificate must be for.
    pub name: String,
    host: Host,
    port: u16,
}

/// One address of a host.
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A URL's hosts, in the order in which they are tried.
pub(super) fn places(config: &Config) -> Vec<Place> {
    let (hosts, addresses, ports) = (config.get_hosts(), config.get_hostaddrs(), config.get_ports());
    let place = |at: usize| {
        let name = match hosts.get(at) {
            Some(Host::Tcp(name)) => name.clone(),
            _ => String::new(),
        };
        // An address that is given is where to go, and the name beside it is what it is called.
        let host = addresses.get(at).map(|address| Host::Tcp(address.to_string())).or_else(|| hosts.get(at).cloned())?;
        Some(Place { name, host, port: ports.get(at).or(ports.first()).copied().unwrap_or(PORT) })
    };
    let mut places: Vec<Place> = (0..hosts.len().max(addresses.len())).filter_map(place).collect();
    if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
        places.shuffle(&mut rand::rng());
    }
    places
}

/// Hosts of a URL, and addresses of a host, that did not let us in within their share of the time, and since when.
#[derive(Debug, Default)]
pub(super) struct Late(Mutex<BTreeMap<Arc<str>, Instant>>);

impl Late {
    pub fn note(&self, name: Arc<str>) {
        let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        late.retain(|_, since| since.elapsed() < LATE_FOR);
        late.insert(name, Instant::now());
    }

    pub fn forget(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Those behind the others; else the order stays.
    pub fn behind<T>(&self, tried: &mut [T], name: impl Fn(&T) -> Arc<str>) {
        let late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tried.sort_by_key(|one| late.get(&name(one)).is_some_and(|since| since.elapsed() < LATE_FOR));
    }
}

impl Place {
    /// Of all of a URL's.
    pub fn key(&self) -> Arc<str> {
        Arc::from(format!("{:?}:{}", self.host, self.port))
    }

    /// # Errors
    /// Where its name is not known.
    pub async fn addresses(&self, config: &Config) -> io::Result<Vec<Address>> {
        match &self.host {
            Host::Tcp(name) => {
                let mut found: Vec<Address> = lookup_host((name.as_str(), self.port)).await?.map(Address::Tcp).collect();
                if found.is_empty() {
                    return Err(io::Error::new(io::ErrorKind::NotFound, format!("{name} has no address")));
                }
                if config.get_load_balance_hosts() == LoadBalanceHosts::Random {
                    found.shuffle(&mut rand::rng());
                }
                Ok(found)
            }
            Host::Unix(folder) => Ok(vec![Address::Unix(folder.join(format!(".s.PGSQL.{}", self.port)))]),
        }
    }
}

impl Address {
    /// For people.
    pub fn name(&self) -> Arc<str> {
        match self {
            Self::Tcp(address) => Arc::from(address.to_string()),
            Self::Unix(path) => Arc::from(path.to_string_lossy()),
        }
    }

    pub fn is_local(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Bounded by the caller. A host that goes without a word is noticed by the kernel's probes, as `config` asks for.
    pub async fn dial(&self, config: &Config) -> io::Result<Stream> {
        let stream = match self {
            Self::Unix(path) => return LocalStream::connect(path).await.map(Either::Right),
            Self::Tcp(address) => TcpStream::connect(address).await?,
        };
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        socket.set_tcp_user_timeout(config.get_tcp_user_timeout().copied())?;
        if config.get_keepalives() {
            let mut probes = TcpKeepalive::new().with_time(config.get_keepalives_idle());
            if let Some(interval) = config.get_keepalives_interval() {
                probes = probes.with_interval(interval);
            }
            if let Some(retries) = config.get_keepalives_retries() {
                probes = probes.with_retries(retries);
            }
            socket.set_tcp_keepalive(&probes)?;
        }
        Ok(Either::Left(stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_host_that_was_late_is_tried_behind_the_others_for_a_while() {
        let config: Config = "postgres://u@a,b,c/d".parse().unwrap();
        let late = Late::default();
        let order = || {
            let mut places = places(&config);
            late.behind(&mut places, Place::key);
            places.into_iter().map(|place| place.name).collect::<String>()
        };
        late.note(places(&config)[0].key());
        assert_eq!(order(), "bca");
        late.note(places(&config)[1].key());
        assert_eq!(order(), "cab");
        late.forget(&places(&config)[0].key());
        assert_eq!(order(), "acb");
        tokio::time::advance(LATE_FOR).await;
        assert_eq!(order(), "abc");
    }

    #[test]
    fn every_host_has_its_own_port_or_the_one_of_all_and_an_address_goes_before_its_name() {
        let found = |url: &str| {
            let config: Config = url.parse().unwrap();
            let text = |place: Place| {
                let host = match place.host {
                    Host::Tcp(host) => host,
                    Host::Unix(folder) => folder.display().to_string(),
                };
                format!("{} {host}:{}", place.name, place.port)
            };
            places(&config).into_iter().map(text).collect::<Vec<_>>()
        };
        assert_eq!(found("postgres://u@a,b:2/d"), ["a a:5432", "b b:2"]);
        assert_eq!(found("postgres://u@a:1/d"), ["a a:1"]);
        assert_eq!(found("postgres://u@%2Ftmp%2Fs/d"), [" /tmp/s:5432"]);
        assert_eq!(found("host=a,b hostaddr=10.0.0.1,10.0.0.2 port=7"), ["a 10.0.0.1:7", "b 10.0.0.2:7"]);
    }
}
