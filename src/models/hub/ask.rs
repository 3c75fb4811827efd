//! How long an answer of the hub is awaited, and how often a question is asked again.

use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use hf_hub::progress::{DownloadEvent, Progress, ProgressEvent, ProgressHandler};
use hf_hub::{HFError, HFResult};

use super::client::Client;
use super::failure::{Answer, Failure};
use super::remote::Repo;

/// The pause before the first repetition; it doubles up to `FIRST_PAUSE << MOST_DOUBLINGS`.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MOST_DOUBLINGS: usize = 6;

/// Bytes that came so far, and how many were announced.
pub(super) type Heard<'a> = &'a mut dyn FnMut(u64, Option<u64>);

impl Repo {
    /// Asks until there is an answer that repetition does not change, at most
    /// [`retries`](super::HubConfig::retries) times more. A server that says how long to wait is
    /// obeyed, unless it asks for more than [`patience`](super::HubConfig::patience).
    pub(super) fn again<R>(&self, mut ask: impl FnMut() -> Answer<R>) -> Answer<R> {
        let mut attempt = 0;
        loop {
            let failure = match ask() {
                Err(failure) if attempt < self.hub.retries && failure.may_pass() => failure,
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

    /// A question without bytes.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        question: impl Fn(&dyn Client) -> HFResult<R> + Clone + Send + 'static,
    ) -> Answer<R> {
        self.again(|| {
            let question = question.clone();
            Ok(self.once(&mut |_, _| {}, move |client, _| question(client))?.0)
        })
    }

    /// Runs `operation` on a thread of its own, and gives up when nothing has moved for as long as
    /// [`patience`](super::HubConfig::patience): `hf-hub` itself waits for a silent server for
    /// ever. Returns also the number of bytes that the server announced. `heard` is called on
    /// this thread.
    pub(super) fn once<R: Send + 'static>(
        &self,
        heard: Heard,
        operation: impl FnOnce(&dyn Client, Progress) -> HFResult<R> + Send + 'static,
    ) -> Answer<(R, Option<u64>)> {
        let (client, (sender, receiver)) = (self.client.clone(), channel());
        let watch = Progress::new(Watch(sender.clone()));
        std::thread::spawn(move || sender.send(News::Done(operation(&*client, watch))));
        let (mut announced, mut seen) = (None, 0);
        let mut patience = Instant::now();
        loop {
            let left = self.hub.patience.saturating_sub(patience.elapsed());
            match receiver.recv_timeout(left) {
                Ok(News::Done(result)) => return Ok((result?, announced)),
                Ok(News::Announced(bytes)) => {
                    announced = Some(bytes).filter(|bytes| *bytes > 0);
                    patience = Instant::now();
                }
                Ok(News::Received(bytes)) if bytes != seen => {
                    seen = bytes;
                    patience = Instant::now();
                    heard(seen, announced);
                }
                Ok(News::Received(_)) => {}
                Err(RecvTimeoutError::Timeout) => return Err(Failure::Silent),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Panicked),
            }
        }
    }
}

/// What a running operation reports.
enum News<R> {
    Announced(u64),
    Received(u64),
    Done(HFResult<R>),
}

/// Passes an operation's progress on.
struct Watch<R>(Sender<News<R>>);

impl<R: Send> ProgressHandler for Watch<R> {
    fn on_progress(&self, event: &ProgressEvent) {
        let news = match event {
            ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. }) => {
                News::Announced(*total_bytes)
            }
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                News::Received(files.iter().map(|file| file.bytes_completed).sum())
            }
            ProgressEvent::Download(DownloadEvent::AggregateProgress { bytes_completed, .. }) => {
                News::Received(*bytes_completed)
            }
            _ => return,
        };
        // The receiver is gone when it has lost patience.
        self.0.send(news).ok();
    }
}
