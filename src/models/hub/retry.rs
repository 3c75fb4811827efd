//! Timeouts and retries of requests to the hub.

use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::{HFError, HFResult};

use super::client::Client;
use super::failure::{Failure, HubResult};
use super::repo::Repo;

/// The pause before the first retry; it doubles up to `FIRST_PAUSE << MAX_DOUBLINGS`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_DOUBLINGS: usize = 6;

/// A callback for the number of bytes received so far, and the number announced.
pub(super) type OnBytes<'a> = &'a mut dyn FnMut(u64, Option<u64>);

impl Repo {
    /// Retries `request` after transient failures, at most [`retries`](super::config::HubConfig::retries)
    /// times. If the server says how long to wait, that pause is kept, or the request fails if it is longer
    /// than [`patience`](super::config::HubConfig::patience).
    pub(super) fn retry<R>(&self, mut request: impl FnMut() -> HubResult<R>) -> HubResult<R> {
        let mut attempt = 0;
        loop {
            let failure = match request() {
                Err(failure) if attempt < self.hub.retries && failure.is_transient() => failure,
                done => return done,
            };
            let pause = match &failure {
                Failure::Hub(HFError::RateLimited { retry_after: Some(wait), .. }) => *wait,
                _ => FIRST_PAUSE * (1 << attempt.min(MAX_DOUBLINGS)),
            };
            if pause > self.hub.patience {
                return Err(failure);
            }
            attempt += 1;
            tracing::debug!("{}: asking the hub again ({attempt}) in {} ms", self.id, pause.as_millis());
            std::thread::sleep(pause);
        }
    }

    /// Sends a request whose answer is not a file, with retries as in [`Self::retry`].
    pub(super) fn request<R: Send + 'static>(
        &self,
        request: impl Fn(&dyn Client) -> HFResult<R> + Clone + Send + 'static,
    ) -> HubResult<R> {
        self.retry(|| {
            let request = request.clone();
            Ok(self.attempt(&mut |_, _| {}, move |client, _| request(client))?.0)
        })
    }

    /// Runs `operation` on its own thread, and gives up after no progress for
    /// [`patience`](super::config::HubConfig::patience): `hf-hub` itself waits forever for a silent server.
    /// Also returns the number of bytes that the server announced. `on_bytes` is called on this thread.
    pub(super) fn attempt<R: Send + 'static>(
        &self,
        on_bytes: OnBytes,
        operation: impl FnOnce(&dyn Client, Progress) -> HFResult<R> + Send + 'static,
    ) -> HubResult<(R, Option<u64>)> {
        let (client, (sender, receiver)) = (self.client.clone(), channel());
        let progress = Progress::new(EventSender(sender.clone()));
        std::thread::spawn(move || sender.send(Event::Done(operation(&*client, progress))));
        let (mut announced, mut seen) = (None, 0);
        let mut patience = Instant::now();
        loop {
            let left = self.hub.patience.saturating_sub(patience.elapsed());
            match receiver.recv_timeout(left) {
                Ok(Event::Done(result)) => return Ok((result?, announced)),
                Ok(Event::Announced(bytes)) => {
                    announced = Some(bytes).filter(|bytes| *bytes > 0);
                    patience = Instant::now();
                }
                Ok(Event::Received(bytes)) if bytes != seen => {
                    seen = bytes;
                    patience = Instant::now();
                    on_bytes(seen, announced);
                }
                Ok(Event::Received(_)) => {}
                Err(RecvTimeoutError::Timeout) => return Err(Failure::Silent),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Panicked),
            }
        }
    }
}

/// A report from a running operation.
enum Event<R> {
    Announced(u64),
    Received(u64),
    Done(HFResult<R>),
}

/// Forwards the progress of an operation.
struct EventSender<R>(Sender<Event<R>>);

impl<R: Send> ProgressHandler for EventSender<R> {
    fn on_progress(&self, event: &ProgressEvent) {
        let event = match event {
            ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. }) => {
                Event::Announced(*total_bytes)
            }
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                Event::Received(files.iter().map(|file| file.bytes_completed).sum())
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                Event::Received(*bytes_completed)
            }
            _ => return,
        };
        // The receiver is gone after it has given up waiting.
        self.0.send(event).ok();
    }
}
