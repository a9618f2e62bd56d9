//! Models from servers that misbehave, into caches that are full, shared and interrupted: each ends in
//! the right file, or in one line that says what to do.

#[path = "models/server.rs"]
mod server;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use llama_orch::engine_provisioner::models::{
    Digest, Model, ModelError, Options, Progress, Reference, Request, Secret, Store, resolve,
};
use server::{Reply, Server};
use tempfile::TempDir;

/// Far longer than anything here takes, so that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

fn root() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Bytes without a pattern that a shifted or repeated span would keep.
fn content(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).take(length).collect()
}

fn options(root: &TempDir) -> Options {
    Options {
        pause_first: Duration::from_millis(5),
        failures_max: 4,
        stall: Duration::from_secs(20),
        ..Options::new(&root.path().join("models"))
    }
}

fn request(reference: &str) -> Request {
    let reference = Reference::parse(reference).expect("a reference");
    Request { reference, digest: None, refresh: false }
}

fn fetch(options: &Options, request: &Request) -> Result<Model, ModelError> {
    resolve(options, request, &Arc::new(AtomicBool::new(false)), &mut |_| {})
}

fn read(model: &Model) -> Vec<u8> {
    fs::read(&model.path).expect("the model can be read")
}

/// Everything in the cache that takes room: blobs, and what is on its way.
fn kept(options: &Options) -> Vec<String> {
    let list = |name: &str| fs::read_dir(options.directory.join(name)).into_iter().flatten().flatten();
    let all = list("blobs").chain(list("partial")).chain(list("entries"));
    all.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn refused(options: &Options, request: &Request) -> String {
    let error = fetch(options, request).expect_err("it cannot work");
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains(':'), "it says what to do: {text}");
    text
}

#[test]
fn a_file_is_fetched_once_hashed_and_named() {
    let (root, content) = (root(), content(3 * MIB + 7));
    let server = Server::good(&content);
    let options = options(&root);
    let request = request(&server.url("/dir/m.bin"));
    let mut told = Vec::new();
    let mut tell = |progress: Progress<'_>| told.push(format!("{progress:?}"));
    let model = resolve(&options, &request, &Arc::default(), &mut tell).expect("fetched");
    assert!(model.fetched && model.path.ends_with("m.bin"), "{model:?}");
    assert!(read(&model) == content && model.digest == Some(Digest::of(&content)));
    assert!(told.first().is_some_and(|first| first.starts_with("Started")), "{told:?}");
    assert!(told.last().is_some_and(|last| last.starts_with("Finished")), "{told:?}");

    let again = fetch(&options, &request).expect("here already");
    assert!(!again.fetched && again.path == model.path);
    let offline = Options { offline: true, ..options.clone() };
    assert!(fetch(&offline, &request).is_ok());
    assert_eq!(server.asks().len(), 1, "the server was asked again");
    let provenance = fs::read_to_string(options.directory.join("provenance.jsonl")).expect("it is kept");
    let line: serde_json::Value = serde_json::from_str(provenance.trim()).expect("one line of JSON");
    assert_eq!(line["digest"], Digest::of(&content).to_string());
    assert_eq!(
        (line["from"].as_str(), line["size_bytes"].as_u64()),
        (Some(server.url("/dir/m.bin").as_str()), Some(content.len() as u64))
    );
    let catalogue = Store::open(&options.directory).and_then(|store| store.catalogue()).expect("a catalogue");
    assert_eq!(catalogue.models.len(), 1);
}

#[test]
fn a_large_file_comes_over_several_connections() {
    let (root, content) = (root(), content(70 * MIB + 3));
    let server = Server::good(&content);
    let model = fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched");
    assert_eq!(model.digest, Some(Digest::of(&content)));
    let asks = server.asks();
    assert!(asks.len() >= 5 && asks.iter().all(|ask| ask.range.is_some()), "{asks:?}");
    let asked: usize = asks
        .iter()
        .filter_map(|ask| ask.range.clone())
        .map(|range| range.end.min(content.len()) - range.start)
        .sum();
    assert_eq!(asked, content.len(), "a byte was asked for twice");
}

