//! The rows of a run: their format, those to train on, and those held out.

use std::path::{Path, PathBuf};

use monteclora::data::causal::{pack, PromptEncoder, Tokens};
use monteclora::data::instruct::{Format, Prompted};
use monteclora::data::split::{at, stratified, Subset};
use monteclora::models::decoder::DecoderConfig;
use monteclora::train::RunFolder;
use monteclora::util::files;
use monteclora::Noise;
use serde::{Deserialize, Serialize};

use super::row_format::{FormatOptions, RowFormat};
use super::Args;
use crate::common::given::Given;
use crate::common::output::tell;
use crate::common::{asset, Outcome};

/// How a run read its rows, so that what goes on from it puts its own in the same form.
#[derive(Serialize, Deserialize)]
pub struct Input {
    format: String,
    /// The run's own chat template, a file in its folder.
    chat_template: Option<PathBuf>,
}

impl Input {
    /// Writes how a run reads its rows into its folder: the format and, if it is one of the run's own, the text of
    /// the chat template.
    pub fn write(format: &str, template: Option<&str>, dir: &Path) -> monteclora::Result<()> {
        let name = "chat_template.jinja";
        let written = template.map(|text| files::write(&dir.join(name), text.as_bytes())).transpose()?;
        let chat_template = written.map(|()| name.into());
        RunFolder::new(dir).save_input(&Self { format: format.to_string(), chat_template })
    }

    /// The given format and chat template, and where they are not given, those of the run that wrote the adapter.
    pub fn complete(
        options: &FormatOptions,
        adapter: Option<&Path>,
        given: &Given,
    ) -> Outcome<FormatOptions> {
        let mut options = options.clone();
        let run = adapter.map(RunFolder::find_input::<Self>).transpose()?.flatten();
        if let Some((dir, input)) = run {
            if !given.has("format") {
                options.format = input.format.clone();
            }
            let of_run = input.chat_template.filter(|_| options.format == input.format);
            options.chat_template = options.chat_template.or(of_run.map(|name| dir.join(name)));
        }
        Ok(options)
    }
}

/// The rows of a run; the held-out ones also as texts.
pub struct Data {
    pub train: Vec<Tokens>,
    pub held_out: Vec<Tokens>,
    pub held_out_texts: Vec<Prompted>,
    pub prompt: String,
    /// The tokens that end a generated text.
    pub stop: Vec<u32>,
}

impl Data {
    /// Reads, encodes and splits the data.
    pub fn read(
        args: &Args,
        format: &RowFormat,
        config: &DecoderConfig,
        encoder: &PromptEncoder,
    ) -> Outcome<Self> {
        tell!("template: {}", format.template());
        let (mut rows, held_out) = match (&args.data, &args.held_out) {
            (Some(path), Some(held_out)) => (format.read(path)?, format.read(held_out)?),
            (Some(path), None) => format.read_parted(path)?,
            (None, held_out) => {
                let is_gsm8k = matches!(format, RowFormat::Plain(Format::Gsm8k));
                if args.train.epochs > 0 && (held_out.is_some() || !is_gsm8k) {
                    return Err("the bundled rows are those of GSM8K: give --data".into());
                }
                let (dir, bundled) = (PathBuf::from(asset("gsm8k")?), RowFormat::Plain(Format::Gsm8k));
                let held_out = held_out.as_ref().map(|path| format.read(path)).transpose()?;
                let held_out = held_out.map_or_else(|| bundled.read(&dir.join("test.jsonl")), Ok)?;
                (bundled.read(&dir.join("train.jsonl"))?, held_out)
            }
        };
        rows.truncate(args.train.limit(&rows).len());
        if held_out.is_empty() {
            return Err("--data: too few rows to hold some out; give --held-out".into());
        }
        let held_out = match args.limit_held_out {
            Some(count) => {
                at(&held_out, &stratified(&vec![0; held_out.len()], count, Noise::new(0), Subset::Measured))
            }
            None => held_out,
        };
        let (train, encoded) = (encoder.encode(&rows)?, encoder.encode(&held_out)?);
        for (name, rows) in [("training", &train), ("held-out", &encoded)] {
            if rows.rows.is_empty() && rows.dropped > 0 {
                let lost = format!("leaves no room for an answer in any of the {} {name} rows", rows.dropped);
                return Err(format!("--max-length {}: {lost}: give a larger one", args.max_length).into());
            }
            if rows.cut + rows.dropped > 0 {
                let lost = format!("{} {name} rows were truncated, {} were left out", rows.cut, rows.dropped);
                tell!("--max-length {}: {lost}", args.max_length);
            }
        }
        let fits = || {
            encoded.rows.first().map_or_else(String::new, |tokens| held_out[tokens.row].opening().to_string())
        };
        let prompt =
            args.prompt.as_ref().map(|prompt| format.prompt(prompt)).transpose()?.unwrap_or_else(fits);
        let turn_ends = train.ends.iter().filter(|end| !config.eos_token_ids.contains(end));
        let stop = config.eos_token_ids.iter().chain(turn_ends).copied().collect();
        let train = if args.packing { pack(&train.rows, args.max_length) } else { train.rows };
        Ok(Self { train, held_out: encoded.rows, held_out_texts: held_out, prompt, stop })
    }
}
