//! The settings of the whole program, whichever engines it keeps. PURE.

use std::path::PathBuf;

use super::plan::{Directories, path};
use crate::service::credentials;
use crate::service::logging::LogFormat;
use crate::service::tls::{Files, blocking};
use crate::settings::{Exit, Setting, Settings, boolean, flag};
use crate::wire::url::BaseUrl;

/// Most places that are notified.
const NOTIFY_MAX: usize = 8;

/// Settings that every command takes.
pub static TABLE: &[Setting] = &[
    Setting {
        flag: "handoff-dir",
        env: "ENGINE_PROVISIONER_HANDOFF_DIR",
        aliases: &[],
        default: None,
        value: "DIR",
        help: "Directory of handoff files, the one that pool-managerd watches; created if missing; without it .runtime/engines, or /run/llama-orch/engines where only that is there",
    },
    Setting {
        flag: "log-dir",
        env: "ENGINE_PROVISIONER_LOG_DIR",
        aliases: &[],
        default: None,
        value: "DIR",
        help: "Directory of what engines print, 64 MiB of each and as much before that; without it `logs` beside the handoff directory",
    },
    Setting {
        flag: "state-dir",
        env: "ENGINE_PROVISIONER_STATE_DIR",
        aliases: &[],
        default: None,
        value: "DIR",
        help: "What --orphans=keep remembers of running engines; without it `provisioner` beside the handoff directory",
    },
    Setting {
        flag: "orphans",
        env: "ENGINE_PROVISIONER_ORPHANS",
        aliases: &[],
        default: Some("end"),
        value: "FATE",
        help: "What becomes of engines when this program is killed outright: end, or keep to take them over at its next start",
    },
    Setting {
        flag: "pool-managerd",
        env: "POOL_MANAGERD_URL",
        aliases: &[],
        default: Some("http://127.0.0.1:9200"),
        value: "URL",
        help: "Who is asked whether a withdrawn replica is drained; where nobody answers, the engine's connections tell",
    },
    Setting {
        flag: "notify",
        env: "ENGINE_PROVISIONER_NOTIFY",
        aliases: &[],
        default: None,
        value: "URL,...",
        help: "Where handoffs are posted too: a pool-managerd that does not see the directory, or any URL with a path",
    },
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::NODE_TOKEN,
    credentials::NODE_TOKEN_FILE,
    blocking::CA,
    blocking::CERT,
    blocking::KEY,
    Setting {
        flag: "require-gpu",
        env: "LLORCH_REQUIRE_GPU",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Refuse machines without a GPU, and engines that would compute on the CPU",
    },
    Setting {
        flag: "allow-cpu",
        env: "LLORCH_ALLOW_CPU",
        aliases: &[],
        default: Some("false"),
        value: "BOOL",
        help: "Lift --require-gpu again, for tests with engines that stand in",
    },
    flag("report", Some("false"), "BOOL", "Print what happens as JSON lines on standard output"),
    Setting {
        flag: "log-level",
        env: "ENGINE_PROVISIONER_LOG_LEVEL",
        aliases: &[],
        default: Some("info"),
        value: "LEVEL",
        help: "error, warn, info, debug or trace; RUST_LOG beats it",
    },
    Setting {
        flag: "log-format",
        env: "ENGINE_PROVISIONER_LOG_FORMAT",
        aliases: &[],
        default: Some("text"),
        value: "FORMAT",
        help: "text, or json for one object a line; the journal gets a priority either way",
    },
];

/// What becomes of engines whose keeper is killed outright.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orphans {
    /// They are ended.
    End,
    /// They go on, and are taken over at the next start.
    Keep,
}

