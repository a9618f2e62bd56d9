//! Engines from source: a small repository with a toy project, the real git and the real cmake.
//!
//! Where there is no cmake, `REQUIRE_CMAKE=1 cargo test --test source` installs one from PyPI into
//! `target/cmake`; without the variable the tests that need it say that they were skipped.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use llama_orch::engine_provisioner::source::{
    Binary, Program, SourceError, SourceSpec, Step, cuda_root, find_program, provide,
};
use tempfile::TempDir;

/// A stand-in for llama-server, of the same shape: a program and a library beside it.
const PROJECT: &str = r#"cmake_minimum_required(VERSION 3.14)
project(toy C CXX)
option(LOUD "say it louder" OFF)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(words SHARED words.c)
if(LOUD)
  target_compile_definitions(words PRIVATE LOUD)
endif()
add_executable(llama-server main.c)
target_link_libraries(llama-server words)
"#;
const MAIN: &str =
    "#include <stdio.h>\nconst char *words(void);\nint main(void) { puts(words()); return 0; }\n";

fn search_path() -> OsString {
    std::env::var_os("PATH").expect("a search path")
}

/// A directory with cmake, and the search path with it; `None` where it is not asked for.
fn cmake_path() -> Option<OsString> {
    static FOUND: OnceLock<Option<OsString>> = OnceLock::new();
    FOUND.get_or_init(find_cmake).clone()
}

#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn find_cmake() -> Option<OsString> {
    if find_program("cmake", Some(&search_path())).is_ok() {
        return Some(search_path());
    }
    if std::env::var_os("REQUIRE_CMAKE").is_none_or(|value| value != "1") {
        eprintln!("skipped: there is no cmake; set REQUIRE_CMAKE=1 to fetch one from PyPI");
        return None;
    }
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/cmake");
    if !venv.join("bin/cmake").exists() {
        run("python3", &["-m", "venv", &venv.display().to_string()], Path::new("."));
        let python = venv.join("bin/python").display().to_string();
        run(
            &python,
            &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "cmake>=3.20,<5"],
            Path::new("."),
        );
    }
    let inherited = search_path();
    let all = std::iter::once(venv.join("bin")).chain(std::env::split_paths(&inherited));
    Some(std::env::join_paths(all).expect("plain names"))
}

fn run(program: &str, args: &[&str], directory: &Path) -> String {
    let output = Command::new(program).args(args).current_dir(directory).output().expect("it starts");
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_string()
}

/// A repository whose program says `word`.
struct Repository(TempDir);

impl Repository {
    fn new(word: &str) -> Repository {
        let repository = Repository(tempfile::tempdir().expect("a directory"));
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.write("CMakeLists.txt", PROJECT);
        repository.write("main.c", MAIN);
        repository.say(word);
        repository
    }

    fn git(&self, args: &[&str]) -> String {
        let who = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"];
        run("git", &[&who[..], args].concat(), self.0.path())
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.path().join(name), text).expect("written");
    }

    /// Commits a program that says `word`; returns the commit.
    fn say(&self, word: &str) -> String {
        let code = format!(
            "#ifdef LOUD\n#define END \"!\"\n#else\n#define END \"\"\n#endif\nconst char *words(void) {{ return \"{word}\" END; }}\n"
        );
        self.write("words.c", &code);
        self.git(&["add", "."]);
        self.git(&["commit", "--quiet", "-m", "Say it"]);
        self.git(&["rev-parse", "HEAD"])
    }

    fn spec(&self, revision: &str, flags: &[&str]) -> SourceSpec {
        SourceSpec {
            repository: self.0.path().display().to_string(),
            cmake_flags: flags.iter().map(|flag| flag.to_string()).collect(),
            ..SourceSpec::llama_cpp(revision, false)
        }
    }
}

