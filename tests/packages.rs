//! The packages for real: made by `packaging/build`, installed into a Debian of their own, upgraded,
//! removed and purged there; then that Debian is booted, and DEPLOY.md is followed in it as written, with a real
//! llama.cpp (`packages/checks.sh`).
//!
//! Takes a release build, root, `debootstrap`, `systemd-nspawn`, `lintian`, `rpm`, `rpmlint`, Python with venv, and
//! minutes; so it runs only where `REQUIRE_PACKAGES=1` asks for it. `PACKAGES_NO_BUILD=1` takes the programs that lie
//! in `target/release`; `PACKAGES_NO_BOOT=1` is for machines whose kernel allows no containers.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use harness::*;

const SIZE_MAX: u64 = 5_000_000;
/// Of what runs all day at least so many bytes are found by their names; it is 0.5 to 1 MB, with the build.
const ALL_DAY_BYTES_MIN: u64 = 300_000;
const UNITS: [&str; 4] =
    ["orchestratord.service", "orchestratord.socket", "pool-managerd.service", "engine@.service"];
/// Packages of the Debian beside the smallest set: what boots it, asks, and runs llama.cpp.
const INCLUDED: &str = "systemd,systemd-sysv,dbus,curl,python3,libgomp1,libstdc++6";
/// Longest that the booted Debian may take, from its first process to its last.
const BOOT_PATIENCE: Duration = Duration::from_secs(600);
/// Longest that it may take from `apt install` to an answer, in milliseconds.
const SERVED_MS_MAX: u64 = 60_000;
/// Runs the checks, and ends the machine with them.
const CHECKS_UNIT: &str = "\
[Service]
Type=exec
ExecStart=/bin/bash /root/checks.sh
StandardOutput=append:/root/checks.log
StandardError=append:/root/checks.log
[Unit]
SuccessAction=poweroff-force
FailureAction=poweroff-force
";

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

