//! Money: whole minor units inside, decimal text at the edge.
//!
//! An [`Amount`] is constructed and checked, never assembled: it is read from the text of a JSON number (or of a JSON
//! string that holds one), never through a float, and written back without needless zeros. May import nothing of ours.
//!
//! What clients usually write, plain digits with at most two decimals, is read digit by digit; bigdecimal reads whatever else JSON
//! calls a number. A property test holds the two together, and what is written against bigdecimal too.

use std::fmt;

use bigdecimal::{BigDecimal, ToPrimitive, num_bigint::BigInt};
use serde::{Deserialize, Serialize};

/// Decimals of the one configured currency.
const SCALE: i64 = 2;

/// The largest amount one order or deposit may have, in minor units: 9 999 999 999.99.
pub const AMOUNT_MAX_MINOR: i64 = 999_999_999_999;

/// A sum of money in minor units (cents), of any sign: a balance, or a signed ledger entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Minor(pub i64);

/// What one order costs or one deposit brings: 0.01 ..= 9 999 999 999.99, in minor units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(i64);

/// Why a text is no [`Amount`]; the variants are in the order in which they are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    #[error("Amount must be a JSON number or a string that holds one")]
    NotANumber,
    #[error("Amount must be positive")]
    NotPositive,
    #[error("Amount must have at most two decimals")]
    Precision,
    #[error("Amount must be at most 9999999999.99")]
    TooLarge,
}

impl Amount {
    /// Reads the text of a JSON number. Linear in the text's length whatever its exponent says.
    ///
    /// Decided in this order: JSON grammar, sign (zero counts as not positive), decimals, size.
    pub fn from_json_number(text: &str) -> Result<Self, AmountError> {
        match plain_minor(text.as_bytes()).and_then(Self::from_minor) {
            Some(amount) => Ok(amount),
            None => Self::from_any_number(text),
        }
    }

    fn from_any_number(text: &str) -> Result<Self, AmountError> {
        let number = Number::parse(text).ok_or(AmountError::NotANumber)?;
        if number.negative || number.digits.is_empty() {
            return Err(AmountError::NotPositive);
        }
        if number.exponent < -SCALE {
            return Err(AmountError::Precision);
        }
        // Ten digits stand before the point of the maximum; what is longer need not be computed to be refused.
        if (number.digits.len() as i64).saturating_add(number.exponent) > 10 {
            return Err(AmountError::TooLarge);
        }
        let digits: BigInt = number.digits.parse().map_err(|_| AmountError::NotANumber)?;
        let hundred = BigDecimal::from(10i64.pow(SCALE as u32));
        let minor = (BigDecimal::new(digits, -number.exponent) * hundred).to_i64();
        minor.and_then(Self::from_minor).ok_or(AmountError::TooLarge)
    }

    /// `None` outside 1 ..= [`AMOUNT_MAX_MINOR`].
    pub fn from_minor(minor: i64) -> Option<Self> {
        (1..=AMOUNT_MAX_MINOR).contains(&minor).then_some(Self(minor))
    }

    pub fn minor(self) -> i64 {
        self.0
    }
}

/// The minor units of a plain text: at most ten digits without a needless zero before the point, one or two behind it or no point.
/// `None` for any other text, number or not.
fn plain_minor(text: &[u8]) -> Option<i64> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &b"0"[..]),
    };
    let leads = !whole.is_empty() && (whole.len() == 1 || whole[0] != b'0');
    if !leads || whole.len() > 10 || !(1..=SCALE as usize).contains(&fraction.len()) {
        return None;
    }
    let mut minor = 0;
    for byte in whole.iter().chain(fraction) {
        if !byte.is_ascii_digit() {
            return None;
        }
        minor = minor * 10 + i64::from(byte - b'0');
    }
    Some(if fraction.len() == 1 { minor * 10 } else { minor })
}

/// The parts of a JSON number's text: its significant digits without zeros at either end, and their power of ten.
struct Number {
    negative: bool,
    digits: String,
    exponent: i64,
}

