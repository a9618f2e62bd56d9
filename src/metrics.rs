//! Metrics in the Prometheus text format 0.0.4.
//!
//! Programs keep plain counters where things happen and write them out when scraped. Label values
//! come from bounded sets only.

use std::fmt::Write;

/// `Content-Type` of a scrape.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Upper bounds, in seconds, for everything from a turn of the loop to a long answer.
pub const SECONDS_BUCKETS: [f64; 14] =
    [0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0];

/// A histogram over [`SECONDS_BUCKETS`].
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    counts: [u64; SECONDS_BUCKETS.len()],
    count: u64,
    sum_ns: u64,
}

impl Histogram {
    /// Adds one observation.
    pub fn observe_ns(&mut self, ns: u64) {
        let seconds = ns as f64 / 1e9;
        if let Some(bucket) = SECONDS_BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }

    /// Observations so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// Writes one scrape.
#[derive(Debug, Default)]
pub struct Scrape {
    text: String,
}

impl Scrape {
    /// A family of counters: `(labels, value)` each, labels such as `outcome="ok"`, often empty.
    pub fn counter(&mut self, name: &str, help: &str, samples: &[(&str, u64)]) {
        self.family(name, help, "counter");
        for (labels, value) in samples {
            self.sample(name, labels, *value as f64);
        }
    }

    /// A family of gauges, as [`Scrape::counter`].
    pub fn gauge(&mut self, name: &str, help: &str, samples: &[(&str, f64)]) {
        self.family(name, help, "gauge");
        for (labels, value) in samples {
            self.sample(name, labels, *value);
        }
    }

    /// One histogram without further labels.
    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.family(name, help, "histogram");
        let mut cumulative = 0;
        for (bound, count) in SECONDS_BUCKETS.iter().zip(histogram.counts) {
            cumulative += count;
            let _ = writeln!(self.text, "{name}_bucket{{le=\"{bound}\"}} {cumulative}");
        }
        let _ = writeln!(self.text, "{name}_bucket{{le=\"+Inf\"}} {}", histogram.count);
        let _ = writeln!(self.text, "{name}_sum {}", histogram.sum_ns as f64 / 1e9);
        let _ = writeln!(self.text, "{name}_count {}", histogram.count);
    }

    /// The scrape's text.
    #[must_use]
    pub fn finish(self) -> String {
        self.text
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) {
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: f64) {
        let _ = match labels {
            "" => writeln!(self.text, "{name} {value}"),
            labels => writeln!(self.text, "{name}{{{labels}}} {value}"),
        };
    }
}

/// A label value with the format's three escapes.
#[must_use]
pub fn label_value(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_reads_as_the_format_says() {
        let mut wait = Histogram::default();
        wait.observe_ns(2_000_000);
        wait.observe_ns(600_000_000_000);
        let mut scrape = Scrape::default();
        scrape.counter("x_total", "Things.", &[("outcome=\"ok\"", 3)]);
        scrape.gauge("x_nodes", "Nodes.", &[("", 2.0)]);
        scrape.histogram("x_wait_seconds", "Waiting.", &wait);
        let text = scrape.finish();
        for line in [
            "# TYPE x_total counter",
            "x_total{outcome=\"ok\"} 3",
            "x_nodes 2",
            "x_wait_seconds_bucket{le=\"0.001\"} 0",
            "x_wait_seconds_bucket{le=\"0.005\"} 1",
            "x_wait_seconds_bucket{le=\"120\"} 1",
            "x_wait_seconds_bucket{le=\"+Inf\"} 2",
            "x_wait_seconds_sum 600.002",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
