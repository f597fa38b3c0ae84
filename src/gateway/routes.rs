//! Which path leads where: pure, over the raw bytes of the path.
//!
//! Nothing is decoded and no dot segment is resolved, so a segment stays the one segment it is (`..`, `%2e%2e`, `a%2Fb`) and no
//! path leads to another route. May import nothing of ours.

use actix_web::http::Method;

/// A service behind the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServiceName {
    Orders,
    Payments,
}

impl ServiceName {
    pub const ALL: [Self; 2] = [Self::Orders, Self::Payments];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Orders => "orders",
            Self::Payments => "payments",
        }
    }

    /// What clients ask.
    pub fn public_prefix(self) -> &'static str {
        match self {
            Self::Orders => "/api/OrdersProxy",
            Self::Payments => "/api/PaymentsProxy",
        }
    }

    /// What the service calls the same.
    pub fn inner_prefix(self) -> &'static str {
        match self {
            Self::Orders => "/api/Orders",
            Self::Payments => "/api/Account",
        }
    }
}

/// Where a request goes; texts are raw, as the client wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target<'a> {
    /// To a service; `rest` follows its prefix, empty or beginning with `/`.
    Proxy {
        service: ServiceName,
        rest: &'a str,
    },
    /// A WebSocket that is fed from `events` of the orders service; `rest` as above, without its last segment.
    Socket {
        rest: &'a str,
    },
    Summary {
        user: &'a str,
    },
    /// Both services' part of one order's way.
    Timeline {
        order: &'a str,
    },
    /// `OPTIONS` of a known route; `allow` is the header's text.
    Options {
        allow: &'static str,
    },
    Root,
    SwaggerPage,
    SwaggerAsset(&'a str),
    SwaggerDocument,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    NotFound,
    /// `allow` is the header's text.
    MethodNotAllowed {
        allow: &'static str,
    },
}

const GET: &str = "GET, HEAD, OPTIONS";
const POST: &str = "POST, OPTIONS";
const GET_POST: &str = "GET, HEAD, POST, OPTIONS";

/// Every route as a pattern, for limits and the metrics' labels; [`resolve`] alone decides.
const PATTERNS: &[&str] = &[
    "/",
    "/swagger",
    "/swagger/",
    "/swagger/{asset}",
    "/swagger/v1/swagger.json",
    "/api/users/{userId}/summary",
    "/api/OrdersProxy",
    "/api/OrdersProxy/events",
    "/api/OrdersProxy/{id}",
    "/api/OrdersProxy/{id}/events",
    "/api/OrdersProxy/{id}/ws",
    "/api/OrdersProxy/{id}/timeline",
    "/api/PaymentsProxy/{userId}",
    "/api/PaymentsProxy/{userId}/deposit",
    "/api/PaymentsProxy/{userId}/balance",
    "/api/PaymentsProxy/{userId}/transactions",
];

/// The routes of the API, whose clients may be limited.
pub fn limited() -> impl Iterator<Item = (Method, &'static str)> {
    let api = PATTERNS.iter().filter(|pattern| pattern.starts_with("/api/"));
    api.flat_map(|pattern| {
        let allow = find(pattern).map_or("", |(_, allow)| allow);
        [Method::GET, Method::POST].into_iter().filter(|method| allows(allow, method)).map(|method| (method, *pattern))
    })
}

/// The pattern of a path that [`resolve`] has a target for; a limit's and a metric's name for it.
pub fn pattern(path: &str) -> Option<&'static str> {
    let fits = |pattern: &&&str| {
        let mut segments = path.split('/');
        pattern.split('/').all(|part| segments.next().is_some_and(|segment| part.starts_with('{') || part == segment))
            && segments.next().is_none()
    };
    PATTERNS.iter().find(fits).copied()
}

