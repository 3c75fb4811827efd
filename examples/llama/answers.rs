//! Answers of a trained model to the prompts of a file.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::Device;
use indicatif::ProgressBar;
use monteclora::data::chat;
use monteclora::eval::Generator;
use monteclora::models::generate::PosteriorWeights;
use monteclora::train::LanguageModel;
use monteclora::Error;
use serde_json::json;

use super::row_format::RowFormat;
use super::Args;
use crate::common::given::Given;
use crate::common::output::{self, tell_err};
use crate::common::{self, download, interrupt, Outcome};

/// The options that answers depend on.
const READ: &str =
    "model revision adapter predict format chat_template batch_size max_new_tokens temperature top_k \
    top_p repetition_penalty stop posterior_samples seed device dtype quantize output";

/// Answers the prompts in the file `rows`.
pub fn answer(args: &Args, rows: &Path, given: &Given, devices: &[Device]) -> Outcome {
    given.reads_only::<Args>(READ, "with --predict nothing is trained");
    args.format.tell_unread(given);
    let mut language = open(args, devices)?;
    args.generation.tell_asked(language.files())?;
    let format = args.format.row_format(language.files())?;
    let prompts = format.read_prompts(rows)?;
    let mut ends = Vec::new();
    if let RowFormat::Chat(template) = &format {
        ends = chat::turn_ends(template, &language.encoder)?;
        language.encoder = language.encoder.of_rendered();
    }
    let weights = match args.posterior_samples {
        draws if draws == 0 || !given.has("posterior_samples") => PosteriorWeights::Mean,
        _ if !language.has_posterior() => {
            return Err("--posterior-samples: what was trained has no posterior to draw from".into())
        }
        draws => PosteriorWeights::Average(draws),
    };
    let config = args.generation.config(args.train.seed, ends, weights, 256)?;
    let generator = Generator { batch_size: args.batch_size, ..Generator::of(&language, config) };

    let all: Vec<&str> = prompts.iter().map(String::as_str).collect();
    // On a terminal, answers that are printed tell the progress themselves.
    let bar = match args.output {
        Some(_) => common::progress(prompts.len() as u64, "answers"),
        None => ProgressBar::hidden(),
    };
    let (mut answered, mut out) = (all.iter(), None);
    generator.each_batch(&all, &args.generation.stops(), &mut |texts| {
        // Not before there is something to write: earlier answers stay until then.
        if let (None, Some(dir)) = (&out, &args.output) {
            out = Some(create(dir, rows)?);
        }
        for (answer, prompt) in texts.into_iter().zip(answered.by_ref()) {
            let line = json!({"prompt": prompt, "answer": answer});
            match &mut out {
                Some((path, file)) => writeln!(file, "{line}").map_err(Error::io(&*path))?,
                None => output::result(&line.to_string())?,
            }
            bar.inc(1);
        }
        interrupt::check(0)
    })?;
    bar.finish_and_clear();
    if let Some((path, _)) = out {
        tell_err!("{}: {} rows", path.display(), prompts.len());
    }
    Ok(())
}

/// Opens what was trained, or a checkpoint as it is.
fn open(args: &Args, devices: &[Device]) -> Outcome<LanguageModel> {
    let dtype = common::dtype(&args.dtype)?;
    let base = download::given_base(args.model.as_deref(), args.revision.as_deref(), args.quantize)?;
    Ok(match (&args.method.adapter, &base) {
        (Some(dir), base) => LanguageModel::open(dir, base.as_ref(), dtype, devices)?,
        (None, Some(files)) => LanguageModel::of_checkpoint(files, dtype, devices)?,
        (None, None) => return Err("--predict: give the trained --adapter, or a --model".into()),
    })
}

/// Creates the file for the answers to `rows`.
fn create(dir: &Path, rows: &Path) -> monteclora::Result<(PathBuf, File)> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    let stem = rows.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let path = dir.join(format!("{stem}.answers.jsonl"));
    let file = File::create(&path).map_err(Error::io(&*path))?;
    Ok((path, file))
}
