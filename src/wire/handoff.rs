//! The handoff file: "an engine is ready, and here is where".
//!
//! One JSON object a file, one file a replica, at most [`HANDOFF_BYTES_MAX`]. Several generations of
//! writers exist, so the reader takes the union of their shapes: `url` may be called `endpoint` or
//! `http_endpoint`, `slots` may be `slots_total`, a device is a number or a mask, a model is a string
//! or an object. Only `url` is required. A file that describes just a model (the model provisioner
//! writes such into the same directory) is no handoff and no error.
//!
//! The writer emits one canonical shape, with the aliases that older readers look for.

use std::fmt;

use serde_json::{Map, Value, json};

use super::id::{PoolId, ReplicaId, ReplicaKey};
use super::url::BaseUrl;

/// Largest handoff file that is read, in bytes.
pub const HANDOFF_BYTES_MAX: usize = 64 * 1024;
/// Most slots that one replica may claim.
pub const SLOTS_MAX: u32 = 65_536;
/// Most models that one handoff may name.
pub const MODELS_MAX: usize = 256;
/// Longest free text in a handoff (engine, version, model, mask), in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;

/// What a handoff says about a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handoff {
    /// `pool_id`, default `default`.
    pub pool_id: PoolId,
    /// `replica_id`, default `r0`.
    pub replica_id: ReplicaId,
    /// Where the engine listens.
    pub url: BaseUrl,
    /// Kind of engine, default `llamacpp`: selects the probe dialect.
    pub engine: String,
    /// Version as the engine or its starter tells it.
    pub engine_version: Option<String>,
    /// Requests that the engine serves at once, at least 1.
    pub slots: u32,
    /// Whether the file says so; otherwise the engine's own number counts, where it tells one.
    pub slots_given: bool,
    /// Slots that were free when the file was written, at most `slots`.
    pub slots_free: u32,
    /// `false`: known, but not routable.
    pub ready: bool,
    /// GPUs that the engine uses, as `CUDA_VISIBLE_DEVICES` would say it.
    pub device_mask: Option<String>,
    /// Model names; empty when the file names none and the engine has to be asked.
    pub models: Vec<String>,
    /// Size of the model's files in bytes, where the file tells it: large models load longer.
    pub model_bytes: Option<u64>,
    /// Engine process, for liveness.
    pub pid: Option<u32>,
    /// When that process started, in clock ticks after boot: tells a pid from its successor.
    pub pid_start: Option<u64>,
    /// Boot in which that pid lives.
    pub boot_id: Option<String>,
    /// Inode of the pid namespace in which that pid counts; the reader's own where absent.
    pub pid_ns: Option<u64>,
    /// Between two files that name the same replica the higher generation wins.
    pub generation: u64,
    /// Path of the health probe, default `/health`.
    pub health_path: String,
    /// File that holds the engine's own API key. Never the key itself.
    pub auth_file: Option<String>,
}

/// What a `.json` file in the runtime directory turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandoffFile {
    /// A handoff.
    Engine(Box<Handoff>),
    /// A model description without an engine: skipped quietly.
    ModelOnly,
}

/// Why a file is no handoff. The text names the field and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoffError {
    text: String,
    is_incomplete: bool,
}

impl HandoffError {
    /// Whether more bytes could make it good: its writer may not have finished.
    #[must_use]
    pub fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }
}

impl fmt::Display for HandoffError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for HandoffError {}

/// Reads a handoff file's bytes.
///
/// ```
/// use llama_orch::wire::handoff::{HandoffFile, parse};
///
/// let file = parse(br#"{"url": "http://127.0.0.1:8081", "slots": 4}"#)?;
/// let HandoffFile::Engine(handoff) = file else { panic!("it names an engine") };
/// assert_eq!((handoff.key().to_string().as_str(), handoff.slots), ("default/r0", 4));
///
/// let refused = parse(br#"{"url": "http://127.0.0.1:8081", "slots": 0}"#).unwrap_err();
/// assert_eq!(refused.to_string(), "`slots` must be a whole number from 1 to 65536, found 0");
/// # Ok::<(), llama_orch::wire::handoff::HandoffError>(())
/// ```
///
/// # Errors
/// [`HandoffError`] for anything that is not one JSON object with fields of the expected types. An
/// empty or truncated file is an error like any other: whoever watches keeps the last good state.
pub fn parse(bytes: &[u8]) -> Result<HandoffFile, HandoffError> {
    if bytes.len() > HANDOFF_BYTES_MAX {
        return Err(error(format!("larger than {HANDOFF_BYTES_MAX} bytes")));
    }
    if bytes.is_empty() {
        let text =
            "empty file: its writer has not finished, or does not write to a temporary name first".into();
        return Err(HandoffError { text, is_incomplete: true });
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        return Err(error("starts with a byte order mark, which JSON does not allow"));
    }
    let text = std::str::from_utf8(bytes).map_err(|e| HandoffError {
        text: format!("not UTF-8 at byte {}", e.valid_up_to()),
        is_incomplete: e.error_len().is_none(),
    })?;
    let value = unambiguous_json::from_str(text)
        .map_err(|e| HandoffError { text: format!("not usable JSON: {e}"), is_incomplete: e.is_eof() })?;
    let Value::Object(fields) = value else { return Err(error("not a JSON object")) };
    Fields(fields).read()
}