#[test]
fn a_server_that_ignores_ranges_sends_it_whole() {
    let (root, content) = (root(), content(MIB));
    let whole = content.clone();
    let server = Server::start(move |_, _| Reply::status(200).body(&whole));
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == content);

    // And of a length that it does not know.
    let whole = content.clone();
    let server = Server::start(move |_, _| Reply::status(200).body(&whole).length(None));
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == content);
}

#[test]
fn connections_that_break_are_taken_up_where_they_broke() {
    let (root, content) = (root(), content(2 * MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, before| {
        let reply = Reply::of(&whole, "\"v1\"", ask);
        if before < 6 { reply.cut(200_000) } else { reply }
    });
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == content);
    let starts: Vec<usize> =
        server.asks().iter().map(|ask| ask.range.clone().expect("a range").start).collect();
    assert_eq!(starts, (0..=6).map(|n| n * 200_000).collect::<Vec<_>>());
}

#[test]
fn silence_ends_a_connection_and_not_the_download() {
    let (root, content) = (root(), content(MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, before| {
        let reply = Reply::of(&whole, "\"v1\"", ask);
        if before == 0 { reply.silent_after(1000, PATIENCE) } else { reply }
    });
    let options = Options { stall: Duration::from_millis(300), ..options(&root) };
    assert!(read(&fetch(&options, &request(&server.url("/m.bin"))).expect("fetched")) == content);
    assert_eq!(server.asks().len(), 2);
}

#[test]
fn other_ranges_than_asked_for_are_not_believed() {
    let (root, content) = (root(), content(MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, _| match &ask.range {
        Some(range) => {
            let told = format!("bytes {}-{}/{}", range.start + 1, whole.len() - 1, whole.len());
            Reply::status(206).body(&whole[1..]).header("Content-Range", &told)
        }
        None => Reply::status(200).body(&whole),
    });
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == content);
    assert!(server.asks().last().is_some_and(|ask| ask.range.is_none()));
}

#[test]
fn a_wrong_length_is_found_out() {
    let (root, content) = (root(), content(MIB));
    for wrong in [content.len() + 5, content.len() * 2] {
        let whole = content.clone();
        let server = Server::start(move |_, _| Reply::status(200).body(&whole).length(Some(wrong)));
        let options = options(&root);
        let told = refused(&options, &request(&server.url("/m.bin")));
        assert!(told.contains("ended in the middle"), "{told}");
        assert_eq!(kept(&options), [""; 0], "without ranges nothing can be continued");
    }
}

#[test]
fn a_file_that_changes_is_begun_anew_and_never_mixed() {
    let (root, old, new) = (root(), content(2 * MIB), content(3 * MIB)[MIB..].to_vec());
    let (first, second) = (old.clone(), new.clone());
    let server = Server::start(move |ask, before| match before {
        0 => Reply::of(&first, "\"old\"", ask).cut(MIB),
        _ => Reply::of(&second, "\"new\"", ask),
    });
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == new);

    // One that never stands still is given up.
    let server = Server::start(move |ask, before| Reply::of(&old, &format!("\"{before}\""), ask).cut(1000));
    let told = refused(&options(&root), &request(&server.url("/other.bin")));
    assert!(told.contains("keeps changing"), "{told}");
}

#[test]
fn without_anything_to_compare_two_attempts_are_not_joined() {
    let (root, old, new) = (root(), content(2 * MIB), content(3 * MIB)[MIB..].to_vec());
    let second = new.clone();
    let server = Server::start(move |ask, before| match before {
        0 => Reply::of(&old, "", ask).cut(MIB),
        _ => Reply::of(&second, "", ask),
    });
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == new);
}