/// What the operator asked for, of the whole program.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the handoff files.
    pub handoff_dir: PathBuf,
    /// Directory of what engines print.
    pub log_dir: PathBuf,
    /// What is remembered of running engines.
    pub state_dir: PathBuf,
    /// What becomes of them when this program is killed.
    pub orphans: Orphans,
    /// Who knows whether a replica is drained.
    pub pool_managerd: BaseUrl,
    /// Who is told of handoffs.
    pub notify: Vec<BaseUrl>,
    /// Certificates for those of them that are reached by https, and for such engines.
    pub tls: Files,
    /// Whether engines must compute on GPUs.
    pub require_gpu: bool,
    /// Whether events are printed on standard output.
    pub report: bool,
    /// What is logged.
    pub log_level: String,
    /// How a line of the log is written.
    pub log_format: LogFormat,
}

impl Options {
    /// Reads and checks the settings of [`TABLE`]; `usual_dir` is where handoffs are if nobody says otherwise.
    ///
    /// # Errors
    /// [`Exit`] with code 78 and one line that names what is not usable.
    pub fn from_settings(settings: &Settings, usual_dir: PathBuf) -> Result<Options, Exit> {
        let handoff_dir = settings.get("handoff-dir", path)?.unwrap_or(usual_dir);
        let beside = handoff_dir.parent().unwrap_or(&handoff_dir).join("provisioner");
        let usual = Directories::beside(handoff_dir.clone());
        Ok(Options {
            log_dir: settings.get("log-dir", path)?.unwrap_or(usual.logs),
            state_dir: settings.get("state-dir", path)?.unwrap_or(beside),
            orphans: settings.need("orphans", |text| match text {
                "end" => Ok(Orphans::End),
                "keep" => Ok(Orphans::Keep),
                _ => Err("allowed are end and keep".to_string()),
            })?,
            pool_managerd: settings.need("pool-managerd", peer)?,
            notify: settings.get("notify", peers)?.unwrap_or_default(),
            tls: Files::from_settings(settings, [""; 3])?,
            require_gpu: settings.need("require-gpu", boolean)? && !settings.need("allow-cpu", boolean)?,
            report: settings.need("report", boolean)?,
            log_level: settings.need("log-level", |text| Ok(text.to_string()))?,
            log_format: settings.need("log-format", str::parse)?,
            handoff_dir,
        })
    }
}

impl Options {
    /// Where files of engines go.
    #[must_use]
    pub fn directories(&self) -> Directories {
        Directories { handoffs: self.handoff_dir.clone(), logs: self.log_dir.clone() }
    }
}

fn peers(text: &str) -> Result<Vec<BaseUrl>, String> {
    let all: Vec<BaseUrl> = text.split(',').map(str::trim).map(peer).collect::<Result<_, _>>()?;
    if all.len() > NOTIFY_MAX { Err(format!("at most {NOTIFY_MAX} URLs are allowed")) } else { Ok(all) }
}

fn peer(text: &str) -> Result<BaseUrl, String> {
    BaseUrl::new(text).map_err(|why| why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Options, Exit> {
        let args = args.iter().map(std::ffi::OsString::from);
        let settings = Settings::read("t", "about", TABLE, None, args, |_| None)?;
        Options::from_settings(&settings, "engines".into())
    }

    #[test]
    fn the_gate_is_closed_by_one_setting_and_opened_by_another() {
        assert!(!read(&[]).expect("defaults").require_gpu);
        assert!(read(&["--require-gpu"]).expect("usable").require_gpu);
        assert!(!read(&["--require-gpu", "--allow-cpu"]).expect("usable").require_gpu);
    }

    #[test]
    fn what_is_not_usable_is_named() {
        for (flag, why) in [
            ("--orphans=adopt", "end and keep"),
            ("--tls-client-cert=/a.crt", "LLORCH_TLS_CLIENT_KEY is not"),
            ("--notify=http://a,b", "--notify"),
            ("--pool-managerd=9200", "--pool-managerd"),
        ] {
            let exit = read(&[flag]).expect_err(why);
            assert!(exit.code == 78 && exit.message.contains(why), "{exit}");
        }
        assert_eq!(read(&["--notify=http://a,http://b:1/x"]).expect("usable").notify.len(), 2);
    }
}
