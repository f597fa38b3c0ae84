//! How often one client may ask for one route: token buckets of the library's, `RateLimit-*` headers, 429 with `Retry-After`.
//!
//! A client is an address: the connection's, or, behind proxies that are trusted, what they say (`X-Forwarded-For`, the last entry
//! that is none of theirs). Of IPv6 the /64 counts, because one host has all of it.

use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use actix_web::http::Method;
use actix_web::http::header::{HeaderMap, HeaderValue};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use ipnet::IpNet;

use super::routes;
use crate::config::RateLimit;
use crate::http::{Code, Problem};

/// Clients remembered of one route; beyond them those of one network (IPv4 /16, IPv6 /32) share a bucket.
const CLIENTS_MAX: usize = 100_000;
/// How often it is looked how many there are.
const LOOK_EVERY: u32 = 1_000;

pub struct Limits {
    routes: Vec<Route>,
    trusted: Vec<IpNet>,
}

struct Route {
    method: Method,
    pattern: &'static str,
    count: u32,
    policy: HeaderValue,
    buckets: RateLimiter<IpAddr, DashMapStateStore<IpAddr>, DefaultClock, StateInformationMiddleware>,
    asked: AtomicU32,
    is_crowded: AtomicBool,
}

/// What is left to a client, for its answer's headers.
#[derive(Clone, Debug)]
pub struct Left {
    limit: u32,
    remaining: u32,
    reset_s: u64,
    policy: HeaderValue,
}

impl Left {
    /// `RateLimit-Limit`, `-Remaining`, `-Reset` (seconds) and `-Policy`.
    pub fn headers(&self) -> [(&'static str, HeaderValue); 4] {
        [
            ("ratelimit-limit", self.limit.into()),
            ("ratelimit-remaining", self.remaining.into()),
            ("ratelimit-reset", self.reset_s.into()),
            ("ratelimit-policy", self.policy.clone()),
        ]
    }
}

impl Limits {
    /// # Errors
    /// A limit for a route that there is not.
    pub fn new(limits: &[RateLimit], trusted: &[IpNet]) -> Result<Self, String> {
        let mut routes = Vec::new();
        for (method, pattern) in routes::limited() {
            let own = |limit: &&RateLimit| is_route(&limit.route, &method, pattern);
            let every = |limit: &&RateLimit| limit.route == "*";
            if let Some(limit) = limits.iter().find(own).or_else(|| limits.iter().find(every)) {
                routes.push(Route::new(method, pattern, limit.count, limit.window));
            }
        }
        let unknown = |limit: &&RateLimit| {
            limit.route != "*" && !routes::limited().any(|(method, pattern)| is_route(&limit.route, &method, pattern))
        };
        match limits.iter().find(unknown) {
            Some(limit) => Err(format!("there is no route {}", limit.route)),
            None => Ok(Self { routes, trusted: trusted.to_vec() }),
        }
    }

    pub fn is_any(&self) -> bool {
        !self.routes.is_empty()
    }

    /// Counts a request; `None` where its route has no limit.
    ///
    /// # Errors
    /// `rate_limited`.
    pub fn check(
        &self,
        method: &Method,
        pattern: &'static str,
        peer: Option<IpAddr>,
        headers: &HeaderMap,
    ) -> Result<Option<Left>, Problem> {
        let asked = if method == Method::HEAD { &Method::GET } else { method };
        let Some(route) = self.routes.iter().find(|route| route.pattern == pattern && route.method == *asked) else {
            return Ok(None);
        };
        route.check(client(peer, headers, &self.trusted)).map(Some)
    }
}

/// As the document writes it, whatever its parameters are called.
fn is_route(route: &str, method: &Method, pattern: &str) -> bool {
    let Some((name, path)) = route.split_once(' ') else { return false };
    let is_parameter = |segment: &str| segment.starts_with('{') && segment.ends_with('}');
    let same = |(a, b): (&str, &str)| a == b || (is_parameter(a) && is_parameter(b));
    name.eq_ignore_ascii_case(method.as_str())
        && path.split('/').count() == pattern.split('/').count()
        && path.split('/').zip(pattern.split('/')).all(same)
}

impl Route {
    fn new(method: Method, pattern: &'static str, count: NonZeroU32, window: Duration) -> Self {
        // A bucket of `count` that is refilled evenly over the window. Counts are bounded, so no interval is zero.
        let interval = (window / count.get()).max(Duration::from_nanos(1));
        let quota = Quota::with_period(interval).unwrap_or(Quota::per_second(count)).allow_burst(count);
        let policy = HeaderValue::from_str(&format!("{count};w={}", window.as_secs()));
        Self {
            method,
            pattern,
            count: count.get(),
            policy: policy.unwrap_or(HeaderValue::from_static("")),
            buckets: RateLimiter::dashmap(quota).with_middleware(),
            asked: AtomicU32::new(0),
            is_crowded: AtomicBool::new(false),
        }
    }

