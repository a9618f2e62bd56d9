//! What is shipped for Kubernetes and containers: every setting in it is one that its daemon knows and takes, what is
//! copied into the image exists, and, with `REQUIRE_KUBERNETES=1`, all of it is what Kubernetes' schemas say (by
//! `kubernetes-validate` from PyPI), as files and, where there is `kubectl`, as kustomize puts them together.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ORCHESTRATORD: &str = env!("CARGO_BIN_EXE_orchestratord");
const POOL_MANAGERD: &str = env!("CARGO_BIN_EXE_pool-managerd");

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn shipped(file: &str) -> PathBuf {
    repository().join("packaging/kubernetes").join(file)
}

fn text(file: &str) -> String {
    fs::read_to_string(shipped(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Variables of a manifest: `- {name: A, value: "b"}` a line.
fn of_manifest(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| {
        let (name, value) = line.trim().strip_prefix("- {name: ")?.split_once(", value: ")?;
        Some((name.to_string(), value.strip_suffix('}')?.trim_matches('"').to_string()))
    });
    pairs.filter(|(name, _)| name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')).collect()
}

/// Variables of a service of the compose file: `A: "b"` a line.
fn of_compose(text: &str, service: &str) -> BTreeMap<String, String> {
    let from = text.split(&format!("\n  {service}:\n")).nth(1).expect("the service");
    let block = from.split("    environment:\n").nth(1).expect("its variables");
    let lines = block.lines().take_while(|line| line.starts_with("      "));
    lines
        .filter_map(|line| line.trim().split_once(": "))
        .map(|(name, value)| (name.to_string(), value.trim_matches('"').to_string()))
        .collect()
}

/// Whether a daemon would start with these; what is the machine's to say is put in.
fn starts_with(program: &str, mut variables: BTreeMap<String, String>, what: &str) {
    assert!(variables.len() > 5, "{what}: {variables:?}");
    let help = Command::new(program).arg("--help").output().expect("it runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let foreign = |name: &str| name.starts_with("NVIDIA_") || name == "HOST_IP";
    for name in variables.keys().filter(|name| !foreign(name)) {
        assert!(help.contains(&format!("[env: {name}]")), "{what}: {program} knows no {name}");
    }
    let directory = tempfile::tempdir().expect("a directory");
    let token = directory.path().join("token");
    fs::write(&token, "0123456789012345678901234567890123456789012\n").expect("written");
    for value in variables.values_mut() {
        *value = value.replace("$(HOST_IP)", "192.168.1.100");
    }
    let place = |name: &str, path: &Path| (name.to_string(), path.display().to_string());
    variables.extend([place("LLORCH_API_TOKEN_FILE", &token)]);
    let output = Command::new(program)
        .arg("--check-config")
        .env_clear()
        .envs(&variables)
        .current_dir(directory.path())
        .output()
        .expect("it runs");
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn settings_of_manifests_and_compose_file_are_taken_by_their_daemons() {
    let compose = text("compose.yaml");
    for (program, file, service) in [
        (ORCHESTRATORD, "orchestratord.yaml", "orchestratord"),
        (POOL_MANAGERD, "pool-managerd.yaml", "pool-managerd"),
    ] {
        starts_with(program, of_manifest(&text(file)), file);
        starts_with(program, of_compose(&compose, service), "compose.yaml");
    }
}

#[test]
fn the_image_is_made_of_what_is_there() {
    let dockerfile = text("Dockerfile");
    let copied: Vec<&str> = dockerfile
        .lines()
        .filter_map(|line| line.strip_prefix("COPY "))
        .flat_map(str::split_whitespace)
        .collect();
    for path in
        copied.iter().filter(|path| !path.starts_with('/') && !path.starts_with('-') && **path != "./")
    {
        assert!(repository().join(path).exists(), "{path}");
    }
    for program in ["orchestratord", "pool-managerd", "engine-provisioner", "llorch"] {
        assert!(copied.contains(&format!("/src/target/release/{program}").as_str()), "{program}");
    }
    // Everything that cargo wants to know of its targets before it builds any.
    let manifest = fs::read_to_string(repository().join("Cargo.toml")).expect("Cargo.toml");
    assert!(manifest.contains("[[bench]]") && copied.contains(&"benches"));
    let version = format!("llama-orch:{}", env!("CARGO_PKG_VERSION"));
    assert!(dockerfile.contains(&version) && text("compose.yaml").contains(&version));
    assert!(text("kustomization.yaml").contains(&format!("newTag: \"{}\"", env!("CARGO_PKG_VERSION"))));
    for file in text("kustomization.yaml").lines().filter_map(|line| line.strip_prefix("  - ")) {
        assert!(!file.ends_with(".yaml") || shipped(file).exists(), "{file}");
    }
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn everything_is_what_the_schemas_say() {
    if std::env::var_os("REQUIRE_KUBERNETES").is_none_or(|value| value != "1") {
        eprintln!("skipped: set REQUIRE_KUBERNETES=1 to fetch kubernetes-validate and check the manifests");
        return;
    }
    let run = |program: &Path, words: &[&str]| {
        let output = Command::new(program).args(words).current_dir(repository()).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let said = [&output.stdout[..], &output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "{words:?}: {said}");
        output.stdout
    };
    let venv = repository().join("target/kubernetes");
    let validate = venv.join("bin/kubernetes-validate");
    if !validate.exists() {
        run(Path::new("python3"), &["-m", "venv", venv.to_str().expect("UTF-8")]);
        let words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "kubernetes-validate"];
        run(&venv.join("bin/python"), &words);
    }
    let mut files: Vec<PathBuf> =
        fs::read_dir(shipped("")).expect("the directory").flatten().map(|e| e.path()).collect();
    files.retain(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.ends_with(".yaml") && !matches!(&*name, "compose.yaml" | "kustomization.yaml")
    });
    assert!(files.len() >= 4, "{files:?}");
    let directory = tempfile::tempdir().expect("a directory");
    if let Ok(whole) = Command::new("kubectl").arg("kustomize").arg(shipped("")).output() {
        assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
        let together = directory.path().join("together.yaml");
        fs::write(&together, whole.stdout).expect("written");
        files.push(together);
    }
    for file in files {
        run(&validate, &["--strict", file.to_str().expect("UTF-8")]);
    }
}
