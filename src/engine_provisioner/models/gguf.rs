//! What the header of a GGUF file says about the model in it. PURE.
//!
//! A GGUF file begins with key-value pairs and the list of its tensors; the weights follow. This reads
//! the first two, front to back, and keeps the few facts that an engine's settings depend on. The file
//! came from somewhere, so nothing in it decides how much is allocated: every count has a limit, every
//! length is skipped over in pieces of a fixed size, and the whole header has a budget in bytes.
//!
//! The list of tensors also says how long the file has to be, so one that was cut short is found here
//! rather than by an engine that crashes on it.

use std::fmt;
use std::io::{self, Read};

/// Largest header, in bytes. The vocabulary is in it: the largest known ones take some 20 MB.
pub const HEADER_BYTES_MAX: u64 = 256 << 20;
/// Most key-value pairs: known files have fewer than a hundred.
pub const PAIRS_MAX: u64 = 1 << 16;
/// Most tensors: a large mixture of experts has some tens of thousands.
pub const TENSORS_MAX: u64 = 1 << 20;
/// Longest text that is kept, in bytes: names of architectures and models.
pub const TEXT_BYTES_MAX: u64 = 1024;
/// Most dimensions of a tensor: ggml itself has four.
const DIMENSIONS_MAX: u32 = 8;
/// Arrays within arrays; known files have none.
const NESTING_MAX: u32 = 3;
/// What is skipped at once, in bytes.
const SCRATCH_BYTES: usize = 4096;
/// Where tensors begin when `general.alignment` does not say otherwise, in bytes.
const ALIGNMENT_DEFAULT: u64 = 32;

/// What is known of a model from its header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gguf {
    /// Format version: 2 or 3.
    pub version: u32,
    /// `llama`, `qwen2`, ...
    pub architecture: Option<String>,
    /// Name that its makers gave it.
    pub name: Option<String>,
    /// Longest context that it was trained for, in tokens.
    pub context_length: Option<u64>,
    /// Layers, which is what `--n-gpu-layers` counts.
    pub block_count: Option<u64>,
    /// Quantisation of most of its tensors, such as `Q4_K_M`.
    pub quantisation: Option<&'static str>,
    /// Weights in this file.
    pub parameters: u64,
    /// Tensors in this file.
    pub tensors: u64,
    /// Parts that the model was split into; 1 for a whole one.
    pub parts: u64,
    /// Length of the header, in bytes.
    pub header_bytes: u64,
    /// Length that the file must have at least, in bytes; unknown where a tensor's type is.
    pub file_bytes_min: Option<u64>,
}

/// Why a file is no usable GGUF.
#[derive(Debug)]
pub enum GgufError {
    /// It begins otherwise; the first bytes as they may be shown.
    NotGguf(String),
    /// A version or byte order that engines do not read either.
    Version(u32),
    /// It ends within its header.
    CutShort,
    /// A count or length that no model has.
    TooLarge(&'static str),
    /// A type or value that the format does not know.
    Malformed(&'static str),
    /// It could not be read.
    Io(io::Error),
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GgufError::NotGguf(first) => write!(f, "it is no GGUF file: it begins with {first:?}"),
            GgufError::Version(n) => write!(f, "GGUF version {n} is not supported (2 and 3 are)"),
            GgufError::CutShort => f.write_str("the file ends within its header"),
            GgufError::TooLarge(what) => write!(f, "its header is not believable: {what}"),
            GgufError::Malformed(what) => write!(f, "its header is malformed: {what}"),
            GgufError::Io(error) => write!(f, "cannot read it: {error}"),
        }
    }
}

impl std::error::Error for GgufError {}

impl From<io::Error> for GgufError {
    fn from(error: io::Error) -> GgufError {
        if error.kind() == io::ErrorKind::UnexpectedEof { GgufError::CutShort } else { GgufError::Io(error) }
    }
}

