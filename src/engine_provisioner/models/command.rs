//! `engine-provisioner models` and `llorch models`: what is there, and doing something about it.

use std::ffi::OsString;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use super::digest::Digest;
use super::error::size;
use super::progress::Display;
use super::reference::Reference;
use super::store::{Entry, State, Store};
use super::{Options, Request, TABLE, resolve};
use crate::engine_provisioner::PROGRAM;
use crate::service::logging::{self, LogFormat};
use crate::settings::{Exit, Setting, Settings, boolean, flag};

const HELP: &str = "Usage: engine-provisioner models ACTION [REFERENCE...] [OPTIONS]

Actions:
  ls                   What is there
  fetch REFERENCE...   Fetch a model, or check that it is there; prints its path
  retire REFERENCE...  Mark it as no longer used: gc, or the next download that needs its room, removes it
  rm REFERENCE...      Remove it now
  gc                   Remove retired models and what was left half fetched a week ago

References: PATH, file:PATH, hf:ORG/REPO, hf:ORG/REPO/FILE, hf:ORG/REPO:QUANTISATION, http(s)://HOST/FILE

`engine-provisioner models ACTION --help` tells the options.";

/// Settings of this command besides those of all that deals with models.
static OWN: [Setting; 3] = [
    flag(
        "digest",
        None,
        "SHA256",
        "What the file has to be: sha256: and 64 digits; a mismatch keeps nothing",
    ),
    flag(
        "refresh",
        Some("false"),
        "BOOL",
        "Ask the server although the model is here: a branch may have moved on",
    ),
    flag("json", Some("false"), "BOOL", "Print JSON"),
];

/// Everything that an action can be told.
fn table() -> &'static [Setting] {
    static ALL: std::sync::OnceLock<Vec<Setting>> = std::sync::OnceLock::new();
    ALL.get_or_init(|| TABLE.iter().chain(&OWN).copied().collect())
}

/// Runs it: `args` are the words behind `models`.
///
/// # Errors
/// [`Exit`]: 2 for a line that does not parse, 78 for what cannot be meant, 1 for what failed, and 0
/// with the text of `--help`.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let is_word = |arg: &&OsString| !arg.to_string_lossy().starts_with('-');
    let words: Vec<String> =
        args.iter().take_while(is_word).map(|word| word.to_string_lossy().into_owned()).collect();
    let flags = args.into_iter().skip(words.len());
    let Some((action, references)) = words.split_first() else {
        return match flags.into_iter().next() {
            None => Err(Exit::usage(HELP)),
            Some(flag) if flag == "--help" || flag == "-h" => Err(Exit { code: 0, message: HELP.into() }),
            Some(flag) => {
                Err(Exit::usage(format!("an action comes before {}\n\n{HELP}", flag.to_string_lossy())))
            }
        };
    };
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read(
        "engine-provisioner models",
        "Look after the models of this machine",
        table(),
        None,
        flags,
        env,
    )?;
    logging::install("info", LogFormat::Text, PROGRAM, None)?;
    for note in &settings.notes {
        log::warn!("{note}");
    }
    let options = Options::from_settings(&settings, env)?;
    let json = settings.need("json", boolean)?;
    match (action.as_str(), references) {
        ("ls" | "list", []) => list(&options, json),
        ("gc", []) => clean(&options),
        ("fetch", [_, ..]) => {
            let digest = settings.get("digest", Digest::parse)?;
            if digest.is_some() && references.len() > 1 {
                return Err(Exit::usage("--digest is one file's: fetch one model at a time with it"));
            }
            fetch(&options, references, digest, settings.need("refresh", boolean)?, json)
        }
        ("retire", [_, ..]) => references.iter().try_for_each(|reference| retire(&options, reference)),
        ("rm", [_, ..]) => references.iter().try_for_each(|reference| remove(&options, reference)),
        ("fetch" | "retire" | "rm", []) => Err(Exit::usage(format!("{action} needs a REFERENCE\n\n{HELP}"))),
        ("ls" | "list" | "gc", _) => Err(Exit::usage(format!("{action} takes no REFERENCE\n\n{HELP}"))),
        _ => Err(Exit::usage(format!("{action:?} is no action\n\n{HELP}"))),
    }
}