impl Number {
    fn parse(text: &str) -> Option<Self> {
        let (negative, rest) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let (mantissa, exponent) = match rest.find(['e', 'E']) {
            Some(at) => (&rest[..at], Some(&rest[at + 1..])),
            None => (rest, None),
        };
        let (whole, fraction) = match mantissa.split_once('.') {
            Some((_, "")) => return None,
            Some((whole, fraction)) => (whole, fraction),
            None => (mantissa, ""),
        };
        let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || (whole.len() > 1 && whole.starts_with('0')) || !all_digits(whole) || !all_digits(fraction) {
            return None;
        }
        let exponent = match exponent {
            Some(text) => saturating_exponent(text)?,
            None => 0,
        };
        let mut digits = String::with_capacity(whole.len() + fraction.len());
        digits.push_str(whole);
        digits.push_str(fraction);
        let significant = digits.trim_end_matches('0');
        let trimmed = (digits.len() - significant.len()) as i64;
        let exponent = exponent.saturating_add(trimmed).saturating_sub(fraction.len() as i64);
        let digits = significant.trim_start_matches('0').to_owned();
        Some(Self { negative, digits, exponent })
    }
}

/// An exponent of any length; what lies beyond ±10^9 decides nothing further.
fn saturating_exponent(text: &str) -> Option<i64> {
    const FAR: i64 = 1_000_000_000;
    let (sign, digits) = match text.as_bytes().first()? {
        b'-' => (-1, &text[1..]),
        b'+' => (1, &text[1..]),
        _ => (1, text),
    };
    if digits.is_empty() {
        return None;
    }
    let mut value = 0i64;
    for byte in digits.bytes() {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = (value * 10 + i64::from(byte - b'0')).min(FAR);
    }
    Some(sign * value)
}

impl From<Amount> for Minor {
    fn from(amount: Amount) -> Self {
        Self(amount.0)
    }
}

impl Minor {
    /// The value as a decimal with two places.
    pub fn to_decimal(self) -> BigDecimal {
        BigDecimal::new(BigInt::from(self.0), SCALE)
    }
}

/// A decimal text in place; the longest is that of `i64::MIN`, with a sign and a point.
struct Text {
    bytes: [u8; 24],
    start: usize,
}

impl Text {
    fn of(minor: Minor) -> Self {
        let mut text = Self { bytes: [0; 24], start: 24 };
        let units = minor.0.unsigned_abs();
        let (mut whole, cents) = (units / 100, (units % 100) as u8);
        if cents != 0 {
            if cents % 10 != 0 {
                text.put(b'0' + cents % 10);
            }
            text.put(b'0' + cents / 10);
            text.put(b'.');
        }
        loop {
            text.put(b'0' + (whole % 10) as u8);
            whole /= 10;
            if whole == 0 {
                break;
            }
        }
        if minor.0 < 0 {
            text.put(b'-');
        }
        text
    }

    /// From the end to the start.
    fn put(&mut self, byte: u8) {
        self.start -= 1;
        self.bytes[self.start] = byte;
    }

    fn as_str(&self) -> &str {
        // Cannot fail: digits, a point and a sign.
        std::str::from_utf8(&self.bytes[self.start..]).expect("ASCII")
    }
}

/// Decimal text without needless zeros: `0`, `100.5`, `-3.07`.
impl fmt::Display for Minor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Text::of(*self).as_str())
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Minor(self.0).fmt(f)
    }
}

/// A JSON number with exactly the digits of [`fmt::Display`].
impl Serialize for Minor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = Text::of(*self);
        let raw: &serde_json::value::RawValue = serde_json::from_str(text.as_str()).map_err(serde::ser::Error::custom)?;
        raw.serialize(serializer)
    }
}

impl Serialize for Amount {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Minor(self.0).serialize(serializer)
    }
}

/// From a JSON number or string, by its text; works with `serde_json` readers only.
impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = <&serde_json::value::RawValue>::deserialize(deserializer)?;
        Self::from_json(raw.get()).map_err(serde::de::Error::custom)
    }
}

