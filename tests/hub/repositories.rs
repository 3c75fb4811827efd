//! Tests of the real client against a hub on the loopback interface.

use std::time::Duration;

use candle_core::{DType, Device};
use monteclora::models::hub::{locate_adapter_with, repo_file_with, ModelFiles, RepoKind};
use monteclora::Result;

use super::fixture::{hub_error, model, offline, tensors, with, Cache, CONFIG, TOKEN, TOKENIZER, WEIGHTS};
use super::server::{Fault, Server, COMMIT};

#[test]
fn a_model_is_downloaded_once_and_then_found_without_the_server() -> Result<()> {
    let cache = Cache::new();
    let server = Server::good(&model());
    let hub = cache.hub(&server.endpoint());
    let first = ModelFiles::locate_repo("owner/tiny", None, &hub)?;
    let snapshot = cache.path().join("models--owner--tiny/snapshots").join(COMMIT);
    assert_eq!(first.weights(), [snapshot.join(WEIGHTS)]);
    assert_eq!(first.config_path(), snapshot.join(CONFIG));
    assert_eq!(first.tokenizer_path(), Some(snapshot.join(TOKENIZER).as_path()));
    assert_eq!(first.var_builder(DType::F32, &Device::Cpu)?.get(2, "a")?.to_vec1::<f32>()?, [1.5, 1.5]);
    assert!(server.requests().iter().all(|r| r.authorization == Some(format!("Bearer {TOKEN}"))));
    // All files after the first are requested at the commit of the first.
    assert!(server.requests().iter().any(|r| r.path.ends_with(&format!("resolve/{COMMIT}/{WEIGHTS}"))));

    let again = ModelFiles::locate_repo("owner/tiny", None, &hub)?;
    assert_eq!(again.weights(), first.weights());
    assert_eq!(server.downloads(WEIGHTS), 1);
    server.leave();
    assert_eq!(ModelFiles::locate_repo("owner/tiny", None, &hub)?.weights(), first.weights());
    let hub = offline(hub);
    for revision in [None, Some(COMMIT)] {
        assert_eq!(ModelFiles::locate_repo("owner/tiny", revision, &hub)?.weights(), first.weights());
    }
    Ok(())
}

#[test]
fn shards_and_files_of_data_sets_come_by_the_same_way() -> Result<()> {
    let cache = Cache::new();
    let index = r#"{"weight_map": {"a": "w-1.safetensors", "b": "w-2.safetensors"}}"#;
    let mut files = model();
    files.truncate(2);
    files.extend([
        ("owner/tiny/model.safetensors.index.json", index.as_bytes().to_vec()),
        ("owner/tiny/w-1.safetensors", tensors("a", 1.0)),
        ("owner/tiny/w-2.safetensors", tensors("b", 2.0)),
        ("datasets/owner/rows/sub/train-0.parquet", b"PAR1".to_vec()),
    ]);
    let server = Server::good(&files);
    let hub = cache.hub(&server.endpoint());
    let located = ModelFiles::locate_repo("owner/tiny", None, &hub)?;
    assert_eq!(located.weights().len(), 2);
    let rows = repo_file_with("owner/rows", RepoKind::Dataset, "sub/train-0.parquet", None, &hub)?;
    assert_eq!(std::fs::read(&rows).unwrap(), b"PAR1");
    server.leave();
    // The absence of a single file of weights was cached too.
    assert_eq!(ModelFiles::locate_repo("owner/tiny", None, &hub)?.weights(), located.weights());
    assert_eq!(repo_file_with("owner/rows", RepoKind::Dataset, "sub/train-0.parquet", None, &hub)?, rows);
    Ok(())
}

