//! How long an answer of the hub is awaited, and how often a request is repeated.

use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::{HFError, HFResult};

use super::client::Client;
use super::failure::{Failure, HubResult};
use super::repo::Repo;

/// The pause before the first repetition; it doubles up to `FIRST_PAUSE << MOST_DOUBLINGS`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MOST_DOUBLINGS: usize = 6;

/// Is told how many bytes came so far, and how many were announced.
pub(super) type OnBytes<'a> = &'a mut dyn FnMut(u64, Option<u64>);

impl Repo {
    /// Repeats `request` until there is an answer that repetition does not change, at most
    /// [`retries`](super::config::HubConfig::retries) times. A server that says how long to wait is
    /// obeyed, unless it asks for more than [`patience`](super::config::HubConfig::patience).
    pub(super) fn retry<R>(&self, mut request: impl FnMut() -> HubResult<R>) -> HubResult<R> {
        let mut attempt = 0;
        loop {
            let failure = match request() {
                Err(failure) if attempt < self.hub.retries && failure.is_transient() => failure,
                done => return done,
            };
            let pause = match &failure {
                Failure::Hub(HFError::RateLimited { retry_after: Some(wait), .. }) => *wait,
                _ => FIRST_PAUSE * (1 << attempt.min(MOST_DOUBLINGS)),
            };
            if pause > self.hub.patience {
                return Err(failure);
            }
            attempt += 1;
            tracing::debug!("{}: asking the hub again ({attempt}) in {} ms", self.id, pause.as_millis());
            std::thread::sleep(pause);
        }
    }

    /// A request whose answer is no file, repeated as [`Self::retry`] says.
    pub(super) fn request<R: Send + 'static>(
        &self,
        request: impl Fn(&dyn Client) -> HFResult<R> + Clone + Send + 'static,
    ) -> HubResult<R> {
        self.retry(|| {
            let request = request.clone();
            Ok(self.attempt(&mut |_, _| {}, move |client, _| request(client))?.0)
        })
    }

    /// Runs `operation` on a thread of its own, and gives up when nothing has moved for as long as
    /// [`patience`](super::config::HubConfig::patience): `hf-hub` itself waits for a silent server for
    /// ever. Returns also the number of bytes that the server announced. `on_bytes` is called on
    /// this thread.
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

/// What a running operation reports.
enum Event<R> {
    Announced(u64),
    Received(u64),
    Done(HFResult<R>),
}

/// Passes an operation's progress on.
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
        // The receiver is gone when it has lost patience.
        self.0.send(event).ok();
    }
}
