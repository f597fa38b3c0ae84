//! What is wrong with the settings: all of it, a line each, and never a secret.

use std::fmt;

/// Every mistake found; each is one line that begins with the setting's key or variable, or with the flag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// `name` is a key, a variable or a flag; neither it nor `problem` may hold a line break.
    pub(super) fn add(&mut self, name: impl fmt::Display, problem: impl fmt::Display) {
        self.0.push(format!("{name}: {problem}"));
    }

    /// `Err` unless there are none.
    pub(super) fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }

    pub fn lines(&self) -> &[String] {
        &self.0
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// A value that is no secret, for a message: in quotes, on one line, at most 60 characters.
///
/// A text that looks like a URL with a password in it is not shown, whatever setting it was given for.
pub(super) fn shown(value: &str) -> String {
    if value.contains('@') {
        return "the value (not shown: it may hold a password)".into();
    }
    match value.char_indices().nth(60) {
        None => format!("{value:?}"),
        Some((end, _)) => format!("{:?}…", &value[..end]),
    }
}

/// `, did you mean …?` where one of the known names is near.
pub(super) fn suggestion<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let given = given.to_lowercase();
    let near = known.into_iter().map(|name| (distance(&given, &name.to_lowercase()), name)).min();
    match near {
        Some((far, name)) if far <= 1 + given.chars().count() / 6 => format!(", did you mean {name}?"),
        _ => String::new(),
    }
}

/// Levenshtein's: how many characters to insert, remove or replace.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_near_name_is_suggested_and_a_far_one_is_not() {
        let known = ["gateway.listen", "orders.listen"];
        assert_eq!(suggestion("gatway.listen", known), ", did you mean gateway.listen?");
        assert_eq!(suggestion("GATEWAY.LISTEN", known), ", did you mean gateway.listen?");
        assert_eq!(suggestion("smtp.password", known), "");
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "abc"), 3);
    }

    #[test]
    fn a_shown_value_is_short_on_one_line_and_holds_no_password() {
        assert_eq!(shown("a\nb"), r#""a\nb""#);
        assert!(shown(&"ж".repeat(500)).chars().count() < 70);
        assert!(!shown("postgres://u:hunter2@h/d").contains("hunter2"));
    }
}
