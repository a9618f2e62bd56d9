//! Whether the GPUs that an engine is given exist, and are large enough. PURE.

use serde::{Deserialize, Serialize};

use super::plan::Config;
use crate::replicas::profile::Engine as Profile;

/// As many layers as no model has: what is usually said for all.
const LAYERS_ALL: u32 = 999;

/// A GPU as the driver tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Its number.
    pub index: u32,
    /// `GPU-...`.
    pub uuid: String,
    /// Its name.
    pub name: String,
    /// Memory in all, in bytes.
    pub memory_bytes: u64,
    /// Memory that nobody uses now, in bytes.
    pub free_bytes: u64,
}

/// Holds an engine's devices against those of the machine; `gpus` is an error where there is no driver.
///
/// # Errors
/// What is wrong, and what to do.
///
/// Without a mask the engine sees all GPUs, or those of `inherited`: what this program's own
/// `CUDA_VISIBLE_DEVICES` leaves.
pub fn check(
    config: &Config,
    gpus: &Result<Vec<Gpu>, String>,
    require_gpu: bool,
    inherited: Option<&str>,
) -> Result<(), String> {
    let key = config.key();
    let gate = |why: String| {
        Err(format!(
            "GPU-only enforcement: {key} {why}; give it a GPU, or lift the rule for a test with --allow-cpu"
        ))
    };
    if require_gpu {
        match gpus {
            Err(why) => return gate(format!("needs a GPU, and this machine shows none ({why})")),
            Ok(gpus) if gpus.is_empty() => return gate("needs a GPU, and this machine has none".into()),
            Ok(_) if config.device_mask.as_deref() == Some("-1") => {
                return gate("is given no device (mask -1)".into());
            }
            Ok(_) if layers(config) == Some(0) => return gate("is told to put 0 layers on GPUs".into()),
            Ok(_) => {}
        }
    }
    check_split(config).map_err(|why| format!("{key}: {why}"))?;
    // Without a driver nothing can be said about devices: they may be somebody else's kind.
    let Ok(gpus) = gpus else { return Ok(()) };
    let Some(devices) = mask(config) else {
        // llama.cpp spreads a model over all that it sees, by their memory; others may take one, and then have
        // less. What stays on the CPU where there is no room is no error unless it was asked for.
        let is_visible = |gpu: &&Gpu| inherited.is_none_or(|mask| split(mask).any(|device| is(gpu, device)));
        let visible: Vec<&Gpu> = gpus.iter().filter(is_visible).collect();
        let fills = require_gpu || fills_gpus(config);
        return if fills {
            check_memory(config, &visible).map_err(|why| format!("{key}: {why}"))
        } else {
            Ok(())
        };
    };
    let mut used = Vec::new();
    for device in split(devices) {
        if device == "-1" || device.starts_with("MIG-") {
            continue;
        }
        match gpus.iter().find(|gpu| is(gpu, device)) {
            Some(gpu) if used.contains(&gpu) => {
                return Err(format!("{key}: device {device} is named twice: name each GPU once"));
            }
            Some(gpu) => used.push(gpu),
            None => {
                let there: Vec<String> =
                    gpus.iter().map(|gpu| format!("{} ({})", gpu.index, gpu.name)).collect();
                let there = if there.is_empty() { "none".into() } else { there.join(", ") };
                return Err(format!(
                    "{key}: device {device} does not exist; this machine has: {there}. Correct the device mask"
                ));
            }
        }
    }
    check_memory(config, &used).map_err(|why| format!("{key}: {why}"))
}

/// What says which GPUs an engine sees, where anything does: the mask, or the variable that it becomes.
fn mask(config: &Config) -> Option<&str> {
    config.device_mask.as_deref().or_else(|| config.env.get("CUDA_VISIBLE_DEVICES").map(String::as_str))
}

fn split(mask: &str) -> impl Iterator<Item = &str> {
    mask.split(',').map(str::trim).filter(|device| !device.is_empty())
}

/// Whether a mask's word means a GPU: its number, with or without `GPU` before it, or the begin of its UUID.
fn is(gpu: &Gpu, device: &str) -> bool {
    let name = device.strip_prefix("GPU").filter(|rest| rest.parse::<u32>().is_ok()).unwrap_or(device);
    name.parse() == Ok(gpu.index) || (name.starts_with("GPU-") && gpu.uuid.starts_with(name))
}

