//! Shared by the hub tests: files to serve, settings, and a cache that checks that the token does not leak.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once};
use std::time::Duration;

use candle_core::{Device, Tensor};
use monteclora::models::hub::HubConfig;
use monteclora::{Error, Result};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

pub const CONFIG: &str = "config.json";
pub const TOKENIZER: &str = "tokenizer.json";
pub const WEIGHTS: &str = "model.safetensors";

/// The token that every test sends.
pub const TOKEN: &str = "hf_secretsecretsecret";

/// Tracing events that contain the token; below, the number of all events of `hf-hub`.
static LEAKS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static EVENTS: AtomicUsize = AtomicUsize::new(0);

/// An empty cache. When it is dropped, neither its files nor any event may contain the token.
pub struct Cache(tempfile::TempDir);

impl Cache {
    pub fn new() -> Self {
        static LISTEN: Once = Once::new();
        LISTEN.call_once(|| tracing::subscriber::set_global_default(Listener).unwrap());
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Settings for a server with this cache: one attempt, and a patience of 20 seconds.
    pub fn hub(&self, endpoint: &str) -> HubConfig {
        with(HubConfig::from_env(), |hub| {
            hub.endpoint = endpoint.to_string();
            hub.cache = self.path().to_path_buf();
            hub.token = Some(TOKEN.to_string());
            hub.offline = false;
            hub.retries = 0;
            hub.patience = Duration::from_secs(20);
        })
    }

    /// The names of all files in the folder `blobs` of the model `owner/tiny`.
    pub fn blobs(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path().join("models--owner--tiny/blobs")) else {
            return Vec::new();
        };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The number of events of `hf-hub` in all tests so far.
    pub fn events() -> usize {
        EVENTS.load(Ordering::SeqCst)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let found = with_token(self.path());
            assert!(found.is_empty(), "the token is in {found:?}");
            // Cloned, so that a failed assertion does not poison the lock, which every test needs.
            let leaks = LEAKS.lock().unwrap().clone();
            assert!(leaks.is_empty(), "the token is in events: {leaks:?}");
        }
    }
}

/// Returns the settings `hub` with a change.
pub fn with(mut hub: HubConfig, change: impl FnOnce(&mut HubConfig)) -> HubConfig {
    change(&mut hub);
    hub
}

/// Returns the settings `hub` in offline mode.
pub fn offline(hub: HubConfig) -> HubConfig {
    with(hub, |hub| hub.offline = true)
}

/// The files below `dir` that contain the token in their path, link target or content.
pub fn with_token(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.symlink_metadata().unwrap().file_type();
        let text = if kind.is_dir() {
            found.extend(with_token(&path));
            Vec::new()
        } else if kind.is_symlink() {
            std::fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
        } else {
            std::fs::read(&path).unwrap()
        };
        let all = [path.as_os_str().as_encoded_bytes(), &text].concat();
        if all.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()) {
            found.push(path);
        }
    }
    found
}

/// A subscriber that receives every event and span of every level and crate.
struct Listener;

impl Listener {
    fn hear(&self, metadata: &Metadata, record: impl FnOnce(&mut Text)) {
        let mut text = Text(format!("{} {}", metadata.target(), metadata.name()));
        record(&mut text);
        if metadata.target().starts_with("hf_hub") {
            EVENTS.fetch_add(1, Ordering::SeqCst);
        }
        if text.0.contains(TOKEN) {
            LEAKS.lock().unwrap().push(text.0);
        }
    }
}

impl Subscriber for Listener {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes) -> Id {
        self.hear(span.metadata(), |text| span.record(text));
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event) {
        self.hear(event.metadata(), |text| event.record(text));
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        write!(self.0, " {field}={value:?}").ok();
    }
}

/// A safetensors file of one vector `name = [value, value]`.
pub fn tensors(name: &str, value: f32) -> Vec<u8> {
    let vector = Tensor::new(&[value, value], &Device::Cpu).unwrap();
    safetensors::serialize([(name, vector)], None).unwrap()
}

/// A small model, and a file of a data set.
pub fn model() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("owner/tiny/config.json", br#"{"hidden_size": 4}"#.to_vec()),
        ("owner/tiny/tokenizer.json", b"{}".to_vec()),
        ("owner/tiny/model.safetensors", tensors("a", 1.5)),
        ("datasets/owner/rows/sub/train-0.parquet", b"PAR1".to_vec()),
    ]
}

/// The message of an [`Error::Hub`] that does not show the token.
pub fn hub_error(result: Result<impl std::fmt::Debug>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Hub { .. }), "{error:?}");
    let message = error.to_string();
    assert!(!message.contains(TOKEN) && !format!("{error:?}").contains(TOKEN), "{message}");
    message
}