impl Amount {
    /// Reads a JSON value's text: a number, or a string that holds a number's text.
    pub fn from_json(raw: &str) -> Result<Self, AmountError> {
        if raw.starts_with('"') {
            let text: String = serde_json::from_str(raw).map_err(|_| AmountError::NotANumber)?;
            Self::from_json_number(&text)
        } else {
            Self::from_json_number(raw)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<String, AmountError> {
        Amount::from_json(text).map(|a| a.to_string())
    }

    #[test]
    fn amounts_come_back_without_needless_zeros() {
        for (wire, back) in [
            ("0.1", "0.1"),
            ("100.50", "100.5"),
            ("1.000", "1"),
            ("1e2", "100"),
            ("1E+2", "100"),
            ("12.3e-1", "1.23"),
            ("9999999999.99", "9999999999.99"),
            ("999999999999e-2", "9999999999.99"),
            ("\"100.5\"", "100.5"),
            ("\"\\u0031\"", "1"),
            ("10.00e0", "10"),
        ] {
            assert_eq!(read(wire).as_deref(), Ok(back), "{wire}");
        }
        assert_eq!(Minor(0).to_string(), "0");
        assert_eq!(Minor(-307).to_string(), "-3.07");
        assert_eq!(Minor(-50).to_string(), "-0.5");
        assert_eq!(Minor(1_000_000).to_string(), "10000");
    }

    #[test]
    fn what_is_no_amount_is_refused_in_the_order_json_sign_decimals_size() {
        use AmountError::*;
        for (wire, why) in [
            ("abc", NotANumber),
            ("+1", NotANumber),
            ("01", NotANumber),
            ("1.", NotANumber),
            (".5", NotANumber),
            ("1e", NotANumber),
            ("\"\"", NotANumber),
            ("\" 1\"", NotANumber),
            ("null", NotANumber),
            ("true", NotANumber),
            ("NaN", NotANumber),
            ("0", NotPositive),
            ("-0", NotPositive),
            ("0e5", NotPositive),
            ("0.000", NotPositive),
            ("0e-999999999999", NotPositive),
            ("-1", NotPositive),
            ("-0.001", NotPositive),
            ("-1e999999999", NotPositive),
            ("0.001", Precision),
            ("10000000000.001", Precision),
            ("1e-999999999", Precision),
            ("1e-99999999999999999999999999", Precision),
            ("10000000000", TooLarge),
            ("1e10", TooLarge),
            ("1e999999999", TooLarge),
            ("1e99999999999999999999999999", TooLarge),
        ] {
            assert_eq!(read(wire), Err(why), "{wire}");
        }
    }

    #[test]
    fn an_exponent_undoes_any_number_of_zeros() {
        let long = format!("0.{}1e5000", "0".repeat(4999));
        assert_eq!(read(&long).as_deref(), Ok("1"));
        let long = format!("1{}e-5000", "0".repeat(5000));
        assert_eq!(read(&long).as_deref(), Ok("1"));
    }

    proptest! {
        #[test]
        fn what_is_read_digit_by_digit_is_what_bigdecimal_reads(text in "-?[0-9]{0,12}(\\.[0-9]{0,4})?") {
            prop_assert_eq!(Amount::from_json_number(&text), Amount::from_any_number(&text));
        }

        #[test]
        fn what_is_written_is_what_bigdecimal_writes(minor in any::<i64>(), small in -100_000i64..100_000) {
            for minor in [Minor(minor), Minor(small), Minor(small * 100), Minor(i64::MIN), Minor(i64::MAX)] {
                let text = minor.to_decimal().normalized().to_plain_string();
                prop_assert_eq!(minor.to_string(), text.as_str());
                prop_assert_eq!(serde_json::to_string(&minor).unwrap(), text);
            }
        }

        #[test]
        fn every_amount_survives_the_wire(minor in 1..=AMOUNT_MAX_MINOR, zeros in 0usize..4) {
            let amount = Amount::from_minor(minor).unwrap();
            let text = amount.to_string();
            prop_assert_eq!(Amount::from_json(&text), Ok(amount));
            prop_assert_eq!(Amount::from_json(&format!("{minor}e-2")), Ok(amount));
            let padded = if text.contains('.') { format!("{text}{}", "0".repeat(zeros)) } else { text };
            prop_assert_eq!(Amount::from_json(&padded), Ok(amount));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC*") {
            let _ = Amount::from_json(&text);
        }

        #[test]
        fn the_reader_agrees_with_json_on_what_a_number_is(text in "-?[0-9]{1,3}(\\.[0-9]{0,3})?([eE][+-]?[0-9]{0,3})?") {
            let json = serde_json::from_str::<&serde_json::value::RawValue>(&text).is_ok();
            prop_assert_eq!(Amount::from_json(&text) != Err(AmountError::NotANumber), json);
        }
    }
}