fn provide_with(
    path: &OsString,
    spec: SourceSpec,
    cache: &Path,
    tell: &mut dyn FnMut(Step<'_>),
) -> Result<Program, SourceError> {
    let env = |name: &str| (name == "PATH").then(|| path.clone());
    provide(&Binary::Source(spec), cache, &env, &AtomicBool::new(false), tell)
}

fn says(program: &Program) -> String {
    run(&program.path.display().to_string(), &[], Path::new("/"))
}

#[test]
fn a_revision_is_built_once_and_runs() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    let mut told = Vec::new();
    let mut tell = |step: Step<'_>| told.push(format!("{step:?}"));
    let built = provide_with(&path, repository.spec("main", &[]), cache.path(), &mut tell).expect("built");
    assert!(built.built && says(&built) == "one");
    assert_eq!(built.version.as_deref(), Some("llamacpp-source:main-cpu"));
    let steps = ["git-clone", "git-fetch", "cmake-configure", "cmake-build"];
    let began: Vec<&String> = told.iter().filter(|step| step.starts_with("Began")).collect();
    assert_eq!(began, steps.map(|step| format!("Began({step:?})")).iter().collect::<Vec<_>>());
    assert!(told.contains(&"Percent(100)".to_string()), "{told:?}");

    let again = provide_with(&path, repository.spec("main", &[]), cache.path(), &mut |_| {}).expect("kept");
    assert!(!again.built && again.path == built.path);
    let loud = provide_with(&path, repository.spec("main", &["-DLOUD=ON"]), cache.path(), &mut |_| {})
        .expect("built");
    assert!(loud.built && says(&loud) == "one!", "other flags are another build");
    let commit = repository.say("two");
    let second = provide_with(&path, repository.spec("main", &[]), cache.path(), &mut |_| {}).expect("built");
    assert!(second.built && says(&second) == "two" && says(&built) == "one", "the old build stays");
    // A commit that is here needs no repository any more.
    let gone = repository.spec(&commit, &[]);
    drop(repository);
    assert_eq!(provide_with(&path, gone, cache.path(), &mut |_| {}).expect("kept").path, second.path);
}

#[test]
fn what_does_not_compile_is_tried_once_more_and_ends_with_the_compilers_words() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    repository.write("main.c", "#error this engine is broken\n");
    repository.say("two");
    // Compilers that CUDA would accept: the system's own, under other names.
    let other = tempfile::tempdir().expect("a directory");
    for (name, real) in [("gcc-13", "gcc"), ("g++-13", "g++")] {
        let real = find_program(real, Some(&path)).expect("a compiler");
        std::os::unix::fs::symlink(real, other.path().join(name)).expect("linked");
    }
    let all = std::iter::once(other.path().to_path_buf()).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(all).expect("plain names");
    let mut retried = 0;
    let mut tell = |step: Step<'_>| retried += usize::from(matches!(step, Step::Retrying(_)));
    let error =
        provide_with(&path, repository.spec("main", &[]), cache.path(), &mut tell).expect_err("broken");
    let told = error.to_string();
    assert!(told.starts_with("cmake-build failed") && told.contains("this engine is broken"), "{told}");
    assert!(told.lines().count() <= 16, "{told}");
    assert_eq!(retried, 1);
    repository.write("main.c", MAIN);
    repository.say("mended");
    let mended = provide_with(&path, repository.spec("main", &[]), cache.path(), &mut |_| {}).expect("built");
    assert_eq!(says(&mended), "mended");
}

#[test]
fn a_host_compiler_that_works_saves_the_build() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    let other = tempfile::tempdir().expect("a directory");
    let script = |name: &str, text: &str| {
        let file = other.path().join(name);
        fs::write(&file, text).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("mode");
    };
    // The default compilers are broken, the other ones work.
    for (name, working, real) in [("cc", "gcc-13", "gcc"), ("c++", "g++-13", "g++")] {
        let real = find_program(real, Some(&path)).expect("a compiler");
        script(name, "#!/bin/sh\necho unsupported compiler >&2\nexit 1\n");
        script(working, &format!("#!/bin/sh\nexec {} \"$@\"\n", real.display()));
    }
    let all = std::iter::once(other.path().to_path_buf()).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(all).expect("plain names");
    // The child's own search path decides which compilers cmake sees: flags name the broken ones.
    let broken = ["cc", "c++"].map(|name| other.path().join(name).display().to_string());
    fs::write(
        repository.0.path().join("CMakeLists.txt"),
        PROJECT.replace("project(toy", &format!("if(NOT DEFINED CMAKE_C_COMPILER)\nset(CMAKE_C_COMPILER {})\nset(CMAKE_CXX_COMPILER {})\nendif()\nproject(toy", broken[0], broken[1])),
    )
    .expect("written");
    repository.say("saved");
    let mut retried = Vec::new();
    let mut tell = |step: Step<'_>| {
        if let Step::Retrying(with) = step {
            retried.push(with.to_string());
        }
    };
    let built = provide_with(&path, repository.spec("main", &[]), cache.path(), &mut tell).expect("saved");
    assert_eq!(says(&built), "saved");
    assert_eq!(retried, [other.path().join("g++-13").display().to_string()]);
}

#[test]
fn two_that_want_the_same_build_build_it_once() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    let build =
        || provide_with(&path, repository.spec("main", &[]), cache.path(), &mut |_| {}).expect("built");
    let (one, two) = thread::scope(|scope| {
        let first = scope.spawn(build);
        let second = scope.spawn(build);
        (first.join().expect("no panic"), second.join().expect("no panic"))
    });
    assert_eq!(one.path, two.path);
    assert!(one.built != two.built, "{one:?} {two:?}");
}

