//! SHA-256, which names what is in the cache: the value, and the work of computing it over a file.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Bytes that are hashed at once: large enough for few calls, small enough for a core's own cache.
const PIECE_BYTES: usize = 256 << 10;

/// A SHA-256, written `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Reads `sha256:...`, or the digits alone.
    ///
    /// # Errors
    /// What is allowed.
    pub fn parse(text: &str) -> Result<Digest, String> {
        let allowed = || "allowed is sha256: and 64 hexadecimal digits".to_string();
        let text = text.trim();
        let hex = match text.split_once(':') {
            Some((algorithm, hex)) if algorithm.eq_ignore_ascii_case("sha256") => hex,
            Some(_) => return Err(allowed()),
            None => text,
        };
        if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(allowed());
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).map_err(|_| allowed())?;
        }
        Ok(Digest(bytes))
    }

    /// The 64 digits, as they name a file.
    #[must_use]
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Of a few bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::new();
        hasher.context.update(bytes);
        hasher.finish()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        Digest::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Hashes a file from its beginning, as far as it is there.
///
/// What is hashed is read back from the file rather than taken from the network on its way: the digest
/// then is that of the file, several connections can fill it out of order, and a download that is
/// continued hashes what it has while the rest arrives. What was just written is read from memory.
pub(super) struct Hasher {
    context: ring::digest::Context,
    done_bytes: u64,
    piece: Vec<u8>,
}

impl Hasher {
    pub(super) fn new() -> Hasher {
        Hasher {
            context: ring::digest::Context::new(&ring::digest::SHA256),
            done_bytes: 0,
            piece: Vec::new(),
        }
    }

    /// How far it is.
    pub(super) fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Goes on up to `end`, but not further than one piece.
    pub(super) fn advance(&mut self, file: &File, end: u64) -> io::Result<()> {
        self.piece.resize(PIECE_BYTES, 0);
        let length =
            usize::try_from(end.saturating_sub(self.done_bytes)).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
        let piece = &mut self.piece[..length];
        file.read_exact_at(piece, self.done_bytes)?;
        self.context.update(piece);
        self.done_bytes += length as u64;
        Ok(())
    }

    pub(super) fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.context.finish().as_ref());
        Digest(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_read_as_it_is_written() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(Digest::parse(&digest.to_string()), Ok(digest));
        assert_eq!(Digest::parse(&digest.hex().to_uppercase()), Ok(digest));
        for bad in ["", "sha256:", "md5:abc", "sha256:xyz", &"é".repeat(32), &digest.hex()[1..]] {
            assert!(Digest::parse(bad).is_err(), "{bad}");
        }
    }
}
