//! A minimal hub on the loopback interface, for tests: enough of the protocol for the real client, and the
//! faults of real servers.
//!
//! It serves HEAD and GET of `/owner/name/resolve/revision/file` (data sets under `/datasets`) with ranges,
//! ETag, If-None-Match and X-Repo-Commit, the existence queries and lists of files under `/api`, and any
//! other path as a plain file, as the target of redirects.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::json;

/// The commit of `main`.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The commit of the tag `v1`, which has the files whose names begin with `v1:`.
pub const OLD_COMMIT: &str = "76543210fedcba9876543210fedcba9876543210";

/// A fault of an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    /// This status, with the text `refused`.
    Status(u16),
    /// The status 429 with this `Retry-After`.
    RetryAfter(&'static str),
    /// No answer; the connection stays open.
    Silent,
    /// The connection is closed after this many bytes of the body.
    Cut(usize),
    /// The body stops after this many bytes; the connection stays open.
    Stall(usize),
    /// The body comes in ten pieces, with this pause before each.
    Drip(Duration),
    /// Another body than HEAD announced, complete in itself.
    Body(Vec<u8>),
    /// The whole file, whatever range was requested.
    NoRange,
    /// No `Content-Length`; the body ends with the connection.
    NoLength,
    /// A redirect to this address, with the file's ETag and size in the headers.
    Moved(String),
    /// A header with this name and this value.
    Header(&'static str, &'static str),
}

/// A request as received.
#[derive(Debug, Clone, Default)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
    etag: Option<String>,
}

impl Request {
    pub fn is_get(&self) -> bool {
        self.method == "GET"
    }
}

/// Maps a request, and the number of earlier ones with the same method, path and range, to its fault.
type Faults = dyn Fn(&Request, usize) -> Option<Fault> + Send;

pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    away: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `files`, named `owner/name/path` or `datasets/owner/name/path`, without a fault.
    pub fn good(files: &[(&str, Vec<u8>)]) -> Self {
        Self::start(files, |_, _| None)
    }

    /// Serves `files` with `faults`.
    pub fn start(
        files: &[(&str, Vec<u8>)],
        faults: impl Fn(&Request, usize) -> Option<Fault> + Send + 'static,
    ) -> Self {
        let files: BTreeMap<String, Vec<u8>> =
            files.iter().map(|(n, b)| (n.to_string(), b.clone())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, away, requests) =
            <(Arc<AtomicBool>, Arc<AtomicBool>, Arc<Mutex<Vec<Request>>>)>::default();
        let (stopped, gone, log) = (stop.clone(), away.clone(), requests.clone());
        let thread = std::thread::spawn(move || {
            // Connections that stay open without an answer.
            let mut silenced = Vec::new();
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if gone.load(Ordering::SeqCst) {
                    continue;
                }
                silenced.extend(serve(stream, &files, &faults, &log).ok().flatten());
            }
        });
        Self { address, stop, away, requests, thread: Some(thread) }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on every connection is closed at once. The port stays bound: otherwise the server of another
    /// test could get it.
    pub fn leave(&self) {
        self.away.store(true, Ordering::SeqCst);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The number of GET requests for paths with this ending.
    pub fn downloads(&self, end: &str) -> usize {
        self.requests().iter().filter(|r| r.is_get() && r.path.ends_with(end)).count()
    }

    /// The ranges that were fetched, in order.
    pub fn ranges(&self) -> Vec<String> {
        self.requests().into_iter().filter(Request::is_get).filter_map(|r| r.range).collect()
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

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?.take(1 << 16)).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_string();
    let path = words.next().unwrap_or_default().trim_start_matches('/').to_string();
    let mut request = Request { method, path, ..Request::default() };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_string()),
            "range" => request.range = value.strip_prefix("bytes=").map(str::to_string),
            "if-none-match" => request.etag = Some(value.to_string()),
            _ => {}
        }
    }
    Ok(request)
}