#[test]
fn a_build_that_is_stopped_is_not_taken_for_one() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    repository.write(
        "CMakeLists.txt",
        &PROJECT.replace("add_executable", "add_custom_target(wait ALL COMMAND sleep 600)\nadd_executable"),
    );
    repository.write(
        "CMakeLists.txt",
        &format!(
            "{}add_dependencies(llama-server wait)\n",
            fs::read_to_string(repository.0.path().join("CMakeLists.txt")).expect("read")
        ),
    );
    repository.say("one");
    let cancel = AtomicBool::new(false);
    let env = |name: &str| (name == "PATH").then(|| path.clone());
    let start = Instant::now();
    let mut tell = |step: Step<'_>| {
        if step == Step::Began("cmake-build") {
            cancel.store(true, Ordering::Relaxed);
        }
    };
    let spec = repository.spec("main", &[]);
    let stopped = provide(&Binary::Source(spec), cache.path(), &env, &cancel, &mut tell);
    assert_eq!(stopped, Err(SourceError::Cancelled));
    assert!(start.elapsed() < Duration::from_secs(300));
    repository.write("CMakeLists.txt", PROJECT);
    repository.say("two");
    assert_eq!(
        says(&provide_with(&path, repository.spec("main", &[]), cache.path(), &mut |_| {}).expect("built")),
        "two"
    );
}

#[test]
fn the_command_prints_where_the_program_is() {
    let Some(path) = cmake_path() else { return };
    let (repository, cache) = (Repository::new("one"), tempfile::tempdir().expect("a directory"));
    let build = |reference: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine-provisioner"));
        command
            .args(["build", "--cmake-flags=-DLOUD=ON", "--ref", reference, "--repository"])
            .arg(repository.0.path());
        command.env("PATH", &path).env("ENGINE_PROVISIONER_CACHE_DIR", cache.path()).env_remove("RUST_LOG");
        command.output().expect("it runs")
    };
    let output = build("main");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("cmake-build") && said.contains("built 100 %"),
        "{said}"
    );
    let program = String::from_utf8_lossy(&output.stdout).trim().to_string();
    assert_eq!(run(&program, &[], Path::new("/")), "one!");
    let output = build("no-such-branch");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("cannot fetch no-such-branch"), "{said}");
}

#[test]
fn what_is_missing_is_named_before_anything_is_begun() {
    let cache = tempfile::tempdir().expect("a directory");
    let nothing = OsString::from("/nonexistent");
    let spec = SourceSpec::llama_cpp("b1", false);
    let told = |result: Result<Program, SourceError>| match result.expect_err("it cannot work") {
        SourceError::Request(text) => text,
        other => panic!("{other:?}"),
    };
    let text = told(provide_with(&nothing, spec.clone(), cache.path(), &mut |_| {}));
    assert!(text.contains("needs git") && text.contains("install it"), "{text}");
    let bad = SourceSpec { revision: "--upload-pack=sh".into(), ..spec };
    assert!(told(provide_with(&nothing, bad, cache.path(), &mut |_| {})).contains("no revision"));
    let env = |name: &str| (name == "PATH").then(search_path);
    let named = |name: &str| {
        provide(&Binary::Named(name.into()), cache.path(), &env, &AtomicBool::new(false), &mut |_| {})
    };
    assert!(named("sh").expect("on the path").path.is_absolute());
    assert!(told(named("no-such-engine")).contains("on PATH"));
    assert!(told(named("/nowhere/llama-server")).contains("there is no program"));
    let file = cache.path().join("text");
    fs::write(&file, "").expect("written");
    assert!(told(named(&file.display().to_string())).contains("chmod +x"));
    assert_eq!(fs::read_dir(cache.path()).expect("listed").count(), 1, "nothing was begun");
}

#[test]
fn cuda_is_found_where_variables_and_paths_say() {
    let root = tempfile::tempdir().expect("a directory");
    let compiler = root.path().join("bin/nvcc");
    fs::create_dir(root.path().join("bin")).expect("created");
    fs::write(&compiler, "").expect("written");
    fs::set_permissions(&compiler, fs::Permissions::from_mode(0o755)).expect("mode");
    let found = |name: &'static str, value: PathBuf| {
        cuda_root(&move |asked| (asked == name).then(|| value.clone().into()))
    };
    let expected = fs::canonicalize(root.path()).expect("a path");
    for (name, value) in [
        ("CUDAToolkit_ROOT", expected.clone()),
        ("CUDA_HOME", expected.clone()),
        ("CUDA_PATH", expected.clone()),
        ("CUDACXX", expected.join("bin/nvcc")),
        ("PATH", expected.join("bin")),
    ] {
        assert_eq!(found(name, value), Some(expected.clone()), "{name}");
    }
    assert_ne!(found("CUDA_HOME", "/nonexistent".into()), Some("/nonexistent".into()));
}