#[test]
fn an_adapter_of_a_repository_is_a_folder_and_no_model() -> Result<()> {
    let cache = Cache::new();
    let config =
        r#"{"peft_type": "LORA", "r": 2, "target_modules": ["q"], "base_model_name_or_path": "owner/base"}"#;
    let files = [
        ("owner/lora/adapter_config.json", config.as_bytes().to_vec()),
        ("owner/lora/adapter_model.safetensors", tensors("base_model.model.q.lora_A.weight", 1.0)),
        ("owner/old/adapter_config.json", config.as_bytes().to_vec()),
        ("owner/old/adapter_model.bin", b"pickle".to_vec()),
    ];
    let server = Server::good(&files);
    let hub = cache.hub(&server.endpoint());
    let dir = locate_adapter_with("owner/lora", None, &hub)?;
    assert_eq!(dir, cache.path().join("models--owner--lora/snapshots").join(COMMIT));
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(dir.join(name).is_file() && server.downloads(name) == 1, "{name}");
    }
    // A folder is taken as it is, and has no revision.
    let path = dir.to_str().unwrap();
    assert_eq!(locate_adapter_with(path, None, &hub)?, dir);
    let error = locate_adapter_with(path, Some("main"), &hub).unwrap_err().to_string();
    assert!(error.starts_with("invalid revision"), "{error}");
    for id in ["owner/lora", path] {
        let error = ModelFiles::locate_with(id, None, &hub).unwrap_err().to_string();
        assert!(error.contains("an adapter, not a model"), "{error}");
    }
    let error = hub_error(locate_adapter_with("owner/old", None, &hub));
    assert!(error.contains("adapter_model.bin"), "{error}");
    let error = hub_error(locate_adapter_with("owner/none", None, &hub));
    assert!(error.ends_with("(and there is no such local folder)"), "{error}");
    server.leave();
    assert_eq!(locate_adapter_with("owner/lora", None, &offline(hub))?, dir);
    Ok(())
}

#[test]
fn a_gguf_file_of_a_repository_is_a_model() -> Result<()> {
    let cache = Cache::new();
    // No tensors, and one value: general.architecture = llama.
    let mut head = b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
    head.extend_from_slice(b"\x14\0\0\0\0\0\0\0general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama");
    head.resize(96, 0);
    let files = [("owner/tiny/tiny-q4.gguf", head), ("owner/tiny/other.gguf", b"GGUF".to_vec())];
    let server = Server::good(&files);
    let hub = cache.hub(&server.endpoint());
    let located = ModelFiles::locate_repo("owner/tiny/tiny-q4.gguf", None, &hub)?;
    let place = cache.path().join("models--owner--tiny/snapshots").join(COMMIT).join("tiny-q4.gguf");
    assert_eq!((located.config_path(), located.weights()), (&*place, &[place.clone()][..]));
    assert!(located.gguf().is_some() && located.tokenizer_path().is_none());
    assert_eq!(server.downloads("other.gguf"), 0);
    let error = located.config().unwrap_err().to_string();
    assert!(error.contains("tiny-q4.gguf: there is no tensor token_embd.weight"), "{error}");
    let message = hub_error(ModelFiles::locate_repo("owner/tiny/none.gguf", None, &hub));
    assert!(message.contains("owner/tiny: ") && message.contains("no file none.gguf"), "{message}");
    let truncated = ModelFiles::locate_repo("owner/tiny/other.gguf", None, &hub).unwrap_err().to_string();
    assert!(truncated.contains("other.gguf: the file ends within its header"), "{truncated}");
    Ok(())
}

#[test]
fn what_the_hub_refuses_is_said_without_the_token() {
    for (status, words) in [
        (401, vec!["401", "HF_TOKEN", "licence"]),
        (403, vec!["403", "HF_TOKEN", "licence"]),
        (429, vec!["429", "7 seconds"]),
        (500, vec!["500"]),
    ] {
        let cache = Cache::new();
        let server = Server::start(&model(), move |_, _| match status {
            429 => Some(Fault::RetryAfter("7")),
            _ => Some(Fault::Status(status)),
        });
        let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint())));
        assert!(words.iter().all(|word| message.contains(word)), "{status}: {message}");
        assert!(message.contains("owner/tiny"), "{message}");
    }
}

#[test]
fn a_404_says_what_is_missing() {
    let cache = Cache::new();
    let server = Server::good(&model());
    let hub = cache.hub(&server.endpoint());
    let message = hub_error(ModelFiles::locate_repo("owner/absent", None, &hub));
    assert!(message.contains("owner/absent: the hub has no such repository"), "{message}");
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", Some("v9"), &hub));
    assert!(message.contains("no revision v9"), "{message}");
    let message =
        hub_error(repo_file_with("owner/rows", RepoKind::Dataset, "sub/test-0.parquet", None, &hub));
    assert!(message.contains("no file sub/test-0.parquet"), "{message}");
}

