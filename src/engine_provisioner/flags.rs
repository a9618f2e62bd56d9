//! llama-server's command line from what an operator wrote. PURE.
//!
//! Flags have had several names over the years; here each has one, and is written once: the last one given
//! counts. What the provisioner itself decides (model, address, port) is not the operator's to give, and what
//! is not known here is passed on as it is, in its order.

/// What is asked of llama-server beside flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted<'a> {
    /// Requests at once.
    pub slots: Option<u32>,
    /// Context length in tokens, of all slots together.
    pub context: Option<u64>,
    /// No layer goes on a GPU.
    pub cpu_only: bool,
    /// `--tensor-split`.
    pub tensor_split: Option<&'a str>,
}

/// Flags with a value, by every name that they have had.
const VALUED: &[(&str, &[&str])] = &[
    ("--n-gpu-layers", &["-ngl", "--ngl", "--gpu-layers", "--n_gpu_layers"]),
    ("--ctx-size", &["-c", "--ctx", "--context", "--context-size", "--n-ctx", "--ctx_size", "--n_ctx"]),
    ("--parallel", &["-np", "--n-parallel", "--n_parallel", "--slots-total"]),
    ("--tensor-split", &["-ts", "--tensor_split"]),
    ("--model", &["-m"]),
    ("--port", &[]),
    ("--host", &[]),
];
/// Flags without one.
const BARE: &[(&str, &[&str])] =
    &[("--metrics", &[]), ("--no-webui", &[]), ("--no-cont-batching", &["-nocb"])];
/// Flags whose value is the provisioner's.
const OURS: [&str; 3] = ["--model", "--port", "--host"];

/// The one name of a flag that is known here.
#[must_use]
pub fn canonical(name: &str) -> Option<&'static str> {
    let known = VALUED.iter().chain(BARE).find(|(own, others)| *own == name || others.contains(&name));
    known.map(|(own, _)| *own)
}

/// The words behind llama-server's program, with `{model}`, `{host}` and `{port}` to be filled in.
#[must_use]
pub fn llama_server(flags: &[String], wanted: &Wanted<'_>) -> Vec<String> {
    let mut known: Vec<(&'static str, Option<String>)> = Vec::new();
    let mut rest: Vec<String> = Vec::new();
    let mut words = flags.iter().peekable();
    while let Some(word) = words.next() {
        let (name, given) = match word.split_once('=') {
            Some((name, value)) if name.starts_with('-') => (name, Some(value.to_string())),
            _ => (word.as_str(), None),
        };
        let Some(own) = canonical(name) else {
            rest.push(word.clone());
            continue;
        };
        let is_bare = BARE.iter().any(|(bare, _)| *bare == own);
        let value = match (is_bare, given) {
            (true, _) => None,
            (false, Some(value)) => Some(value),
            // A flag that stands where its value should be: the value was forgotten.
            (false, None) => match words.next_if(|next| !is_flag(next)) {
                Some(value) => Some(value.clone()),
                None => continue,
            },
        };
        known.retain(|(other, _)| *other != own);
        known.push((own, value));
    }
    let given = |name: &str| known.iter().find(|(own, _)| *own == name).and_then(|(_, value)| value.clone());
    let mut out: Vec<String> = Vec::new();
    let mut put = |name: &str, value: Option<String>| {
        out.push(name.to_string());
        out.extend(value);
    };
    for (name, value) in [("--model", "{model}"), ("--host", "{host}"), ("--port", "{port}")] {
        put(name, Some(value.into()));
    }
    let slots = given("--parallel").unwrap_or_else(|| wanted.slots.unwrap_or(1).to_string());
    put("--parallel", Some(slots.clone()));
    if let Some(context) = given("--ctx-size").or_else(|| wanted.context.map(|n| n.to_string())) {
        put("--ctx-size", Some(context));
    }
    let layers = if wanted.cpu_only { Some("0".to_string()) } else { given("--n-gpu-layers") };
    if let Some(layers) = layers {
        put("--n-gpu-layers", Some(layers));
    }
    if let Some(split) = given("--tensor-split").or_else(|| wanted.tensor_split.map(str::to_string)) {
        put("--tensor-split", Some(split));
    }
    // One slot has nothing to batch, and answers the same to the same question.
    if slots == "1" || known.iter().any(|(own, _)| *own == "--no-cont-batching") {
        put("--no-cont-batching", None);
    }
    put("--metrics", None);
    put("--no-webui", None);
    out.extend(rest);
    out
}

/// The slots that flags ask for.
#[must_use]
pub fn slots(words: &[String]) -> Option<u32> {
    let at = words.iter().position(|word| word == "--parallel")?;
    words.get(at + 1)?.parse().ok()
}

/// Those of `flags` whose value is the provisioner's to give.
#[must_use]
pub fn overruled(flags: &[String]) -> Vec<&'static str> {
    let names = flags.iter().filter_map(|word| canonical(word.split('=').next().unwrap_or_default()));
    names.filter(|name| OURS.contains(name)).collect()
}

