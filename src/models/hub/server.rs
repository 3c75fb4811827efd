//! A hub in miniature on the loopback, for tests: enough of the protocol for the real client.
//!
//! HEAD and GET of `/owner/name/resolve/revision/file` (data sets under `/datasets`), ranges,
//! ETag and X-Repo-Commit, and the existence questions under `/api`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// The commit that `main` is at.
pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server misbehaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Mood {
    /// It does not.
    Good,
    /// Every answer has this status.
    Status(u16),
    /// GET fails with this status where HEAD went well.
    Get(u16),
    /// It takes connections and says nothing.
    Silent,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) authorization: Option<String>,
}

pub(super) struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `files`, named `owner/name/path` or `datasets/owner/name/path`.
    pub(super) fn start(files: &[(&str, Vec<u8>)], mood: Mood) -> Self {
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(n, b)| (n.to_string(), b.clone())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (stopped, log) = (stop.clone(), requests.clone());
        let thread = std::thread::spawn(move || {
            let mut silenced = Vec::new();
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if mood == Mood::Silent {
                    silenced.push(stream);
                } else {
                    serve(stream, &files, mood, &log).ok();
                }
            }
        });
        Self { address, stop, requests, thread: Some(thread) }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many times a path that ends so was fetched whole.
    pub(super) fn downloads(&self, end: &str) -> usize {
        self.requests().iter().filter(|r| r.method == "GET" && r.path.ends_with(end)).count()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        TcpStream::connect(self.address).ok();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn serve(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    mood: Mood,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(1 << 16)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_string();
    let path = words.next().unwrap_or_default().trim_start_matches('/').to_string();
    let (mut authorization, mut range) = (None, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = Some(value.trim().to_string()),
            "range" => range = value.trim().strip_prefix("bytes=").map(str::to_string),
            _ => {}
        }
    }
    log.lock().unwrap().push(Request { method: method.clone(), path: path.clone(), authorization });

    let not_found = (404, b"Not Found".to_vec());
    let (mut status, mut body) = match mood {
        Mood::Status(status) => (status, b"refused".to_vec()),
        Mood::Get(status) if method == "GET" => (status, b"refused".to_vec()),
        _ => match path.split_once("/resolve/") {
            Some((repo, rest)) => {
                let (revision, name) = rest.split_once('/').unwrap_or((rest, ""));
                let known = revision == "main" || revision == COMMIT;
                match files.get(&format!("{repo}/{name}")).filter(|_| known) {
                    Some(bytes) => (200, bytes.clone()),
                    None => not_found,
                }
            }
            None => match path.strip_prefix("api/") {
                Some(api) => {
                    let (repo, revision) = api.split_once("/revision/").unwrap_or((api, "main"));
                    let prefix = format!("{}/", repo.strip_prefix("models/").unwrap_or(repo));
                    let known = files.keys().any(|name| name.starts_with(&prefix));
                    let known = known && (revision == "main" || revision == COMMIT);
                    if known {
                        (200, format!(r#"{{"sha":"{COMMIT}"}}"#).into_bytes())
                    } else {
                        not_found
                    }
                }
                None => not_found,
            },
        },
    };
    let etag =
        format!("{:016x}", body.iter().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b))));
    if let Some((from, to)) = range.as_deref().and_then(|r| r.split_once('-')).filter(|_| status == 200) {
        let from = from.parse().unwrap_or(0).min(body.len());
        let to = to.parse().map_or(body.len(), |to: usize| (to + 1).min(body.len()));
        (status, body) = (206, body[from..to.max(from)].to_vec());
    }
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\n\
         Retry-After: 7\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    if method != "HEAD" {
        stream.write_all(&body)?;
    }
    stream.flush()
}
