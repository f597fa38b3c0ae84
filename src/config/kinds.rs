//! What a setting's value may be: one kind a type, each with its text form, its limits and its way back to text.
//!
//! A kind parses text, so that the environment, a file and a TOML value are read alike and a number-like password stays as it is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use actix_web::http::Uri;
use tokio_postgres::config::TargetSessionAttrs;

use super::mistakes::shown;
use super::{PostgresTarget, Secret};

/// A value as a layer gives it.
pub(super) enum Raw {
    Text(String),
    /// A TOML array of strings.
    List(Vec<String>),
    /// Anything else that TOML knows, by its name.
    Other(&'static str),
}

impl Raw {
    pub(super) fn text(&self) -> Result<&str, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::List(_) => Err("must be one value, not an array".into()),
            Self::Other(what) => Err(format!("must not be {what}")),
        }
    }

    /// A comma-separated text or an array; the items trimmed, none of them empty.
    pub(super) fn items(&self) -> Result<Vec<&str>, String> {
        let items: Vec<&str> = match self {
            Self::List(items) => items.iter().map(|item| item.trim()).collect(),
            Self::Text(_) | Self::Other(_) => self.text()?.split(',').map(str::trim).collect(),
        };
        match items.iter().position(|item| item.is_empty()) {
            Some(_) if items.len() == 1 => Err("is empty".into()),
            Some(at) => Err(format!("item {} is empty", at + 1)),
            None => Ok(items),
        }
    }
}

/// How one kind of value is read, shown and described.
pub(super) trait Kind<T> {
    /// The problem's text follows the setting's name and a colon; it never holds a secret.
    fn parse(&self, raw: &Raw) -> Result<T, String>;
    fn show(&self, value: &T) -> String;
    /// For the table of settings.
    fn limits(&self) -> String;
}

/// An address to listen on; port 0 picks one.
pub(super) struct Listen;

impl Kind<SocketAddr> for Listen {
    fn parse(&self, raw: &Raw) -> Result<SocketAddr, String> {
        let text = raw.text()?.trim();
        let local = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
        let address = local.map(|port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        address
            .or_else(|| text.parse().ok())
            .ok_or_else(|| format!("{} is no address and port, such as 0.0.0.0:8000 or [::]:8000", shown(text)))
    }

    fn show(&self, value: &SocketAddr) -> String {
        value.to_string()
    }

    fn limits(&self) -> String {
        "address:port, port 0..65535".into()
    }
}

/// Whole milliseconds.
pub(super) struct Millis(pub RangeInclusive<u64>);

impl Kind<Duration> for Millis {
    fn parse(&self, raw: &Raw) -> Result<Duration, String> {
        let millis: i64 = whole(raw, " of milliseconds")?;
        match u64::try_from(millis) {
            Ok(millis) if self.0.contains(&millis) => Ok(Duration::from_millis(millis)),
            _ => Err(format!("{millis} is out of range, {} to {} ms", self.0.start(), self.0.end())),
        }
    }

    fn show(&self, value: &Duration) -> String {
        value.as_millis().to_string()
    }

    fn limits(&self) -> String {
        format!("{}..{} ms", self.0.start(), self.0.end())
    }
}

/// A count.
pub(super) struct Count(pub RangeInclusive<i64>);

impl<T> Kind<T> for Count
where
    T: TryFrom<i64> + ToString,
{
    fn parse(&self, raw: &Raw) -> Result<T, String> {
        let count: i64 = whole(raw, "")?;
        let fits = self.0.contains(&count).then(|| T::try_from(count).ok()).flatten();
        fits.ok_or_else(|| format!("{count} is out of range, {} to {}", self.0.start(), self.0.end()))
    }

    fn show(&self, value: &T) -> String {
        value.to_string()
    }

    fn limits(&self) -> String {
        format!("{}..{}", self.0.start(), self.0.end())
    }
}

fn whole(raw: &Raw, of: &str) -> Result<i64, String> {
    let text = raw.text()?.trim();
    text.parse().map_err(|_| format!("{} is no whole number{of}", shown(text)))
}

/// Replicas of a service: `http://host:port`, each once.
pub(super) struct Replicas;

impl Kind<Vec<String>> for Replicas {
    fn parse(&self, raw: &Raw) -> Result<Vec<String>, String> {
        let mut urls = Vec::new();
        for (at, item) in raw.items()?.into_iter().enumerate() {
            let url = base_url(item).map_err(|problem| format!("item {} {problem}: {}", at + 1, shown(item)))?;
            if !urls.contains(&url) {
                urls.push(url);
            }
        }
        if urls.is_empty() { Err("is empty".into()) } else { Ok(urls) }
    }

    fn show(&self, value: &Vec<String>) -> String {
        value.join(",")
    }

    fn limits(&self) -> String {
        "http://host:port, comma-separated".into()
    }
}

/// A collector of traces: `http://host:port`; OTLP's own path is added.
pub(super) struct Collector;

impl Kind<String> for Collector {
    fn parse(&self, raw: &Raw) -> Result<String, String> {
        let text = raw.text()?.trim();
        if text.is_empty() {
            // As compose.yaml passes on a variable that nobody set.
            return Ok(String::new());
        }
        base_url(text).map_err(|problem| format!("{problem}: {}", shown(text)))
    }

