//! Path segments and query parameters from the request's own text, decoded strictly.
//!
//! The framework's decoding is lossy: it lets a malformed escape stand and mends invalid UTF-8, so two users could become one.
//! Dot segments are just text here.

use std::borrow::Cow;

use actix_web::HttpRequest;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::problem::Problem;

/// Everything but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// One path segment or query value, escaped so that it decodes to `text` whatever it holds.
pub fn escape(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// `None` where an escape is malformed or the bytes are no UTF-8.
fn unescape(text: &str) -> Option<Cow<'_, str>> {
    let mut escapes = text.match_indices('%').map(|(at, _)| text.as_bytes().get(at + 1..at + 3));
    if !escapes.all(|digits| digits.is_some_and(|d| d.iter().all(u8::is_ascii_hexdigit))) {
        return None;
    }
    percent_decode_str(text).decode_utf8().ok()
}

/// The decoded segment that stands where the matched route has `{name}`.
pub fn path_segment(req: &HttpRequest, name: &str) -> Result<String, Problem> {
    let pattern = req.match_pattern().unwrap_or_default();
    let found = pattern.split('/').position(|s| s.strip_prefix('{').and_then(|s| s.strip_suffix('}')) == Some(name));
    let raw = found.and_then(|at| req.uri().path().split('/').nth(at));
    let raw = raw.ok_or_else(|| Problem::internal(format!("the route {pattern} has no segment {name}")))?;
    let text = unescape(raw).ok_or_else(|| Problem::invalid(name, "The path's percent-encoding is malformed."))?;
    Ok(text.into_owned())
}

/// That a raw query can be decoded. Whole, which is the same as part by part: no character lies across a `&` or `=`.
pub(super) fn check_query(query: &str) -> Result<(), Problem> {
    unescape(query).map(|_| ()).ok_or_else(malformed_query)
}

fn malformed_query() -> Problem {
    Problem::invalid("query", "The query's percent-encoding is malformed.")
}

/// A request's query parameters, decoded, in their order.
#[derive(Clone, Debug, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    pub fn of(req: &HttpRequest) -> Result<Self, Problem> {
        Self::parse(req.uri().query().unwrap_or_default())
    }

    fn parse(query: &str) -> Result<Self, Problem> {
        let decode = |text: &str| unescape(&text.replace('+', " ")).map(Cow::into_owned);
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            decode(name).zip(decode(value))
        });
        let pairs: Option<Vec<_>> = pairs.collect();
        pairs.map(Self).ok_or_else(malformed_query)
    }

    /// Of names and values as they are.
    pub fn from_pairs(pairs: &[(&str, &str)]) -> Self {
        Self(pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect())
    }

    /// The first value of a name, whatever the name's case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// The query with `name` set to `value` behind all others, escaped.
    pub fn with(&self, name: &str, value: &str) -> String {
        let others = self.0.iter().filter(|(n, _)| !n.eq_ignore_ascii_case(name));
        let others = others.map(|(n, v)| (n.as_str(), v.as_str())).chain([(name, value)]);
        others.map(|(n, v)| format!("{}={}", escape(n), escape(v))).collect::<Vec<_>>().join("&")
    }
}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;
    use actix_web::{App, HttpResponse, web};
    use proptest::prelude::*;

    use super::*;

    #[actix_web::test]
    async fn a_segment_is_the_text_that_was_escaped_and_malformed_escapes_are_refused() {
        let app = App::new().route(
            "/users/{user}/balance",
            web::get().to(|req: HttpRequest| async move { path_segment(&req, "user").map(|u| HttpResponse::Ok().body(u)) }),
        );
        let app = actix_web::test::init_service(app).await;
        for (raw, text) in
            [("a%2Fb", "a/b"), ("..", ".."), ("%2e%2E", ".."), ("%25", "%"), ("a+b", "a+b"), ("%D0%B6", "ж"), ("%252F", "%2F")]
        {
            let request = TestRequest::with_uri(&format!("/users/{raw}/balance")).to_request();
            let body = actix_web::test::call_and_read_body(&app, request).await;
            assert_eq!(std::str::from_utf8(&body).unwrap(), text);
        }
        for raw in ["%", "%4", "%zz", "a%", "%ff", "%D0"] {
            let request = TestRequest::with_uri(&format!("/users/{raw}/balance")).to_request();
            let status = actix_web::test::call_service(&app, request).await.status();
            assert_eq!(status.as_u16(), 400, "{raw}");
        }
    }

    #[test]
    fn parameter_names_have_any_case_and_the_first_value_counts() {
        let params = Params::parse("UserId=a%20b+c&userid=other&&flag&x=1%2b1").unwrap();
        assert_eq!(params.get("userId"), Some("a b c"));
        assert_eq!(params.get("flag"), Some(""));
        assert_eq!(params.get("X"), Some("1+1"));
        assert_eq!(params.get("y"), None);
        assert_eq!(params.with("userID", "ж&"), "flag=&x=1%2B1&userID=%D0%B6%26");
        for bad in ["a=%", "%zz=1", "a=%ff"] {
            assert!(Params::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_was_escaped_comes_back(name in "[a-z]{1,5}", value in "\\PC*") {
            let query = Params::default().with(&name, &value);
            let params = Params::parse(&query).unwrap();
            prop_assert_eq!(params.get(&name), Some(value.as_str()));
            let escaped = escape(&value);
            prop_assert_eq!(unescape(&escaped), Some(value.into()));
        }

        #[test]
        fn a_query_that_passes_the_check_is_read_and_no_other(query in "([a-z]|%4|%41|%D0%B6|%D0|%ff|[%&=+ж]){0,12}|\\PC*") {
            prop_assert_eq!(check_query(&query).is_ok(), Params::parse(&query).is_ok());
        }
    }
}
