//! Which path leads where: pure, over the raw bytes of the path.
//!
//! A route's own words are found as [`Paths`] says; [`canonical`] writes them as the services know them.

use std::borrow::Cow;

use actix_web::http::Method;

use crate::http::Paths;

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

/// Where a request goes; a user's and an order's segments are raw, as the client wrote them.
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
const PATHS: Paths = Paths::new(&[
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
]);

/// The routes of the API, whose clients may be limited.
pub fn limited() -> impl Iterator<Item = (Method, &'static str)> {
    let api = PATHS.patterns().filter(|pattern| pattern.starts_with("/api/"));
    api.flat_map(|pattern| {
        let allow = find(pattern).map_or("", |(_, allow)| allow);
        [Method::GET, Method::POST].into_iter().filter(|method| allows(allow, method)).map(move |method| (method, pattern))
    })
}

/// The pattern of a path that [`resolve`] has a target for; a limit's and a metric's name for it.
pub fn pattern(path: &str) -> Option<&'static str> {
    PATHS.pattern(path)
}

/// The path of its route as the services know it; itself, where it has none.
pub fn canonical(path: &str) -> Cow<'_, str> {
    PATHS.canonical(path)
}

/// Decides by the [`canonical`] path and the method; `HEAD` is allowed wherever `GET` is, and `OPTIONS` everywhere.
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
    use proptest::prelude::*;

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
            ("/api/PaymentsProxy/u/balance/", Some("/api/PaymentsProxy/{userId}/balance")),
            ("/API/ordersproxy/%45vents", Some("/api/OrdersProxy/events")),
            ("/api/PaymentsProxy//balance", None),
            ("/api/nothing", None),
        ] {
            assert_eq!(pattern(path), expected, "{path}");
        }
        assert!(PATHS.patterns().all(|known| pattern(known) == Some(known) && resolve(&Method::OPTIONS, known).is_ok()));
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
    fn a_routes_words_are_found_in_any_case_and_before_a_last_slash_as_the_originals_router_does() {
        for (path, expected) in [
            ("/api/ordersproxy", "/api/OrdersProxy"),
            ("/api/OrdersProxy/", "/api/OrdersProxy"),
            ("/API/ORDERSPROXY/A-1/TIMELINE/", "/api/OrdersProxy/A-1/timeline"),
            ("/api/PaymentsProxy/Balance/Balance", "/api/PaymentsProxy/Balance/balance"),
            ("/api/Users/U1/Summary", "/api/users/U1/summary"),
            ("/Swagger/V1/swagger.JSON", "/swagger/v1/swagger.json"),
            ("/swagger/swagger-ui.css", "/swagger/swagger-ui.css"),
            ("/swagger/", "/swagger/"),
            // What needs no encoding means the same with it: else it would be an order to us, and `events` to the service.
            ("/api/OrdersProxy/%65vents", "/api/OrdersProxy/events"),
            ("/api/PaymentsProxy/u%2d%31/%64eposit", "/api/PaymentsProxy/u-1/deposit"),
            // Everything else stays as it is.
            ("/api/PaymentsProxy/%2e%2E/balance", "/api/PaymentsProxy/%2e%2E/balance"),
            ("/api/PaymentsProxy/a%2Fb%25%2565/balance", "/api/PaymentsProxy/a%2Fb%25%2565/balance"),
            ("/api/PaymentsProxy/%zz%65%2%35/balance", "/api/PaymentsProxy/%zz%65%2%35/balance"),
            ("/api/PaymentsProxy/é%C3%A9%/balance", "/api/PaymentsProxy/é%C3%A9%/balance"),
            ("/", "/"),
            ("//", "//"),
            ("/api/OrdersProxy//", "/api/OrdersProxy//"),
            ("/api/nothing/", "/api/nothing/"),
        ] {
            assert_eq!(canonical(path), expected, "{path}");
            assert_eq!(canonical(expected), expected);
            assert_eq!(pattern(path).is_some(), resolve(&Method::OPTIONS, expected).is_ok(), "{path}");
        }
    }

    proptest! {
        #[test]
        fn a_canonical_path_is_its_own_and_has_the_same_pattern(path in "(/(api|API|OrdersProxy|events|(%6[0-9a-f]|%2[5ef]|%3[05]|[.a%]){0,3})){0,5}/?") {
            let one = canonical(&path).into_owned();
            prop_assert_eq!(canonical(&one), one.as_str());
            prop_assert_eq!(pattern(&path), pattern(&one));
            prop_assert_eq!(path.trim_end_matches('/').matches('/').count(), one.trim_end_matches('/').matches('/').count());
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
