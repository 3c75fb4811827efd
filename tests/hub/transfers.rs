//! Downloads by the real client that take several requests, break off, or are redirected.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use candle_core::{DType, Device};
use monteclora::models::hub::{repo_file_with, HubConfig, ModelFiles, RepoKind};
use monteclora::Result;

use super::fixture::{hub_error, offline, tensors, with, Cache, CONFIG, TOKEN, WEIGHTS};
use super::server::{Fault, Request, Server, COMMIT, OLD_COMMIT};

/// A file of ten parts.
const LENGTH: usize = 1000;
const PART: u64 = 100;

fn weights() -> Vec<u8> {
    (0..LENGTH).map(|i| (i % 251) as u8).collect()
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    vec![("owner/tiny/model.safetensors", weights())]
}

fn fetch(hub: &HubConfig) -> Result<PathBuf> {
    repo_file_with("owner/tiny", RepoKind::Model, WEIGHTS, None, hub)
}

fn in_parts(cache: &Cache, server: &Server) -> HubConfig {
    with(cache.hub(&server.endpoint()), |hub| hub.part = PART)
}

/// Fetches from `server`, and checks the bytes.
fn fetch_whole(hub: &HubConfig) {
    assert_eq!(std::fs::read(fetch(hub).unwrap()).unwrap(), weights());
}

/// Asserts that nothing in the cache passes for the file.
fn assert_absent(cache: &Cache, server: &Server) {
    let whole: Vec<_> = cache.blobs().into_iter().filter(|name| !name.contains('.')).collect();
    assert!(whole.is_empty(), "{whole:?}");
    let message = hub_error(fetch(&offline(cache.hub(&server.endpoint()))));
    assert!(message.contains("not in the cache"), "{message}");
}

#[test]
fn progress_is_told_for_what_is_downloaded_and_only_for_that() {
    let cache = Cache::new();
    let server = Server::good(&files());
    let told = Arc::new(Mutex::new(Vec::new()));
    let to = told.clone();
    let hub = in_parts(&cache, &server).on_progress(move |at| to.lock().unwrap().push(at.clone()));
    fetch_whole(&hub);
    let ranges: Vec<String> = (0..10).map(|i| format!("{}-{}", i * 100, i * 100 + 99)).collect();
    assert_eq!(server.ranges(), ranges);
    let told = std::mem::take(&mut *told.lock().unwrap());
    assert!(told.iter().all(|at| at.repo == "owner/tiny" && at.file == WEIGHTS && at.total == Some(1000)));
    assert!(told.len() >= 10 && told.windows(2).all(|pair| pair[0].bytes < pair[1].bytes), "{told:?}");
    assert_eq!(told.last().unwrap().bytes, 1000);
    assert!(!format!("{hub:?}").contains(TOKEN));

    let silent = hub.on_progress(|at| panic!("{at:?}"));
    fetch_whole(&silent);
    server.leave();
    fetch_whole(&silent);
}

#[test]
fn a_download_that_broke_off_goes_on_where_it_was() {
    for fault in [Fault::Cut(50), Fault::Stall(50), Fault::Status(403)] {
        let cache = Cache::new();
        let broken = fault.clone();
        let late = |r: &Request| r.range.as_deref() == Some("600-699");
        let server = Server::start(&files(), move |r, _| late(r).then(|| broken.clone()));
        let hub = with(in_parts(&cache, &server), |hub| hub.patience = Duration::from_millis(700));
        let message = hub_error(fetch(&hub));
        let reason = match fault {
            Fault::Cut(_) => "broke off in the middle of a file",
            Fault::Stall(_) => "no answer for 0.7 seconds",
            _ => "403",
        };
        assert!(message.contains(reason), "{message}");
        assert_absent(&cache, &server);
        drop(server);

        let server = Server::good(&files());
        let first = Arc::new(Mutex::new(None));
        let to = first.clone();
        let hub = in_parts(&cache, &server).on_progress(move |at| {
            to.lock().unwrap().get_or_insert(at.bytes);
        });
        fetch_whole(&hub);
        assert_eq!(server.ranges(), ["600-699", "700-799", "800-899", "900-999"], "{fault:?}");
        assert!(first.lock().unwrap().unwrap() > 600);
        assert_eq!(cache.blobs().len(), 1);
    }
}

