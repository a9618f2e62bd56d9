//! What building an engine from source takes, step by step. PURE.
//!
//! A source is a repository, a revision of it, and flags for cmake. From these and from what was found
//! of CUDA on the machine follow the commands in their order, and the name under which the result is
//! kept: the same commit with the same flags is built once.

use std::path::{Path, PathBuf};

/// Longest flag for cmake, in bytes.
pub const FLAG_BYTES_MAX: usize = 1024;
/// Most flags.
pub const FLAGS_MAX: usize = 64;
/// Most processes of one build: what a linker needs of memory grows with them.
pub const JOBS_MAX: usize = 64;

/// Where an engine is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceSpec {
    /// URL or path of a git repository.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Flags for cmake, such as `-DGGML_CUDA=ON`.
    pub cmake_flags: Vec<String>,
    /// cmake's generator; its own choice where there is none.
    pub generator: Option<String>,
    /// What is built: target and name of the program.
    pub target: String,
    /// Whether submodules are fetched too.
    pub submodules: bool,
}

impl SourceSpec {
    /// llama.cpp's server at `revision`, with CUDA or without.
    #[must_use]
    pub fn llama_cpp(revision: &str, cuda: bool) -> SourceSpec {
        SourceSpec {
            repository: "https://github.com/ggml-org/llama.cpp".into(),
            revision: revision.into(),
            cmake_flags: if cuda { vec!["-DGGML_CUDA=ON".into()] } else { Vec::new() },
            generator: None,
            target: "llama-server".into(),
            submodules: false,
        }
    }

    /// Whether the flags ask for CUDA.
    #[must_use]
    pub fn wants_cuda(&self) -> bool {
        let on =
            |flag: &String| matches!(flag.as_str(), "-DGGML_CUDA=ON" | "-DGGML_CUDA=1" | "-DGGML_CUDA=TRUE");
        normalised(&self.cmake_flags).iter().any(on)
    }

    /// Checks what is given to git and cmake as words: none may be taken for an option of another kind.
    ///
    /// # Errors
    /// One line that names what is not usable and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let word =
            |text: &str| !text.is_empty() && !text.starts_with('-') && !text.chars().any(char::is_control);
        if !word(&self.repository) || self.repository.contains("::") {
            return Err(format!("{:?} is no repository: a URL or a path is", self.repository));
        }
        let name = |c: char| c.is_ascii_alphanumeric() || "._-/+".contains(c);
        if !word(&self.revision) || !self.revision.chars().all(name) || self.revision.contains("..") {
            return Err(format!("{:?} is no revision: a branch, tag or commit is", self.revision));
        }
        if !word(&self.target) || !self.target.chars().all(name) || self.target.contains('/') {
            return Err(format!("{:?} is no target: a program's name is, such as llama-server", self.target));
        }
        let flag = |flag: &String| {
            flag.len() <= FLAG_BYTES_MAX
                && flag.starts_with("-D")
                && flag.contains('=')
                && !flag.chars().any(char::is_control)
        };
        match self.cmake_flags.iter().find(|text| !flag(text)) {
            Some(bad) => Err(format!("{bad:?} is no flag for cmake: -DNAME=VALUE is")),
            None if self.cmake_flags.len() > FLAGS_MAX => {
                Err(format!("more than {FLAGS_MAX} flags for cmake"))
            }
            None => Ok(()),
        }
    }

    /// What of this, besides the commit, makes one build another than the next; one line a fact.
    #[must_use]
    pub fn recipe(&self) -> String {
        let mut flags = normalised(&self.cmake_flags);
        flags.sort();
        let generator = self.generator.as_deref().unwrap_or_default();
        format!("{}\n{generator}\n{}\n{}", self.target, self.submodules, flags.join("\n"))
    }

    /// What the engine's version is called in a handoff.
    #[must_use]
    pub fn version(&self) -> String {
        format!("llamacpp-source:{}-{}", self.revision, if self.wants_cuda() { "cuda" } else { "cpu" })
    }
}

/// Flags by the names that today's sources know: `LLAMA_CUBLAS` and `LLAMA_CUDA` became `GGML_CUDA`.
#[must_use]
pub fn normalised(flags: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for flag in flags {
        let old = ["-DLLAMA_CUBLAS", "-DLLAMA_CUDA="].iter().any(|name| flag.starts_with(name));
        let new = match flag.split_once('=') {
            Some((_, value)) if old => format!("-DGGML_CUDA={value}"),
            _ => flag.clone(),
        };
        if !all.contains(&new) {
            all.push(new);
        }
    }
    all
}

/// Whether a flag has a name that the cache of an earlier configuration may still hold.
#[must_use]
pub fn names_cublas(flags: &[String]) -> bool {
    flags.iter().any(|flag| flag.starts_with("-DLLAMA_CUBLAS"))
}

/// A compiler that CUDA accepts where it refuses the system's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCompiler {
    /// For C.
    pub c: PathBuf,
    /// For C++, and for what CUDA leaves to the host.
    pub cxx: PathBuf,
}