/// Reads the header from a file's beginning. Give it something buffered: it reads in small pieces.
///
/// # Errors
/// [`GgufError`]; whatever the bytes are, there is no panic and no allocation that they decide.
pub fn read(input: impl Read) -> Result<Gguf, GgufError> {
    let mut input = Input { input, read_bytes: 0 };
    let mut magic = [0; 4];
    let found = input.fill(&mut magic)?;
    if &magic != b"GGUF" {
        let first: String =
            String::from_utf8_lossy(&magic[..found]).chars().filter(|c| !c.is_control()).collect();
        return Err(GgufError::NotGguf(first));
    }
    let version = input.u32()?;
    if !(2..=3).contains(&version) {
        return Err(GgufError::Version(version));
    }
    let tensors = input.count(TENSORS_MAX, "too many tensors")?;
    let pairs = input.count(PAIRS_MAX, "too many keys")?;
    let mut gguf = Gguf { version, tensors, parts: 1, ..Gguf::default() };
    let mut alignment = ALIGNMENT_DEFAULT;
    for _ in 0..pairs {
        let key = input.text()?.ok_or(GgufError::TooLarge("a key longer than 1024 bytes"))?;
        let kind = input.u32()?;
        match (key.as_str(), input.value(kind)?) {
            ("general.architecture", Value::Text(text)) => gguf.architecture = Some(text),
            ("general.name", Value::Text(text)) => gguf.name = Some(text),
            ("general.file_type", Value::Whole(number)) => gguf.quantisation = file_type(number),
            ("split.count", Value::Whole(number)) => gguf.parts = number.max(1),
            ("general.alignment", Value::Whole(number)) => {
                if !number.is_power_of_two() || number > 1 << 20 {
                    return Err(GgufError::Malformed("general.alignment is no power of two"));
                }
                alignment = number;
            }
            // The prefix is the architecture, which most files name first, but need not.
            (key, Value::Whole(number)) if key.ends_with(".context_length") => {
                gguf.context_length = gguf.context_length.or(Some(number));
            }
            (key, Value::Whole(number)) if key.ends_with(".block_count") => {
                gguf.block_count = gguf.block_count.or(Some(number));
            }
            _ => {}
        }
    }
    let mut data_bytes = Some(0u64);
    for _ in 0..tensors {
        input.text()?.ok_or(GgufError::TooLarge("a tensor's name longer than 1024 bytes"))?;
        let dimensions = input.u32()?;
        if dimensions > DIMENSIONS_MAX {
            return Err(GgufError::TooLarge("a tensor of more than 8 dimensions"));
        }
        let mut weights = 1u64;
        for _ in 0..dimensions {
            weights = weights
                .checked_mul(input.u64()?)
                .ok_or(GgufError::TooLarge("a tensor beyond 2^64 weights"))?;
        }
        let kind = input.u32()?;
        let offset = input.u64()?;
        gguf.parameters = gguf.parameters.saturating_add(weights);
        let end = tensor_bytes(kind, weights).map(|bytes| offset.saturating_add(bytes));
        data_bytes = data_bytes.zip(end).map(|(a, b)| a.max(b));
    }
    gguf.header_bytes = input.read_bytes;
    gguf.file_bytes_min = data_bytes.map(|bytes| match bytes {
        0 => gguf.header_bytes,
        bytes => gguf.header_bytes.next_multiple_of(alignment).saturating_add(bytes),
    });
    Ok(gguf)
}

/// A value as far as it is kept.
enum Value {
    Whole(u64),
    Text(String),
    Other,
}

struct Input<R> {
    input: R,
    read_bytes: u64,
}