#[test]
fn a_server_that_asks_for_patience_gets_it() {
    let (root, content) = (root(), content(1000));
    let whole = content.clone();
    let server = Server::start(move |ask, before| match before {
        0 => Reply::status(429).header("Retry-After", "1"),
        1 | 2 => Reply::status(503),
        _ => Reply::of(&whole, "\"v1\"", ask),
    });
    let start = Instant::now();
    assert!(read(&fetch(&options(&root), &request(&server.url("/m.bin"))).expect("fetched")) == content);
    assert!(start.elapsed() >= Duration::from_secs(1), "Retry-After was not kept to");

    let never = Server::start(|_, _| Reply::status(503));
    let told = refused(&options(&root), &request(&never.url("/never.bin")));
    assert!(told.contains("503") && told.contains("run it again"), "{told}");
    assert_eq!(never.asks().len(), 5, "one attempt and four more");
    let tomorrow = Server::start(|_, _| Reply::status(429).header("Retry-After", "86400"));
    let told = refused(&options(&root), &request(&tomorrow.url("/tomorrow.bin")));
    assert!(told.contains("86400 s"), "{told}");
}

#[test]
fn what_will_not_change_is_said_at_once() {
    for (status, what) in [(404, "no such file"), (401, "credentials"), (403, "credentials"), (400, "400")] {
        let (root, server) = (root(), Server::start(move |_, _| Reply::status(status)));
        let options = options(&root);
        let told = refused(&options, &request(&server.url("/m.bin")));
        assert!(told.contains(what), "{status}: {told}");
        assert_eq!(server.asks().len(), 1, "{status} was asked for again");
        assert_eq!(kept(&options), [""; 0]);
    }
    let root = root();
    let nobody = Server::good(b"x").port;
    // Nobody listens on a port that was given back.
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port");
    assert_ne!(free.port(), nobody);
    let told = refused(&options(&root), &request(&format!("http://{free}/m.bin")));
    assert!(told.contains("refused"), "{told}");
}

#[test]
fn a_wrong_digest_keeps_nothing_and_a_right_one_finds_the_same_content() {
    let (root, content) = (root(), content(MIB));
    let server = Server::good(&content);
    let options = options(&root);
    let wrong = Request { digest: Some(Digest::of(b"other")), ..request(&server.url("/m.bin")) };
    let told = refused(&options, &wrong);
    let (expected, found) = (Digest::of(b"other").to_string(), Digest::of(&content).to_string());
    assert!(told.contains(&expected) && told.contains(&found) && told.contains("nothing was kept"), "{told}");
    assert_eq!(kept(&options), [""; 0]);

    let right = Request { digest: Some(Digest::of(&content)), ..request(&server.url("/m.bin")) };
    assert!(fetch(&options, &right).expect("fetched").fetched);
    let elsewhere = Request { digest: right.digest, ..request("http://127.0.0.1:1/renamed.bin") };
    let same = fetch(&Options { offline: true, ..options }, &elsewhere).expect("it has the content");
    assert!(read(&same) == content);
}

#[test]
fn a_page_about_a_model_and_half_a_model_are_no_models() {
    let root = root();
    let options = options(&root);
    let page = Server::good(b"<!DOCTYPE html><title>Log in</title>");
    let told = refused(&options, &request(&page.url("/m.gguf")));
    assert!(told.contains("no GGUF") && told.contains("not a page"), "{told}");
    let model = small_model(256);
    let half = Server::good(&model[..model.len() - 100]);
    let told = refused(&options, &request(&half.url("/m.gguf")));
    assert!(told.contains("cut short"), "{told}");
    let empty = Server::good(b"");
    let told = refused(&options, &request(&empty.url("/m.bin")));
    assert!(told.contains("empty"), "{told}");
    assert_eq!(kept(&options), [""; 0]);

    let whole = Server::good(&model);
    let found = fetch(&options, &request(&whole.url("/m.gguf"))).expect("a model");
    let gguf = found.gguf.as_ref().expect("its header");
    assert_eq!(
        (gguf.architecture.as_deref(), gguf.context_length, gguf.parameters),
        (Some("llama"), Some(4096), 256)
    );
    assert!(found.ready_within_ms() >= 120_000);
}

