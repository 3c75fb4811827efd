//! The examples `glue` and `llama` on the command line: help, options without effect, closed or full outputs, logs.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::{json, Value};

use crate::support::programs::{example, glue, sst2};
use crate::support::{asset, skipped, Outcome};

/// The example and a small task.
struct Home {
    dir: tempfile::TempDir,
    glue: PathBuf,
}

impl Home {
    fn new() -> Outcome<Self> {
        let dir = tempfile::tempdir()?;
        sst2(dir.path(), 8, 4)?;
        Ok(Self { dir, glue: glue()? })
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The command of a run into the folder `out`.
    fn command(&self, out: &str, options: &str) -> Command {
        let mut command = Command::new(&self.glue);
        command.arg("--data").arg(self.dir.path()).args(["--batch-size", "4", "--output"]).arg(self.out(out));
        command.args(options.split_whitespace()).env("RAYON_NUM_THREADS", "1");
        if !options.contains("--epochs") {
            command.args(["--epochs", "1"]);
        }
        command
    }

    fn run(&self, out: &str, options: &str) -> Outcome<String> {
        said(self.command(out, options).output()?)
    }
}

/// The standard error of a run, which must have succeeded.
fn said(output: Output) -> Outcome<String> {
    let text = String::from_utf8(output.stderr)?;
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{}: {text}", output.status).into())
    }
}

/// The write end of a pipe without a reader.
fn closed() -> Outcome<std::io::PipeWriter> {
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    Ok(writer)
}

#[test]
fn a_run_goes_on_where_nobody_reads_what_it_says() -> Outcome {
    let home = Home::new()?;
    let options = "--method lora --rank 2";
    let mut command = home.command("closed", options);
    // A closed pipe is not reported.
    let text = said(command.stdout(closed()?).output()?)?;
    assert!(!text.contains("panicked") && !text.contains("standard output"), "{text}");
    let status = home.command("both", options).stdout(closed()?).stderr(closed()?).status()?;
    assert!(status.success(), "{status}");
    for out in ["closed", "both"] {
        assert!(home.out(out).join("metrics.json").exists(), "{out}");
    }
    match File::options().write(true).open("/dev/full") {
        Ok(full) => {
            let text = said(home.command("full", options).stdout(full).stderr(Stdio::piped()).output()?)?;
            assert_eq!(text.matches("standard output cannot be written").count(), 1, "{text}");
            assert!(home.out("full").join("metrics.json").exists());
        }
        Err(error) => skipped(&format!("/dev/full: {error}")),
    }
    Ok(())
}

#[test]
fn help_begins_with_what_the_program_does_and_ends_with_examples() -> Outcome {
    let glue = glue()?;
    let of = |argument: &str| -> Outcome<String> {
        Ok(String::from_utf8(Command::new(&glue).arg(argument).output()?.stdout)?)
    };
    for help in [of("-h")?, of("--help")?] {
        assert!(help.starts_with("Fine-tunes an encoder or a decoder on a GLUE or SuperGLUE task"), "{help}");
        let headings = ["Model and data:", "Method:", "Training:", "Evaluation and output:", "Examples:"];
        for heading in headings {
            assert!(help.contains(&format!("\n{heading}\n")), "{heading}: {help}");
        }
        assert!(help.contains("constant, linear") && help.contains("3e-4"), "{help}");
    }
    assert_eq!(of("--version")?, format!("glue {}\n", env!("CARGO_PKG_VERSION")));
    Ok(())
}

