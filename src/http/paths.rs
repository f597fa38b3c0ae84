//! How a path's spelling is read: pure, over its raw bytes.
//!
//! As the original's router does, a route's own words are found in any letter case and before a last `/`. Of what is encoded only letters, digits,
//! `-`, `_` and `~` are decoded, which mean the same either way, and no dot segment is resolved: a segment stays the one segment it is
//! (`..`, `%2e%2e`, `a%2Fb`) and no path leads to another route.

use std::borrow::Cow;

/// A port's routes as patterns, `{…}` for a segment that is the client's own; one of words stands before one that would take its word for a name.
#[derive(Clone, Copy, Debug)]
pub struct Paths(&'static [&'static str]);

/// The only word of a route that stands where another one has a name.
const WORD_OR_NAME: &str = "events";

impl Paths {
    pub const fn new(patterns: &'static [&'static str]) -> Self {
        Self(patterns)
    }

    pub fn patterns(self) -> impl Iterator<Item = &'static str> {
        self.0.iter().copied()
    }

    /// The pattern of the route that a path leads to.
    pub fn pattern(self, path: &str) -> Option<&'static str> {
        self.as_documented(path).or_else(|| self.spelled(&decoded(path)))
    }

    /// The path as its route is documented; itself, where it has none.
    pub fn canonical(self, path: &str) -> Cow<'_, str> {
        if self.as_documented(path).is_some() {
            return path.into();
        }
        let decoded = decoded(path);
        let Some(pattern) = self.spelled(&decoded) else { return decoded };
        let own = |(part, segment): (&'static str, _)| if part.starts_with('{') { segment } else { part };
        let canonical = pattern.split('/').zip(decoded.split('/')).map(own).collect::<Vec<_>>().join("/");
        canonical.into()
    }

    /// The pattern of a path that is written as ours are, which nearly all are: each request is looked for here, twice.
    fn as_documented(self, path: &str) -> Option<&'static str> {
        // In another case it may be the route's own word.
        let is_own = |segment: &str| !segment.is_empty() && !segment.eq_ignore_ascii_case(WORD_OR_NAME) && !segment.contains('%');
        self.patterns().find(|pattern| is_instance(pattern, path, |part, segment| part == segment, is_own))
    }

    /// The pattern that a path is an instance of, in any letter case and before a last `/`.
    fn spelled(self, path: &str) -> Option<&'static str> {
        let without_last = path.strip_suffix('/').filter(|path| !path.is_empty() && !path.ends_with('/'));
        let path = without_last.unwrap_or(path);
        let is_own = |segment: &str| !segment.is_empty();
        self.patterns().find(|pattern| is_instance(pattern, path, str::eq_ignore_ascii_case, is_own))
    }
}

/// Segment by segment: `is_word` compares a pattern's words, `is_own` says what may stand for a name in braces.
fn is_instance(pattern: &str, path: &str, is_word: impl Fn(&str, &str) -> bool, is_own: impl Fn(&str) -> bool) -> bool {
    let mut segments = path.split('/');
    let fits = |part: &str, segment: &str| if part.starts_with('{') { is_own(segment) } else { is_word(part, segment) };
    pattern.split('/').all(|part| segments.next().is_some_and(|segment| fits(part, segment))) && segments.next().is_none()
}

/// Without the encoding of what needs none (RFC 3986, 6.2.2.2), `.` aside: others resolve dot segments.
fn decoded(path: &str) -> Cow<'_, str> {
    if !path.contains('%') {
        return path.into();
    }
    let mut plain = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('%') {
        plain.push_str(before);
        let hex = after.get(..2).filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        // What is no encoding must not become one by what is decoded behind it.
        let Some(byte) = hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) else { return path.into() };
        match byte.is_ascii_alphanumeric() || b"-_~".contains(&byte) {
            true => plain.push(char::from(byte)),
            false => plain.push_str(&rest[before.len()..before.len() + 3]),
        }
        rest = &after[2..];
    }
    plain.push_str(rest);
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stands_before_the_name_that_it_could_be() {
        const PATHS: Paths = Paths::new(&["/api/Orders", "/api/Orders/events", "/api/Orders/{orderId}"]);
        for (path, pattern, canonical) in [
            ("/api/Orders/EVENTS", "/api/Orders/events", "/api/Orders/events"),
            ("/api/orders/%65vents/", "/api/Orders/events", "/api/Orders/events"),
            ("/api/orders/Event", "/api/Orders/{orderId}", "/api/Orders/Event"),
            ("/API/ORDERS/", "/api/Orders", "/api/Orders"),
        ] {
            assert_eq!((PATHS.pattern(path), &*PATHS.canonical(path)), (Some(pattern), canonical), "{path}");
        }
        assert_eq!((PATHS.pattern("/health/live"), &*PATHS.canonical("/health/live")), (None, "/health/live"));
    }
}