/// A GGUF with one tensor of `weights` F32.
fn small_model(weights: u64) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend([text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat());
    bytes.extend(
        [text("llama.context_length"), 4u32.to_le_bytes().to_vec(), 4096u32.to_le_bytes().to_vec()].concat(),
    );
    bytes.extend([text("w"), 1u32.to_le_bytes().to_vec(), weights.to_le_bytes().to_vec()].concat());
    bytes.extend([&0u32.to_le_bytes()[..], &0u64.to_le_bytes()[..]].concat());
    bytes.resize(bytes.len().next_multiple_of(32) + usize::try_from(weights).expect("few") * 4, 7);
    bytes
}

#[test]
fn a_token_stays_with_the_hub() {
    let (root, content) = (root(), content(1000));
    let whole = content.clone();
    let store = Server::start(move |ask, _| Reply::of(&whole, "\"v1\"", ask));
    let elsewhere = store.url("/signed?signature=1");
    let digest = Digest::of(&content).hex();
    let hub = Server::start(move |ask, _| match ask.authorization.as_deref() {
        Some("Bearer hf_right") if ask.path == "/o/r/resolve/main/m.bin" => {
            Reply::status(302).header("Location", "/moved/m.bin")
        }
        Some("Bearer hf_right") => Reply::status(302)
            .header("Location", &elsewhere)
            .header("X-Linked-ETag", &format!("\"{digest}\"")),
        _ => Reply::status(401),
    });
    let token = |text: &str| Some(Secret::parse(text).expect("a token"));
    let with = |token| Options { hub: hub.url(""), token, ..options(&root) };
    let request = request("hf:o/r/m.bin");
    let told = refused(&with(None), &request);
    assert!(told.contains("--hf-token-file") && told.contains("HF_TOKEN"), "{told}");
    let told = refused(&with(token("hf_wrong")), &request);
    assert!(told.contains("refuses the token") && !told.contains("hf_wrong"), "{told}");
    let options = with(token("hf_right"));
    assert!(!format!("{options:?}").contains("hf_right"));
    assert!(read(&fetch(&options, &request).expect("fetched")) == content);
    assert!(hub.asks().iter().skip(2).all(|ask| ask.authorization.as_deref() == Some("Bearer hf_right")));
    assert!(store.asks().iter().all(|ask| ask.authorization.is_none()), "{:?}", store.asks());
    for file in ["catalogue.json", "provenance.jsonl"] {
        let text = fs::read_to_string(options.directory.join(file)).expect("it is there");
        assert!(!text.contains("hf_right") && !text.contains("signature"), "{text}");
    }
}

#[test]
fn what_the_hub_promised_is_held_against_what_its_store_sent() {
    let root = root();
    let store = Server::good(b"something else");
    let elsewhere = store.url("/m");
    let digest = Digest::of(b"what was promised").hex();
    let hub = Server::start(move |_, _| {
        Reply::status(302).header("Location", &elsewhere).header("X-Linked-ETag", &format!("\"{digest}\""))
    });
    let options = Options { hub: hub.url(""), ..options(&root) };
    assert!(refused(&options, &request("hf:o/r/m.bin")).contains("not what was promised"));
    assert_eq!(kept(&options), [""; 0]);
}

#[test]
fn redirects_end() {
    let root = root();
    let circle = Server::start(|ask, _| Reply::status(302).header("Location", &ask.path));
    let told = refused(&options(&root), &request(&circle.url("/m.bin")));
    assert!(told.contains("redirects"), "{told}");
    let away = Server::start(|_, _| Reply::status(302).header("Location", "file:///etc/passwd"));
    let told = refused(&options(&root), &request(&away.url("/m.bin")));
    assert!(told.contains("no http(s) URL"), "{told}");
}