fn error(text: impl Into<String>) -> HandoffError {
    HandoffError { text: text.into(), is_incomplete: false }
}

impl Handoff {
    /// The replica that this handoff names.
    #[must_use]
    pub fn key(&self) -> ReplicaKey {
        ReplicaKey { pool: self.pool_id.clone(), replica: self.replica_id.clone() }
    }

    /// `<pool>-<replica>.json`.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}-{}.json", self.pool_id, self.replica_id)
    }

    /// First GPU of the mask, where it is a plain number.
    #[must_use]
    pub fn gpu_device(&self) -> Option<u32> {
        let first = self.device_mask.as_deref()?.split(',').next()?.trim();
        first.strip_prefix("GPU").unwrap_or(first).parse().ok()
    }

    /// The canonical JSON text, with a final newline. Absent fields are left out.
    #[must_use]
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(&self.to_value()).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The same, to be part of something larger.
    #[must_use]
    pub fn to_value(&self) -> Value {
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| {
            if !value.is_null() {
                fields.insert(name.to_string(), value);
            }
        };
        put("pool_id", json!(self.pool_id));
        put("replica_id", json!(self.replica_id));
        put("url", json!(self.url));
        put("engine", json!(self.engine));
        put("engine_version", json!(self.engine_version));
        if self.slots_given {
            put("slots", json!(self.slots));
            put("slots_total", json!(self.slots));
            put("slots_free", json!(self.slots_free));
        }
        put("ready", json!(self.ready));
        put("device_mask", json!(self.device_mask));
        put("gpu_device", json!(self.gpu_device()));
        match self.models.as_slice() {
            [] => {}
            [one] => put("model", json!(one)),
            many => put("models", json!(many)),
        }
        put("model_bytes", json!(self.model_bytes));
        put("pid", json!(self.pid));
        put("pid_start", json!(self.pid_start));
        put("boot_id", json!(self.boot_id));
        put("pid_ns", json!(self.pid_ns));
        put("generation", json!(self.generation));
        put("health_path", json!(self.health_path));
        put("auth", self.auth_file.as_ref().map_or(Value::Null, |file| json!({ "file": file })));
        Value::Object(fields)
    }
}

/// The object's fields while they are read; `null` counts as absent throughout.
struct Fields(Map<String, Value>);