    fn show(&self, value: &String) -> String {
        value.clone()
    }

    fn limits(&self) -> String {
        "http://host:port".into()
    }
}

fn base_url(text: &str) -> Result<String, &'static str> {
    const SHAPE: &str = "is not of the form http://host:port";
    let rest = match text.split_once("://") {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("https") => {
            return Err("is https, and only plain http is spoken here");
        }
        _ => return Err(SHAPE),
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if authority.contains(['/', '?', '#']) {
        return Err("has a path, and paths are added by shopd");
    }
    if authority.contains('@') {
        return Err("has a user name, and none is asked for");
    }
    // The crate that later connects reads it too, so nothing passes here that fails there.
    let uri: Uri = format!("http://{authority}/").parse().map_err(|_| SHAPE)?;
    let (host, port) = (uri.host().unwrap_or_default(), uri.port_u16());
    if !is_host(host) || port == Some(0) || (port.is_none() && authority != host) {
        return Err(SHAPE);
    }
    Ok(format!("http://{}:{}", host.to_ascii_lowercase(), port.unwrap_or(80)))
}

/// Brokers to begin with: `host:port`.
pub(super) struct Brokers;

impl Kind<Vec<String>> for Brokers {
    fn parse(&self, raw: &Raw) -> Result<Vec<String>, String> {
        let mut brokers = Vec::new();
        for (at, item) in raw.items()?.into_iter().enumerate() {
            let (host, port) = item.rsplit_once(':').unwrap_or((item, ""));
            if !is_host(host) || !port.parse::<u16>().is_ok_and(|port| port > 0) {
                return Err(format!("item {} is not of the form host:port: {}", at + 1, shown(item)));
            }
            brokers.push(item.to_owned());
        }
        Ok(brokers)
    }

    fn show(&self, value: &Vec<String>) -> String {
        value.join(",")
    }

    fn limits(&self) -> String {
        "host:port, comma-separated".into()
    }
}

/// A host name, an IPv4 address, or an IPv6 address in brackets.
fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().is_ok();
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return host.parse::<IpAddr>().is_ok();
    }
    // Underscores are in no standard and in many a container's name.
    let label = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    host.len() <= 253 && host.strip_suffix('.').unwrap_or(host).split('.').all(label)
}

/// A Postgres URL; nothing of it is ever shown.
pub(super) struct DatabaseUrl;

impl Kind<Option<Secret>> for DatabaseUrl {
    fn parse(&self, raw: &Raw) -> Result<Option<Secret>, String> {
        let text = raw.text()?;
        if text.is_empty() {
            // Not "none": `all` would then quietly keep its orders elsewhere because a variable somewhere was empty.
            return Err("is empty; leave it out where there is no database".into());
        }
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            return Err("must begin with postgres:// or postgresql://".into());
        }
        let parsed = PostgresTarget::read(text)?.config;
        if parsed.get_dbname().is_none_or(str::is_empty) {
            return Err("names no database: postgres://user:password@host:port/name".into());
        }
        if parsed.get_hosts().is_empty() {
            return Err("names no host: postgres://user:password@host:port/name".into());
        }
        if parsed.get_hosts().len() > 1 && parsed.get_target_session_attrs() != TargetSessionAttrs::ReadWrite {
            // The first that answers would be taken, and a standby answers.
            return Err("names several hosts, so it must end in ?target_session_attrs=read-write, which finds the primary".into());
        }
        Ok(Some(Secret::new(text)))
    }

    fn show(&self, value: &Option<Secret>) -> String {
        if value.is_some() { "<secret>".into() } else { String::new() }
    }

    fn limits(&self) -> String {
        "postgres://user:password@host:port/name".into()
    }
}

/// What stands before a topic's name.
pub(super) struct TopicPrefix;

/// A topic's name has at most 249 characters; ours have at most 26 with `.dlq`.
const TOPIC_PREFIX_CHARS_MAX: usize = 200;

impl Kind<String> for TopicPrefix {
    fn parse(&self, raw: &Raw) -> Result<String, String> {
        let text = raw.text()?;
        let legal = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if text.len() > TOPIC_PREFIX_CHARS_MAX || !text.bytes().all(legal) {
            return Err(format!("{} is not {}", shown(text), Kind::<String>::limits(self)));
        }
        Ok(text.to_owned())
    }

    fn show(&self, value: &String) -> String {
        value.clone()
    }