#[test]
fn a_repository_is_listed_and_a_split_model_is_whole() {
    let root = root();
    let model = small_model(256);
    let served = model.clone();
    let sibling = |name: &str| serde_json::json!({"rfilename": name, "size": model.len()});
    let names =
        ["q/m-Q8_0-00002-of-00002.gguf", "q/m-Q8_0-00001-of-00002.gguf", "m-Q4_K_M.gguf", "README.md"];
    let list = serde_json::json!({"sha": "c0ffee", "siblings": names.map(sibling)}).to_string();
    let hub = Server::start(move |ask, _| {
        if ask.path.starts_with("/api/models/o/r/revision/main") {
            return Reply::status(200).body(list.as_bytes());
        }
        assert!(ask.path.starts_with("/o/r/resolve/c0ffee/"), "a commit, not a branch: {}", ask.path);
        let mut served = served.clone();
        // The two parts differ.
        *served.last_mut().expect("a byte") =
            u8::try_from(ask.path.len() % 251).expect("small") ^ ask.path.as_bytes()[ask.path.len() - 15];
        Reply::of(&served, "\"v1\"", ask)
    });
    let options = Options { hub: hub.url(""), ..options(&root) };
    let told = refused(&options, &request("hf:o/r"));
    assert!(told.contains("hf:o/r/m-Q4_K_M.gguf") && told.contains("00001-of-00002"), "{told}");
    let split = fetch(&options, &request("hf:o/r:Q8_0")).expect("fetched");
    assert!(split.path.ends_with("q/m-Q8_0-00001-of-00002.gguf"), "{split:?}");
    assert!(split.path.with_file_name("m-Q8_0-00002-of-00002.gguf").exists(), "engines find parts by name");
    assert_eq!((split.bytes, split.gguf.as_ref().map(|g| g.parameters)), (2 * model.len() as u64, Some(512)));
    let one = Request { digest: Some(Digest::of(b"x")), ..request("hf:o/r/q/m-Q8_0-00001-of-00002.gguf") };
    assert!(refused(&options, &one).contains("a digest is one file's"));
}

#[test]
fn a_local_model_is_used_where_it_lies_and_never_asked_for_elsewhere() {
    let root = root();
    let options = Options { offline: true, ..options(&root) };
    let path = root.path().join("m.gguf");
    let reference = path.display().to_string();
    let told = refused(&options, &request(&reference));
    assert!(told.contains("there is no"), "{told}");
    fs::write(&path, small_model(64)).expect("written");
    for text in [reference.clone(), format!("file:{reference}"), format!("file://{reference}")] {
        let model = fetch(&options, &request(&text)).expect("here");
        assert_eq!((model.path.as_path(), model.fetched), (path.as_path(), false));
    }
    let digest = Some(Digest::of(&small_model(64)));
    assert!(fetch(&options, &Request { digest, ..request(&reference) }).is_ok());
    let wrong = Request { digest: Some(Digest::of(b"x")), ..request(&reference) };
    assert!(refused(&options, &wrong).contains("not what was promised"));
    assert!(path.exists(), "a file that is not ours stays");
    let directory = Request { digest, ..request(&root.path().display().to_string()) };
    assert!(refused(&options, &directory).contains("not one file"));
    let catalogue = Store::open(&options.directory).and_then(|store| store.catalogue()).expect("a catalogue");
    assert_eq!(catalogue.models.len(), 1, "one entry, however often it is asked for");
    assert!(refused(&options, &request("hf:o/r/m.gguf")).contains("--offline"));
    fs::write(&path, &small_model(64)[..200]).expect("written");
    assert!(refused(&options, &request(&reference)).contains("cut short"));
}