impl Fields {
    fn read(self) -> Result<HandoffFile, HandoffError> {
        let url = match self.text_of(&["url", "endpoint", "http_endpoint"])? {
            Some(url) => {
                let url = BaseUrl::new(url).map_err(|e| error(format!("`url`: {e}")))?;
                // A port that was left out counts too: it is there when the handoff is written again.
                if url.to_string().len() > TEXT_BYTES_MAX {
                    return Err(error(format!("`url` is longer than {TEXT_BYTES_MAX} bytes with its port")));
                }
                url
            }
            None if self.get("model").is_some() => return Ok(HandoffFile::ModelOnly),
            None => return Err(error("`url` is missing")),
        };
        let pool_id = PoolId::new(self.text("pool_id")?.unwrap_or("default"))
            .map_err(|e| error(format!("`pool_id`: {e}")))?;
        let replica_id = ReplicaId::new(self.text("replica_id")?.unwrap_or("r0"))
            .map_err(|e| error(format!("`replica_id`: {e}")))?;
        let slots_given = self.slots("slots_total", 1)?.or(self.slots("slots", 1)?);
        let slots = slots_given.unwrap_or(1);
        let slots_free = self.slots("slots_free", 0)?.unwrap_or(slots).min(slots);
        let device_mask = match self.text("device_mask")? {
            Some(mask) => Some(mask.to_string()),
            None => self.uint("gpu_device", u64::from(u16::MAX))?.map(|device| device.to_string()),
        };
        let health_path = self.text("health_path")?.unwrap_or("/health");
        if !health_path.starts_with('/') || !health_path.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
            return Err(error(format!(
                "`health_path` must be a path such as /health, found {health_path:?}"
            )));
        }
        Ok(HandoffFile::Engine(Box::new(Handoff {
            url,
            pool_id,
            replica_id,
            engine: self.text("engine")?.unwrap_or("llamacpp").to_string(),
            engine_version: self.text("engine_version")?.map(str::to_string),
            slots,
            slots_given: slots_given.is_some(),
            slots_free,
            ready: self.boolean("ready")?.unwrap_or(true),
            device_mask,
            models: self.models()?,
            model_bytes: self.model_bytes()?,
            pid: self
                .uint("pid", u64::from(u32::MAX >> 1))?
                .and_then(|pid| u32::try_from(pid).ok())
                .filter(|pid| *pid > 0),
            pid_start: self.uint("pid_start", u64::MAX)?,
            boot_id: self.text("boot_id")?.map(str::to_string),
            pid_ns: self.uint("pid_ns", u64::MAX)?,
            generation: self.uint("generation", u64::MAX)?.unwrap_or(0),
            health_path: health_path.to_string(),
            auth_file: self.auth_file()?,
        })))
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn text(&self, name: &str) -> Result<Option<&str>, HandoffError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) if text.len() <= TEXT_BYTES_MAX => Ok(Some(text)),
            Some(Value::String(_)) => Err(error(format!("`{name}` is longer than {TEXT_BYTES_MAX} bytes"))),
            Some(other) => Err(wrong(name, "a string", other)),
        }
    }

    fn text_of(&self, names: &[&str]) -> Result<Option<&str>, HandoffError> {
        for name in names {
            if let Some(text) = self.text(name)? {
                return Ok(Some(text));
            }
        }
        Ok(None)
    }

    fn boolean(&self, name: &str) -> Result<Option<bool>, HandoffError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(wrong(name, "true or false", other)),
        }
    }

    fn uint(&self, name: &str, max: u64) -> Result<Option<u64>, HandoffError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) if number <= max => Ok(Some(number)),
                _ => Err(wrong(name, &format!("a whole number from 0 to {max}"), value)),
            },
        }
    }

    fn slots(&self, name: &str, min: u32) -> Result<Option<u32>, HandoffError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
                Some(n) if (min..=SLOTS_MAX).contains(&n) => Ok(Some(n)),
                _ => Err(wrong(name, &format!("a whole number from {min} to {SLOTS_MAX}"), value)),
            },
        }
    }

    /// `model` and `models` together, in order, each once. An entry is a name, or an object whose
    /// `id` is the name; without one the file name of its `path` serves.
    fn models(&self) -> Result<Vec<String>, HandoffError> {
        let mut names: Vec<String> = Vec::new();
        let one = self.get("model").into_iter();
        let many = match self.get("models") {
            None => [].iter(),
            Some(Value::Array(list)) if list.len() <= MODELS_MAX => list.iter(),
            Some(Value::Array(_)) => {
                return Err(error(format!("`models` names more than {MODELS_MAX}")));
            }
            Some(other) => return Err(wrong("models", "a list", other)),
        };
        for entry in one.chain(many) {
            let name = match entry {
                Value::String(name) => Some(name.as_str()),
                Value::Object(fields) => match (fields.get("id"), fields.get("path")) {
                    (Some(Value::String(id)), _) => Some(id.as_str()),
                    (_, Some(Value::String(path))) => {
                        path.rsplit('/').next().map(|file| file.strip_suffix(".gguf").unwrap_or(file))
                    }
                    _ => None,
                },
                other => return Err(wrong("model", "a name or an object with `id` or `path`", other)),
            };
            let Some(name) = name.filter(|name| !name.is_empty()) else { continue };
            if name.len() > TEXT_BYTES_MAX {
                return Err(error(format!("a model name is longer than {TEXT_BYTES_MAX} bytes")));
            }
            if !names.iter().any(|known| known == name) {
                names.push(name.to_string());
            }
        }
        Ok(names)
    }

    /// `model_bytes`, or `size_bytes` of `model` or `metadata`.
    fn model_bytes(&self) -> Result<Option<u64>, HandoffError> {
        let nested = |name: &str| self.get(name).and_then(|value| value["size_bytes"].as_u64());
        Ok(self.uint("model_bytes", u64::MAX)?.or_else(|| nested("model")).or_else(|| nested("metadata")))
    }

    fn auth_file(&self) -> Result<Option<String>, HandoffError> {
        match self.get("auth") {
            None => Ok(None),
            Some(Value::Object(fields)) => match fields.get("file") {
                Some(Value::String(file)) if file.starts_with('/') => Ok(Some(file.clone())),
                // What was found is not shown: it may be the key that should have been in a file.
                _ => Err(error("`auth.file` must be an absolute path")),
            },
            Some(_) => Err(error("`auth` must be an object {\"file\": path}")),
        }
    }
}

