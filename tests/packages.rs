//! The packages for real: made by `packaging/build`, installed into a Debian of their own, upgraded,
//! removed and purged there. Takes a release build, root, `debootstrap`, `lintian`, `rpm` and `rpmlint`,
//! and minutes; so it runs only where `REQUIRE_PACKAGES=1` asks for it.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::*;

const SIZE_MAX: u64 = 5_000_000;
const UNITS: [&str; 3] = ["orchestratord.service", "orchestratord.socket", "pool-managerd.service"];

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command to its end; what it said if it succeeded.
fn run(program: &str, words: &[&str]) -> String {
    let output = output(program, words);
    let said = said(&output);
    assert!(output.status.success(), "{program} {words:?}: {said}");
    said
}

fn output(program: &str, words: &[&str]) -> Output {
    Command::new(program)
        .args(words)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8")
        .current_dir(repository())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The two packages of one build, out of the way of the next.
fn build(words: &[&str], to: &Path) -> (PathBuf, PathBuf) {
    run("packaging/build", words);
    let made = fs::read_dir(repository().join("target/package")).expect("packages");
    let (mut deb, mut rpm) = (None, None);
    for path in made.map(|entry| entry.expect("an entry").path()) {
        let kept = to.join(path.file_name().expect("a name"));
        let slot = match path.extension().and_then(|extension| extension.to_str()) {
            Some("deb") => &mut deb,
            Some("rpm") => &mut rpm,
            _ => continue,
        };
        fs::copy(&path, &kept).expect("copied");
        assert!(path.metadata().expect("a file").len() < SIZE_MAX, "{} is too large", path.display());
        *slot = Some(kept);
    }
    (deb.expect("a .deb"), rpm.expect("an .rpm"))
}

/// A Debian below a directory.
struct Root(PathBuf);

impl Root {
    fn run(&self, words: &[&str]) -> String {
        let root = self.0.to_str().expect("UTF-8");
        run("chroot", &[&[root], words].concat())
    }

    fn install(&self, deb: &Path) -> String {
        let name = deb.file_name().expect("a name").to_str().expect("UTF-8");
        fs::copy(deb, self.0.join("root").join(name)).expect("copied");
        self.run(&["dpkg", "--force-confold", "-i", &format!("/root/{name}")])
    }

    fn has(&self, path: &str) -> bool {
        self.0.join(path.trim_start_matches('/')).symlink_metadata().is_ok()
    }

    fn enabled(&self, unit: &str) -> bool {
        ["multi-user.target.wants", "sockets.target.wants"]
            .iter()
            .any(|wants| self.has(&format!("/etc/systemd/system/{wants}/{unit}")))
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "a test that is skipped says so")]
fn packages_install_start_upgrade_and_go() {
    if std::env::var("REQUIRE_PACKAGES").is_err() {
        println!("skipped: packages are built and installed with REQUIRE_PACKAGES=1");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (deb, rpm) = build(&[], directory.path());
    let (next_deb, _) = build(&["--no-build", "--version", "99.0.0"], directory.path());

    let lint =
        said(&output("lintian", &["--allow-root", "--fail-on", "error", deb.to_str().expect("UTF-8")]));
    assert!(!lint.lines().any(|line| line.starts_with("E: ")), "{lint}");
    run("rpmlint", &["-c", "packaging/rpm/rpmlint.toml", rpm.to_str().expect("UTF-8")]);
    let scripts = run("rpm", &["-qp", "--scripts", rpm.to_str().expect("UTF-8")]);
    assert!(scripts.contains("systemd-sysusers llama-orch.conf"), "{scripts}");

    let root = Root(directory.path().join("root"));
    let path = root.0.to_str().expect("UTF-8").to_string();
    run("debootstrap", &["--variant=minbase", "--include=systemd", "bookworm", &path]);

    root.install(&deb);
    for unit in UNITS {
        assert!(root.has(&format!("/usr/lib/systemd/system/{unit}")) && !root.enabled(unit), "{unit}");
    }
    assert!(root.run(&["id", "llama-orch"]).contains("llama-orch"));
    for program in ["orchestratord", "pool-managerd", "engine-provisioner", "llorch"] {
        assert!(root.run(&[program, "--version"]).starts_with(program), "{program}");
    }
    root.run(&[&["systemd-analyze", "verify", "--man=no"], &UNITS[..]].concat());
    for (unit, most) in [("orchestratord.service", "20"), ("pool-managerd.service", "30")] {
        let threshold = format!("--threshold={most}");
        let path = format!("{path}/usr/lib/systemd/system/{unit}");
        run("systemd-analyze", &["security", "--offline=yes", "--no-pager", &threshold, &path]);
    }

    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let words = [path.as_str(), "orchestratord", "--addr", &addr, "--runtime-dir", "/run/llama-orch/engines"];
    let mut daemon = Process::start("/usr/sbin/chroot", &words, &[], directory.path());
    until("the installed orchestratord", || get(port, "/ready").filter(|answer| answer.status == 200));
    daemon.kill();

    // What the administrator did and what the daemons keep survive an upgrade.
    let defaults = root.0.join("etc/default/orchestratord");
    let own = fs::read_to_string(&defaults).expect("settings") + "# mine\n";
    fs::write(&defaults, &own).expect("written");
    let state = root.0.join("var/lib/llama-orch/orchestratord");
    fs::create_dir_all(&state).expect("a directory");
    fs::write(state.join("registry.json"), "{}").expect("written");
    root.run(&["deb-systemd-helper", "enable", "orchestratord.service"]);
    root.install(&next_deb);
    assert!(root.run(&["dpkg", "-s", "llama-orch"]).contains("Version: 99.0.0"));
    assert_eq!(fs::read_to_string(&defaults).expect("settings"), own);
    assert!(state.join("registry.json").exists());
    assert!(root.enabled("orchestratord.service") && !root.enabled("pool-managerd.service"));

    root.run(&["dpkg", "-r", "llama-orch"]);
    assert!(
        !root.has("/usr/sbin/orchestratord") && !root.has("/usr/lib/systemd/system/orchestratord.service")
    );
    assert!(state.join("registry.json").exists() && defaults.exists(), "a removal keeps state and settings");
    root.run(&["dpkg", "-P", "llama-orch"]);
    for path in ["/var/lib/llama-orch", "/run/llama-orch", "/etc/llama-orch", "/etc/default/orchestratord"] {
        assert!(!root.has(path), "{path} is left after a purge");
    }
    assert!(!root.enabled("orchestratord.service"));
}
