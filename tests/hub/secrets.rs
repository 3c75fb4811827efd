//! Tests that the token is sent only where it belongs and is shown nowhere. In addition, every test with a
//! [`Cache`] checks that no event or file contains the token.

use std::process::Command;

use monteclora::models::hub::ModelFiles;
use monteclora::Result;

use super::fixture::{hub_error, model, with, with_token, Cache, TOKEN};
use super::server::Server;

#[test]
fn the_checks_of_events_and_files_see_what_they_look_for() -> Result<()> {
    let cache = Cache::new();
    let server = Server::good(&model());
    let before = Cache::events();
    let files = ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint()))?;
    assert!(Cache::events() > before);
    let shown = format!("{files:?} {files:#?}");
    assert!(shown.contains("owner/tiny") && shown.contains("<token>") && !shown.contains(TOKEN), "{shown}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    std::fs::write(dir.path().join("sub/clean"), "hf_").unwrap();
    assert!(with_token(dir.path()).is_empty());
    let inside = dir.path().join("sub/inside");
    std::fs::write(&inside, format!("Bearer {TOKEN}\n")).unwrap();
    assert_eq!(with_token(dir.path()), [inside]);
    Ok(())
}

#[test]
fn a_token_that_cannot_be_sent_is_refused_without_showing_it() {
    let cache = Cache::new();
    let server = Server::good(&model());
    for token in [format!("{TOKEN}\nsecond"), format!("{TOKEN} "), format!("{TOKEN}é")] {
        let hub = with(cache.hub(&server.endpoint()), |hub| hub.token = Some(token));
        let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &hub));
        assert!(message.contains("HF_TOKEN"), "{message}");
    }
    assert!(server.requests().is_empty());
}

/// `hf-hub` itself reads the environment if it is given no token.
#[test]
fn without_a_token_none_is_sent_even_if_the_environment_has_one() {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "secrets::sends_no_token"])
        .env("HF_TOKEN", TOKEN)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && text.contains("1 passed"), "{text}");
}

/// Also run by the test above, in a process with a token in its environment.
#[test]
fn sends_no_token() {
    let cache = Cache::new();
    let server = Server::good(&model());
    let hub = with(cache.hub(&server.endpoint()), |hub| hub.token = None);
    ModelFiles::locate_repo("owner/tiny", None, &hub).unwrap();
    assert!(!server.requests().is_empty());
    assert!(server.requests().iter().all(|request| request.authorization.is_none()));
}
