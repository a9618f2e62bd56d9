//! Configuration from flags and environment, by table.
//!
//! Each program lists its settings once: flag, canonical variable, aliases, default, help. A flag
//! beats the environment, which beats the default; an alias counts where the canonical variable is
//! unset, and is reported so that the operator can rename it. A bad value is one line that names the
//! variable (or flag), the value and what is allowed, and ends the program with exit code 78.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io::Write;

/// Exit code of a failure at run time.
pub const EXIT_RUNTIME: u8 = 1;
/// Exit code of a command line that does not parse.
pub const EXIT_USAGE: u8 = 2;
/// Exit code of a bad configuration (`EX_CONFIG`): restarting will not help.
pub const EXIT_CONFIG: u8 = 78;

/// How a program ends other than by success, and what it says last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Process exit code; 0 for `--help` and `--version`, whose text is the message.
    pub code: u8,
    /// For stderr: one line, below it the end of a log where one explains it. The help text for stdout.
    pub message: String,
}

impl Exit {
    /// A failure at run time.
    pub fn runtime(message: impl Into<String>) -> Exit {
        Exit { code: EXIT_RUNTIME, message: message.into() }
    }

    /// A bad configuration.
    pub fn config(message: impl Into<String>) -> Exit {
        Exit { code: EXIT_CONFIG, message: message.into() }
    }

    /// A configuration that was only to be checked is usable; `notes` are remarks on it.
    #[must_use]
    pub fn checked(notes: &[String]) -> Exit {
        let mut message = "the configuration is usable".to_string();
        for note in notes {
            message.push('\n');
            message.push_str(note);
        }
        Exit { code: 0, message }
    }