    fn limits(&self) -> String {
        format!("at most {TOPIC_PREFIX_CHARS_MAX} of letters, digits, '.', '_', '-'")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Raw {
        Raw::Text(text.into())
    }

    #[test]
    fn an_address_to_listen_on_has_a_port_even_0() {
        for good in ["0.0.0.0:8000", "127.0.0.1:0", "[::]:8000", " [::1]:65535 ", "localhost:8000"] {
            assert!(Listen.parse(&text(good)).is_ok(), "{good}");
        }
        for bad in ["", "8000", ":8000", "0.0.0.0", "0.0.0.0:65536", "example.com:80", "::1:80", "localhost:x"] {
            assert!(Listen.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_replica_is_plain_http_with_host_and_port_and_no_path() {
        let one = |s: &str| Replicas.parse(&text(s)).map(|urls| urls.join(","));
        assert_eq!(one("http://orders:8082/").unwrap(), "http://orders:8082");
        assert_eq!(
            one("HTTP://Orders_1:8082, http://[::1]:1,http://orders_1:8082").unwrap(),
            "http://orders_1:8082,http://[::1]:1"
        );
        assert_eq!(one("http://orders").unwrap(), "http://orders:80");
        for bad in [
            "",
            "orders:8082",
            "https://a:1",
            "http://",
            "http://:80",
            "http://a:0",
            "http://a:",
            "http://a:99999",
            "http://a:1/x",
            "http://a:1//",
            "http://a:1?x",
            "http://a:1#x",
            "http://u:p@a:1",
            "http://a b:1",
            "http://1.2.3:1",
            "http://a:1,,http://b:1",
        ] {
            assert!(one(bad).is_err(), "{bad}");
        }
        assert!(!one("http://u:hunter2@a:1").unwrap_err().contains("hunter2"));
        assert!(Replicas.parse(&Raw::List(Vec::new())).is_err());
        assert_eq!(Collector.parse(&text("http://Collector:4318/")), Ok("http://collector:4318".into()));
        assert_eq!(Collector.parse(&text("")), Ok(String::new()), "as good as not set");
        assert!(Collector.parse(&text("collector:4318")).is_err());
        assert_eq!(Replicas.parse(&Raw::List(vec!["http://a:1".into(), "http://b:2".into()])).unwrap().len(), 2);
    }

    #[test]
    fn a_broker_is_a_host_and_a_port() {
        for good in ["localhost:9092", "kafka-1.internal:9092, 10.0.0.1:9092", "[fe80::1]:9092", "my_kafka:1"] {
            assert!(Brokers.parse(&text(good)).is_ok(), "{good}");
        }
        for bad in
            ["", "localhost", "localhost:0", "localhost:", ":9092", "::1:9092", "PLAINTEXT://a:1", "a:1;b:2", "a:1,", "a..b:1"]
        {
            assert!(Brokers.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_database_url_names_a_host_and_a_database_and_is_never_shown() {
        for good in [
            "postgres://u:p@h:5432/d",
            "postgresql://u@h/d",
            "postgres://u:p%40ss@[::1]:1/d?connect_timeout=3",
            "postgres:///d?host=/tmp/s",
            "postgres://u@a:5432,b:5433/d?target_session_attrs=read-write",
            "postgres://u:p@h/d?sslmode=verify-full&sslrootcert=/etc/ca.pem",
        ] {
            assert!(DatabaseUrl.parse(&text(good)).is_ok(), "{good}");
        }
        for bad in [
            "",
            "hunter2",
            "mysql://u:hunter2@h/d",
            "postgres://u:hunter2@h:5432",
            "postgres://u:hunter2@h:5432/",
            "postgres://u:hunter2@h:port/d",
            "postgres://u:hunter2@/d",
            "postgres://u:hunter2@h/d?sslmode=hunter2",
            "postgres://u:hunter2@h/d?hunter2=1",
            "postgres://u:hunter2@a:5432,b:5433/d",
            "postgres://u:hunter2@a,b/d?target_session_attrs=any",
        ] {
            let problem = DatabaseUrl.parse(&text(bad)).unwrap_err();
            assert!(!problem.contains("hunter2"), "{problem}");
        }
    }

    #[test]
    fn numbers_are_whole_and_in_range() {
        let millis = Millis(1..=3_600_000);
        assert_eq!(millis.parse(&text("10000")).unwrap(), Duration::from_secs(10));
        for bad in ["0", "-1", "3600001", "1.5", "10s", "", "99999999999999999999"] {
            assert!(millis.parse(&text(bad)).is_err(), "{bad}");
        }
        let partitions: Result<i32, _> = Count(1..=1_000).parse(&text("1000"));
        assert_eq!(partitions.unwrap(), 1_000);
        assert!(Kind::<i32>::parse(&Count(1..=1_000), &text("1001")).is_err());
        assert!(Kind::<i32>::parse(&Count(1..=1_000), &Raw::Other("a boolean")).is_err());
        assert!(Kind::<i32>::parse(&Count(1..=1_000), &Raw::List(vec!["12".into()])).is_err());
    }

    #[test]
    fn a_topic_prefix_is_what_a_topic_may_be_called() {
        assert_eq!(TopicPrefix.parse(&text("")).unwrap(), "");
        assert_eq!(TopicPrefix.parse(&text("staging.eu-1_")).unwrap(), "staging.eu-1_");
        assert!(TopicPrefix.parse(&text("a b")).is_err());
        assert!(TopicPrefix.parse(&text(&"x".repeat(201))).is_err());
    }
}