#[test]
fn a_part_is_of_the_version_that_it_began_with() {
    let cache = Cache::new();
    let late = |r: &Request| r.range.as_deref() == Some("600-699");
    let server = Server::start(&files(), move |r, _| late(r).then_some(Fault::Cut(0)));
    fetch(&in_parts(&cache, &server)).unwrap_err();
    drop(server);
    // The file has changed since.
    let other: Vec<u8> = weights().into_iter().rev().collect();
    let server = Server::good(&[("owner/tiny/model.safetensors", other.clone())]);
    assert_eq!(std::fs::read(fetch(&in_parts(&cache, &server)).unwrap()).unwrap(), other);
    assert_eq!(server.ranges()[0], "0-99");
}

#[test]
fn a_failure_that_passes_is_asked_again() {
    for fault in [Fault::Status(500), Fault::Status(503), Fault::Cut(50), Fault::Body(b"part".to_vec())] {
        let cache = Cache::new();
        let first = fault.clone();
        let server = Server::start(&files(), move |_, before| (before == 0).then(|| first.clone()));
        // Two retries for one file, since HEAD and GET may each fail once.
        fetch_whole(&with(cache.hub(&server.endpoint()), |hub| hub.retries = 2));
        assert_eq!(server.downloads(WEIGHTS), 2, "{fault:?}");
    }
    // A permanent failure is not retried.
    for status in [401, 403, 404, 501] {
        let cache = Cache::new();
        let server = Server::start(&files(), move |r, _| {
            r.path.contains("/resolve/").then_some(Fault::Status(status))
        });
        let message = hub_error(fetch(&with(cache.hub(&server.endpoint()), |hub| hub.retries = 5)));
        assert!(message.contains(&status.to_string()), "{message}");
        let asked = server.requests().iter().filter(|r| r.path.contains("/resolve/")).count();
        assert!(asked <= 2, "{status}: {asked}");
    }
}

#[test]
fn a_server_that_says_how_long_to_wait_is_obeyed() {
    let cache = Cache::new();
    let server =
        Server::start(&files(), |r, before| (!r.is_get() && before == 0).then_some(Fault::RetryAfter("1")));
    let start = Instant::now();
    fetch_whole(&with(cache.hub(&server.endpoint()), |hub| hub.retries = 1));
    assert!(start.elapsed() >= Duration::from_secs(1));

    // A wait longer than `patience` is not waited for; the error reports it.
    let cache = Cache::new();
    let server = Server::start(&files(), |_, _| Some(Fault::RetryAfter("7")));
    let patience = Duration::from_secs(5);
    let message = hub_error(fetch(&with(cache.hub(&server.endpoint()), |hub| {
        hub.retries = 5;
        hub.patience = patience;
    })));
    assert!(message.contains("429") && message.contains("7 seconds"), "{message}");
    assert_eq!(server.requests().len(), 1);
    // `hf-hub` only reads seconds; a date is ignored.
    let cache = Cache::new();
    let server = Server::start(&files(), |_, _| Some(Fault::RetryAfter("Wed, 21 Oct 2015 07:28:00 GMT")));
    let message = hub_error(fetch(&cache.hub(&server.endpoint())));
    assert!(message.contains("429") && message.contains("later"), "{message}");
}

#[test]
fn a_wrong_length_is_never_cached() {
    let longer = [weights(), b"more".to_vec()].concat();
    for body in [weights()[..999].to_vec(), longer, Vec::new()] {
        let cache = Cache::new();
        let got = body.len();
        let server = Server::start(&files(), move |r, _| r.is_get().then(|| Fault::Body(body.clone())));
        let message = hub_error(fetch(&cache.hub(&server.endpoint())));
        assert!(message.contains(&format!("{WEIGHTS} failed: expected 1000 bytes, got {got}")), "{message}");
        assert_absent(&cache, &server);
        assert!(cache.blobs().is_empty(), "{:?}", cache.blobs());
        drop(server);
        fetch_whole(&cache.hub(&Server::good(&files()).endpoint()));
    }
}

#[test]
fn a_wrong_file_that_something_else_left_is_replaced() {
    let cache = Cache::new();
    let server = Server::good(&files());
    let hub = cache.hub(&server.endpoint());
    let path = fetch(&hub).unwrap();
    std::fs::write(path.canonicalize().unwrap(), "Service Unavailable").unwrap();
    fetch_whole(&hub);
}

#[test]
fn a_server_without_ranges_or_lengths_is_used_as_it_is() {
    let cache = Cache::new();
    let server = Server::start(&files(), |_, _| Some(Fault::NoRange));
    fetch_whole(&in_parts(&cache, &server));
    assert_eq!(server.downloads(WEIGHTS), 1);

    let cache = Cache::new();
    let server = Server::start(&files(), |_, _| Some(Fault::NoLength));
    fetch_whole(&in_parts(&cache, &server));
    // Without a length, only the status distinguishes an error's text from the file.
    let cache = Cache::new();
    let server =
        Server::start(&files(), |r, _| Some(if r.is_get() { Fault::Status(503) } else { Fault::NoLength }));
    let message = hub_error(fetch(&in_parts(&cache, &server)));
    assert!(message.contains("503"), "{message}");
    assert_absent(&cache, &server);
}