    fn check(&self, client: IpAddr) -> Result<Left, Problem> {
        let client = if self.is_crowded() { network(client, 16, 32) } else { client };
        let left = |remaining: u32, wait: Duration| Left {
            limit: self.count,
            remaining,
            reset_s: wait.as_secs() + u64::from(wait.subsec_nanos() > 0),
            policy: self.policy.clone(),
        };
        match self.buckets.check_key(&client) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                let missing = self.count.saturating_sub(remaining);
                Ok(left(remaining, state.quota().replenish_interval() * missing))
            }
            Err(not_until) => {
                metrics::counter!("shopd_gateway_rate_limited_total", "route" => self.pattern).increment(1);
                let left = left(0, not_until.wait_time_from(DefaultClock::default().now()));
                let mut problem = Problem::new(Code::RateLimited, "Too many requests; come back after the time in Retry-After.");
                problem.retry_after_s = Some(u32::try_from(left.reset_s).unwrap_or(u32::MAX).max(1));
                problem.headers.extend(left.headers());
                Err(problem)
            }
        }
    }

    fn is_crowded(&self) -> bool {
        if self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_EVERY) {
            if self.buckets.len() > CLIENTS_MAX {
                // Who has its whole bucket again is forgotten.
                self.buckets.retain_recent();
                self.buckets.shrink_to_fit();
            }
            self.is_crowded.store(self.buckets.len() > CLIENTS_MAX, Ordering::Relaxed);
        }
        self.is_crowded.load(Ordering::Relaxed)
    }
}

fn client(peer: Option<IpAddr>, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let is_trusted = |address: &IpAddr| trusted.iter().any(|network| network.contains(address));
    let mut address = peer.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)).to_canonical();
    if is_trusted(&address) {
        let lines: Vec<&str> = headers.get_all("x-forwarded-for").filter_map(|value| value.to_str().ok()).collect();
        for entry in lines.iter().rev().flat_map(|line| line.rsplit(',')) {
            // What cannot be read ends what can be believed.
            let Some(said) = read_address(entry.trim()) else { break };
            address = said;
            if !is_trusted(&address) {
                break;
            }
        }
    }
    network(address, 32, 64)
}

/// The network that an address is in, by the length of its prefix.
fn network(address: IpAddr, v4_bits: u8, v6_bits: u8) -> IpAddr {
    let bits = if address.is_ipv4() { v4_bits } else { v6_bits };
    IpNet::new(address, bits).map_or(address, |network| network.network())
}