fn wrong(name: &str, expected: &str, found: &Value) -> HandoffError {
    let found: String = found.to_string().chars().take(80).collect();
    error(format!("`{name}` must be {expected}, found {found}"))
}

/// JSON in which no object says anything twice: two readers could believe different halves of it.
mod unambiguous_json {
    use std::fmt;

    use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
    use serde_json::{Map, Number, Value};

    pub(super) fn from_str(text: &str) -> Result<Value, serde_json::Error> {
        let mut reader = serde_json::Deserializer::from_str(text);
        let value = Unambiguous.deserialize(&mut reader)?;
        reader.end()?;
        Ok(value)
    }

    struct Unambiguous;

    impl<'de> DeserializeSeed<'de> for Unambiguous {
        type Value = Value;

        fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
            reader.deserialize_any(self)
        }
    }

    impl<'de> Visitor<'de> for Unambiguous {
        type Value = Value;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("JSON")
        }

        fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
            Ok(Value::Bool(value))
        }

        fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
            Ok(value.into())
        }

        fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
            Ok(value.into())
        }

        fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
            Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
        }

        fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
            Ok(Value::String(value.to_string()))
        }

        fn visit_unit<E: Error>(self) -> Result<Value, E> {
            Ok(Value::Null)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
            let mut values = Vec::new();
            while let Some(value) = list.next_element_seed(Unambiguous)? {
                values.push(value);
            }
            Ok(Value::Array(values))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
            let mut fields = Map::new();
            while let Some(name) = object.next_key::<String>()? {
                let value = object.next_value_seed(Unambiguous)?;
                let shown: String = name.chars().take(80).collect();
                if fields.insert(name, value).is_some() {
                    return Err(A::Error::custom(format!("the field `{shown}` is there twice")));
                }
            }
            Ok(Value::Object(fields))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn engine(text: &str) -> Handoff {
        match parse(text.as_bytes()) {
            Ok(HandoffFile::Engine(handoff)) => *handoff,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_known_shape_is_read() {
        let readme = engine(
            r#"{"pool_id":"pool-0","replica_id":"r0","url":"http://localhost:8081","gpu_device":0,"slots":4,"ready":true}"#,
        );
        assert_eq!(
            (readme.key().to_string().as_str(), readme.slots, readme.slots_free, readme.ready),
            ("pool-0/r0", 4, 4, true)
        );
        assert_eq!((readme.device_mask.as_deref(), readme.engine.as_str()), (Some("0"), "llamacpp"));

        let manual = engine(
            r#"{"pool_id":"pool-0","replica_id":"r0","engine":"llamacpp","url":"http://localhost:8081","engine_version":"v1","slots":4}"#,
        );
        assert_eq!((manual.engine_version.as_deref(), manual.slots), (Some("v1"), 4));

        let nulls = engine(
            r#"{"pool_id":"p","replica_id":"r","engine":"vllm","engine_version":"0.9","url":"http://h:1","device_mask":null,"slots":null,"pid":null}"#,
        );
        assert_eq!(
            (nulls.engine.as_str(), nulls.slots, nulls.pid, nulls.device_mask),
            ("vllm", 1, None, None)
        );

        let preload = engine(
            r#"{"engine":"llamacpp","engine_version":"b1","flags":["--metrics"],"model":{"path":"/m/tiny.gguf"},"pool_id":"p","provisioning_mode":"source","replica_id":"r0","url":"http://127.0.0.1:8080"}"#,
        );
        assert_eq!(preload.models, ["tiny"]);

        let provisioner = engine(r#"{"url":"http://127.0.0.1:1","model":{"id":"qwen","path":"/m/q.gguf"}}"#);
        assert_eq!(
            (provisioner.key().to_string().as_str(), provisioner.models),
            ("default/r0", vec!["qwen".to_string()])
        );

        let autobind = engine(
            r#"{"url":"http://127.0.0.1:1","engine_version":"v","device_mask":"GPU1,GPU2","slots_total":4,"slots_free":9}"#,
        );
        assert_eq!((autobind.slots, autobind.slots_free, autobind.gpu_device()), (4, 4, Some(1)));

        let memo = engine(
            r#"{"pool_id":"p","replica_id":"r0","engine":"llamacpp","engine_version":"v","slots":2,"http_endpoint":"http://127.0.0.1:1"}"#,
        );
        assert_eq!(memo.url.port(), 1);

        let not_ready = engine(
            r#"{"url":"http://127.0.0.1:1","ready":false,"auth":{"file":"/run/key"},"models":["a","b","a"]}"#,
        );
        assert_eq!(
            (not_ready.ready, not_ready.auth_file.as_deref(), not_ready.models.len()),
            (false, Some("/run/key"), 2)
        );

        let model = parse(br#"{"model":{"id":"m","path":"/m"},"metadata":{"size_bytes":5,"ctx_max":null}}"#);
        assert_eq!(model, Ok(HandoffFile::ModelOnly));
    }

    #[test]
    fn what_is_no_handoff_is_refused_by_field() {
        for (bad, names) in [
            ("", "empty file"),
            ("\u{feff}{}", "byte order mark"),
            ("[]", "not a JSON object"),
            ("{", "not usable JSON: EOF"),
            (r#"{"url":"http://h:1","url":"http://h:2"}"#, "the field `url` is there twice"),
            (r#"{"url":"http://h:1","auth":{"file":"/a","file":"/b"}}"#, "the field `file` is there twice"),
            ("{}", "`url` is missing"),
            (r#"{"url":"not a url"}"#, "`url`"),
            (r#"{"url":7}"#, "`url` must be a string"),
            (r#"{"url":"http://h:1","pool_id":"../../etc/passwd"}"#, "`pool_id`"),
            (r#"{"url":"http://h:1","slots":0}"#, "`slots` must be"),
            (r#"{"url":"http://h:1","slots":-1}"#, "`slots` must be"),
            (r#"{"url":"http://h:1","slots":99999999999999999999}"#, "`slots` must be"),
            (r#"{"url":"http://h:1","ready":"yes"}"#, "`ready` must be true or false"),
            (r#"{"url":"http://h:1","health_path":"health"}"#, "`health_path`"),
            (r#"{"url":"http://h:1","auth":{"file":"key"}}"#, "`auth.file`"),
            (r#"{"url":"http://h:1","models":{}}"#, "`models` must be a list"),
        ] {
            let error = parse(bad.as_bytes()).expect_err(bad).to_string();
            assert!(error.contains(names), "{bad}: {error}");
        }
        assert!(
            parse(&vec![b' '; HANDOFF_BYTES_MAX + 1]).expect_err("too large").to_string().contains("larger")
        );
        assert!(parse(&vec![b'['; 60_000]).expect_err("too deep").to_string().contains("recursion limit"));
        assert!(
            parse(b"{\"url\":\"\xff\"}").expect_err("latin-1").to_string().contains("not UTF-8 at byte 8")
        );
        for (cut, is_incomplete) in [(r#"{"url":"http://h"#, true), ("", true), ("{x", false), ("[]", false)]
        {
            assert_eq!(parse(cut.as_bytes()).expect_err(cut).is_incomplete(), is_incomplete, "{cut}");
        }
        let secret = parse(br#"{"url":"http://h:1","auth":"sk-secret"}"#).expect_err("auth").to_string();
        assert!(!secret.contains("sk-secret"), "{secret}");
    }

    proptest::proptest! {
        #[test]
        fn written_handoffs_read_back_the_same(
            pool in "[A-Za-z0-9_-]{1,20}", replica in "[a-z][0-9]{1,3}", port in 1u16.., slots in 1u32..64, ready: bool,
            mask in proptest::option::of("[0-7](,[0-7]){0,3}"), models in proptest::collection::btree_set("[a-z0-9/.-]{1,12}", 0..3),
            pid in proptest::option::of(1u32..4_000_000), generation: u64,
        ) {
            let handoff = Handoff {
                pool_id: PoolId::new(&pool).expect("an id"), replica_id: ReplicaId::new(&replica).expect("an id"),
                url: BaseUrl::new(&format!("http://127.0.0.1:{port}")).expect("a URL"), engine: "llamacpp".into(), engine_version: None,
                slots, slots_given: true, slots_free: slots / 2, ready, model_bytes: Some(7), device_mask: mask, models: models.into_iter().collect(), pid, pid_start: pid.map(u64::from),
                boot_id: None, pid_ns: None, generation, health_path: "/health".into(), auth_file: None,
            };
            proptest::prop_assert_eq!(parse(handoff.to_json().as_bytes()), Ok(HandoffFile::Engine(Box::new(handoff))));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = parse(&bytes);
        }
    }
}