impl<R: Read> Input<R> {
    /// As much as there is, up to all of `bytes`.
    fn fill(&mut self, bytes: &mut [u8]) -> Result<usize, GgufError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.spend(filled as u64)?;
        Ok(filled)
    }

    fn spend(&mut self, bytes: u64) -> Result<(), GgufError> {
        self.read_bytes = self.read_bytes.saturating_add(bytes);
        if self.read_bytes > HEADER_BYTES_MAX {
            return Err(GgufError::TooLarge("longer than 256 MiB"));
        }
        Ok(())
    }

    fn exactly<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.spend(N as u64)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.exactly()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.exactly()?))
    }

    fn count(&mut self, max: u64, what: &'static str) -> Result<u64, GgufError> {
        match self.u64()? {
            count if count > max => Err(GgufError::TooLarge(what)),
            count => Ok(count),
        }
    }

    /// A text; `None` for one that is too long to keep, which is skipped.
    fn text(&mut self) -> Result<Option<String>, GgufError> {
        let length = self.u64()?;
        if length > TEXT_BYTES_MAX {
            self.skip(length)?;
            return Ok(None);
        }
        let mut bytes = [0; TEXT_BYTES_MAX as usize];
        let part = &mut bytes[..usize::try_from(length).unwrap_or(0)];
        self.input.read_exact(part)?;
        self.spend(length)?;
        // It is shown on terminals and kept in the catalogue.
        Ok(Some(String::from_utf8_lossy(part).chars().filter(|c| !c.is_control()).collect()))
    }

    fn skip(&mut self, bytes: u64) -> Result<(), GgufError> {
        self.spend(bytes)?;
        let mut scratch = [0; SCRATCH_BYTES];
        let mut left = bytes;
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(SCRATCH_BYTES).min(SCRATCH_BYTES);
            self.input.read_exact(&mut scratch[..part])?;
            left -= part as u64;
        }
        Ok(())
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        let negative = GgufError::Malformed("a negative number where a count belongs");
        Ok(match kind {
            0 => Value::Whole(u8::from_le_bytes(self.exactly()?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.exactly()?).into()),
            4 => Value::Whole(self.u32()?.into()),
            5 => match i32::from_le_bytes(self.exactly()?) {
                number if number < 0 => Value::Other,
                number => Value::Whole(u64::try_from(number).map_err(|_| negative)?),
            },
            8 => self.text()?.map_or(Value::Other, Value::Text),
            9 => {
                self.array(NESTING_MAX)?;
                Value::Other
            }
            10 => Value::Whole(self.u64()?),
            other => {
                self.skip(
                    scalar_bytes(other).ok_or(GgufError::Malformed("a type of value that is not known"))?,
                )?;
                Value::Other
            }
        })
    }

    fn array(&mut self, nesting: u32) -> Result<(), GgufError> {
        let kind = self.u32()?;
        let count = self.u64()?;
        if let Some(bytes) = scalar_bytes(kind) {
            return self.skip(count.saturating_mul(bytes));
        }
        // Each of these takes bytes of its own, so the budget ends what a large count begins.
        for _ in 0..count {
            match kind {
                8 => {
                    let length = self.u64()?;
                    self.skip(length)?;
                }
                9 if nesting > 0 => self.array(nesting - 1)?,
                9 => return Err(GgufError::TooLarge("arrays within arrays")),
                _ => return Err(GgufError::Malformed("a type of value that is not known")),
            }
        }
        Ok(())
    }
}

/// Bytes of a value whose type alone says how long it is.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Bytes that `weights` take: ggml stores most types in blocks of 32 or 256.
fn tensor_bytes(kind: u32, weights: u64) -> Option<u64> {
    let (block, bytes) = match kind {
        0 | 26 => (1, 4),
        1 | 25 | 30 => (1, 2),
        24 => (1, 1),
        27 | 28 => (1, 8),
        2 | 20 => (32, 18),
        3 => (32, 20),
        6 => (32, 22),
        7 => (32, 24),
        8 => (32, 34),
        9 => (32, 36),
        39 => (32, 17),
        10 => (256, 84),
        11 | 21 => (256, 110),
        12 => (256, 144),
        13 => (256, 176),
        14 => (256, 210),
        15 => (256, 292),
        16 | 35 => (256, 66),
        17 => (256, 74),
        18 => (256, 98),
        19 => (256, 50),
        22 => (256, 82),
        23 => (256, 136),
        29 => (256, 56),
        34 => (256, 54),
        _ => return None,
    };
    Some((weights / block).saturating_mul(bytes))
}

