//! Which GPUs a device mask means. Pure.
//!
//! A mask is what `CUDA_VISIBLE_DEVICES` or a human would say: `0`, `0,1`, `GPU0,GPU1`, `cuda:0`,
//! `GPU-<uuid>` or the beginning of one, `MIG-...`, `all`. It is read tolerantly: what cannot be found
//! is told beside what was.

/// Entries of one mask that are looked at; a machine has fewer GPUs.
const ENTRIES_MAX: usize = 64;

/// A GPU as masks name it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named<'a> {
    /// Its number for the driver.
    pub(super) index: u32,
    /// Its id, where it is known.
    pub(super) uuid: Option<&'a str>,
    /// Whether it is divided into MIG instances.
    pub(super) is_mig: bool,
    /// Whether the driver lists it now: a number means such a GPU first.
    pub(super) is_listed: bool,
}

/// What a mask means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Resolved {
    /// Positions within the GPUs that were given, ascending, each once.
    pub(super) gpus: Vec<usize>,
    /// Entries that name no GPU, each with the reason, for people.
    pub(super) missing: Vec<String>,
}

/// Looks a mask's entries up.
pub(super) fn resolve(mask: &str, gpus: &[Named<'_>]) -> Resolved {
    let mut resolved = Resolved::default();
    let entries = mask.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    for entry in entries.take(ENTRIES_MAX) {
        match entry.to_ascii_lowercase().as_str() {
            "all" => resolved.gpus.extend(0..gpus.len()),
            "none" | "void" | "nodevfiles" | "-1" => {}
            lower => match find(lower, gpus) {
                Ok(position) => resolved.gpus.push(position),
                Err(why) => resolved.missing.push(format!("{}: {why}", entry.escape_debug())),
            },
        }
    }
    resolved.gpus.sort_unstable();
    resolved.gpus.dedup();
    resolved
}

/// `entry` is lower case.
fn find(entry: &str, gpus: &[Named<'_>]) -> Result<usize, &'static str> {
    if let Some(rest) = entry.strip_prefix("mig-") {
        return find_mig(rest, gpus);
    }
    if entry.starts_with("gpu-") {
        return find_uuid(entry, gpus);
    }
    let number = entry.strip_prefix("gpu").or_else(|| entry.strip_prefix("cuda")).unwrap_or(entry);
    let index: u32 = number.trim_start_matches(':').parse().map_err(|_| "is no GPU's number or id")?;
    let has_index = |gpu: &&(usize, &Named<'_>)| gpu.1.index == index;
    let all: Vec<(usize, &Named<'_>)> = gpus.iter().enumerate().collect();
    let listed = all.iter().filter(has_index).find(|(_, gpu)| gpu.is_listed);
    listed.or(all.iter().find(has_index)).map(|(position, _)| *position).ok_or("there is no such GPU")
}

/// As CUDA does, the beginning of an id suffices where it fits one GPU only.
fn find_uuid(prefix: &str, gpus: &[Named<'_>]) -> Result<usize, &'static str> {
    let fits = |gpu: &Named<'_>| gpu.uuid.is_some_and(|uuid| uuid.to_ascii_lowercase().starts_with(prefix));
    let mut found = gpus.iter().enumerate().filter(|(_, gpu)| fits(gpu));
    match (found.next(), found.next()) {
        (Some((position, _)), None) => Ok(position),
        (Some(_), Some(_)) => Err("fits several GPUs"),
        (None, _) => Err("there is no such GPU"),
    }
}

/// `MIG-GPU-<uuid>/<gi>/<ci>` names its GPU; a `MIG-<uuid>` does not, and is found only where one GPU
/// alone is divided.
fn find_mig(rest: &str, gpus: &[Named<'_>]) -> Result<usize, &'static str> {
    if rest.starts_with("gpu-") {
        return find_uuid(rest.split('/').next().unwrap_or(rest), gpus);
    }
    let mut divided = gpus.iter().enumerate().filter(|(_, gpu)| gpu.is_mig);
    match (divided.next(), divided.next()) {
        (Some((position, _)), None) => Ok(position),
        (Some(_), Some(_)) => {
            Err("several GPUs are divided into MIG instances, and the id does not say which")
        }
        (None, _) => Err("no GPU is divided into MIG instances"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "GPU-aaaa1111-0000-0000-0000-000000000000";
    const B: &str = "GPU-aaaa2222-0000-0000-0000-000000000000";

    fn two() -> [Named<'static>; 2] {
        let gpu = |index, uuid| Named { index, uuid: Some(uuid), is_mig: index == 1, is_listed: true };
        [gpu(0, A), gpu(1, B)]
    }

    #[test]
    fn every_way_to_name_a_gpu() {
        for (mask, gpus) in [
            ("0", &[0][..]),
            ("0,1", &[0, 1]),
            (" 1 , 0 ,, 1", &[0, 1]),
            ("GPU0,GPU1", &[0, 1]),
            ("gpu1", &[1]),
            ("cuda:1", &[1]),
            ("CUDA0", &[0]),
            (B, &[1]),
            ("GPU-aaaa1", &[0]),
            ("MIG-GPU-aaaa1111-0000-0000-0000-000000000000/1/0", &[0]),
            ("MIG-5c0f2c1e-1111-2222-3333-444455556666", &[1]),
            ("all", &[0, 1]),
            ("none", &[]),
            ("", &[]),
        ] {
            let found = resolve(mask, &two());
            assert_eq!((found.gpus.as_slice(), found.missing.len()), (gpus, 0), "{mask}: {found:?}");
        }
    }

    #[test]
    fn what_is_not_there_is_told_beside_what_is() {
        for (mask, why) in [
            ("0,7", "7: there is no such GPU"),
            ("0,GPU-ffff", "GPU-ffff: there is no such GPU"),
            ("0,GPU-aaaa", "GPU-aaaa: fits several GPUs"),
            ("0,\u{e9}\n", "\u{e9}: is no GPU's number or id"),
            ("0,99999999999", "is no GPU's number"),
        ] {
            let found = resolve(mask, &two());
            assert_eq!((found.gpus.as_slice(), found.missing.len()), (&[0][..], 1), "{mask}");
            assert!(found.missing[0].contains(why), "{mask}: {:?}", found.missing);
        }
        assert_eq!(resolve("MIG-1", &two()[..1]).missing.len(), 1);
    }

    /// Numbers move up when a GPU vanishes: a number means one that is there, while there is one.
    #[test]
    fn a_number_means_a_listed_gpu_first() {
        let mut gpus = two();
        gpus[0].is_listed = false;
        assert_eq!(resolve("0", &gpus).gpus, [0]);
        gpus[1].index = 0;
        assert_eq!(resolve("0", &gpus).gpus, [1]);
    }

    proptest::proptest! {
        #[test]
        fn any_mask_is_read(mask in "(GPU|gpu-|MIG-|cuda|:|,|[0-9]|\\PC){0,40}") {
            let found = resolve(&mask, &two());
            proptest::prop_assert!(found.gpus.iter().all(|position| *position < 2) && found.gpus.is_sorted());
        }
    }
}