#[test]
fn a_part_that_the_server_cannot_continue_is_given_up() {
    let cache = Cache::new();
    let late = |r: &Request| r.range.as_deref() == Some("600-699");
    let server = Server::start(&files(), move |r, _| late(r).then_some(Fault::Status(416)));
    let hub = in_parts(&cache, &server);
    assert!(hub_error(fetch(&hub)).contains("416"));
    assert!(cache.blobs().is_empty(), "{:?}", cache.blobs());
    fetch_whole(&cache.hub(&server.endpoint()));
}

#[test]
fn two_that_want_the_same_file_fetch_it_once() {
    let cache = Cache::new();
    let server = Server::start(&files(), |r, _| r.is_get().then_some(Fault::Drip(Duration::from_millis(20))));
    let hub = cache.hub(&server.endpoint());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| fetch_whole(&hub));
        }
    });
    assert_eq!(server.downloads(WEIGHTS), 1);
}

#[test]
fn a_slow_server_is_waited_for_as_long_as_something_moves() {
    let cache = Cache::new();
    let pause = Duration::from_millis(80);
    let server = Server::start(&files(), move |_, _| Some(Fault::Drip(pause)));
    let start = Instant::now();
    let patience = Duration::from_millis(600);
    fetch_whole(&with(cache.hub(&server.endpoint()), |hub| hub.patience = patience));
    assert!(start.elapsed() > patience);
}

/// A hub that redirects to another server for its files, and that server.
fn elsewhere(faults: impl Fn(&Request, usize) -> Option<Fault> + Send + 'static) -> (Server, Server) {
    let store = Server::start(&[("store/signed", weights())], faults);
    let to = format!("{}/store/signed", store.endpoint());
    let hub =
        Server::start(&files(), move |r, _| r.path.contains("/resolve/").then(|| Fault::Moved(to.clone())));
    (hub, store)
}

#[test]
fn a_redirect_to_another_host_does_not_carry_the_token() {
    let cache = Cache::new();
    let (hub, store) = elsewhere(|_, _| None);
    let told = Arc::new(Mutex::new(0));
    let to = told.clone();
    fetch_whole(&cache.hub(&hub.endpoint()).on_progress(move |at| *to.lock().unwrap() = at.bytes));
    assert_eq!(*told.lock().unwrap(), LENGTH as u64);
    assert!(hub.requests().iter().all(|r| r.authorization == Some(format!("Bearer {TOKEN}"))));
    assert_eq!(store.downloads("signed"), 1);
    assert!(store.requests().iter().all(|r| r.authorization.is_none()), "{:?}", store.requests());

    // A redirect to the new name of a repository stays on the host, so the token is sent.
    let cache = Cache::new();
    let server = Server::start(&files(), |r, _| {
        let rest = r.path.strip_prefix("owner/former/")?;
        Some(Fault::Moved(format!("/owner/tiny/{rest}")))
    });
    let path = repo_file_with("owner/former", RepoKind::Model, WEIGHTS, None, &cache.hub(&server.endpoint()));
    assert_eq!(std::fs::read(path.unwrap()).unwrap(), weights());
    assert!(server.requests().iter().all(|r| r.authorization.is_some()));
}

#[test]
fn what_fails_behind_a_redirect_is_not_cached_and_is_asked_again() {
    // `hf-hub` fetches redirected files itself: only its length tells the text of a 503 from the file.
    for (fault, reason) in [
        (Fault::Status(503), "expected 1000 bytes, got 7"),
        (Fault::Body(weights()[..999].to_vec()), "expected 1000 bytes, got 999"),
        (Fault::Cut(500), "broke off"),
    ] {
        let cache = Cache::new();
        let broken = fault.clone();
        let (hub, store) = elsewhere(move |r, before| (r.is_get() && before == 0).then(|| broken.clone()));
        let message = hub_error(fetch(&cache.hub(&hub.endpoint())));
        assert!(message.contains(reason) && !message.contains("signed"), "{message}");
        assert_absent(&cache, &hub);
        drop((hub, store));
        let broken = fault.clone();
        let (hub, store) = elsewhere(move |r, before| (r.is_get() && before == 0).then(|| broken.clone()));
        fetch_whole(&with(cache.hub(&hub.endpoint()), |hub| hub.retries = 1));
        assert_eq!(store.downloads("signed"), 2);
    }
}