#[test]
fn a_quota_spares_what_is_in_use_and_spends_what_is_retired() {
    let root = root();
    let options = Options { quota_bytes: Some(5 * MIB as u64), ..options(&root) };
    let server = Server::start(|ask, _| Reply::of(&content(2 * MIB + ask.path.len()), "\"v1\"", ask));
    let get = |path: &str| fetch(&options, &request(&server.url(path)));
    let first = get("/a").expect("fits");
    drop(get("/bb").expect("fits"));
    let told = get("/ccc").expect_err("too much").to_string();
    assert!(told.contains("quota of 5.0 MiB") && told.contains("retire"), "{told}");
    let store = Store::open(&options.directory).expect("a store");
    let retire = |path: &str| {
        let entry = store.mark(&server.url(path), llama_orch::engine_provisioner::models::State::Retired);
        assert!(entry.expect("marked").is_some());
    };
    retire("/a");
    assert!(get("/ccc").is_err(), "an engine uses it");
    assert!(store.remove(&server.url("/a")).expect_err("in use").to_string().contains("in use"));
    assert_eq!(store.clean().expect("cleaned").in_use, 1);
    drop(first);
    let third = get("/ccc").expect("the retired one made room");
    assert_eq!(read(&third).len(), 2 * MIB + 4);
    let left: Vec<String> =
        store.catalogue().expect("a catalogue").models.into_iter().map(|entry| entry.reference).collect();
    assert_eq!(left, [server.url("/bb"), server.url("/ccc")]);
    assert_eq!(kept(&options).len(), 4, "two contents and their links: {:?}", kept(&options));
}

#[test]
fn what_a_power_failure_may_have_taken_is_hashed_again() {
    let (root, content) = (root(), content(MIB));
    let server = Server::good(&content);
    let options = options(&root);
    let request = request(&server.url("/m.bin"));
    let model = fetch(&options, &request).expect("fetched");
    let catalogue = options.directory.join("catalogue.json");
    let text = fs::read_to_string(&catalogue).expect("it is there");
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    assert!(text.contains(boot.trim()), "it was not flushed yet: {text}");
    fs::write(&catalogue, text.replace(boot.trim(), "an-earlier-boot")).expect("written");
    let blob = fs::canonicalize(&model.path).expect("a blob");
    drop(model);
    fs::set_permissions(&blob, fs::Permissions::from_mode(0o640)).expect("mode");
    fs::write(&blob, vec![0; MIB]).expect("zeroes, as after a power failure");
    assert!(read(&fetch(&options, &request).expect("fetched again")) == content);
    assert_eq!(server.asks().len(), 2);
}

#[test]
fn stopping_is_quick_and_keeps_what_arrived() {
    let (root, content) = (root(), content(2 * MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, before| {
        let reply = Reply::of(&whole, "\"v1\"", ask);
        if before == 0 { reply.silent_after(MIB, PATIENCE) } else { reply }
    });
    let options = options(&root);
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cancel);
    let mut tell = |progress: Progress<'_>| {
        if matches!(progress, Progress::Bytes { done_bytes, .. } if done_bytes == MIB as u64) {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let start = Instant::now();
    let stopped = resolve(&options, &request(&server.url("/m.bin")), &cancel, &mut tell);
    assert!(matches!(stopped, Err(ModelError::Cancelled)), "{stopped:?}");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert!(read(&fetch(&options, &request(&server.url("/m.bin"))).expect("fetched")) == content);
    assert_eq!(server.asks()[1].range.clone().map(|range| range.start), Some(MIB));
}

// From here on with processes of their own.

fn provisioner(root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine-provisioner"));
    command.arg("models").args(args).env("ENGINE_PROVISIONER_CACHE_DIR", root);
    for name in [
        "HF_TOKEN",
        "HF_ENDPOINT",
        "RUST_LOG",
        "SSL_CERT_FILE",
        "ENGINE_PROVISIONER_OFFLINE",
        "HF_HUB_OFFLINE",
    ] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn path_of(output: &Output) -> PathBuf {
    assert!(output.status.success(), "{}", said(output));
    PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())
}

/// Ends the process with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let (root, content) = (root(), content(3 * MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, before| {
        let reply = Reply::of(&whole, "\"v1\"", ask);
        if before == 0 { reply.slow(64 << 10, Duration::from_millis(100)) } else { reply }
    });
    let url = server.url("/m.bin");
    let mut first = Killed(provisioner(root.path(), &["fetch", &url]).spawn().expect("it starts"));
    let partial = root.path().join("models/partial");
    let deadline = Instant::now() + PATIENCE;
    let noted = || {
        fs::read_dir(&partial)
            .into_iter()
            .flatten()
            .flatten()
            .any(|e| e.path().extension().is_some_and(|e| e == "json"))
    };
    while !noted() {
        assert!(Instant::now() < deadline, "nothing was noted down");
        thread::sleep(Duration::from_millis(5));
    }
    first.0.kill().expect("killed");
    first.0.wait().expect("ended");
    let output = provisioner(root.path(), &["fetch", &url]).output().expect("it runs");
    assert!(fs::read(path_of(&output)).expect("read") == content);
    let resumed = server.asks()[1].range.clone().expect("a range").start;
    assert!(resumed > 0 && resumed < content.len(), "{resumed}");
    assert_eq!(fs::read_dir(&partial).expect("listed").count(), 0, "nothing is left of the way");
}