#[test]
fn options_and_patterns_that_change_nothing_are_told() -> Outcome {
    let home = Home::new()?;
    let unread =
        "--method lora --rank 2 --posterior-samples 5 --preset peft --virtual-tokens 3 --ivon --clip 1";
    let text = home.run("lora", unread)?;
    for option in ["posterior-samples", "preset", "virtual-tokens", "clip"] {
        assert_eq!(text.matches(&format!("warning: --{option} has no effect: ")).count(), 1, "{text}");
    }
    assert!(!text.contains("--rank has no effect"), "{text}");

    // An adapter with patterns for layers that it does not have.
    let adapter = home.out("lora").join("adapter");
    let path = adapter.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["rank_pattern"] = json!({"nosuch.layer": 2});
    config["alpha_pattern"] = json!({"kuery": 3});
    fs::write(&path, config.to_string())?;
    let text = home.run("more", &format!("--rank 4 --adapter {}", adapter.display()))?;
    for told in
        ["rank_pattern: \"nosuch.layer\" matches no layer", "alpha_pattern: \"kuery\" matches no layer"]
    {
        assert_eq!(text.matches(told).count(), 1, "{text}");
    }
    assert!(text.contains("warning: --rank has no effect: its value comes from --adapter"), "{text}");

    let text = home.run("layers", "--method lora --layers 99").unwrap_err().to_string();
    assert!(text.contains("layer 99") && text.contains("4 layers with targets, 0 to 3"), "{text}");
    Ok(())
}

#[test]
fn a_run_of_no_epoch_measures_and_replaces_nothing() -> Outcome {
    let home = Home::new()?;
    let text = home.run("run", "--method lora --rank 2 --max-length 8")?;
    let told = text.lines().find(|line| line.starts_with("--max-length 8: ")).ok_or(text.clone())?;
    assert!(told.ends_with("training rows have this length or were truncated to it"), "{text}");
    let adapter = home.out("run").join("adapter");
    let trained = fs::read(adapter.join("adapter_model.safetensors"))?;
    // A refused run leaves the file that describes the input of the earlier run's model.
    let input = || fs::read_to_string(home.out("run").join("input.json"));
    let before = input()?;
    let error = home.run("run", "--method lora --rank 2 --max-length 16").unwrap_err().to_string();
    assert!(error.contains("resume it, or give another folder"), "{error}");
    assert_eq!(input()?, before);
    for options in ["--method lora --rank 2 --epochs 0", "--method lora --rank 2 --epochs 0 --resume"] {
        let error = home.run("run", options).unwrap_err().to_string();
        assert!(error.contains("--epochs 0 only measures, but this folder holds a trained run"), "{error}");
    }
    assert_eq!(fs::read(adapter.join("adapter_model.safetensors"))?, trained);

    home.run("fresh", "--method lora --rank 2 --epochs 0")?;
    assert!(home.out("fresh").join("metrics.json").exists() && !home.out("fresh").join("adapter").exists());
    // An adapter that the run was given is written, also if its folder is that of the run.
    for (out, given) in [("given", adapter), ("of-run", home.out("run"))] {
        home.run(out, &format!("--epochs 0 --adapter {}", given.display()))?;
        assert!(home.out(out).join("adapter/adapter_model.safetensors").exists());
    }
    let error = home.run("run", &format!("--adapter {}", home.out("run").display())).unwrap_err().to_string();
    assert!(error.contains("would overwrite the folder that it starts from"), "{error}");
    Ok(())
}

#[test]
fn a_run_logs_steps_evaluations_and_events_and_a_resumed_one_goes_on() -> Outcome {
    let home = Home::new()?;
    let options = "--method lora --rank 2 --eval-every 1 --tensorboard";
    home.run("run", options)?;
    let out = home.out("run");
    let lines = |name: &str| -> Outcome<Vec<Value>> {
        let text = fs::read_to_string(out.join(name))?;
        Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?)
    };
    let steps = |lines: &[Value]| lines.iter().map(|line| line["step"].as_u64()).collect::<Vec<_>>();
    assert_eq!(steps(&lines("log.jsonl")?), [Some(1), Some(2)]);
    let evaluations = lines("evaluations.jsonl")?;
    assert_eq!(steps(&evaluations), [Some(1), Some(2)]);
    assert!(evaluations.iter().all(|line| line["dev/accuracy"].is_f64() && line["dev/nll"].is_f64()));
    let events = || -> Outcome<usize> { Ok(fs::read_dir(out.join("tensorboard"))?.count()) };
    assert_eq!(events()?, 1);
    assert_eq!(out.join("plots/loss.svg").exists(), cfg!(feature = "plot"));

    home.run("run", &format!("{options} --resume --allow-change epochs --epochs 2"))?;
    assert_eq!(steps(&lines("evaluations.jsonl")?), (1..=4).map(Some).collect::<Vec<_>>());
    assert_eq!(events()?, 2);
    Ok(())
}