#[test]
fn a_repository_of_pickles_is_refused() {
    let mut files = model();
    files.truncate(2);
    for pickle in ["pytorch_model.bin", "consolidated.00.pth"] {
        let cache = Cache::new();
        let path = format!("owner/tiny/{pickle}");
        let mut files = files.clone();
        files.push((&path, b"\x80\x02".to_vec()));
        let server = Server::good(&files);
        let hub = cache.hub(&server.endpoint());
        let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &hub));
        assert!(message.contains(pickle) && message.contains("run any code"), "{message}");
        assert!(message.contains("safetensors"), "{message}");
        assert_eq!(server.downloads(pickle), 0);
    }
    // If the hub gives no list of files, the error names the missing file.
    let cache = Cache::new();
    let server =
        Server::start(&files, |request, _| request.path.contains("/tree/").then_some(Fault::Status(404)));
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint())));
    assert!(message.contains("no file model.safetensors"), "{message}");

    // If there are safetensors, a pickle is not even requested.
    let cache = Cache::new();
    files.push(("owner/tiny/pytorch_model.bin", b"\x80\x02".to_vec()));
    files.push(("owner/tiny/model.safetensors", tensors("a", 1.5)));
    let server = Server::good(&files);
    ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint())).unwrap();
    assert!(server.requests().iter().all(|request| !request.path.ends_with(".bin")));
}

#[test]
fn without_a_network_or_a_cache_the_error_says_what_to_do() {
    let cache = Cache::new();
    // Nothing listens at port 1.
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &cache.hub("http://127.0.0.1:1")));
    assert!(message.contains("cannot be reached") && message.contains("local folder"), "{message}");
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");

    let server = Server::good(&model());
    let hub = offline(cache.hub(&server.endpoint()));
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &hub));
    assert!(message.contains("not in the cache") && message.contains("HF_HUB_OFFLINE"), "{message}");
    assert!(server.requests().is_empty());
}

#[test]
fn a_silent_server_is_given_up() {
    let cache = Cache::new();
    let server = Server::start(&[], |_, _| Some(Fault::Silent));
    let hub = with(cache.hub(&server.endpoint()), |hub| hub.patience = Duration::from_millis(200));
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &hub));
    assert!(message.contains("no answer for 0.2 seconds"), "{message}");
}

#[test]
fn the_text_of_an_error_is_never_cached_as_the_file() -> Result<()> {
    let cache = Cache::new();
    let server = Server::start(&model(), |request, _| request.is_get().then_some(Fault::Status(503)));
    let message = hub_error(ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint())));
    assert!(message.contains("503"), "{message}");
    drop(server);
    let server = Server::good(&model());
    let files = ModelFiles::locate_repo("owner/tiny", None, &cache.hub(&server.endpoint()))?;
    assert_eq!(std::fs::read_to_string(files.config_path()).unwrap(), r#"{"hidden_size": 4}"#);
    Ok(())
}

#[test]
fn names_that_are_no_repositories_are_never_asked_for() {
    let cache = Cache::new();
    let server = Server::good(&model());
    let hub = cache.hub(&server.endpoint());
    for name in
        ["", "/", "./models/x", "../x", "a/b/c", "owner/..", "owner/", "~/x", "a b", "owner/a?b", "a--b"]
    {
        let message = hub_error(ModelFiles::locate_repo(name, None, &hub));
        assert!(message.contains("no such local folder"), "{name:?}: {message}");
    }
    for revision in ["../x", "/x", ""] {
        let message = hub_error(ModelFiles::locate_repo("owner/tiny", Some(revision), &hub));
        assert!(message.contains("revision"), "{revision:?}: {message}");
    }
    let message = hub_error(repo_file_with("owner/rows", RepoKind::Dataset, "../x.parquet", None, &hub));
    assert!(message.contains("leads outside"), "{message}");
    assert!(server.requests().is_empty());
}

#[test]
fn a_name_that_may_be_a_folder_s_says_that_there_is_none() {
    let cache = Cache::new();
    let hub = offline(cache.hub("http://127.0.0.1:9"));
    let message = hub_error(ModelFiles::locate_with("models/robreta", None, &hub));
    assert!(message.contains("models/robreta") && message.contains("not in the cache"), "{message}");
    assert!(message.ends_with("(and there is no such local folder)"), "{message}");
    let message = hub_error(ModelFiles::locate_with("models/roberta/large", None, &hub));
    assert_eq!(message.matches("no such local folder").count(), 1);
}
