//! Fields to be sent, in the form in which they are sent: one buffer with a line for each.
//!
//! A message gets its fields from several places, one after the other, and most are copied from another
//! message. A buffer takes them without an allocation for each name and each value, and is appended to the
//! message as it is.

use std::fmt;

use super::head::Field;

/// Fields, each a line that ends with CR LF.
#[derive(Clone, Default)]
pub struct FieldLines {
    bytes: Vec<u8>,
    /// The bits of all names here, so that most questions for a name need no search.
    name_bits: u64,
}

impl FieldLines {
    /// None yet.
    #[must_use]
    pub fn new() -> FieldLines {
        FieldLines::default()
    }

    /// None yet, with room for so many bytes.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> FieldLines {
        FieldLines { bytes: Vec::with_capacity(bytes), name_bits: 0 }
    }

    /// Adds a field; a value that would end the line early is left out altogether.
    pub fn push(&mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        let (name, value) = (name.as_ref(), value.as_ref());
        push_field(&mut self.bytes, name, value);
        self.name_bits |= name_bit(name);
    }

    /// Adds a field of another message.
    pub fn copy(&mut self, field: &Field<'_>) {
        field.copy_to(&mut self.bytes);
        self.name_bits |= name_bit(field.name);
    }

    /// Adds a field whose value is a number.
    pub fn push_number(&mut self, name: &str, number: u64) {
        push_number_field(&mut self.bytes, name, number);
        self.name_bits |= name_bit(name.as_bytes());
    }

    /// With one more field.
    #[must_use]
    pub fn with(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> FieldLines {
        self.push(name, value);
        self
    }

    /// Adds all of `others`.
    pub fn extend(&mut self, others: &FieldLines) {
        self.bytes.extend_from_slice(&others.bytes);
        self.name_bits |= others.name_bits;
    }

    /// Name and value of each.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            // Names are tokens, from tables of ours or from heads that were parsed, and no value holds an LF.
            let end = memchr::memchr(b'\n', rest)?;
            let (line, behind) = rest.split_at(end + 1);
            rest = behind;
            let colon = memchr::memchr(b':', line)?;
            Some((&line[..colon], &line[colon + 2..line.len() - 2]))
        })
    }

    /// Whether there is a field of this name (any case).
    #[must_use]
    pub fn holds(&self, name: &[u8]) -> bool {
        self.name_bits & name_bit(name) != 0 && self.iter().any(|(own, _)| same_name(own, name))
    }

    /// The first field of this name (any case).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.iter().find(|(own, _)| same_name(own, name.as_bytes())).map(|(_, value)| value)
    }

    /// The lines.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for FieldLines {
    /// Names only: values may be secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|(name, _)| String::from_utf8_lossy(name))).finish()
    }
}

/// Of a set of names, in which most that are asked for are not. By length, and the last letter in any case: many
/// names begin with `x`.
pub(super) fn name_bit(name: &[u8]) -> u64 {
    let last = name.last().map_or(0, |byte| usize::from(byte | 0x20));
    1 << ((name.len() + last * 7) % 64)
}

/// Whether two names of fields are the same, in any case. Without a branch a byte: names that are as long as each
/// other mostly are.
#[must_use]
pub fn same_name(a: &[u8], b: &[u8]) -> bool {
    let differs = |(a, b): (&u8, &u8)| a.to_ascii_lowercase() ^ b.to_ascii_lowercase();
    a.len() == b.len() && a.iter().zip(b).map(differs).fold(0, |all, one| all | one) == 0
}

/// Writes one field; a value that would end the line early is left out altogether.
pub fn push_field(out: &mut Vec<u8>, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
    let (name, value) = (name.as_ref(), value.as_ref());
    if holds_control(value) && value.iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)) {
        return;
    }
    push_line(out, name, value);
}

