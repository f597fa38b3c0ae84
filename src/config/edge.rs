//! What the gateway's settings about its clients may be: whose word on addresses counts, how often one may ask, which web pages
//! may ask at all.

use std::num::NonZeroU32;
use std::time::Duration;

use actix_web::http::Uri;
use ipnet::IpNet;

use super::RateLimit;
use super::kinds::{Kind, Raw};
use super::mistakes::shown;

/// Addresses or networks.
pub(super) struct Networks;

impl Kind<Vec<IpNet>> for Networks {
    fn parse(&self, raw: &Raw) -> Result<Vec<IpNet>, String> {
        let read = |item: &str| {
            let alone = || item.parse().ok().map(|address: std::net::IpAddr| IpNet::from(address));
            let network = item.parse().ok().or_else(alone);
            network.ok_or_else(|| format!("{} is no address and no network, such as 10.0.0.0/8", shown(item)))
        };
        raw.items()?.into_iter().map(read).collect()
    }

    fn show(&self, value: &Vec<IpNet>) -> String {
        value.iter().map(IpNet::to_string).collect::<Vec<_>>().join(",")
    }

    fn limits(&self) -> String {
        "addresses or networks (10.0.0.0/8), comma-separated".into()
    }
}

/// Limits by route.
pub(super) struct RateLimits;

/// Requests of one limit; more would be no limit.
const COUNT_MAX: u32 = 1_000_000;

impl Kind<Vec<RateLimit>> for RateLimits {
    fn parse(&self, raw: &Raw) -> Result<Vec<RateLimit>, String> {
        let mut limits: Vec<RateLimit> = Vec::new();
        for item in raw.items()? {
            let limit = rate_limit(item).ok_or_else(|| {
                format!("{} is not of the form ROUTE=COUNT/UNIT, such as *=100/s or POST /api/OrdersProxy=600/m", shown(item))
            })?;
            if limits.iter().any(|other| other.route == limit.route) {
                return Err(format!("{} has two limits", shown(&limit.route)));
            }
            limits.push(limit);
        }
        Ok(limits)
    }

    fn show(&self, value: &Vec<RateLimit>) -> String {
        let unit = |window: Duration| UNITS.iter().find(|(_, seconds)| *seconds == window.as_secs()).map_or("s", |(name, _)| name);
        let one = |limit: &RateLimit| format!("{}={}/{}", limit.route, limit.count, unit(limit.window));
        value.iter().map(one).collect::<Vec<_>>().join(",")
    }

    fn limits(&self) -> String {
        format!("ROUTE=COUNT/UNIT, comma-separated; ROUTE `*` or as in the OpenAPI document, COUNT 1..{COUNT_MAX}, UNIT s, m or h")
    }
}

const UNITS: [(&str, u64); 3] = [("s", 1), ("m", 60), ("h", 3_600)];

fn rate_limit(text: &str) -> Option<RateLimit> {
    let (route, limit) = text.rsplit_once('=')?;
    let (count, unit) = limit.split_once('/')?;
    let route = route.split_whitespace().collect::<Vec<_>>().join(" ");
    let is_route = route == "*" || route.split_once(' ').is_some_and(|(_, path)| path.starts_with('/'));
    let count = count.trim().parse().ok().filter(|count: &NonZeroU32| count.get() <= COUNT_MAX)?;
    let (_, seconds) = UNITS.iter().find(|(name, _)| *name == unit.trim())?;
    is_route.then_some(RateLimit { route, count, window: Duration::from_secs(*seconds) })
}

/// Origins of web pages (RFC 6454).
pub(super) struct Origins;

impl Kind<Vec<String>> for Origins {
    fn parse(&self, raw: &Raw) -> Result<Vec<String>, String> {
        let origins = raw.items()?;
        if origins.contains(&"*") && origins.len() > 1 {
            return Err("has * beside others".into());
        }
        let read = |item: &str| {
            origin(item).ok_or_else(|| format!("{} is no origin, such as https://shop.example, and not *", shown(item)))
        };
        origins.into_iter().map(read).collect()
    }

    fn show(&self, value: &Vec<String>) -> String {
        value.join(",")
    }

    fn limits(&self) -> String {
        "`*`, or scheme://host:port, comma-separated".into()
    }
}

fn origin(text: &str) -> Option<String> {
    if text == "*" {
        return Some(text.to_owned());
    }
    let uri: Uri = text.parse().ok()?;
    let (scheme, authority) = (uri.scheme_str()?, uri.authority()?);
    let plain = format!("{scheme}://{authority}").to_ascii_lowercase();
    // Browsers send it without a path and in lower case; anything else would never match.
    (text.to_ascii_lowercase() == plain && !plain.contains('@')).then_some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Raw {
        Raw::Text(text.into())
    }

    #[test]
    fn an_address_alone_is_a_network_of_one() {
        let networks = Networks.parse(&text("10.0.0.0/8, 192.0.2.1,::1")).unwrap();
        assert_eq!(Networks.show(&networks), "10.0.0.0/8,192.0.2.1/32,::1/128");
        for bad in ["", "10.0.0.0/33", "example.com", "10.0.0.1,,::1"] {
            assert!(Networks.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rate_limit_names_a_route_once_a_count_and_a_unit() {
        let limits = RateLimits.parse(&text("*=100/s, POST   /api/OrdersProxy = 6/m")).unwrap();
        assert_eq!(RateLimits.show(&limits), "*=100/s,POST /api/OrdersProxy=6/m");
        assert_eq!((limits[1].count.get(), limits[1].window), (6, Duration::from_secs(60)));
        for bad in ["", "*", "*=0/s", "*=1", "*=1/d", "*=-1/s", "*=1000001/s", "/api=1/s", "*=1/s,*=2/s", "GET api=1/s"] {
            assert!(RateLimits.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_origin_is_as_a_browser_sends_it() {
        assert_eq!(Origins.parse(&text("https://Shop.example, http://localhost:3000")).unwrap().len(), 2);
        assert_eq!(Origins.parse(&text("*")).unwrap(), ["*"]);
        for bad in ["", "shop.example", "https://shop.example/", "https://u@shop.example", "*,https://a.example", "https://"] {
            assert!(Origins.parse(&text(bad)).is_err(), "{bad}");
        }
    }
}