#[test]
fn f1_is_of_the_class_that_is_named() -> Outcome {
    let home = Home::new()?;
    let f1 = |out: &str, more: &str| -> Outcome<(String, Value)> {
        let said = home.run(out, &format!("--method lora --rank 2 --metric f1 {more}"))?;
        Ok((said, serde_json::from_slice(&fs::read(home.out(out).join("metrics.json"))?)?))
    };
    let (said, plain) = f1("plain", "")?;
    assert!(said.contains("lora: f1 is measured of the class positive (--positive-class)"), "{said}");
    let (said, other) = f1("other", "--positive-class Negative")?;
    assert!(said.contains("lora: f1 is measured of the class negative (--positive-class)"), "{said}");
    // One class alone of two has the mean of both only by accident.
    let of = |metrics: &Value| metrics["mean"]["f1"].as_f64().ok_or("no f1");
    let both = (of(&plain)? + of(&other)?) / 2.0;
    assert!(
        (plain["mean"]["macro_f1"].as_f64().ok_or("no macro F1")? - both).abs() < 1e-12,
        "{plain} {other}"
    );
    let error = f1("none", "--positive-class maybe").unwrap_err().to_string();
    assert!(error.contains("got maybe of negative, positive"), "{error}");
    // The score that picks the best step is another one.
    let resume = "--resume --allow-change metric,epochs --epochs 2 --positive-class negative";
    let (said, _) = f1("plain", resume)?;
    assert!(said.contains("scores from before the change of metric do not compare"), "{said}");
    Ok(())
}

#[test]
fn a_prediction_reads_texts_to_the_length_of_the_run_or_else_of_the_model() -> Outcome {
    let home = Home::new()?;
    let model = asset("stories260k");
    home.run("run", &format!("--method lora --rank 2 --max-length 8 --model {}", model.display()))?;
    let adapter = home.out("alone");
    fs::create_dir(&adapter)?;
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(home.out("run").join("adapter").join(file), adapter.join(file))?;
    }
    // Two texts that differ only far behind their first 128 tokens.
    let rows = home.out("rows.csv");
    let long = "once upon a time there was a little girl ".repeat(20);
    fs::write(&rows, format!("text\n{long}who sang\n{long}and a dog\n"))?;
    let predict = |options: &str| -> Outcome<(Vec<String>, String)> {
        let mut command = Command::new(&home.glue);
        command.arg("--predict").arg(&rows).args(options.split_whitespace()).env("RAYON_NUM_THREADS", "1");
        let output = command.output()?;
        let table = String::from_utf8(output.stdout.clone())?;
        let rows = table.lines().skip(1).filter_map(|line| line.split_once(','));
        Ok((rows.map(|(_, row)| row.to_string()).collect(), said(output)?))
    };
    let (rows, told) = predict(&format!("--adapter {}", adapter.display()))?;
    assert_eq!(rows.len(), 2);
    assert_ne!(rows[0], rows[1]);
    assert!(!told.contains("--max-length"), "{told}");
    // One at a time gives the same, up to rounding.
    let number = |row: &str| row.split(',').nth(1).and_then(|p| p.parse::<f64>().ok()).ok_or("a probability");
    let (alone, _) = predict(&format!("--adapter {} --eval-batch-size 1", adapter.display()))?;
    assert!((number(&alone[0])? - number(&rows[0])?).abs() < 1e-5, "{alone:?} {rows:?}");
    for options in [
        format!("--adapter {} --max-length 128", adapter.display()),
        format!("--adapter {}", home.out("run").display()),
    ] {
        let (rows, told) = predict(&options)?;
        assert_eq!(rows[0], rows[1], "{options}");
        assert!(told.contains("2 of 2 predicted rows have this length or were truncated to it"), "{told}");
    }
    Ok(())
}

