//! What an engine needs and may have to be got first: its model, and its program.
//!
//! References become files by [`models`], sources become programs by [`source`]; what the header of a model
//! says sets what the operator left open. It may take hours, and is done on a thread that can be stopped at
//! any moment. `plan` and `check` only look: what is not here yet stays open, and nothing is fetched.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use super::model_ref;
use super::models::{self, Display, ModelError, Progress, Reference, Request};
use super::plan::{Config, Lease};
use super::source::{self, Binary, Step};
use super::steps::{Kind, Steps};
use crate::settings::{Exit, Settings};

/// Context of each slot where neither the operator nor a smaller model says otherwise, in tokens: more costs
/// memory of the GPU for every slot, whether or not it is used.
const CONTEXT_PER_SLOT: u64 = 8_192;

/// How far it goes to get things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// Nothing is fetched or built.
    Look,
    /// Whatever it takes.
    Get,
}

/// Where things are kept, and how they are got.
#[derive(Clone, Debug)]
pub(super) struct Provider {
    /// An error where no place for them is known; engines with models of their own do not need one.
    models: Result<models::Options, Exit>,
    sources: Result<PathBuf, Exit>,
    /// A build takes all processors: there is one at a time.
    building: Arc<Mutex<()>>,
    /// How far it has come.
    pub(super) steps: Steps,
}

impl Provider {
    /// From the settings of [`models::TABLE`].
    ///
    /// # Errors
    /// [`Exit`] for a setting that is not usable.
    pub(super) fn from_settings(settings: &Settings) -> Result<Provider, Exit> {
        let env = |name: &str| std::env::var_os(name);
        let cache = models::cache_directory(settings, env);
        let models = match &cache {
            Ok(_) => Ok(models::Options::from_settings(settings, env)?),
            Err(exit) => Err(exit.clone()),
        };
        let sources = cache.map(|cache| cache.join("source"));
        Ok(Provider { models, sources, building: Arc::default(), steps: Steps::default() })
    }

    /// Fills in what `config` only names. Relative paths count from `base`.
    ///
    /// # Errors
    /// [`Exit`] with the engine's name, why not, and what to do.
    pub(super) fn fill(
        &self,
        config: &mut Config,
        base: &Path,
        effort: Effort,
        cancel: &Arc<AtomicBool>,
    ) -> Result<(), Exit> {
        let key = config.key();
        let named = |exit: Exit| Exit { message: format!("{key}: {}", exit.message), ..exit };
        self.program(config, effort, cancel).map_err(named)?;
        self.model(config, base, effort, cancel).map_err(named)
    }

    fn program(&self, config: &mut Config, effort: Effort, cancel: &AtomicBool) -> Result<(), Exit> {
        let Some(spec) = config.source.clone() else { return Ok(()) };
        if effort == Effort::Look {
            return spec.check().map_err(Exit::config);
        }
        let (key, kind, steps) = (config.key(), Kind::EngineProvision, &self.steps);
        let directory = self.sources.clone()?;
        let env = |name: &str| -> Option<OsString> { std::env::var_os(name) };
        steps.begin(kind, &key, "source");
        let _alone = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let mut display = source::command::Display::new();
        let mut tell = |step: Step<'_>| {
            match &step {
                Step::Waiting => steps.begin(kind, &key, "another process builds the same"),
                Step::Began(name) | Step::Retrying(name) => steps.begin(kind, &key, name),
                Step::Percent(percent) => steps.percent(kind, &key, u64::from(*percent)),
            }
            display.show(&step);
        };
        let provided = source::provide(&Binary::Source(spec), &directory, &env, cancel, &mut tell);
        display.end();
        let provided = provided.map_err(Exit::from);
        steps.end(kind, &key, provided.as_ref().map(|_| ()).map_err(|exit| exit.message.as_str()));
        let program = provided?;
        config.engine_version = config.engine_version.take().or(program.version);
        config.program = Some(program.path);
        Ok(())
    }

    fn model(
        &self,
        config: &mut Config,
        base: &Path,
        effort: Effort,
        cancel: &Arc<AtomicBool>,
    ) -> Result<(), Exit> {
        let Some(text) = config.model.as_deref().filter(|text| model_ref::is_reference(text)) else {
            return match config.digest {
                Some(_) => {
                    Err(Exit::config("a digest is given, but the model is only a name: name its file"))
                }
                None => Ok(()),
            };
        };
        let mut reference = Reference::parse(text).map_err(|error| Exit::config(error.to_string()))?;
        let options = match (&mut reference, &self.models) {
            (Reference::Local(path), models) => {
                *path = base.join(&*path);
                // Where there is no place for a catalogue, it is used without one.
                models.clone().unwrap_or_else(|_| models::Options::new(Path::new("")))
            }
            (_, models) => models.clone()?,
        };
        let is_offline = options.offline;
        let options = models::Options { offline: is_offline || effort == Effort::Look, ..options };
        let request = Request { reference, digest: config.digest, refresh: false };
        let (key, kind, steps) = (config.key(), Kind::ModelFetch, &self.steps);
        steps.begin(kind, &key, &request.reference.shown());
        // A bar is made for what takes time only.
        let mut display: Option<Display> = None;
        let mut tell = |progress: Progress<'_>| {
            match &progress {
                Progress::Started { total_bytes, kept_bytes, .. } => {
                    steps.bytes(kind, &key, *kept_bytes, *total_bytes);
                }
                Progress::Bytes { done_bytes, total_bytes } => {
                    steps.bytes(kind, &key, *done_bytes, *total_bytes);
                }
                Progress::Waiting { name } => {
                    steps.begin(kind, &key, &format!("{name}: another process fetches it"));
                }
                Progress::Retrying { why, .. } => steps.begin(kind, &key, why),
                Progress::Note(_) | Progress::Finished { .. } => {}
            }
            if !matches!(progress, Progress::Note(_)) || display.is_some() {
                display.get_or_insert_with(Display::new).show(progress);
            }
        };
        let resolved = models::resolve(&options, &request, cancel, &mut tell);
        let outcome = resolved.as_ref().map(|_| ()).map_err(ToString::to_string);
        steps.end(kind, &key, outcome.as_ref().copied().map_err(String::as_str));
        let model = match resolved {
            Err(ModelError::Offline(_)) if effort == Effort::Look && !is_offline => return Ok(()),
            resolved => resolved?,
        };
        if let (None, true, Reference::Hub(hub)) =
            (&config.model_name, model.path.is_dir(), &request.reference)
        {
            config.model_name = Some(hub.repo.clone());
        }
        if let Some(trained) = model.gguf.as_ref().and_then(|gguf| gguf.context_length) {
            set_context(config, trained);
        }
        config.model_file = Some((model.path.clone(), model.bytes));
        config.lease = Lease::on(model);
        Ok(())
    }
}

/// What llama-server is told of the context where the operator says nothing of it.
fn set_context(config: &mut Config, trained: u64) {
    let is_given = config.command.iter().any(|word| word == "--ctx-size");
    if config.is_made && !is_given && trained > 0 {
        let slots = u64::from(config.slots.unwrap_or(1));
        let context = trained.min(CONTEXT_PER_SLOT).saturating_mul(slots);
        config.command.extend(["--ctx-size".into(), context.to_string().into()]);
    }
}