/// Status, body and commit of an answer without a fault.
fn answer(path: &str, files: &BTreeMap<String, Vec<u8>>) -> (u16, Vec<u8>, Option<&'static str>) {
    let not_found = (404, b"Not Found".to_vec(), None);
    let commit = |revision: &str| match revision {
        "main" | COMMIT => Some(("", COMMIT)),
        "v1" | OLD_COMMIT => Some(("v1:", OLD_COMMIT)),
        _ => None,
    };
    if let Some((repo, rest)) = path.split_once("/resolve/") {
        let (revision, name) = rest.split_once('/').unwrap_or((rest, ""));
        let Some((prefix, commit)) = commit(revision) else { return not_found };
        return match files.get(&format!("{prefix}{repo}/{name}")) {
            Some(bytes) => (200, bytes.clone(), Some(commit)),
            None if files.keys().any(|name| name.starts_with(&format!("{repo}/"))) => {
                (404, b"Entry not found".to_vec(), Some(commit))
            }
            None => not_found,
        };
    }
    if let Some(api) = path.strip_prefix("api/") {
        if let Some((repo, rest)) = api.split_once("/tree/") {
            let (revision, _) = rest.split_once('?').unwrap_or((rest, ""));
            let Some((prefix, _)) = commit(revision) else { return not_found };
            let start = format!("{prefix}{}/", repo.strip_prefix("models/").unwrap_or(repo));
            let names = files.keys().filter_map(|name| name.strip_prefix(&start));
            let entry = |name: &str| json!({"type": "file", "oid": "0", "size": 1, "path": name});
            let list: Vec<_> = names.filter(|name| !name.contains('/')).map(entry).collect();
            return (200, json!(list).to_string().into_bytes(), None);
        }
        let (repo, revision) = api.split_once("/revision/").unwrap_or((api, "main"));
        let prefix = format!("{}/", repo.strip_prefix("models/").unwrap_or(repo));
        let known = files.keys().any(|name| name.starts_with(&prefix));
        return match commit(revision).filter(|_| known) {
            Some((_, commit)) => (200, format!(r#"{{"sha":"{commit}"}}"#).into_bytes(), None),
            None => not_found,
        };
    }
    files.get(path).map_or(not_found, |bytes| (200, bytes.clone(), None))
}

/// Answers one request; returns the connection if it is to stay open.
fn serve(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    faults: &Faults,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<Option<TcpStream>> {
    let request = read(&stream)?;
    let same =
        |r: &&Request| (&r.method, &r.path, &r.range) == (&request.method, &request.path, &request.range);
    let before = log.lock().unwrap().iter().filter(same).count();
    log.lock().unwrap().push(request.clone());
    let fault = faults(&request, before);

    let (mut status, mut body, commit) = answer(&request.path, files);
    let hash = body.iter().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)));
    let etag = format!("\"{hash:016x}\"");
    let mut headers = vec![("ETag", etag.clone())];
    headers.extend(commit.map(|commit| ("X-Repo-Commit", commit.to_string())));
    let range = request.range.as_deref().and_then(|r| r.split_once('-')).filter(|_| status == 200);
    match &fault {
        Some(Fault::Silent) => return Ok(Some(stream)),
        Some(Fault::Status(refusal)) => (status, body) = (*refusal, b"refused".to_vec()),
        Some(Fault::RetryAfter(wait)) => {
            (status, body) = (429, b"refused".to_vec());
            headers.push(("Retry-After", wait.to_string()));
        }
        Some(Fault::Moved(to)) => {
            headers[0].0 = "X-Linked-ETag";
            headers.extend([("X-Linked-Size", body.len().to_string()), ("Location", to.clone())]);
            (status, body) = (302, Vec::new());
        }
        Some(Fault::Header(name, value)) => {
            headers.retain(|(other, _)| other != name);
            headers.push((name, value.to_string()));
        }
        Some(Fault::Body(other)) if request.is_get() => body = other.clone(),
        Some(Fault::NoRange) => {}
        _ if status == 200 && request.etag.is_some() && request.etag.as_deref() == Some(&etag) => {
            (status, body) = (304, Vec::new());
        }
        _ => {
            if let Some((from, to)) = range {
                let from = from.parse().unwrap_or(0).min(body.len());
                let to = to.parse().map_or(body.len(), |to: usize| (to + 1).min(body.len()));
                (status, body) = (206, body[from..to.max(from)].to_vec());
            }
        }
    }
    if fault != Some(Fault::NoLength) {
        headers.push(("Content-Length", body.len().to_string()));
    }
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    stream.write_all(format!("HTTP/1.1 {status} X\r\n{headers}Connection: close\r\n\r\n").as_bytes())?;
    if !request.is_get() {
        return stream.flush().map(|()| None);
    }
    match fault {
        Some(Fault::Cut(at)) => stream.write_all(&body[..at.min(body.len())])?,
        Some(Fault::Stall(at)) => {
            stream.write_all(&body[..at.min(body.len())])?;
            stream.flush()?;
            return Ok(Some(stream));
        }
        Some(Fault::Drip(pause)) => {
            for piece in body.chunks(body.len().div_ceil(10).max(1)) {
                std::thread::sleep(pause);
                stream.write_all(piece)?;
                stream.flush()?;
            }
        }
        _ => stream.write_all(&body)?,
    }
    stream.flush().map(|()| None)
}