#[test]
fn a_run_leaves_a_posterior_with_which_others_predict_in_the_linearised_model() -> Outcome {
    let home = Home::new()?;
    home.run("run", "--method monteclora --rank 2 --linearised --posterior-samples 2")?;
    let metrics: Value = serde_json::from_slice(&fs::read(home.out("run").join("metrics.json"))?)?;
    for part in ["mean", "posterior", "linearised"] {
        assert!(metrics[part]["nll"].as_f64().is_some_and(|nll| nll > 0.0), "{part}: {metrics}");
    }
    let lines = fs::read_to_string(home.out("run").join("predictions.jsonl"))?;
    let rows: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let predict = |options: &str| -> Outcome<Output> {
        let mut command = Command::new(&home.glue);
        let run = home.out("run");
        command.arg("--predict").arg(home.dir.path().join("dev.tsv")).arg("--adapter").arg(run);
        Ok(command.args(["--text-column", "sentence"]).args(options.split_whitespace()).output()?)
    };
    let output = predict("--linearised")?;
    let table = String::from_utf8(output.stdout.clone())?;
    said(output)?;
    assert!(table.starts_with("row,label,p_negative,p_positive,entropy,mutual_information\n"), "{table}");
    for (row, line) in rows.iter().zip(table.lines().skip(1)) {
        let p: f64 = line.split(',').nth(2).ok_or("a probability")?.parse()?;
        assert!((row["linearised"][0].as_f64().ok_or("a probability")? - p).abs() < 1e-5, "{row} {line}");
    }
    // A run without the option leaves none, also in the same folder.
    fs::remove_dir_all(home.out("run").join("checkpoints"))?;
    home.run("run", "--method monteclora --rank 2")?;
    let error = said(predict("--linearised")?).unwrap_err().to_string();
    assert!(error.contains("linearised.json"), "{error}");
    let text = home.run("full", "--method full --linearised")?;
    assert!(text.contains("warning: --linearised has no effect"), "{text}");
    Ok(())
}

#[test]
fn a_language_model_trains_on_plain_texts_whether_or_not_a_sample_has_a_first_token() -> Outcome {
    let home = Home::new()?;
    let (llama, model, texts) = (example("llama")?, home.out("model"), home.out("texts.txt"));
    fs::create_dir(&model)?;
    for entry in fs::read_dir(asset("stories260k"))? {
        let path = entry?.path();
        fs::copy(&path, model.join(path.file_name().ok_or("a name")?))?;
    }
    // Like the tokenizers of Qwen and SmolLM, it adds no token of its own.
    let tokenizer = model.join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&tokenizer)?)?;
    json["post_processor"] = Value::Null;
    fs::write(&tokenizer, json.to_string())?;
    fs::write(&texts, "Once upon a time there was a little dog .\n".repeat(20))?;
    let run = |out: &str, options: &str| {
        let mut command = Command::new(&llama);
        command.arg("--model").arg(&model).arg("--data").arg(&texts).arg("--output").arg(home.out(out));
        command.args(["--format", "text", "--epochs", "1", "--max-length", "32", "--max-new-tokens", "4"]);
        command.args(options.split_whitespace()).env("RAYON_NUM_THREADS", "1").output()
    };
    let output = run("lora", "--method lora --rank 2")?;
    let told = String::from_utf8(output.stdout.clone())?;
    said(output)?;
    assert_eq!(told.matches("Once upon a time there[").count(), 2, "{told}"); // before and after
                                                                              // A sample that cannot be made is no reason to end a run.
    let mut empty = Command::new(&llama);
    empty.arg("--model").arg(&model).arg("--data").arg(&texts).args(["--prompt", "", "--epochs", "0"]);
    let told = said(empty.args(["--format", "text", "--method", "lora"]).output()?)?;
    assert!(told.contains("there is no sample: "), "{told}");
    // Half a width cannot be trained whole.
    let error = said(run("full", "--method full --dtype bf16")?).unwrap_err().to_string();
    assert!(error.contains("full fine-tuning trains the base in f32, got bf16"), "{error}");
    Ok(())
}