/// Decides by the raw path and the method; `HEAD` is allowed wherever `GET` is, and `OPTIONS` everywhere.
pub fn resolve<'a>(method: &Method, path: &'a str) -> Result<Target<'a>, Refusal> {
    let (target, allow) = find(path).ok_or(Refusal::NotFound)?;
    if method == Method::OPTIONS {
        return Ok(Target::Options { allow });
    }
    if allows(allow, method) { Ok(target) } else { Err(Refusal::MethodNotAllowed { allow }) }
}

fn allows(allow: &str, method: &Method) -> bool {
    allow.split(", ").any(|name| name == method.as_str())
}

fn find(path: &str) -> Option<(Target<'_>, &'static str)> {
    match path {
        "/" => return Some((Target::Root, GET)),
        "/swagger" | "/swagger/" | "/swagger/index.html" => return Some((Target::SwaggerPage, GET)),
        "/swagger/v1/swagger.json" => return Some((Target::SwaggerDocument, GET)),
        _ => {}
    }
    if let Some(asset) = path.strip_prefix("/swagger/") {
        return (!asset.contains('/')).then_some((Target::SwaggerAsset(asset), GET));
    }
    if let Some(rest) = path.strip_prefix("/api/users") {
        let [user, "summary"] = *Segments::of(rest)?.as_slice() else { return None };
        return Some((Target::Summary { user }, GET));
    }
    ServiceName::ALL.into_iter().find_map(|service| {
        let rest = path.strip_prefix(service.public_prefix())?;
        let allow = match (service, Segments::of(rest)?.as_slice()) {
            (ServiceName::Orders, []) => GET_POST,
            (ServiceName::Orders, [_id] | [_id, "events"]) => GET,
            (ServiceName::Orders, &[order, "timeline"]) => return Some((Target::Timeline { order }, GET)),
            (ServiceName::Orders, [_id, "ws"]) => return Some((Target::Socket { rest: rest.strip_suffix("/ws")? }, GET)),
            (ServiceName::Payments, [_user] | [_user, "deposit"]) => POST,
            (ServiceName::Payments, [_user, "balance" | "transactions"]) => GET,
            _ => return None,
        };
        Some((Target::Proxy { service, rest }, allow))
    })
}

/// No route of a service has more segments after its prefix.
const SEGMENTS_MAX: usize = 2;

/// The segments after a prefix, without a heap for them.
struct Segments<'a> {
    found: [&'a str; SEGMENTS_MAX],
    count: usize,
}

impl<'a> Segments<'a> {
    /// `None` where the prefix ends inside a segment, a segment is empty or there are too many.
    fn of(rest: &'a str) -> Option<Self> {
        let mut segments = Self { found: [""; SEGMENTS_MAX], count: 0 };
        if !rest.is_empty() {
            for segment in rest.strip_prefix('/')?.split('/') {
                *segments.found.get_mut(segments.count).filter(|_| !segment.is_empty())? = segment;
                segments.count += 1;
            }
        }
        Some(segments)
    }