/// Whether GPUs decide if an engine can be started.
#[must_use]
pub fn concern(config: &Config) -> bool {
    mask(config).is_some() || fills_gpus(config)
}

/// Whether the whole model goes to GPUs, because the command says so or the engine can do nothing else.
fn fills_gpus(config: &Config) -> bool {
    match Profile::named(&config.engine) {
        Profile::LlamaCpp => layers(config).is_some_and(|layers| layers >= LAYERS_ALL),
        Profile::Vllm | Profile::Sglang | Profile::Tgi => config.model.is_some(),
        Profile::OpenAi => false,
    }
}

fn check_split(config: &Config) -> Result<(), String> {
    let (split, devices) = (&config.tensor_split, config.devices());
    if split.is_empty() {
        return Ok(());
    }
    if split.len() != devices.len() {
        return Err(format!(
            "the tensor split names {} shares for {} devices: give one a device",
            split.len(),
            devices.len()
        ));
    }
    let sum: f64 = split.iter().sum();
    if split.iter().any(|share| !share.is_finite() || *share < 0.0) || (sum - 1.0).abs() > 0.01 {
        return Err(format!(
            "the tensor split must be shares from 0 to 1 that add up to 1, found a sum of {sum}"
        ));
    }
    Ok(())
}

/// The model against the memory of its GPUs: a part of it may stay on the CPU only where that is asked for.
fn check_memory(config: &Config, used: &[&Gpu]) -> Result<(), String> {
    let Some((_, model)) = config.model_file.as_ref().filter(|_| !used.is_empty()) else { return Ok(()) };
    if layers(config).is_some_and(|layers| layers < LAYERS_ALL) {
        return Ok(());
    }
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let total: u64 = used.iter().map(|gpu| gpu.memory_bytes).sum();
    if *model > total {
        return Err(format!(
            "the model has {:.1} GiB, its GPUs {:.1} GiB of memory: give it more devices, a smaller model, or fewer layers with --n-gpu-layers",
            gib(*model),
            gib(total)
        ));
    }
    for (share, gpu) in config.tensor_split.iter().zip(used) {
        let part = *model as f64 * share;
        if part > gpu.memory_bytes as f64 {
            return Err(format!(
                "its share of the model, {:.1} GiB, does not fit GPU {} with {:.1} GiB: change the tensor split",
                gib(part as u64),
                gpu.index,
                gib(gpu.memory_bytes)
            ));
        }
    }
    Ok(())
}

/// Layers that are put on GPUs, where the command says so.
fn layers(config: &Config) -> Option<u32> {
    let mut words = config.command.iter().filter_map(|word| word.to_str());
    while let Some(word) = words.next() {
        let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
        if super::flags::canonical(name) == Some("--n-gpu-layers") {
            return value.or_else(|| words.next())?.parse().ok();
        }
    }
    None
}