#[test]
fn two_processes_fetch_one_thing_once() {
    let (root, content) = (root(), content(2 * MIB));
    let whole = content.clone();
    let server = Server::start(move |ask, _| {
        Reply::of(&whole, "\"v1\"", ask).slow(256 << 10, Duration::from_millis(50))
    });
    let url = server.url("/m.bin");
    let start = || provisioner(root.path(), &["fetch", &url]).spawn().expect("it starts");
    let outputs = [start(), start(), start()].map(|child| child.wait_with_output().expect("it ends"));
    for output in &outputs {
        assert!(fs::read(path_of(output)).expect("read") == content);
    }
    assert_eq!(server.asks().len(), 1, "{:?}", outputs.each_ref().map(said));
}

#[test]
fn a_full_disk_is_named_with_what_to_do() {
    let (root, content) = (root(), content(4 * MIB));
    let server = Server::good(&content);
    let url = server.url("/m.bin");
    // A limit on the size of files stands in for a disk: writing fails in the middle in the same way.
    let limited = |root: &Path, url: &str| {
        let program = env!("CARGO_BIN_EXE_engine-provisioner");
        let script = format!("trap '' XFSZ; ulimit -f 2048; exec '{program}' models fetch '{url}'");
        let mut command = Command::new("bash");
        command.args(["-c", &script]).env("ENGINE_PROVISIONER_CACHE_DIR", root).env_remove("RUST_LOG");
        command.output().expect("it runs")
    };
    let output = limited(root.path(), &url);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(
        said(&output).contains("no room in") && said(&output).contains("--cache-dir"),
        "{}",
        said(&output)
    );
    // Of a length that nobody knows beforehand, so that it fails while it is written.
    let whole = content.clone();
    let server = Server::start(move |_, _| Reply::status(200).body(&whole).length(None));
    let output = limited(root.path(), &server.url("/unknown.bin"));
    assert!(said(&output).contains("no room in"), "{}", said(&output));

    let output = provisioner(root.path(), &["fetch", &url]).output().expect("it runs");
    assert!(fs::read(path_of(&output)).expect("read") == content, "with room it works");
}

#[test]
#[allow(clippy::print_stderr, reason = "a skipped part has to say so")]
fn a_small_disk_is_refused_before_anything_is_written() {
    let (root, content) = (root(), content(4 * MIB));
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"]).arg(root.path()).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no tmpfs can be mounted here");
        return;
    }
    let server = Server::good(&content);
    let output = provisioner(root.path(), &["fetch", &server.url("/m.bin")]).output().expect("it runs");
    let left = fs::read_dir(root.path().join("models/blobs")).expect("listed").count();
    let unmounted = Command::new("umount").arg(root.path()).status().expect("it runs");
    assert!(unmounted.success());
    assert!(
        said(&output).contains("4.0 MiB are needed") && said(&output).contains("are free"),
        "{}",
        said(&output)
    );
    assert_eq!(left, 0);
}

