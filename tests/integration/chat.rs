//! Conversations with the bundled stories260K: a run of the example `llama`, and the template in a GGUF file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use monteclora::data::chat::{self, ChatTemplate};
use monteclora::models::gguf::{Gguf, GgufKind};
use monteclora::models::hub::ModelFiles;
use monteclora::models::save::save_gguf;
use serde_json::{json, Value};

use crate::support::programs::example;
use crate::support::{asset, Outcome};

/// The model's end token is no special token of the text: `</s>` and `<s>` are.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}
{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}
{% elif m.role == 'user' %}{{ m.content }}
{% else %}{{ raise_exception('Only user and assistant') }}{% endif %}
{% endfor %}";

/// A folder with a copy of the bundled model, and 40 conversations of two answers.
struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new() -> Outcome<Self> {
        let home = Self { dir: tempfile::tempdir()? };
        fs::create_dir(home.model())?;
        for entry in fs::read_dir(asset("stories260k"))? {
            let path = entry?.path();
            fs::copy(&path, home.model().join(path.file_name().ok_or("a name")?))?;
        }
        let turn = |role: &str, text: &str| json!({"role": role, "content": text});
        let chat = json!({"messages": [turn("user", "Who are you ?"), turn("assistant", "A little dog ."),
            turn("user", "Who is he ?"), turn("assistant", "He is a big cat .")]});
        fs::write(home.at("chats.jsonl"), format!("{chat}\n").repeat(40))?;
        Ok(home)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn model(&self) -> PathBuf {
        self.at("model")
    }

    fn files(&self) -> Outcome<ModelFiles> {
        Ok(ModelFiles::locate(&self.model().display().to_string(), None)?)
    }

    fn run(&self, llama: &Path, options: &[&str]) -> Outcome<Output> {
        let mut command = Command::new(llama);
        command.arg("--model").arg(self.model()).arg("--data").arg(self.at("chats.jsonl"));
        command.args(["--format", "chat", "--method", "lora", "--rank", "2", "--max-new-tokens", "4"]);
        Ok(command.args(options).env("RAYON_NUM_THREADS", "1").output()?)
    }
}

/// The standard output and error of a run.
fn told(output: &Output) -> Outcome<(String, String)> {
    Ok((String::from_utf8(output.stdout.clone())?, String::from_utf8(output.stderr.clone())?))
}

#[test]
fn a_language_model_learns_what_the_assistant_says_in_conversations() -> Outcome {
    let home = Home::new()?;
    let llama = example("llama")?;
    let (template, out) = (home.at("template.jinja"), home.at("out"));
    let (template, out) = (template.to_str().ok_or("a path")?, out.to_str().ok_or("a path")?);
    let without = home.run(&llama, &["--epochs", "0"])?;
    let (_, error) = told(&without)?;
    assert!(!without.status.success(), "{error}");
    assert!(error.contains("model: it has no chat template: give one (--chat-template FILE)"), "{error}");

    fs::write(template, TEMPLATE)?;
    let trained =
        home.run(&llama, &["--chat-template", template, "--epochs", "2", "--lr", "1e-2", "--output", out])?;
    let (text, error) = told(&trained)?;
    assert!(trained.status.success(), "{error}");
    assert!(text.contains(&format!("template: {template}\n38 training rows, 2 held out")), "{text}");
    let sample = "<s>Who are you ?\nA little dog .</s>\nWho is he ?\n[";
    assert_eq!(text.matches(sample).count(), 2, "{text}"); // before and after
    let metrics: Value = serde_json::from_slice(&fs::read(home.at("out").join("metrics.json"))?)?;
    let loss = |key: &str| metrics[key].as_f64().ok_or("a loss");
    assert!(loss("loss_mean")? < loss("loss_before")?, "{metrics}");

    // A prompt is what a user says.
    let asked = ["--chat-template", template, "--epochs", "0", "--prompt", "Who ?"];
    let (text, error) = told(&home.run(&llama, &asked)?)?;
    assert!(text.contains("before: <s>Who ?\n["), "{text}{error}");

    let row = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}"#;
    fs::write(home.at("chats.jsonl"), row)?;
    let (_, error) = told(&home.run(&llama, &asked)?)?;
    assert!(
        error.contains("chats.jsonl, line 1: the chat template refuses it: Only user and assistant"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_file_in_gguf_has_the_template_that_is_named_default_and_gives_it_back() -> Outcome {
    let home = Home::new()?;
    let path = home.model().join("tokenizer_config.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&path)?)?;
    settings["chat_template"] =
        json!([{"name": "rag", "template": "rag"}, {"name": "default", "template": TEMPLATE}]);
    fs::write(&path, settings.to_string())?;
    let (files, gguf) = (home.files()?, home.at("model.gguf"));
    save_gguf(&files, &gguf, GgufKind::F16)?;
    let written = Gguf::open(&gguf)?;
    assert_eq!(written.value("tokenizer.chat_template").and_then(|text| text.as_str()), Some(TEMPLATE));
    let read = ModelFiles::locate(&gguf.display().to_string(), None)?;
    for files in [files, read] {
        assert_eq!(ChatTemplate::of_model(&files)?.prompt("Who ?")?, "<s>Who ?\n");
    }
    Ok(())
}

#[test]
fn conversations_are_the_texts_that_transformers_renders() -> Outcome {
    // tests/data/make_chat_golden.py
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat_golden.json");
    let golden: Value = serde_json::from_slice(&fs::read(path)?)?;
    let tokens: Vec<(&str, &str)> = ["bos_token", "eos_token"]
        .into_iter()
        .filter_map(|name| Some((name, golden["tokens"][name].as_str()?)))
        .collect();
    let cases = golden["cases"].as_array().ok_or("cases")?;
    let mut split = 0;
    for case in cases {
        let text = |name: &str| case[name].as_str().ok_or("a text");
        let (name, whole, prompt) = (text("name")?, text("text")?, text("prompt")?);
        let template = ChatTemplate::parse(text("template")?, Path::new(name), &tokens)?;
        let read = chat::read_from(text("row")?.as_bytes(), Path::new(name), &template)?;
        split += read.split;
        let row = read.rows.last().ok_or("a row")?;
        assert_eq!(format!("{}{}", row.prompt, row.answer), whole, "{name}");
        // What a server would send, if the whole text begins with it.
        if whole.starts_with(prompt) {
            assert_eq!(row.prompt, prompt, "{name}");
        }
        if let Some(spans) = case["spans"].as_array() {
            let learnt: Vec<Value> =
                row.learnt.iter().flatten().map(|span| json!([span.start, span.end])).collect();
            // Here a turn ends with what the template writes behind it, whose blanks are not learnt.
            let starts = |spans: &[Value]| spans.iter().map(|span| span[0].clone()).collect::<Vec<_>>();
            assert_eq!(starts(&learnt), starts(spans), "{name}");
            for (ours, theirs) in learnt.iter().zip(spans) {
                let [ours, theirs] = [ours, theirs].map(|span| span[1].as_u64().unwrap_or(0) as usize);
                assert_eq!(whole[theirs..ours].trim(), "", "{name}");
            }
        }
    }
    assert_eq!((cases.len(), split), (12, 2)); // those of Qwen 3, which thinks in the last turn alone
    Ok(())
}