/// How many bytes of a program lie side by side because they run all day.
fn all_day_bytes(program: &str) -> u64 {
    let sections = run("readelf", &["-SW", &format!("target/release/{program}")]);
    let section = sections.lines().find(|line| line.contains(".text.all_day")).unwrap_or_default();
    // Behind the name: type, address, offset, size.
    let words = section.split_whitespace().skip_while(|word| *word != ".text.all_day");
    words.take(5).nth(4).and_then(|size| u64::from_str_radix(size, 16).ok()).unwrap_or(0)
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

impl Root {
    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(path, text).expect("written");
    }

    /// A real llama.cpp, with a model that knows nothing.
    fn install_engine(&self) {
        let venv = repository().join("target/package/pip");
        let python = venv.join("bin/python");
        if !python.exists() {
            run("python3", &["-m", "venv", venv.to_str().expect("UTF-8")]);
        }
        let version = self.run(&["python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]);
        let target = self.0.join("opt/llama.cpp");
        let words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"];
        let place = ["--python-version", version.trim(), "--target", target.to_str().expect("UTF-8")];
        let wheels = ["gguf", "numpy", "xllamacpp"];
        run(python.to_str().expect("UTF-8"), &[&words[..], &place, &wheels].concat());
        self.write("/root/tiny_model.py", include_str!("real_llama/tiny_model.py"));
        fs::create_dir_all(self.0.join("srv/models")).expect("made");
        let words = ["env", "PYTHONPATH=/opt/llama.cpp", "python3", "/root/tiny_model.py"];
        self.run(&[&words[..], &["/srv/models/model.gguf"]].concat());
        self.write("/usr/local/bin/llama-server", include_str!("packages/llama-server"));
        self.run(&["chmod", "755", "/usr/local/bin/llama-server"]);
    }

    /// Boots it, with nothing of the package left from before, and looks on.
    fn boot(&self, deb: &Path, next_deb: &Path) {
        self.install_engine();
        for (number, block) in blocks().iter().enumerate() {
            self.write(&format!("/root/block-{}", number + 1), block);
        }
        self.write("/root/checks.sh", include_str!("packages/checks.sh"));
        self.write("/etc/systemd/system/checks.service", CHECKS_UNIT);
        self.run(&["sh", "-c", "rm -f /root/llama-orch_*.deb"]);
        for (deb, to) in [(deb, "root"), (next_deb, "root/next")] {
            let to = self.0.join(to);
            fs::create_dir_all(&to).expect("made");
            fs::copy(deb, to.join(deb.file_name().expect("a name"))).expect("copied");
        }
        let wanted = self.0.join("etc/systemd/system/multi-user.target.wants");
        fs::create_dir_all(&wanted).expect("made");
        std::os::unix::fs::symlink("../checks.service", wanted.join("checks.service")).expect("a link");
        let console = self.0.with_extension("console");
        let output = fs::File::create(&console).expect("a file");
        let mut machine = Command::new("systemd-nspawn")
            .args([
                "--quiet",
                "--boot",
                "--register=no",
                "--keep-unit",
                "--private-network",
                "--console=pipe",
            ])
            .args(["--resolv-conf=off", "--timezone=off", "--machine=llama-orch-packages"])
            .arg(format!("--directory={}", self.0.display()))
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a file"))
            .stderr(output)
            .spawn()
            .expect("systemd-nspawn starts");
        let begun = Instant::now();
        while machine.try_wait().expect("a child").is_none() {
            if begun.elapsed() > BOOT_PATIENCE {
                let _ = machine.kill();
                let _ = machine.wait();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let said = fs::read_to_string(self.0.join("root/checks.log"));
        let said = said.unwrap_or_else(|_| {
            let console = fs::read(&console).unwrap_or_default();
            panic!(
                "it could not be booted; where containers are not allowed, set PACKAGES_NO_BOOT=1\n{}",
                String::from_utf8_lossy(&console)
            )
        });
        assert_eq!(said.lines().last(), Some("all is well"), "{said}");
        let served = fs::read_to_string(self.0.join("root/served-after")).expect("a figure");
        report(&format!("from `apt install` to a served request: {}", served.trim()));
        let served: u64 = served.split(' ').next().and_then(|text| text.parse().ok()).expect("a number");
        assert!(served < SERVED_MS_MAX, "{served} ms");
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
    let is_built = std::env::var("PACKAGES_NO_BUILD").is_ok();
    let (deb, rpm) = build(if is_built { &["--no-build"] } else { &[] }, directory.path());
    let (next_deb, _) = build(&["--no-build", "--version", "99.0.0"], directory.path());

    // Without it they work as well, and each keeps a MiB more resident: `packaging/link/record` makes its list anew.
    for program in ["orchestratord", "pool-managerd", "engine-provisioner"] {
        let bytes = all_day_bytes(program);
        assert!(
            bytes > ALL_DAY_BYTES_MIN,
            "{program}: {bytes} bytes of what runs all day were found by name"
        );
    }
    for package in [&deb, &rpm] {
        let bytes = package.metadata().expect("a file").len();
        report(&format!("{}: {bytes} bytes", package.file_name().expect("a name").display()));
    }
    let lint =
        said(&output("lintian", &["--allow-root", "--fail-on", "error", deb.to_str().expect("UTF-8")]));
    assert!(!lint.lines().any(|line| line.starts_with("E: ")), "{lint}");
    report(&format!(
        "lintian: {} warnings, no errors",
        lint.lines().filter(|l| l.starts_with("W: ")).count()
    ));
    let lint = run("rpmlint", &["-c", "packaging/rpm/rpmlint.toml", rpm.to_str().expect("UTF-8")]);
    report(&format!("rpmlint: {}", lint.trim_end().lines().last().unwrap_or_default().trim()));
    let scripts = run("rpm", &["-qp", "--scripts", rpm.to_str().expect("UTF-8")]);
    assert!(scripts.contains("systemd-sysusers llama-orch.conf"), "{scripts}");

    let root = Root(directory.path().join("root"));
    let path = root.0.to_str().expect("UTF-8").to_string();
    // What has been fetched once is there the next time.
    let cache = repository().join("target/package/debootstrap");
    fs::create_dir_all(&cache).expect("a directory");
    let flags = [format!("--include={INCLUDED}"), format!("--cache-dir={}", cache.display())];
    run("debootstrap", &["--variant=minbase", &flags[0], &flags[1], "bookworm", &path]);

    root.install(&deb);
    for unit in UNITS {
        assert!(root.has(&format!("/usr/lib/systemd/system/{unit}")) && !root.enabled(unit), "{unit}");
    }
    assert!(root.run(&["id", "llama-orch"]).contains("llama-orch"));
    for program in ["orchestratord", "pool-managerd", "engine-provisioner", "llorch"] {
        assert!(root.run(&[program, "--version"]).starts_with(program), "{program}");
    }
    root.run(&["systemd-analyze", "verify", "--man=no", UNITS[0], UNITS[1], UNITS[2], "engine@chat.service"]);
    for (unit, most) in [(UNITS[0], "20"), (UNITS[2], "30"), (UNITS[3], "40")] {
        let threshold = format!("--threshold={most}");
        let path = format!("{path}/usr/lib/systemd/system/{unit}");
        let told = run("systemd-analyze", &["security", "--offline=yes", "--no-pager", &threshold, &path]);
        report(told.lines().find(|line| line.contains("exposure level")).unwrap_or_default());
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
    root.run(&["systemctl", "enable", "--quiet", "orchestratord.service"]);
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
    if std::env::var("PACKAGES_NO_BOOT").is_err() {
        root.boot(&deb, &next_deb);
    }
}

#[allow(clippy::print_stdout, reason = "who asks for this test wants its figures")]
fn report(text: &str) {
    println!("{text}");
}

/// The blocks of DEPLOY.md's part on one machine.
fn blocks() -> Vec<String> {
    let deploy = fs::read_to_string(repository().join("packaging/DEPLOY.md")).expect("DEPLOY.md");
    let part = deploy.split("\n## One machine\n").nth(1).and_then(|rest| rest.split("\n## ").next());
    let blocks = part.expect("a part on one machine").split("\n```sh\n").skip(1);
    blocks.map(|rest| rest.split("```\n").next().expect("an end").to_string()).collect()
}
