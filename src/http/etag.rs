//! `If-None-Match`.

use actix_web::HttpRequest;
use actix_web::http::header::IF_NONE_MATCH;

/// Whether the client's copy is the current one: `etag` (with its quotes) is in the list, or the list is `*`.
/// Compared weakly, as RFC 9110 asks; what is malformed matches nothing.
pub fn matches(req: &HttpRequest, etag: &str) -> bool {
    let mut lines = req.headers().get_all(IF_NONE_MATCH).filter_map(|value| value.to_str().ok());
    lines.any(|line| list_has(line, etag))
}

fn list_has(list: &str, etag: &str) -> bool {
    if list.trim() == "*" {
        return true;
    }
    let mut rest = list;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let tag = rest.strip_prefix("W/").unwrap_or(rest);
        let Some(opened) = tag.strip_prefix('"') else { return false };
        let Some(end) = opened.find('"') else { return false };
        if &tag[..end + 2] == etag {
            return true;
        }
        rest = &opened[end + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_found_anywhere_in_the_list() {
        for list in ["\"a\"", "*", " * ", "W/\"a\"", "\"b\", \"a\"", "\"b,\",W/\"x\" ,\"a\"", ",,\"a\""] {
            assert!(list_has(list, "\"a\""), "{list}");
        }
        for list in ["", "a", "\"b\"", "\"a", "\"b\" x \"a\"", "w/\"a\"", "\"*\""] {
            assert!(!list_has(list, "\"a\""), "{list}");
        }
    }
}
