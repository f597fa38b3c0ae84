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
    Summary {
        user: &'a str,
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

const GET: &str = "GET, HEAD";
const POST: &str = "POST";
const GET_POST: &str = "GET, HEAD, POST";

/// Every route as a pattern, for the framework's router and the metrics' labels; [`resolve`] alone decides.
pub const PATTERNS: &[&str] = &[
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

/// Decides by the raw path and the method; `HEAD` is allowed wherever `GET` is.
pub fn resolve<'a>(method: &Method, path: &'a str) -> Result<Target<'a>, Refusal> {
    let (target, allow) = find(path).ok_or(Refusal::NotFound)?;
    if allow.split(", ").any(|name| name == method.as_str()) { Ok(target) } else { Err(Refusal::MethodNotAllowed { allow }) }
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
        let [user, "summary"] = segments(rest)?[..] else { return None };
        return Some((Target::Summary { user }, GET));
    }
    ServiceName::ALL.into_iter().find_map(|service| {
        let rest = path.strip_prefix(service.public_prefix())?;
        let allow = match (service, &segments(rest)?[..]) {
            (ServiceName::Orders, []) => GET_POST,
            (ServiceName::Orders, [_id] | [_id, "events" | "ws" | "timeline"]) => GET,
            (ServiceName::Payments, [_user] | [_user, "deposit"]) => POST,
            (ServiceName::Payments, [_user, "balance" | "transactions"]) => GET,
            _ => return None,
        };
        Some((Target::Proxy { service, rest }, allow))
    })
}

/// The segments after a prefix; `None` where the prefix ends inside a segment or a segment is empty.
fn segments(rest: &str) -> Option<Vec<&str>> {
    if rest.is_empty() {
        return Some(Vec::new());
    }
    let segments: Vec<&str> = rest.strip_prefix('/')?.split('/').collect();
    segments.iter().all(|segment| !segment.is_empty()).then_some(segments)
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
            (Method::GET, "/api/OrdersProxy/1/ws", Orders, "/1/ws"),
            (Method::GET, "/api/OrdersProxy/1/timeline", Orders, "/1/timeline"),
            (Method::POST, "/api/PaymentsProxy/u1", Payments, "/u1"),
            (Method::POST, "/api/PaymentsProxy/u1/deposit", Payments, "/u1/deposit"),
            (Method::GET, "/api/PaymentsProxy/u1/balance", Payments, "/u1/balance"),
            (Method::GET, "/api/PaymentsProxy/u1/transactions", Payments, "/u1/transactions"),
        ] {
            assert_eq!(resolve(&method, path), proxied(service, rest), "{method} {path}");
        }
        assert_eq!(resolve(&Method::GET, "/api/users/u1/summary"), Ok(Target::Summary { user: "u1" }));
    }

    #[test]
    fn a_known_route_names_its_methods_and_an_unknown_one_is_not_found() {
        for (method, path, allow) in [
            (Method::DELETE, "/api/OrdersProxy", "GET, HEAD, POST"),
            (Method::POST, "/api/OrdersProxy/1", "GET, HEAD"),
            (Method::GET, "/api/PaymentsProxy/u1", "POST"),
            (Method::GET, "/api/PaymentsProxy/u1/deposit", "POST"),
            (Method::OPTIONS, "/api/PaymentsProxy/u1/balance", "GET, HEAD"),
            (Method::POST, "/swagger", "GET, HEAD"),
        ] {
            assert_eq!(resolve(&method, path), Err(Refusal::MethodNotAllowed { allow }), "{method} {path}");
        }
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