fn push_line(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Whether a value holds a control character, eight bytes at a time: most are short, and none of them does.
fn holds_control(value: &[u8]) -> bool {
    const ONES: u64 = u64::from_ne_bytes([1; 8]);
    let mut words = value.chunks_exact(8);
    let in_words = words.by_ref().any(|word| {
        let word = u64::from_ne_bytes(word.try_into().unwrap_or_default());
        // The highest bit of a byte is set where taking 32 from it borrows, and it had none itself.
        word.wrapping_sub(ONES * 0x20) & !word & (ONES * 0x80) != 0
    });
    in_words || words.remainder().iter().any(|byte| *byte < 0x20)
}

/// Writes a field whose value is a number.
pub fn push_number_field(out: &mut Vec<u8>, name: &str, number: u64) {
    let mut digits = [0; NUMBER_DIGITS_MAX];
    push_line(out, name.as_bytes(), decimal(number, &mut digits));
}

/// Decimal digits of the largest `u64`.
const NUMBER_DIGITS_MAX: usize = 20;

/// The digits of a number. A message has several; the standard library's formatting takes ten times as long.
fn decimal(mut number: u64, digits: &mut [u8; NUMBER_DIGITS_MAX]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        digits[start] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &digits[start..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_field_that_would_become_two_is_left_out() {
        let mut fields = FieldLines::new();
        for (name, value) in [("A", "1\r\nB: 2"), ("A", "1\n"), ("A", "\0")] {
            fields.push(name, value);
        }
        assert_eq!(fields.as_bytes(), b"");
        fields.push("A", "");
        fields.push_number("N", 70);
        assert_eq!(fields.as_bytes(), b"A: \r\nN: 70\r\n");
    }

    proptest! {
        #[test]
        fn names_are_the_same_in_any_case(a in "[!-~]{0,40}", b in "[!-~]{0,3}", flips in any::<u64>()) {
            let flip = |(at, c): (usize, char)| match flips >> at & 1 {
                0 => c.to_ascii_lowercase(),
                _ => c.to_ascii_uppercase(),
            };
            let other: String = a.chars().enumerate().map(flip).collect();
            prop_assert!(same_name(a.as_bytes(), other.as_bytes()));
            prop_assert_eq!(name_bit(a.as_bytes()), name_bit(other.as_bytes()));
            let (short, other) = (a.get(..b.len()).unwrap_or_default(), &b);
            prop_assert_eq!(same_name(short.as_bytes(), other.as_bytes()), short.eq_ignore_ascii_case(other));
        }
    }

    #[test]
    fn only_what_ends_a_line_is_left_out_wherever_it_stands() {
        for (byte, at) in (0..=u8::MAX).flat_map(|byte| (0..20).map(move |at| (byte, at))) {
            let mut value = [b'v'; 20];
            value[at] = byte;
            let is_there = !FieldLines::new().with("A", value).as_bytes().is_empty();
            assert_eq!(is_there, !matches!(byte, b'\r' | b'\n' | 0), "{byte} at {at}");
        }
    }

    #[test]
    fn printing_shows_no_value() {
        let fields = FieldLines::new().with("Authorization", "Bearer secret");
        assert_eq!(format!("{fields:?}"), "[\"Authorization\"]");
    }

    #[test]
    fn numbers_are_written_as_they_are_read() {
        for number in [0, 7, 10, 409, 65_536, u64::MAX] {
            let mut fields = FieldLines::new();
            fields.push_number("N", number);
            assert_eq!(fields.as_bytes(), format!("N: {number}\r\n").as_bytes());
        }
    }

    proptest! {
        #[test]
        fn what_was_pushed_is_found_in_order(fields in prop::collection::vec(("[A-Za-z-]{1,70}", "[ -~]{0,9}"), 0..9)) {
            let mut lines = FieldLines::new();
            for (name, value) in &fields {
                lines.push(name, value);
            }
            let found: Vec<_> = lines.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
            let wanted: Vec<_> =
                fields.iter().map(|(name, value)| (name.clone().into_bytes(), value.clone().into_bytes())).collect();
            prop_assert_eq!(found, wanted);
            for (name, _) in &fields {
                prop_assert!(lines.holds(name.to_uppercase().as_bytes()));
                let longer = format!("{name}x");
                let is_there = fields.iter().any(|(own, _)| own.eq_ignore_ascii_case(&longer));
                prop_assert_eq!(lines.holds(longer.as_bytes()), is_there);
            }
        }
    }
}
