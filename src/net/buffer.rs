//! Bytes on their way to a socket.

use std::io;

use crate::reactor::stream::Stream;

/// With this many bytes in a buffer its source is not read.
pub const HIGH_WATER_BYTES: usize = 64 * 1024;
/// Below this many bytes it is read again.
pub const LOW_WATER_BYTES: usize = 16 * 1024;
/// An empty buffer that grew beyond this gives its memory back: idle connections stay small.
const KEEP_BYTES: usize = 2 * 1024;

/// A buffer between a producer and a stream.
#[derive(Debug, Default)]
pub struct OutBuffer {
    bytes: Vec<u8>,
    written: usize,
}

impl OutBuffer {
    /// Bytes that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where a producer appends.
    pub fn end(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Writes what the stream takes. Returns how much that was.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn flush(&mut self, stream: &mut Stream) -> io::Result<usize> {
        let mut total = 0;
        while self.written < self.bytes.len() {
            let length = stream.write(&self.bytes[self.written..])?;
            if length == 0 {
                break;
            }
            self.written += length;
            total += length;
        }
        if self.is_empty() {
            self.bytes.clear();
            self.written = 0;
            if self.bytes.capacity() > KEEP_BYTES {
                self.bytes = Vec::new();
            }
        } else if self.written > LOW_WATER_BYTES
            && (self.len() <= HIGH_WATER_BYTES || self.written >= self.len())
        {
            // Little is moved, or what has been written pays for it: a response of our own may be large.
            self.bytes.drain(..self.written);
            self.written = 0;
        }
        Ok(total)
    }
}