/// Memory of an engine's GPUs that nobody uses now, in bytes.
#[must_use]
pub fn free_bytes(config: &Config, gpus: &[Gpu]) -> u64 {
    let devices = config.devices();
    let is_used = |gpu: &&Gpu| {
        devices.iter().any(|device| device.parse() == Ok(gpu.index) || gpu.uuid.starts_with(device))
    };
    gpus.iter().filter(is_used).map(|gpu| gpu.free_bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_provisioner::plan::Directories;

    const GIB: u64 = 1 << 30;

    fn gpus() -> Result<Vec<Gpu>, String> {
        let gpu = |index, memory_bytes| Gpu {
            index,
            uuid: format!("GPU-{index}{index}{index}"),
            name: "H100".into(),
            memory_bytes,
            free_bytes: memory_bytes / 2,
        };
        Ok(vec![gpu(0, 80 * GIB), gpu(1, 24 * GIB)])
    }

    /// An engine with a model of so many GiB, from what stands in its pool.
    fn engine(pool: &str, model_gib: u64) -> Config {
        let text = format!("[[pools]]\nid = \"p\"\nmodel = \"m\"\n{pool}");
        let read =
            crate::engine_provisioner::file::read(text.as_bytes(), false, &Directories::beside("d".into()));
        let mut config = read.expect("a usable file").remove(0);
        config.model_file = Some(("m".into(), model_gib * GIB));
        config
    }

    #[test]
    fn devices_are_held_against_those_of_the_machine() {
        for (pool, model_gib, why) in [
            ("devices = [0, 1]", 10, None),
            ("devices = \"GPU0,GPU1\"", 10, None),
            ("devices = \"GPU-111\"", 10, None),
            ("devices = \"MIG-1\"", 10, None),
            ("devices = []", 500, None),
            ("", 500, None),
            ("flags = [\"-ngl\", \"999\"]", 104, None),
            ("flags = [\"-ngl\", \"999\"]", 105, Some("give it more devices")),
            ("env = { CUDA_VISIBLE_DEVICES = \"1\" }", 25, Some("give it more devices")),
            ("env = { CUDA_VISIBLE_DEVICES = \"5\" }", 1, Some("does not exist")),
            ("env = { CUDA_VISIBLE_DEVICES = \"\" }", 500, None),
            ("engine = \"vllm\"\ncommand = [\"vllm\", \"{port}\"]", 105, Some("its GPUs 104.0 GiB")),
            ("engine = \"other\"\ncommand = [\"other\", \"{port}\"]", 105, None),
            ("devices = [2]", 10, Some("this machine has: 0 (H100), 1 (H100)")),
            ("devices = [0, 0]", 10, Some("named twice")),
            ("devices = [1]", 25, Some("give it more devices")),
            ("devices = [1]\nflags = [\"-ngl\", \"10\"]", 25, None),
            ("devices = [0, 1]\ntensor_split = [0.8, 0.2]", 90, None),
            ("devices = [0, 1]\ntensor_split = [0.5, 0.5]", 90, Some("change the tensor split")),
            ("devices = [0, 1]\ntensor_split = [0.5, 0.4]", 1, Some("add up to 1")),
            ("devices = [0, 1]\ntensor_split = [1.5, -0.5]", 1, Some("add up to 1")),
            ("devices = [0, 1]\ntensor_split = [1.0]", 1, Some("give one a device")),
        ] {
            match (check(&engine(pool, model_gib), &gpus(), false, None), why) {
                (Ok(()), None) => {}
                (Err(error), Some(why)) => assert!(error.contains(why), "{pool}: {error}"),
                other => panic!("{pool}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_this_program_may_see_is_all_that_an_engine_sees() {
        let all = "flags = [\"-ngl\", \"999\"]";
        for (inherited, model_gib, fits) in
            [(None, 100, true), (Some("0"), 80, true), (Some("1"), 25, false), (Some("GPU-111"), 25, false)]
        {
            let checked = check(&engine(all, model_gib), &gpus(), false, inherited);
            assert_eq!(checked.is_ok(), fits, "{inherited:?}: {checked:?}");
        }
        // Where it must not be computed on the CPU, all of it has to fit.
        assert!(check(&engine("", 105), &gpus(), true, None).is_err_and(|why| why.contains("smaller model")));
        assert_eq!(check(&engine("", 105), &gpus(), false, None), Ok(()));
    }

    #[test]
    fn without_a_driver_masks_are_believed_and_the_gate_is_shut() {
        let none = Err("no NVIDIA driver".to_string());
        assert_eq!(check(&engine("devices = [7]", 1), &none, false, None), Ok(()));
        for (pool, gpus) in [
            ("devices = [0]", none),
            ("", Ok(vec![])),
            ("devices = []", gpus()),
            ("flags = [\"--gpu-layers=0\"]", gpus()),
        ] {
            let error = check(&engine(pool, 1), &gpus, true, None).expect_err(pool);
            assert!(error.contains("GPU-only enforcement") && error.contains("--allow-cpu"), "{error}");
        }
        assert_eq!(check(&engine("devices = [0]", 1), &gpus(), true, None), Ok(()));
        assert_eq!(free_bytes(&engine("devices = [0, 1]", 1), &gpus().expect("two")), 52 * GIB);
    }
}