/// `-1` is a number.
fn is_flag(word: &str) -> bool {
    word.starts_with('-') && word.parse::<f64>().is_err()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(flags: &[&str], wanted: &Wanted<'_>) -> String {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_string()).collect();
        let words = llama_server(&flags, wanted).join(" ");
        words.strip_prefix("--model {model} --host {host} --port {port} ").expect("ours first").to_string()
    }

    #[test]
    fn legacy_names_become_todays_and_unknown_flags_pass() {
        let one = "--no-cont-batching --metrics --no-webui";
        for (flags, expected) in [
            (&["-ngl", "99"][..], format!("--parallel 1 --n-gpu-layers 99 {one}")),
            (&["--gpu-layers=7", "--ngl", "8"], format!("--parallel 1 --n-gpu-layers 8 {one}")),
            (&["--n-gpu-layers"], format!("--parallel 1 {one}")),
            (&["-ngl", "--flash-attn"], format!("--parallel 1 {one} --flash-attn")),
            (&["--n-gpu-layers", "-1"], format!("--parallel 1 --n-gpu-layers -1 {one}")),
            (&["-c", "4096", "-np", "2"], "--parallel 2 --ctx-size 4096 --metrics --no-webui".into()),
            (&["--port", "1", "-m", "x", "--seed", "7"], format!("--parallel 1 {one} --seed 7")),
            (&["--metrics", "--jinja"], format!("--parallel 1 {one} --jinja")),
        ] {
            assert_eq!(run(flags, &Wanted::default()), expected, "{flags:?}");
        }
    }

    #[test]
    fn what_the_file_says_is_there_and_a_cpu_engine_stays_on_the_cpu() {
        let wanted = Wanted { slots: Some(4), context: Some(8192), cpu_only: true, tensor_split: None };
        assert_eq!(
            run(&["-ngl", "99"], &wanted),
            "--parallel 4 --ctx-size 8192 --n-gpu-layers 0 --metrics --no-webui"
        );
        assert_eq!(overruled(&["--port=1".into(), "-m".into(), "x".into()]), ["--port", "--model"]);
    }

    proptest! {
        /// What comes out goes in again unchanged, and each flag that is known stands there once.
        #[test]
        fn normal_form_is_stable(flags in prop::collection::vec(
            prop_oneof![
                Just("-ngl"), Just("--gpu-layers"), Just("-c"), Just("--ctx"), Just("-np"), Just("7"),
                Just("--metrics"), Just("--no-webui"), Just("--seed"), Just("-x=1"), Just("-ts"), Just("0.5,0.5"),
            ].prop_map(str::to_string), 0..12)
        ) {
            let wanted = Wanted { slots: Some(2), ..Wanted::default() };
            let once = llama_server(&flags, &wanted);
            prop_assert_eq!(&llama_server(&once, &wanted), &once);
            for (name, _) in VALUED.iter().chain(BARE) {
                prop_assert!(once.iter().filter(|word| word == name).count() <= 1, "{} in {:?}", name, once);
            }
        }
    }
}