#[test]
fn a_store_that_describes_nothing_is_fetched_from_all_the_same() {
    // The signature of the store's address is valid for GET only.
    let cache = Cache::new();
    let (hub, store) = elsewhere(|r, _| (!r.is_get()).then_some(Fault::Status(403)));
    fetch_whole(&cache.hub(&hub.endpoint()));
    assert_eq!(store.downloads("signed"), 1);
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    for (header, value) in
        [("ETag", "\"../../../outside\""), ("X-Repo-Commit", "../../../outside"), ("ETag", "\"/outside\"")]
    {
        let cache = Cache::new();
        let server = Server::start(&files(), move |_, _| Some(Fault::Header(header, value)));
        let message = hub_error(fetch(&cache.hub(&server.endpoint())));
        assert!(message.contains("the hub's") && message.contains("outside"), "{message}");
        assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
        assert_eq!(server.downloads(WEIGHTS), 0);
    }
}

#[test]
fn a_revision_is_held_to_for_all_files_and_a_commit_needs_no_network() -> Result<()> {
    let cache = Cache::new();
    let server = Server::good(&[
        ("owner/tiny/config.json", b"new".to_vec()),
        ("owner/tiny/model.safetensors", tensors("a", 2.0)),
        ("v1:owner/tiny/config.json", b"old".to_vec()),
        ("v1:owner/tiny/model.safetensors", tensors("a", 1.0)),
    ]);
    let hub = cache.hub(&server.endpoint());
    for (revision, commit, config, value) in [
        (None, COMMIT, "new", 2.0),
        (Some("v1"), OLD_COMMIT, "old", 1.0),
        (Some(OLD_COMMIT), OLD_COMMIT, "old", 1.0),
    ] {
        let before = server.requests().len();
        let files = ModelFiles::locate_repo("owner/tiny", revision, &hub)?;
        let snapshot = cache.path().join("models--owner--tiny/snapshots").join(commit);
        assert_eq!(files.config_path(), snapshot.join(CONFIG));
        assert_eq!(std::fs::read_to_string(files.config_path()).unwrap(), config);
        assert_eq!(files.weights(), [snapshot.join(WEIGHTS)]);
        let vb = files.var_builder(DType::F32, &Device::Cpu)?;
        assert_eq!(vb.get(2, "a")?.to_vec1::<f32>()?, [value, value]);
        // At a known commit, neither its files nor the missing tokenizer are requested again.
        assert_eq!(server.requests().len() == before, revision == Some(OLD_COMMIT));
    }
    Ok(())
}

#[test]
fn a_branch_is_asked_for_anew_but_fetched_only_if_it_has_changed() {
    let cache = Cache::new();
    let server = Server::good(&files());
    let hub = cache.hub(&server.endpoint());
    fetch_whole(&hub);
    assert_eq!(server.downloads(WEIGHTS), 1);
    let before = server.requests().len();
    fetch_whole(&hub);
    // One request for its metadata; the existing link is kept.
    assert_eq!(server.requests().len(), before + 1);
    assert_eq!(server.downloads(WEIGHTS), 1);
    drop(server);
    let changed = [
        ("owner/tiny/model.safetensors", b"changed".to_vec()),
        ("v1:owner/tiny/model.safetensors", b"changed".to_vec()),
    ];
    let server = Server::start(&changed, |_, _| Some(Fault::Header("X-Repo-Commit", OLD_COMMIT)));
    let hub = cache.hub(&server.endpoint());
    assert_eq!(std::fs::read(fetch(&hub).unwrap()).unwrap(), b"changed");
    let hub = offline(hub);
    assert_eq!(std::fs::read(fetch(&hub).unwrap()).unwrap(), b"changed");
}

#[test]
fn while_the_hub_is_out_of_reach_the_cache_serves() {
    let cache = Cache::new();
    fetch_whole(&cache.hub(&Server::good(&files()).endpoint()));
    for fault in [Fault::Status(503), Fault::RetryAfter("7"), Fault::Silent] {
        let out = fault.clone();
        let server = Server::start(&files(), move |_, _| Some(out.clone()));
        fetch_whole(&with(cache.hub(&server.endpoint()), |hub| hub.patience = Duration::from_millis(200)));
        assert_eq!(server.requests().len(), 1, "{fault:?}");
    }
    // A refusal, in contrast, is an error.
    let server = Server::start(&files(), |_, _| Some(Fault::Status(401)));
    assert!(hub_error(fetch(&cache.hub(&server.endpoint()))).contains("401"));
}