    /// A command line that does not parse.
    pub fn usage(message: impl Into<String>) -> Exit {
        Exit { code: EXIT_USAGE, message: message.into() }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

/// Turns how a program ended into what the shell sees: its last words and its exit code.
#[must_use]
pub fn finish(program: &str, ended: Result<(), Exit>) -> std::process::ExitCode {
    match ended {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(Exit { code: 0, message }) => {
            // A reader that went away (`--help | head`) is no failure.
            let _ = writeln!(std::io::stdout(), "{message}");
            std::process::ExitCode::SUCCESS
        }
        Err(Exit { code, message }) => {
            let _ = writeln!(std::io::stderr(), "{program}: {message}");
            std::process::ExitCode::from(code)
        }
    }
}

/// One setting of a program.
#[derive(Clone, Copy)]
pub struct Setting {
    /// Flag without the dashes, which is also its name in code.
    pub flag: &'static str,
    /// Canonical environment variable; empty where only the flag exists.
    pub env: &'static str,
    /// Other variables that mean the same, each with the conversion of its value.
    pub aliases: &'static [Alias],
    /// Value when nothing is given; `None` where absence means something.
    pub default: Option<&'static str>,
    /// What the value is, as the help shows it; `BOOL` makes a bare flag mean `true`, and one that ends with
    /// `,...` is a list whose parts may come in flags of their own.
    pub value: &'static str,
    /// Help text: one line, units and range included.
    pub help: &'static str,
}

/// A setting that exists as a flag only.
#[must_use]
pub const fn flag(
    flag: &'static str,
    default: Option<&'static str>,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { flag, env: "", aliases: &[], default, value, help }
}

/// Another name of a variable.
#[derive(Clone, Copy)]
pub struct Alias {
    /// The variable.
    pub env: &'static str,
    /// From its value to the canonical one (seconds to milliseconds, say).
    pub convert: fn(&str) -> String,
}

impl Alias {
    /// An alias whose value is taken as it is.
    #[must_use]
    pub const fn same(env: &'static str) -> Alias {
        Alias { env, convert: str::to_string }
    }

    /// An alias in seconds of a setting in milliseconds.
    #[must_use]
    pub const fn seconds(env: &'static str) -> Alias {
        Alias {
            env,
            convert: |s| {
                s.trim().parse::<u64>().map_or_else(|_| s.to_string(), |n| n.saturating_mul(1000).to_string())
            },
        }
    }
}

/// Words of a command line that belong to no flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Words {
    /// There are none.
    None,
    /// Any number behind `--`, by the name that the help gives them.
    Behind(&'static str),
    /// Between `min` and `max` of them, anywhere.
    Given {
        /// As the help calls one.
        name: &'static str,
        /// What they are.
        help: &'static str,
        /// At least so many.
        min: usize,
        /// At most so many.
        max: usize,
    },
}

/// The settings as given, with where each came from.
#[derive(Debug)]
pub struct Settings {
    values: BTreeMap<&'static str, Given>,
    /// Sentences for the log once it is up: aliases in use.
    pub notes: Vec<String>,
    /// Words after `--`.
    pub rest: Vec<OsString>,
}

#[derive(Clone, Debug)]
struct Given {
    text: String,
    /// As the operator knows it: `--addr` or `ORCHESTRATORD_ADDR`.
    source: String,
}

impl Settings {
    /// Reads `args` (without the program's name) and the environment against `table`.
    ///
    /// # Errors
    /// [`Exit`] with code 2 for a command line that does not parse, 78 for a value that is not UTF-8,
    /// and 0 with the text of `--help` or `--version`.
    pub fn read(
        program: &'static str,
        about: &'static str,
        table: &'static [Setting],
        rest: Option<&'static str>,
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Settings, Exit> {
        Settings::read_tables(program, about, &[table], rest, args, env)
    }

    /// As [`Settings::read`], with words of any kind; they are in [`Settings::rest`].
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn read_words(
        program: &'static str,
        about: &'static str,
        table: &'static [Setting],
        words: Words,
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Settings, Exit> {
        Settings::read_all(program, about, &[table], words, args, env)
    }

    /// As [`Settings::read`], for a program whose commands share some of their settings.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn read_tables(
        program: &'static str,
        about: &'static str,
        tables: &[&'static [Setting]],
        rest: Option<&'static str>,
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Settings, Exit> {
        let words = rest.map_or(Words::None, Words::Behind);
        Settings::read_all(program, about, tables, words, args, env)
    }

    fn read_all(
        program: &'static str,
        about: &'static str,
        tables: &[&'static [Setting]],
        words: Words,
        args: impl IntoIterator<Item = OsString>,
        env: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Settings, Exit> {
        let args: Vec<OsString> = args.into_iter().collect();
        let mut line = match plain(tables, words, &args) {
            Some(line) => line,
            None => understood(program, about, tables, words, args)?,
        };
        let mut settings = Settings { values: BTreeMap::new(), notes: Vec::new(), rest: line.rest };
        for setting in tables.iter().copied().flatten() {
            if let Some(texts) = line.flags.remove(setting.flag) {
                settings.put(setting.flag, texts.join(","), format!("--{}", setting.flag));
            } else {
                settings.take_from_environment(setting, &env)?;
            }
        }
        Ok(settings)
    }

    /// The value of `flag` through `parse`, whose error says what is allowed. `None` where nothing
    /// was given and there is no default.
    ///
    /// # Errors
    /// [`Exit`] with code 78 and one line naming source, value and what is allowed.
    pub fn get<T>(
        &self,
        flag: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Exit> {
        let Some(given) = self.values.get(flag) else { return Ok(None) };
        parse(given.text.trim()).map(Some).map_err(|allowed| {
            Exit::config(format!("{}={:?} is not usable: {allowed}", given.source, shorten(&given.text)))
        })
    }

    /// As [`Settings::get`] for settings with a default.
    ///
    /// # Errors
    /// As [`Settings::get`]; also when neither a value nor a default exists.
    pub fn need<T>(&self, flag: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Result<T, Exit> {
        self.get(flag, parse)?.ok_or_else(|| Exit::config(format!("--{flag} is required")))
    }

    /// As [`Settings::get`] for secrets: the error does not repeat the value.
    ///
    /// # Errors
    /// [`Exit`] with code 78.
    pub fn secret<T>(
        &self,
        flag: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, Exit> {
        let Some(given) = self.values.get(flag) else { return Ok(None) };
        parse(given.text.trim())
            .map(Some)
            .map_err(|allowed| Exit::config(format!("{} is not usable: {allowed}", given.source)))
    }

    /// Whether `flag` was given by the operator rather than by its default.
    #[must_use]
    pub fn given(&self, flag: &str) -> bool {
        self.values.get(flag).is_some_and(|given| given.source != "the default")
    }

    /// Whether `flag` stood on the command line, which every user of the machine can read.
    #[must_use]
    pub fn on_command_line(&self, flag: &str) -> bool {
        self.values.get(flag).is_some_and(|given| given.source.starts_with("--"))
    }

    fn put(&mut self, flag: &'static str, text: String, source: String) {
        self.values.insert(flag, Given { text, source });
    }

    fn take_from_environment(
        &mut self,
        setting: &'static Setting,
        env: &impl Fn(&str) -> Option<OsString>,
    ) -> Result<(), Exit> {
        let read = |name: &'static str| -> Result<Option<String>, Exit> {
            let Some(raw) = Some(name).filter(|name| !name.is_empty()).and_then(env) else { return Ok(None) };
            match raw.into_string() {
                Ok(text) if text.trim().is_empty() => Ok(None),
                Ok(text) => Ok(Some(text)),
                Err(_) => Err(Exit::config(format!("{name} is not UTF-8"))),
            }
        };
        if let Some(text) = read(setting.env)? {
            self.put(setting.flag, text, setting.env.to_string());
            return Ok(());
        }
        for alias in setting.aliases {
            if let Some(text) = read(alias.env)? {
                self.notes.push(format!("{} is an older name: use {}", alias.env, setting.env));
                self.put(setting.flag, (alias.convert)(text.trim()), alias.env.to_string());
                return Ok(());
            }
        }
        if let Some(default) = setting.default {
            self.put(setting.flag, default.to_string(), "the default".to_string());
        }
        Ok(())
    }
}

/// What stands on a command line: the values of each flag, and the words.
#[derive(Debug, Default, PartialEq, Eq)]
struct Line {
    flags: BTreeMap<&'static str, Vec<String>>,
    rest: Vec<OsString>,
}

/// A command line on which every flag is written out and has its value, as in a unit file; of any other
/// `None`, and clap says what it means or what is wrong with it. A daemon that is started so never touches
/// clap's code, nor the memory that clap takes while it reads.
fn plain(tables: &[&'static [Setting]], words: Words, args: &[OsString]) -> Option<Line> {
    let mut line = Line::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let arg = arg.to_str()?.strip_prefix("--")?;
        if arg.is_empty() {
            let Words::Behind(_) = words else { return None };
            line.rest = args.cloned().collect();
            break;
        }
        let (name, joined) = arg.split_once('=').map_or((arg, None), |(name, value)| (name, Some(value)));
        let setting = tables.iter().copied().flatten().find(|setting| setting.flag == name)?;
        let value = match joined {
            Some(value) => value,
            None if setting.value == "BOOL" => "true",
            None => args.next()?.to_str().filter(|value| !value.starts_with('-'))?,
        };
        let values = line.flags.entry(setting.flag).or_default();
        if value.is_empty() || !values.is_empty() && !is_list(setting) {
            return None;
        }
        values.push(value.to_string());
    }
    matches!(words, Words::None | Words::Behind(_)).then_some(line)
}

/// A command line as clap understands it.
fn understood(
    program: &'static str,
    about: &'static str,
    tables: &[&'static [Setting]],
    words: Words,
    args: Vec<OsString>,
) -> Result<Line, Exit> {
    let (first, others) = tables.split_first().map_or((&[][..], &[][..]), |(first, others)| (*first, others));
    let arguments = others.iter().copied().flatten().map(argument);
    let command = command(program, about, first, words).args(arguments).no_binary_name(true);
    let mut matches = command.try_get_matches_from(args).map_err(|error| {
        let text = error.render().to_string();
        match error.use_stderr() {
            true => Exit::usage(text.trim_end()),
            false => Exit { code: 0, message: text.trim_end().to_string() },
        }
    })?;
    let mut line = Line::default();
    if words != Words::None {
        line.rest = matches.remove_many("rest").map(Iterator::collect).unwrap_or_default();
    }
    for setting in tables.iter().copied().flatten() {
        if let Some(texts) = matches.remove_many::<String>(setting.flag) {
            line.flags.insert(setting.flag, texts.collect());
        }
    }
    Ok(line)
}

/// A command line as clap knows it, to be read, or to be completed by a shell.
#[must_use]
pub fn command(
    program: &'static str,
    about: &'static str,
    table: &'static [Setting],
    words: Words,
) -> clap::Command {
    let mut command = clap::Command::new(program)
        .about(about)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true);
    for setting in table {
        command = command.arg(argument(setting));
    }
    let arg = clap::Arg::new("rest").value_parser(clap::value_parser!(OsString));
    match words {
        Words::None => command,
        Words::Behind(name) => {
            command.arg(arg.value_name(name).last(true).num_args(0..).help("Everything after --"))
        }
        Words::Given { name, help, min, max } => {
            let hint = if name == "FILE" { clap::ValueHint::AnyPath } else { clap::ValueHint::Unknown };
            let arg = arg.value_name(name).num_args(min..=max).required(min > 0).help(help);
            command.arg(arg.action(clap::ArgAction::Append).value_hint(hint))
        }
    }
}

fn argument(setting: &Setting) -> clap::Arg {
    let mut help = setting.help.to_string();
    if !setting.env.is_empty() {
        help.push_str(&format!(" [env: {}]", setting.env));
    }
    if let Some(default) = setting.default.filter(|text| !text.is_empty()) {
        help.push_str(&format!(" [default: {default}]"));
    }
    let arg = clap::Arg::new(setting.flag).long(setting.flag).value_name(setting.value).help(help);
    if setting.value == "BOOL" {
        arg.num_args(0..=1).require_equals(true).default_missing_value("true")
    } else if is_list(setting) {
        arg.num_args(1).action(clap::ArgAction::Append)
    } else {
        arg.num_args(1)
    }
}

fn is_list(setting: &Setting) -> bool {
    setting.value.ends_with(",...")
}

fn shorten(text: &str) -> String {
    text.chars().take(120).collect()
}

/// `true`/`false`, with the spellings that operators use.
///
/// # Errors
/// What is allowed.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err("allowed are true and false".into()),
    }
}

/// A whole number within a range.
pub fn number(min: u64, max: u64) -> impl Fn(&str) -> Result<u64, String> {
    move |text| match text.parse::<u64>() {
        Ok(n) if (min..=max).contains(&n) => Ok(n),
        _ => Err(format!("allowed is a whole number from {min} to {max}")),
    }
}

/// `IP:PORT` to listen on; `localhost:PORT` and `:PORT` are understood.
///
/// # Errors
/// What is allowed.
pub fn listen_address(text: &str) -> Result<std::net::SocketAddr, String> {
    let full = match text.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None if text.starts_with(':') => format!("0.0.0.0{text}"),
        None => text.to_string(),
    };
    full.parse().map_err(|_| "allowed is an address such as 127.0.0.1:8080 or [::1]:8080".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    static TABLE: &[Setting] = &[
        Setting {
            flag: "node-timeout-ms",
            env: "T_NODE_TIMEOUT_MS",
            aliases: &[Alias::seconds("T_NODE_TIMEOUT_SECS")],
            default: Some("30000"),
            value: "MS",
            help: "How long",
        },
        Setting {
            flag: "cloud",
            env: "T_CLOUD",
            aliases: &[],
            default: Some("false"),
            value: "BOOL",
            help: "Profile",
        },
        Setting {
            flag: "token",
            env: "T_TOKEN",
            aliases: &[],
            default: None,
            value: "TOKEN",
            help: "Secret",
        },
        flag("mask", None, "GPU,...", "Devices"),
    ];

    fn read(args: &[&str], env: &[(&str, &str)]) -> Result<Settings, Exit> {
        let env: BTreeMap<String, OsString> =
            env.iter().map(|(k, v)| (k.to_string(), OsString::from(v))).collect();
        Settings::read("t", "about", TABLE, Some("CMD"), args.iter().map(OsString::from), |name| {
            env.get(name).cloned()
        })
    }

    proptest! {
        #[test]
        fn a_plain_line_means_what_clap_takes_it_for(args in prop::collection::vec(word(), 0..6), behind: bool) {
            let words = if behind { Words::Behind("CMD") } else { Words::None };
            let args: Vec<OsString> = args.into_iter().map(OsString::from).collect();
            if let Some(line) = plain(&[TABLE], words, &args) {
                prop_assert_eq!(understood("t", "about", &[TABLE], words, args), Ok(line));
            }
        }

        #[test]
        fn a_line_of_flags_with_values_needs_no_clap(values in prop::collection::vec("[a-z0-9:/.,-]{1,9}", 3)) {
            let args = ["--node-timeout-ms", "--cloud", "--token"];
            let joined = args.iter().zip(&values).map(|(flag, value)| format!("{flag}={value}").into());
            prop_assert!(plain(&[TABLE], Words::None, &joined.collect::<Vec<_>>()).is_some());
        }
    }

    fn word() -> impl Strategy<Value = String> {
        let flag = prop::sample::select(vec![
            "node-timeout-ms",
            "cloud",
            "token",
            "mask",
            "node-timeout",
            "help",
            "version",
            "nonsense",
        ]);
        let value =
            prop::sample::select(vec!["", "1", "true", "x,y", "-1", "--", "-", "a=b", "--token", "ü"]);
        prop_oneof![
            flag.clone().prop_map(|flag| format!("--{flag}")),
            (flag, value.clone()).prop_map(|(flag, value)| format!("--{flag}={value}")),
            value.prop_map(str::to_string),
        ]
    }

    #[test]
    fn a_flag_beats_the_environment_which_beats_the_default() {
        let timeout = |args: &[&str], env: &[(&str, &str)]| {
            read(args, env).and_then(|s| s.need("node-timeout-ms", number(1, 100_000)))
        };
        assert_eq!(timeout(&[], &[]), Ok(30_000));
        assert_eq!(timeout(&[], &[("T_NODE_TIMEOUT_MS", "7")]), Ok(7));
        assert_eq!(timeout(&["--node-timeout-ms", "9"], &[("T_NODE_TIMEOUT_MS", "7")]), Ok(9));
        assert_eq!(timeout(&[], &[("T_NODE_TIMEOUT_MS", " "), ("T_NODE_TIMEOUT_SECS", "5")]), Ok(5000));
    }

    #[test]
    fn an_alias_is_reported_by_its_canonical_name() {
        let settings = read(&[], &[("T_NODE_TIMEOUT_SECS", "5")]).expect("a valid environment");
        assert_eq!(settings.notes, ["T_NODE_TIMEOUT_SECS is an older name: use T_NODE_TIMEOUT_MS"]);
    }

    #[test]
    fn a_bad_value_names_variable_value_and_what_is_allowed() {
        let exit = read(&[], &[("T_NODE_TIMEOUT_MS", "soon")])
            .and_then(|s| s.need("node-timeout-ms", number(1, 9)))
            .expect_err("not a number");
        assert_eq!(exit.code, EXIT_CONFIG);
        assert_eq!(
            exit.message,
            "T_NODE_TIMEOUT_MS=\"soon\" is not usable: allowed is a whole number from 1 to 9"
        );
        let exit = read(&[], &[("T_TOKEN", "hunter2")])
            .and_then(|s| s.secret("token", |_| Err::<(), _>("too short".into())))
            .expect_err("refused");
        assert!(!exit.message.contains("hunter2"), "{exit}");
    }

    #[test]
    fn bare_booleans_help_and_trailing_words() {
        let settings = read(&["--cloud", "--", "llama-server", "--port"], &[]).expect("a valid line");
        assert_eq!(settings.need("cloud", boolean), Ok(true));
        assert_eq!(settings.rest, ["llama-server", "--port"]);
        assert_eq!(read(&["--help"], &[]).expect_err("help ends the program").code, 0);
        assert_eq!(read(&["--nonsense"], &[]).expect_err("unknown flag").code, EXIT_USAGE);
    }
}
