//! Bytes on their way to a socket.

use std::io;

use crate::reactor::stream::Stream;

/// With this many bytes in a buffer its source is not read.
pub const HIGH_WATER_BYTES: usize = 64 * 1024;
/// Below this many bytes it is read again.
pub const LOW_WATER_BYTES: usize = 16 * 1024;
/// An empty buffer that grew beyond this gives its memory back: idle connections stay small.
const KEEP_BYTES: usize = 2 * 1024;

/// Empty buffers that are kept for the next who needs one, and the largest that is kept, in bytes: together
/// 256 KiB. A request takes three, each for some microseconds; most are so small, and asking the allocator for
/// each would cost more than filling them.
const SPARES_MAX: usize = 64;
const SPARE_BYTES_MAX: usize = 4 * 1024;

/// Memory of buffers that nobody needs at the moment.
#[derive(Debug, Default)]
pub struct Spares {
    empty: Vec<Vec<u8>>,
}

impl Spares {
    /// An empty buffer, mostly one that has memory.
    #[must_use]
    pub fn take(&mut self) -> Vec<u8> {
        self.empty.pop().unwrap_or_default()
    }

    /// Takes back the memory of a buffer whose bytes are needed no more.
    pub fn give(&mut self, mut buffer: Vec<u8>) {
        if self.empty.len() < SPARES_MAX && (1..=SPARE_BYTES_MAX).contains(&buffer.capacity()) {
            buffer.clear();
            self.empty.push(buffer);
        }
    }
}

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

    /// Where a producer appends; a buffer without memory gets some that is spare.
    pub fn end_with(&mut self, spares: &mut Spares) -> &mut Vec<u8> {
        if self.bytes.capacity() == 0 {
            self.bytes = spares.take();
        }
        &mut self.bytes
    }

    /// Gives the memory of an empty buffer away.
    pub fn rest(&mut self, spares: &mut Spares) {
        if self.is_empty() {
            spares.give(std::mem::take(&mut self.bytes));
            self.written = 0;
        }
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