#[test]
fn a_cache_that_may_not_be_written_is_named() {
    let root = root();
    // A file where a directory has to be: root may write anywhere else.
    let blocked = root.path().join("file");
    fs::write(&blocked, "").expect("written");
    let output = provisioner(&blocked, &["ls"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(&blocked.display().to_string()), "{}", said(&output));
    let locked = root.path().join("locked");
    fs::create_dir(&locked).expect("created");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).expect("mode");
    if fs::write(locked.join("trial"), "").is_err() {
        let output = provisioner(&locked, &["ls"]).output().expect("it runs");
        assert!(said(&output).contains("--cache-dir"), "{}", said(&output));
    }
}

#[test]
fn the_command_lists_retires_and_removes() {
    let (root, model) = (root(), small_model(64));
    let server = Server::good(&model);
    let url = server.url("/m.gguf?signature=hidden");
    let run = |args: &[&str]| provisioner(root.path(), args).output().expect("it runs");
    let out = |args: &[&str]| {
        let output = run(args);
        assert!(output.status.success(), "{args:?}: {}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(out(&["ls"]).contains("no models"));
    let digest = Digest::of(&model).to_string();
    let told: serde_json::Value =
        serde_json::from_str(&out(&["fetch", &url, "--digest", &digest, "--json"])).expect("JSON");
    assert_eq!((told["architecture"].as_str(), told["context_length"].as_u64()), (Some("llama"), Some(4096)));
    assert_eq!(told["digest"], digest);
    let listed = out(&["ls"]);
    assert!(
        listed.starts_with("active") && listed.contains("llama") && !listed.contains("hidden"),
        "{listed}"
    );
    let shown = server.url("/m.gguf");
    assert!(out(&["retire", &shown]).starts_with("retired"));
    assert!(out(&["gc"]).contains("1 files removed"));
    assert!(out(&["ls"]).contains("no models"));
    assert_eq!(run(&["rm", &shown]).status.code(), Some(78));
    for (args, code) in [
        (&["fetch"][..], 2),
        (&["frobnicate"][..], 2),
        (&["fetch", "s3://b/m"][..], 78),
        (&["fetch", "hf:x", "--digest=md5:1"][..], 78),
        (&["fetch", "/nowhere/m.gguf"][..], 78),
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", said(&output));
    }
}

/// A server that speaks TLS under a certificate for 127.0.0.1, and gives `content` to whoever asks.
fn tls_server(content: Vec<u8>) -> (u16, String) {
    let own = rcgen::generate_simple_self_signed(["127.0.0.1".to_string()]).expect("a certificate");
    let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).expect("a key");
    let config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .expect("they fit");
    let config = Arc::new(config);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut tls = rustls::ServerConnection::new(Arc::clone(&config)).expect("a connection");
            let mut stream = rustls::Stream::new(&mut tls, &mut stream);
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n")
                && std::io::Read::read(&mut stream, &mut byte).is_ok_and(|n| n == 1)
            {
                head.push(byte[0]);
            }
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", content.len());
            let _ = std::io::Write::write_all(&mut stream, &[answer.as_bytes(), &content].concat());
        }
    });
    (port, own.cert.pem())
}

#[test]
fn https_is_checked_against_the_certificates_that_are_trusted() {
    let (root, content) = (root(), content(MIB));
    let (port, pem) = tls_server(content.clone());
    let bundle = root.path().join("bundle.pem");
    fs::write(&bundle, pem).expect("written");
    let url = format!("https://127.0.0.1:{port}/m.bin");
    let output = provisioner(root.path(), &["fetch", &url]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said(&output).contains("not trusted") && said(&output).contains("SSL_CERT_FILE"),
        "{}",
        said(&output)
    );
    let output =
        provisioner(root.path(), &["fetch", &url]).env("SSL_CERT_FILE", &bundle).output().expect("it runs");
    assert!(fs::read(path_of(&output)).expect("read") == content);
    let output =
        provisioner(root.path(), &["fetch", &url, "--refresh"]).env("SSL_CERT_FILE", "/nonexistent").output();
    assert_eq!(output.expect("it runs").status.code(), Some(78));
}
