//! A user's name as clients give it: 1..=128 characters, none of them a control character.
//!
//! Both services and the events hold it; neither service owns users. May import nothing of ours.

use std::fmt;

use serde::Serialize;

/// The most characters (Unicode scalar values) a user id may have.
pub const USER_ID_CHARS_MAX: usize = 128;

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct UserId(String);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserIdError {
    #[error("userId must have 1 to 128 characters")]
    Length,
    #[error("userId must not contain control characters")]
    ControlCharacter,
}

impl UserId {
    pub fn new(text: impl Into<String>) -> Result<Self, UserIdError> {
        let text = text.into();
        let plain = text.len() <= USER_ID_CHARS_MAX && text.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        if plain && !text.is_empty() {
            return Ok(Self(text));
        }
        if text.is_empty() || text.chars().nth(USER_ID_CHARS_MAX).is_some() {
            return Err(UserIdError::Length);
        }
        if text.chars().any(char::is_control) {
            return Err(UserIdError::ControlCharacter);
        }
        Ok(Self(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn into_string(self) -> String {
        self.0
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_user_id_has_one_to_128_visible_characters() {
        assert!(UserId::new("u1").is_ok());
        assert!(UserId::new("ж".repeat(128)).is_ok());
        assert_eq!(UserId::new("").unwrap_err(), UserIdError::Length);
        assert_eq!(UserId::new("x".repeat(129)).unwrap_err(), UserIdError::Length);
        for bad in ["a\0b", "a\nb", "\u{7f}", "\u{85}"] {
            assert_eq!(UserId::new(bad).unwrap_err(), UserIdError::ControlCharacter, "{bad:?}");
        }
        assert!(UserId::new("a b/..%").is_ok());
    }

    proptest! {
        #[test]
        fn a_plain_name_is_judged_as_any_other(text in "[ -~]{0,140}|[\\x00-\\x7f]{0,4}|\\PC{0,140}|.{0,3}") {
            let length = (1..=USER_ID_CHARS_MAX).contains(&text.chars().count());
            let fit = length && !text.chars().any(char::is_control);
            prop_assert_eq!(UserId::new(text.as_str()).is_ok(), fit);
        }
    }
}