/// The words for configuring.
#[must_use]
pub fn configure(
    spec: &SourceSpec,
    source: &Path,
    build: &Path,
    cuda_root: Option<&Path>,
    host: Option<&HostCompiler>,
) -> Vec<String> {
    let mut words: Vec<String> =
        vec!["-S".into(), source.display().to_string(), "-B".into(), build.display().to_string()];
    if let Some(generator) = &spec.generator {
        words.extend(["-G".into(), generator.clone()]);
    }
    words.extend(["-DCMAKE_BUILD_TYPE=Release".into(), "-DLLAMA_BUILD_SERVER=ON".into()]);
    words.extend(["-U".into(), "LLAMA_CUBLAS".into()]);
    if spec.wants_cuda()
        && let Some(root) = cuda_root
    {
        words.push(format!("-DCUDAToolkit_ROOT={}", root.display()));
        words.push(format!("-DCMAKE_CUDA_COMPILER={}", root.join("bin/nvcc").display()));
    }
    if let Some(host) = host {
        words.push(format!("-DCMAKE_C_COMPILER={}", host.c.display()));
        words.push(format!("-DCMAKE_CXX_COMPILER={}", host.cxx.display()));
        if spec.wants_cuda() {
            words.push(format!("-DCMAKE_CUDA_HOST_COMPILER={}", host.cxx.display()));
        }
    }
    // Last: what the operator says counts.
    words.extend(normalised(&spec.cmake_flags));
    words
}

/// The words for building.
#[must_use]
pub fn build(spec: &SourceSpec, build: &Path, jobs: usize) -> Vec<String> {
    let jobs = jobs.clamp(1, JOBS_MAX).to_string();
    [
        "--build",
        &build.display().to_string(),
        "--target",
        &spec.target,
        "--parallel",
        &jobs,
        "--config",
        "Release",
    ]
    .map(String::from)
    .to_vec()
}

/// How far a build is, from a line that it printed: `[ 12%] Building ...` of make, `[3/40] ...` of ninja.
#[must_use]
pub fn percent(line: &str) -> Option<u8> {
    let (inside, _) = line.trim_start().strip_prefix('[')?.split_once(']')?;
    let percent: u64 = match inside.split_once('/') {
        Some((done, all)) => {
            let (done, all): (u64, u64) = (done.trim().parse().ok()?, all.trim().parse().ok()?);
            done.checked_mul(100)?.checked_div(all)?
        }
        None => inside.trim().strip_suffix('%')?.trim().parse().ok()?,
    };
    u8::try_from(percent).ok().filter(|percent| *percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(flags: &[&str]) -> SourceSpec {
        SourceSpec {
            cmake_flags: flags.iter().map(|f| f.to_string()).collect(),
            ..SourceSpec::llama_cpp("b5000", false)
        }
    }

    #[test]
    fn old_names_mean_cuda_and_its_root_goes_along() {
        let old = spec(&["-DLLAMA_CUBLAS=ON", "-DGGML_NATIVE=OFF"]);
        assert!(
            old.wants_cuda()
                && names_cublas(&old.cmake_flags)
                && old.version() == "llamacpp-source:b5000-cuda"
        );
        let words = configure(&old, Path::new("/s"), Path::new("/b"), Some(Path::new("/opt/cuda")), None);
        for word in [
            "-DGGML_CUDA=ON",
            "-DCUDAToolkit_ROOT=/opt/cuda",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_BUILD_SERVER=ON",
        ] {
            assert!(words.contains(&word.to_string()), "{word}: {words:?}");
        }
        assert!(words.windows(2).any(|pair| pair == ["-U", "LLAMA_CUBLAS"]), "{words:?}");
        let plain =
            configure(&spec(&[]), Path::new("/s"), Path::new("/b"), Some(Path::new("/opt/cuda")), None);
        assert!(!plain.iter().any(|word| word.contains("cuda")), "{plain:?}");
    }

    #[test]
    fn a_recipe_is_what_makes_a_build_another_one() {
        let same = [spec(&["-DA=1", "-DB=2"]), spec(&["-DB=2", "-DA=1"])];
        assert_eq!(same[0].recipe(), same[1].recipe());
        assert_ne!(spec(&["-DA=1"]).recipe(), spec(&["-DA=2"]).recipe());
        assert_eq!(spec(&["-DLLAMA_CUBLAS=ON"]).recipe(), spec(&["-DGGML_CUDA=ON"]).recipe());
    }

    #[test]
    fn words_that_git_or_cmake_would_take_for_options_are_refused() {
        let good = spec(&["-DA=1"]);
        assert_eq!(good.check(), Ok(()));
        for bad in [
            SourceSpec { repository: "--upload-pack=sh".into(), ..good.clone() },
            SourceSpec { repository: "ext::sh -c id".into(), ..good.clone() },
            SourceSpec { revision: "-x".into(), ..good.clone() },
            SourceSpec { revision: "a..b".into(), ..good.clone() },
            SourceSpec { target: "../sh".into(), ..good.clone() },
            spec(&["-P/tmp/evil.cmake"]),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn progress_is_read_from_make_and_ninja() {
        for (line, expected) in [
            ("[ 12%] Building C", Some(12)),
            ("[100%] Built", Some(100)),
            ("[3/4] Linking", Some(75)),
            ("[x]", None),
            ("hi", None),
            ("[1/0]", None),
            ("[900%]", None),
        ] {
            assert_eq!(percent(line), expected, "{line}");
        }
    }

    proptest! {
        #[test]
        fn no_line_panics(line in "\\PC{0,20}|\\[[0-9/% ]{0,24}\\].{0,4}") {
            prop_assert!(percent(&line).is_none_or(|percent| percent <= 100));
        }
    }
}