    fn as_slice(&self) -> &[&'a str] {
        &self.found[..self.count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxied(service: ServiceName, rest: &str) -> Result<Target<'_>, Refusal> {
        Ok(Target::Proxy { service, rest })
    }

    #[test]
    fn every_route_of_the_contract_leads_to_its_service() {
        use ServiceName::{Orders, Payments};
        for (method, path, service, rest) in [
            (Method::POST, "/api/OrdersProxy", Orders, ""),
            (Method::GET, "/api/OrdersProxy", Orders, ""),
            (Method::HEAD, "/api/OrdersProxy", Orders, ""),
            (Method::GET, "/api/OrdersProxy/1", Orders, "/1"),
            (Method::GET, "/api/OrdersProxy/events", Orders, "/events"),
            (Method::GET, "/api/OrdersProxy/1/events", Orders, "/1/events"),
            (Method::POST, "/api/PaymentsProxy/u1", Payments, "/u1"),
            (Method::POST, "/api/PaymentsProxy/u1/deposit", Payments, "/u1/deposit"),
            (Method::GET, "/api/PaymentsProxy/u1/balance", Payments, "/u1/balance"),
            (Method::GET, "/api/PaymentsProxy/u1/transactions", Payments, "/u1/transactions"),
        ] {
            assert_eq!(resolve(&method, path), proxied(service, rest), "{method} {path}");
        }
        assert_eq!(resolve(&Method::GET, "/api/users/u1/summary"), Ok(Target::Summary { user: "u1" }));
        assert_eq!(resolve(&Method::GET, "/api/OrdersProxy/1/ws"), Ok(Target::Socket { rest: "/1" }));
        assert_eq!(resolve(&Method::GET, "/api/OrdersProxy/ws/ws"), Ok(Target::Socket { rest: "/ws" }));
        assert_eq!(resolve(&Method::GET, "/api/OrdersProxy/%2F/timeline"), Ok(Target::Timeline { order: "%2F" }));
    }

    #[test]
    fn a_path_has_the_pattern_of_its_route() {
        for (path, expected) in [
            ("/api/OrdersProxy", Some("/api/OrdersProxy")),
            ("/api/OrdersProxy/events", Some("/api/OrdersProxy/events")),
            ("/api/OrdersProxy/..", Some("/api/OrdersProxy/{id}")),
            ("/api/PaymentsProxy/u%2F/balance", Some("/api/PaymentsProxy/{userId}/balance")),
            ("/api/PaymentsProxy/u/balance/", None),
            ("/api/nothing", None),
        ] {
            assert_eq!(pattern(path), expected, "{path}");
        }
        assert!(PATTERNS.iter().all(|known| pattern(known) == Some(*known) && resolve(&Method::OPTIONS, known).is_ok()));
        assert_eq!(limited().filter(|(_, pattern)| *pattern == "/api/OrdersProxy").count(), 2);
        assert!(limited().all(|(_, pattern)| !pattern.contains("swagger")));
    }

    #[test]
    fn a_known_route_names_its_methods_and_an_unknown_one_is_not_found() {
        for (method, path, allow) in [
            (Method::DELETE, "/api/OrdersProxy", "GET, HEAD, POST, OPTIONS"),
            (Method::POST, "/api/OrdersProxy/1", "GET, HEAD, OPTIONS"),
            (Method::POST, "/api/OrdersProxy/1/ws", "GET, HEAD, OPTIONS"),
            (Method::GET, "/api/PaymentsProxy/u1", "POST, OPTIONS"),
            (Method::GET, "/api/PaymentsProxy/u1/deposit", "POST, OPTIONS"),
            (Method::POST, "/swagger", "GET, HEAD, OPTIONS"),
        ] {
            assert_eq!(resolve(&method, path), Err(Refusal::MethodNotAllowed { allow }), "{method} {path}");
            assert_eq!(resolve(&Method::OPTIONS, path), Ok(Target::Options { allow }), "{path}");
        }
        assert_eq!(resolve(&Method::OPTIONS, "/nothing"), Err(Refusal::NotFound));
        for path in [
            "/api/OrdersProxy/",
            "/api/OrdersProxyX",
            "/api/OrdersProxy/1/2",
            "/api/PaymentsProxy",
            "/api/PaymentsProxy//balance",
            "/api/PaymentsProxy/u1/withdraw",
            "/api/PaymentsProxy/u1/balance/",
            "/api/Orders",
            "/api/users//summary",
            "/api/users/u1",
            "/swagger/a/b",
            "//api/OrdersProxy",
            "*",
        ] {
            assert_eq!(resolve(&Method::GET, path), Err(Refusal::NotFound), "{path}");
        }
    }

    #[test]
    fn a_segment_stays_the_one_segment_it_is() {
        for user in ["..", ".", "%2e%2e", "a%2Fb", "%2F..%2Fadmin", "balance", "deposit", "%zz", "a;b=c"] {
            let rest = format!("/{user}/balance");
            let path = format!("/api/PaymentsProxy{rest}");
            assert_eq!(resolve(&Method::GET, &path), proxied(ServiceName::Payments, &rest));
        }
        assert_eq!(resolve(&Method::GET, "/api/OrdersProxy/../PaymentsProxy"), Err(Refusal::NotFound));
    }
}