/// Names of `general.file_type`.
fn file_type(number: u64) -> Option<&'static str> {
    const NAMES: [&str; 39] = [
        "F32",
        "F16",
        "Q4_0",
        "Q4_1",
        "",
        "",
        "",
        "Q8_0",
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K_S",
        "Q3_K_M",
        "Q3_K_L",
        "Q4_K_S",
        "Q4_K_M",
        "Q5_K_S",
        "Q5_K_M",
        "Q6_K",
        "IQ2_XXS",
        "IQ2_XS",
        "Q2_K_S",
        "IQ3_XS",
        "IQ3_XXS",
        "IQ1_S",
        "IQ4_NL",
        "IQ3_S",
        "IQ3_M",
        "IQ2_S",
        "IQ2_M",
        "IQ4_XS",
        "IQ1_M",
        "BF16",
        "",
        "",
        "",
        "TQ1_0",
        "TQ2_0",
        "MXFP4_MOE",
    ];
    NAMES.get(usize::try_from(number).ok()?).copied().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }

    fn pair_u32(bytes: &mut Vec<u8>, key: &str, value: u32) {
        text(bytes, key);
        bytes.extend(4u32.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }

    /// A model of two tensors, with a vocabulary in between.
    fn sample(words: u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(5u64.to_le_bytes());
        text(&mut bytes, "general.architecture");
        bytes.extend(8u32.to_le_bytes());
        text(&mut bytes, "qwen2");
        text(&mut bytes, "tokenizer.ggml.tokens");
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend(words.to_le_bytes());
        (0..words).for_each(|n| text(&mut bytes, &format!("word{n}")));
        pair_u32(&mut bytes, "qwen2.context_length", 32_768);
        pair_u32(&mut bytes, "qwen2.block_count", 24);
        pair_u32(&mut bytes, "general.file_type", 15);
        for (name, kind, offset) in [("a", 12u32, 0u64), ("b", 0, 144)] {
            text(&mut bytes, name);
            bytes.extend(2u32.to_le_bytes());
            bytes.extend(256u64.to_le_bytes());
            bytes.extend(1u64.to_le_bytes());
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn facts_are_found_behind_a_vocabulary() {
        let bytes = sample(1000);
        let gguf = read(bytes.as_slice()).expect("a header");
        assert_eq!(gguf.architecture.as_deref(), Some("qwen2"));
        assert_eq!((gguf.context_length, gguf.block_count), (Some(32_768), Some(24)));
        assert_eq!((gguf.quantisation, gguf.parameters, gguf.parts), (Some("Q4_K_M"), 512, 1));
        assert_eq!(gguf.header_bytes, bytes.len() as u64);
        assert_eq!(gguf.file_bytes_min, Some((bytes.len() as u64).next_multiple_of(32) + 144 + 1024));
    }

    #[test]
    fn what_is_no_model_is_named() {
        for (bytes, why) in [
            (b"<!DOCTYPE html>".to_vec(), "begins with \"<!DO\""),
            (b"".to_vec(), "no GGUF"),
            (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
            (b"GGUF\0\0\0\x03".to_vec(), "version"),
            ([b"GGUF\x03\0\0\0".as_slice(), &[0xff; 16]].concat(), "too many tensors"),
        ] {
            let error = read(bytes.as_slice()).expect_err("no model").to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_header_cannot_ask_for_more_than_its_budget() {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        text(&mut bytes, "k");
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(10u32.to_le_bytes());
        bytes.extend(u64::MAX.to_le_bytes());
        // A source without end: only the budget stops it, before anything is read.
        let error = read(bytes.as_slice().chain(io::repeat(0))).expect_err("too large");
        assert!(matches!(error, GgufError::TooLarge(_)), "{error}");
    }

    proptest! {
        #[test]
        fn every_prefix_is_cut_short_and_nothing_else(cut in 4usize..400) {
            let whole = sample(4);
            let cut = cut.min(whole.len() - 1);
            prop_assert!(matches!(read(&whole[..cut]), Err(GgufError::CutShort)));
        }

        #[test]
        fn hostile_bytes_neither_panic_nor_hang(
            flips in proptest::collection::vec((8usize..400, any::<u8>()), 0..12),
            tail in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = sample(4);
            for (at, value) in flips {
                let at = at % bytes.len();
                bytes[at.max(8)] = value;
            }
            bytes.extend(tail);
            if let Ok(gguf) = read(bytes.as_slice()) {
                prop_assert!(gguf.header_bytes <= bytes.len() as u64);
            }
        }
    }
}
