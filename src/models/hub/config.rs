//! Settings of the hub, from the environment variables that Hugging Face's own tools read.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_PART: u64 = 32 << 20;

/// A callback for the progress of a download.
type OnProgress = dyn Fn(&DownloadProgress) + Send + Sync;

/// The progress of the download of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DownloadProgress {
    /// The repository.
    pub repo: String,
    /// The file's name in the repository.
    pub file: String,
    /// The number of bytes received, including those of an earlier run. It can decrease after a broken
    /// connection.
    pub bytes: u64,
    /// The size of the file in bytes, if the hub reports it.
    pub total: Option<u64>,
}

/// The hub's address, the cache folder, the token and limits on requests.
#[derive(Clone)]
#[non_exhaustive]
pub struct HubConfig {
    /// The hub's address: `HF_ENDPOINT`, or `https://huggingface.co`.
    pub endpoint: String,
    /// The folder of downloaded files: `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `$HF_HOME/hub`,
    /// `$XDG_CACHE_HOME/huggingface/hub`, or `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// The token sent with each request: `HF_TOKEN`, the file `HF_TOKEN_PATH`, or `$HF_HOME/token`. There is
    /// none if `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set.
    pub token: Option<String>,
    /// Whether to use only the cache: `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// The number of retries after a transient failure: no connection, a broken connection, or status 408,
    /// 429, 500, 502, 503 or 504. 5 by default.
    pub retries: usize,
    /// How long a server may stay silent, and how long a pause it may ask for (`Retry-After` of 429), before
    /// the request fails. 60 seconds by default.
    pub patience: Duration,
    /// The number of bytes that are requested, and held in memory, at a time. An interrupted download loses
    /// no more. 32 MiB by default.
    pub part: u64,
    pub(super) progress: Option<Arc<OnProgress>>,
}

impl HubConfig {
    /// Reads the settings from the environment.
    pub fn from_env() -> Self {
        Self::from_vars(&|name| std::env::var(name).ok())
    }

    /// Reads the settings from the variables `var`. An empty variable counts as unset.
    pub(super) fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let user = || var("HOME").or_else(|| var("USERPROFILE")).map(PathBuf::from); // the second on Windows
        let path = |name: &str| {
            let path = PathBuf::from(var(name)?);
            match (path.strip_prefix("~"), user()) {
                (Ok(below), Some(user)) => Some(user.join(below)),
                _ => Some(path),
            }
        };
        let is_true = |name: &str| {
            var(name).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        let home = path("HF_HOME").unwrap_or_else(|| {
            let caches = || user().unwrap_or_else(std::env::temp_dir).join(".cache");
            path("XDG_CACHE_HOME").unwrap_or_else(caches).join("huggingface")
        });
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_string());
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let in_file = |path: &Path| {
            let text = std::fs::read_to_string(path).ok()?;
            Some(text.trim().to_string()).filter(|token| !token.is_empty())
        };
        let token = || {
            var("HF_TOKEN")
                .or_else(|| in_file(&path("HF_TOKEN_PATH")?))
                .or_else(|| in_file(&home.join("token")))
        };
        Self {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache: cache.unwrap_or_else(|| home.join("hub")),
            token: if is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") { None } else { token() },
            offline: is_true("HF_HUB_OFFLINE"),
            retries: 5,
            patience: Duration::from_secs(60),
            part: DEFAULT_PART,
            progress: None,
        }
    }

    /// Sets a callback that is called whenever bytes of a download arrive, on the thread that requested it.
    /// It is not called for files in the cache.
    ///
    /// ```no_run
    /// use monteclora::models::hub::{HubConfig, ModelFiles};
    ///
    /// let hub = HubConfig::from_env().on_progress(|at| eprintln!("{}: {} of {:?}", at.file, at.bytes, at.total));
    /// let files = ModelFiles::locate_with("FacebookAI/roberta-base", None, &hub)?;
    /// # Ok::<(), monteclora::Error>(())
    /// ```
    pub fn on_progress(self, progress: impl Fn(&DownloadProgress) + Send + Sync + 'static) -> Self {
        Self { progress: Some(Arc::new(progress)), ..self }
    }

    /// The scheme and host of the endpoint, without user and password.
    pub(super) fn host(&self) -> String {
        let (scheme, rest) = self.endpoint.split_once("://").unwrap_or(("", &self.endpoint));
        let authority = rest.split('/').next().unwrap_or(rest);
        let host = authority.rsplit('@').next().unwrap_or(authority);
        if scheme.is_empty() {
            host.to_string()
        } else {
            format!("{scheme}://{host}")
        }
    }

    /// Replaces the token in `text`, wherever it occurs.
    pub(super) fn redact(&self, text: String) -> String {
        match &self.token {
            Some(token) if !token.is_empty() => text.replace(token.as_str(), "<token>"),
            _ => text,
        }
    }
}

impl Default for HubConfig {
    fn default() -> Self {
        Self::from_env()
    }
}

impl std::fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.host())
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "<token>"))
            .field("offline", &self.offline)
            .field("retries", &self.retries)
            .field("patience", &self.patience)
            .field("part", &self.part)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn the_environment_is_read_as_hugging_face_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().display().to_string();
        std::fs::write(dir.path().join("token"), " hf_stored\n").unwrap();
        std::fs::write(dir.path().join("other"), "hf_other\n").unwrap();
        let other = dir.path().join("other").display().to_string();
        let config = |vars: &[(&str, &str)]| {
            let vars: BTreeMap<String, String> =
                vars.iter().map(|(n, v)| (n.to_string(), v.to_string())).collect();
            HubConfig::from_vars(&move |name| vars.get(name).cloned())
        };
        let plain = config(&[("HOME", "/home/u")]);
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert_eq!(plain.cache, Path::new("/home/u/.cache/huggingface/hub"));
        assert!(plain.token.is_none() && !plain.offline);

        assert_eq!(config(&[("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
        assert_eq!(config(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h")]).cache, Path::new("/h/hub"));
        assert_eq!(config(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")]).cache, Path::new("/c"));
        assert_eq!(config(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");

        assert_eq!(config(&[("HF_HOME", &home)]).token.as_deref(), Some("hf_stored"));
        assert_eq!(
            config(&[("HF_HOME", &home), ("HF_TOKEN_PATH", &other)]).token.as_deref(),
            Some("hf_other")
        );
        assert_eq!(config(&[("HF_HOME", &home), ("HF_TOKEN", "hf_x")]).token.as_deref(), Some("hf_x"));
        assert!(config(&[("HF_TOKEN", "hf_x"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token.is_none());

        for (value, offline) in
            [("1", true), ("on", true), ("Yes", true), ("true", true), ("0", false), ("", false)]
        {
            assert_eq!(config(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value:?}");
        }
        let secret = config(&[("HF_TOKEN", "hf_x"), ("HF_ENDPOINT", "http://user:word@mirror/path")]);
        let shown = format!("{secret:?}");
        assert!(!shown.contains("hf_x") && !shown.contains("word"), "{shown}");
    }
}
