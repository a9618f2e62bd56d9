//! What is counted of requests for the metrics, by model where that is bounded. Pure.
//!
//! A model has a label of its own from the first request on that an engine was given, as long as there
//! are fewer than [`LABELS_MAX`]; what clients merely ask for makes no labels.

use std::collections::BTreeMap;

use crate::metrics::{Histogram, Scrape, label_value};
use crate::time::Mono;

use super::admission::Priority;
use super::core::Core;

/// Models with a label of their own; the others share `other`.
pub const LABELS_MAX: usize = 100;
/// Label of the models beyond these.
const OTHER: &str = "other";
/// Label of requests that name no model.
const UNNAMED: &str = "unnamed";

/// What was measured of an exchange with an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Metered {
    /// When the first event of a stream came.
    pub first_token: Option<Mono>,
    /// Tokens of the prompt, where the engine told.
    pub tokens_in: Option<u64>,
    /// Tokens of the answer, where the engine told.
    pub tokens_out: Option<u64>,
}

/// How a request ended, as far as metrics tell it by model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Answered,
    Withdrawn,
    Broken,
    Refused,
}

const ENDED: [(Ended, &str); 4] = [
    (Ended::Answered, "answered"),
    (Ended::Withdrawn, "withdrawn"),
    (Ended::Broken, "broken"),
    (Ended::Refused, "refused"),
];

/// Counters by model, and durations over all of them.
#[derive(Debug, Default)]
pub struct Meters {
    by_model: BTreeMap<String, ModelCounts>,
    first_token: Histogram,
}

#[derive(Debug, Default)]
struct ModelCounts {
    ended: [u64; ENDED.len()],
    tokens_in: u64,
    tokens_out: u64,
}

impl Meters {
    /// An engine was given a request for this model.
    pub(super) fn dispatched(&mut self, model: Option<&str>) {
        let name = model.unwrap_or(UNNAMED);
        if !self.by_model.contains_key(name) && self.by_model.len() < LABELS_MAX {
            self.by_model.insert(name.to_string(), ModelCounts::default());
        }
    }

    pub(super) fn ended(&mut self, model: Option<&str>, how: Ended) {
        let at = ENDED.iter().position(|(ended, _)| *ended == how).unwrap_or_default();
        self.change(model, |counts| counts.ended[at] += 1);
    }

    /// Something was measured of an exchange for a request that was asked for at `since`.
    pub(super) fn metered(&mut self, model: Option<&str>, metered: Metered, since: Mono) {
        if let Some(first) = metered.first_token {
            self.first_token.observe_ns(first.ns_since(since));
        }
        self.change(model, |counts| {
            counts.tokens_in += metered.tokens_in.unwrap_or(0);
            counts.tokens_out += metered.tokens_out.unwrap_or(0);
        });
    }

    fn change(&mut self, model: Option<&str>, change: impl FnOnce(&mut ModelCounts)) {
        match self.by_model.get_mut(model.unwrap_or(UNNAMED)) {
            Some(counts) => change(counts),
            // The one label beyond the limit.
            None => change(self.by_model.entry(OTHER.to_string()).or_default()),
        }
    }

    fn scrape(&self, scrape: &mut Scrape) {
        let mut requests = Vec::new();
        let (mut tokens_in, mut tokens_out) = (Vec::new(), Vec::new());
        for (model, counts) in &self.by_model {
            let label = format!("model=\"{}\"", label_value(model));
            for ((_, outcome), count) in ENDED.iter().zip(counts.ended) {
                requests.push((format!("{label},outcome=\"{outcome}\""), count));
            }
            tokens_in.push((label.clone(), counts.tokens_in));
            tokens_out.push((label, counts.tokens_out));
        }
        let mut counter = |name, help, samples: &[(String, u64)]| {
            let samples: Vec<(&str, u64)> =
                samples.iter().map(|(label, count)| (label.as_str(), *count)).collect();
            scrape.counter(name, help, &samples);
        };
        counter(
            "orchestratord_model_requests_total",
            "Requests by model and outcome; models beyond the first hundred share a label.",
            &requests,
        );
        counter("orchestratord_prompt_tokens_total", "Tokens of prompts, where engines told.", &tokens_in);
        counter(
            "orchestratord_completion_tokens_total",
            "Tokens of answers, where engines told.",
            &tokens_out,
        );
        scrape.histogram(
            "orchestratord_time_to_first_token_seconds",
            "From ask to the first event of a stream.",
            &self.first_token,
        );
    }
}

/// What the data plane counts, beside what [`super::api`] writes itself. `gaps`: between two pieces of
/// one stream.
pub fn scrape(core: &Core, gaps: &Histogram, scrape: &mut Scrape) {
    core.meters().scrape(scrape);
    scrape.histogram(
        "orchestratord_inter_token_seconds",
        "Between two pieces of a stream that said something.",
        gaps,
    );
    let depth = Priority::ALL
        .map(|priority| (format!("priority=\"{}\"", priority.as_str()), core.waiting_of(priority) as f64));
    let samples: Vec<(&str, f64)> = depth.iter().map(|(label, count)| (label.as_str(), *count)).collect();
    scrape.gauge("orchestratord_queue_depth", "Requests that wait for a slot, by priority.", &samples);
    let circuits = core.registry().circuits();
    scrape.gauge(
        "orchestratord_circuits",
        "Replicas by the state of their circuit.",
        &[
            ("state=\"closed\"", circuits.closed as f64),
            ("state=\"open\"", circuits.open as f64),
            ("state=\"half_open\"", circuits.half_open as f64),
        ],
    );
    let counts = core.counts();
    scrape.counter(
        "orchestratord_engine_failures_total",
        "Exchanges that engines failed, by what that means for them.",
        &[
            ("kind=\"connect\"", counts.failures.connect),
            ("kind=\"broken\"", counts.failures.broken),
            ("kind=\"timeout\"", counts.failures.timeout),
            ("kind=\"not_ready\"", counts.failures.not_ready),
            ("kind=\"vanished\"", counts.failures.vanished),
        ],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_and_made_by_engines_only() {
        let mut meters = Meters::default();
        for n in 0..1000 {
            meters.ended(Some(&format!("asked-{n}")), Ended::Refused);
        }
        assert_eq!(meters.by_model.len(), 1, "refusals make no labels");
        let mut meters = Meters::default();
        for n in 0..1000 {
            let model = format!("m\"{n:04}");
            meters.dispatched(Some(&model));
            meters.ended(Some(&model), Ended::Answered);
            let metered = Metered { tokens_in: Some(2), tokens_out: Some(3), ..Metered::default() };
            meters.metered(Some(&model), metered, Mono(0));
        }
        let mut scrape = Scrape::default();
        meters.scrape(&mut scrape);
        let text = scrape.finish();
        for line in [
            "orchestratord_model_requests_total{model=\"m\\\"0099\",outcome=\"answered\"} 1",
            "orchestratord_model_requests_total{model=\"other\",outcome=\"answered\"} 900",
            "orchestratord_prompt_tokens_total{model=\"other\"} 1800",
            "orchestratord_completion_tokens_total{model=\"m\\\"0000\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert_eq!(text.lines().filter(|line| line.contains("model_requests_total{")).count(), 101 * 4);
    }
}
