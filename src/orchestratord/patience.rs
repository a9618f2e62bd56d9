//! How long a client is willing to wait, as its request's header fields say. Pure.
//!
//! `X-Llorch-Wait-Ms` is the longest wait for a slot; `X-Llorch-Deadline-Ms` is the longest time from the
//! request to the last byte of the answer, the wait included. Both only shorten what is configured.

use crate::http::head::Fields;

use super::refusal::Refusal;

/// Longest wait for a slot.
pub const WAIT_FIELD: &str = "x-llorch-wait-ms";
/// Longest time altogether.
pub const DEADLINE_FIELD: &str = "x-llorch-deadline-ms";

/// What a client is willing to wait, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientPatience {
    /// For a slot.
    pub wait_ms: Option<u64>,
    /// Altogether.
    pub total_ms: Option<u64>,
}

impl ClientPatience {
    /// Reads the fields of a request.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for what is no number, [`Refusal::Deadline`] for a deadline that has passed.
    pub fn read(fields: &Fields) -> Result<ClientPatience, Refusal> {
        let number = |name: &str| {
            let value = fields.get(name).map(|value| value.trim().parse::<u64>());
            value
                .transpose()
                .map_err(|_| Refusal::Invalid(format!("{name} must be a number of milliseconds")))
        };
        let patience = ClientPatience { wait_ms: number(WAIT_FIELD)?, total_ms: number(DEADLINE_FIELD)? };
        if patience.total_ms == Some(0) {
            return Err(Refusal::Deadline("X-Llorch-Deadline-Ms: no time is left".into()));
        }
        Ok(patience)
    }

    /// The longest wait for a slot.
    #[must_use]
    pub fn wait_ms_max(&self) -> u64 {
        self.wait_ms.into_iter().chain(self.total_ms).min().unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    fn read(fields: &str) -> Result<ClientPatience, Refusal> {
        let text = format!("POST /v1/completions HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
        let head = parse_request(text.as_bytes()).expect("a good head");
        ClientPatience::read(&head.fields)
    }

    #[test]
    fn the_shorter_of_both_bounds_the_wait() {
        let none = read("").expect("nothing said");
        assert_eq!((none, none.wait_ms_max()), (ClientPatience::default(), u64::MAX));
        let both = read("X-Llorch-Wait-Ms: 500\r\nX-LLORCH-DEADLINE-MS:  300 \r\n").expect("numbers");
        assert_eq!((both.total_ms, both.wait_ms_max()), (Some(300), 300));
        assert_eq!(read("X-Llorch-Wait-Ms: 0\r\n").expect("no wait at all").wait_ms_max(), 0);
        assert!(matches!(read("X-Llorch-Deadline-Ms: 0\r\n"), Err(Refusal::Deadline(_))));
        for bad in ["-1", "1s", "", "99999999999999999999999"] {
            let refused = read(&format!("X-Llorch-Wait-Ms: {bad}\r\n"));
            assert!(matches!(refused, Err(Refusal::Invalid(_))), "{bad}: {refused:?}");
        }
    }
}
