//! Explains why a request to the hub failed, and what to do about it. Messages contain neither the token nor
//! addresses, which can be signed.

use hf_hub::HFError;

use super::repo::Repo;
use crate::error::Error;

/// The result of a request to the hub.
pub(super) type HubResult<R> = std::result::Result<R, Failure>;

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// An error of `hf-hub`.
    Hub(HFError),
    /// There was no progress for too long.
    Silent,
    /// `hf-hub` panicked.
    Panicked,
    /// The number of bytes differs from the announced one.
    Length { name: String, expected: u64, got: u64 },
    /// A failure on this machine, such as a full disk.
    Local(Error),
}

impl From<HFError> for Failure {
    fn from(error: HFError) -> Self {
        Self::Hub(error)
    }
}

impl Failure {
    /// Whether the same request may succeed later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Hub(HFError::RateLimited { .. }) | Self::Length { .. } => true,
            Self::Hub(HFError::Request { source, .. }) => !source.is_builder() && !source.is_redirect(),
            Self::Hub(HFError::Http { context }) => {
                matches!(context.status.as_u16(), 408 | 500 | 502 | 503 | 504)
            }
            _ => false,
        }
    }

    /// Whether the hub cannot be reached now, so that the cache is used instead.
    pub(super) fn is_outage(&self) -> bool {
        matches!(self, Self::Silent) || self.is_transient()
    }

    /// Whether the partial file cannot be resumed: its length is wrong, or the server rejects the remaining
    /// range (416).
    pub(super) fn invalidates_part(&self) -> bool {
        match self {
            Self::Length { .. } => true,
            Self::Hub(HFError::Http { context }) => context.status.as_u16() == 416,
            _ => false,
        }
    }
}

impl Repo {
    /// Converts a failure into an error that says what to do.
    pub(super) fn explain(&self, failure: Failure) -> Error {
        let reason = match failure {
            Failure::Local(error) => return error,
            Failure::Panicked => "the hub's client panicked".into(),
            Failure::Silent => {
                let silence = self.hub.patience.as_secs_f32();
                return self.unreachable(&format!("no answer for {silence} seconds"));
            }
            Failure::Length { name, expected, got } => {
                format!("the download of {name} failed: expected {expected} bytes, got {got}; try again")
            }
            Failure::Hub(error) => match self.reason(&error) {
                Some(reason) => reason,
                None => match error {
                    HFError::Request { source, .. } => {
                        return self.unreachable(&causes(&source.without_url()))
                    }
                    HFError::Io(source) => return Error::io(&self.hub.cache)(source),
                    other => causes(&other),
                },
            },
        };
        self.error(reason)
    }

    /// Explains errors that result from an answer of the hub; `None` for all others.
    fn reason(&self, error: &HFError) -> Option<String> {
        let token = if self.hub.token.is_some() { "the given token" } else { "no token" };
        Some(match error {
            HFError::AuthRequired { .. } => format!(
                "access denied (401) with {token}: check the repository's name, set HF_TOKEN to a token that \
                 may read it, and accept its licence on the hub if it is gated"
            ),
            HFError::Forbidden { .. } => format!(
                "access denied (403) with {token}: accept the repository's licence on the hub, and set HF_TOKEN \
                 to a token that may read it"
            ),
            HFError::RepoNotFound { .. } => "the hub has no such repository (404)".into(),
            HFError::RevisionNotFound { revision, .. } => format!("there is no revision {revision} (404)"),
            HFError::RateLimited { retry_after, .. } => match retry_after {
                Some(wait) => format!("too many requests (429): try again in {} seconds", wait.as_secs()),
                None => "too many requests (429): try again later, or set HF_TOKEN".into(),
            },
            HFError::Http { context } if context.status.is_server_error() => {
                format!("the hub answered {}: the fault is the hub's, try again later", context.status)
            }
            HFError::Http { context } => format!("the hub answered {}", context.status),
            HFError::Request { source, .. } if source.is_body() || source.is_decode() => {
                "the connection broke off in the middle of a file: try again".into()
            }
            HFError::CacheLockTimeout { .. } => {
                "another process is downloading the same file: try again when it is done".into()
            }
            HFError::MalformedResponse { what, .. } => {
                format!("{} did not answer like a hub: {what}", self.hub.host())
            }
            _ => return None,
        })
    }

    fn unreachable(&self, cause: &str) -> Error {
        self.error(format!(
            "the hub at {} cannot be reached: {cause}; without a network, give a local folder with the files, \
             or set HF_HUB_OFFLINE=1 to use the files in the cache ({})",
            self.hub.host(),
            self.hub.cache.display()
        ))
    }
}

/// An error and its causes, in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    let mut parts: Vec<String> = chain.map(ToString::to_string).collect();
    parts.dedup_by(|inner, outer| outer.contains(inner.as_str()));
    parts.join(": ")
}