/// An address, perhaps with a port.
fn read_address(text: &str) -> Option<IpAddr> {
    let plain = || text.parse::<IpAddr>().ok();
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|address| address.ip());
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<IpAddr>().ok();
    plain().or_else(with_port).or_else(bracketed).map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use actix_web::http::header::HeaderName;

    use super::*;

    fn limit(route: &str, count: u32, window_s: u64) -> RateLimit {
        RateLimit { route: route.into(), count: NonZeroU32::new(count).unwrap(), window: Duration::from_secs(window_s) }
    }

    fn forwarded(text: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static("x-forwarded-for"), HeaderValue::from_static(text));
        headers
    }

    #[test]
    fn a_client_has_its_count_at_once_and_is_then_told_when_to_come_back() {
        let limits = Limits::new(&[limit("*", 2, 60), limit("POST /api/OrdersProxy", 1, 60)], &[]).unwrap();
        let ask = |method: &Method, pattern, address: [u8; 4]| {
            limits.check(method, pattern, Some(IpAddr::from(address)), &HeaderMap::new())
        };
        let (order, balance) = ("/api/OrdersProxy", "/api/PaymentsProxy/{userId}/balance");
        let left = ask(&Method::GET, balance, [1, 1, 1, 1]).unwrap().unwrap();
        assert_eq!((left.limit, left.remaining), (2, 1));
        assert!((29..=31).contains(&left.reset_s), "{left:?}");
        assert_eq!(ask(&Method::HEAD, balance, [1, 1, 1, 1]).unwrap().unwrap().remaining, 0);
        let refused = ask(&Method::GET, balance, [1, 1, 1, 1]).unwrap_err();
        assert_eq!(refused.code, Code::RateLimited);
        assert!((29..=31).contains(&refused.retry_after_s.unwrap()));
        assert_eq!(refused.headers[3].1, "2;w=60");
        // Another route, another client, a route of its own limit.
        assert!(ask(&Method::GET, order, [1, 1, 1, 1]).is_ok() && ask(&Method::GET, balance, [1, 1, 1, 2]).is_ok());
        assert!(ask(&Method::POST, order, [1, 1, 1, 1]).is_ok() && ask(&Method::POST, order, [1, 1, 1, 1]).is_err());
        assert!(ask(&Method::GET, "/swagger", [1, 1, 1, 1]).unwrap().is_none());
    }

    #[test]
    fn a_route_is_named_as_the_document_has_it_and_must_exist() {
        assert!(Limits::new(&[limit("post /api/PaymentsProxy/{anyone}/deposit", 1, 1)], &[]).is_ok());
        for unknown in ["POST /api/Orders", "DELETE /api/OrdersProxy", "GET /swagger"] {
            assert!(Limits::new(&[limit(unknown, 1, 1)], &[]).is_err(), "{unknown}");
        }
    }

    #[test]
    fn who_the_client_is_says_only_a_proxy_that_is_trusted() {
        let trusted: Vec<IpNet> = vec!["10.0.0.0/8".parse().unwrap()];
        let of = |peer: &str, headers: &HeaderMap| client(Some(peer.parse().unwrap()), headers, &trusted).to_string();
        let said = forwarded("6.6.6.6, 1.2.3.4:5555, 10.0.0.2");
        assert_eq!(of("10.0.0.1", &said), "1.2.3.4");
        assert_eq!(of("9.9.9.9", &said), "9.9.9.9");
        assert_eq!(of("10.0.0.1", &forwarded("1.2.3.4, nonsense")), "10.0.0.1");
        assert_eq!(of("10.0.0.1", &HeaderMap::new()), "10.0.0.1");
        assert_eq!(of("::ffff:10.0.0.1", &forwarded("[2001:db8:1:2:3:4:5:6]:443")), "2001:db8:1:2::");
    }

    #[test]
    fn a_crowd_shares_by_network() {
        let route = Route::new(Method::GET, "/", NonZeroU32::new(1).unwrap(), Duration::from_secs(3_600));
        for n in 0..=(CLIENTS_MAX as u32 + LOOK_EVERY) {
            let _ = route.check(IpAddr::from((n + (1 << 24)).to_be_bytes()));
        }
        assert!(route.is_crowded());
        assert!(route.check(IpAddr::from([200, 1, 1, 1])).is_ok());
        assert!(route.check(IpAddr::from([200, 1, 9, 9])).is_err());
        assert!(route.buckets.len() <= CLIENTS_MAX + LOOK_EVERY as usize + 2);
    }
}