#[allow(clippy::print_stdout, reason = "the answer to the command")]
fn list(options: &Options, json: bool) -> Result<(), Exit> {
    let store = Store::open(&options.directory)?;
    let catalogue = store.catalogue()?;
    if json {
        println!(
            "{}",
            serde_json::to_string_pretty(&catalogue).map_err(|error| Exit::runtime(error.to_string()))?
        );
        return Ok(());
    }
    if catalogue.models.is_empty() {
        println!("no models in {} yet: engine-provisioner models fetch REFERENCE", store.root().display());
        return Ok(());
    }
    for entry in &catalogue.models {
        println!("{}", line(entry));
    }
    let quota = options.quota_bytes.map_or(String::new(), |quota| format!(" of {}", size(quota)));
    println!("{}{quota} in {}", size(store.bytes()?), store.root().display());
    Ok(())
}

fn line(entry: &Entry) -> String {
    let state = if entry.state == State::Active { "active " } else { "retired" };
    let context = entry.context_length.map(|n| format!("context {n}"));
    let facts: Vec<String> =
        [entry.architecture.clone(), entry.quantisation.clone(), context].into_iter().flatten().collect();
    let missing = if entry.path.exists() { "" } else { " (missing)" };
    format!("{state}  {:>10}  {}{missing}  {}", size(entry.bytes), entry.reference, facts.join(" "))
}

#[allow(clippy::print_stdout, reason = "the answer to the command")]
fn fetch(
    options: &Options,
    references: &[String],
    digest: Option<Digest>,
    refresh: bool,
    json: bool,
) -> Result<(), Exit> {
    let cancel = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // The second one ends it at once.
        let registered = signal_hook::flag::register_conditional_default(signal, Arc::clone(&cancel))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&cancel)));
        registered.map_err(|error| Exit::runtime(format!("cannot watch for signals: {error}")))?;
    }
    let mut display = Display::new();
    for text in references {
        let reference = Reference::parse(text).map_err(|error| Exit::config(error.to_string()))?;
        let request = Request { reference, digest, refresh };
        let model = resolve(options, &request, &cancel, &mut |progress| display.show(progress))?;
        if json {
            let gguf = model.gguf.as_ref();
            println!(
                "{}",
                serde_json::json!({
                    "path": model.path,
                    "bytes": model.bytes,
                    "digest": model.digest,
                    "fetched": model.fetched,
                    "architecture": gguf.and_then(|gguf| gguf.architecture.clone()),
                    "context_length": gguf.and_then(|gguf| gguf.context_length),
                    "quantisation": gguf.and_then(|gguf| gguf.quantisation),
                    "parameters": gguf.map(|gguf| gguf.parameters),
                    "ready_within_ms": model.ready_within_ms(),
                })
            );
        } else {
            println!("{}", model.path.display());
        }
        if cancel.load(Ordering::Relaxed) {
            return Err(super::ModelError::Cancelled.into());
        }
    }
    Ok(())
}

/// A reference as the catalogue has it; a path and an id are taken as they are.
fn known(reference: &str) -> String {
    match Reference::parse(reference) {
        Ok(Reference::Local(path)) => match std::fs::canonicalize(&path) {
            Ok(path) => format!("file:{}", path.display()),
            // Perhaps an id, perhaps a file that is gone.
            Err(_) if path.is_absolute() => format!("file:{}", path.display()),
            Err(_) => reference.to_string(),
        },
        Ok(reference) => reference.shown(),
        Err(_) => reference.to_string(),
    }
}

fn unknown(reference: &str) -> Exit {
    Exit::config(format!("the catalogue has no {reference}: engine-provisioner models ls tells what it has"))
}

#[allow(clippy::print_stdout, reason = "the answer to the command")]
fn retire(options: &Options, reference: &str) -> Result<(), Exit> {
    let marked = Store::open(&options.directory)?.mark(&known(reference), State::Retired)?;
    let entry = marked.ok_or_else(|| unknown(reference))?;
    println!("{}", line(&entry));
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the answer to the command")]
fn remove(options: &Options, reference: &str) -> Result<(), Exit> {
    let removed = Store::open(&options.directory)?.remove(&known(reference))?;
    let cleaned = removed.ok_or_else(|| unknown(reference))?;
    println!("removed {reference}: {} free again", size(cleaned.bytes));
    Ok(())
}

#[allow(clippy::print_stdout, reason = "the answer to the command")]
fn clean(options: &Options) -> Result<(), Exit> {
    let cleaned = Store::open(&options.directory)?.clean()?;
    for reference in &cleaned.models {
        println!("removed {reference}");
    }
    let in_use =
        if cleaned.in_use > 0 { format!(", {} in use were left", cleaned.in_use) } else { String::new() };
    println!("{} files removed, {} free again{in_use}", cleaned.files, size(cleaned.bytes));
    Ok(())
}
