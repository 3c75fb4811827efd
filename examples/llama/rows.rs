//! The rows of a run: their format, those to train on, and those held out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use monteclora::data::causal::{pack, PromptEncoder, Tokens};
use monteclora::data::instruct::{Format, Prompted};
use monteclora::data::split::measured;
use monteclora::models::decoder::DecoderConfig;
use monteclora::train::RunFolder;
use monteclora::util::files;
use serde::{Deserialize, Serialize};

use super::row_format::{FormatOptions, RowFormat};
use super::Args;
use crate::common::given::Given;
use crate::common::output::tell;
use crate::common::{asset, Outcome};

/// How a run read its rows, so that what goes on from it puts its own in the same form.
#[derive(Clone, Serialize, Deserialize)]
pub struct Input {
    format: String,
    /// The run's own chat template, a file in its folder.
    chat_template: Option<PathBuf>,
    /// The text of that template.
    #[serde(skip)]
    template: Option<String>,
}

impl Input {
    /// The file of the run's own chat template.
    const TEMPLATE: &str = "chat_template.jinja";

    /// The input of a run with these options, whose rows have this format.
    pub fn new(options: &FormatOptions, format: &RowFormat) -> Self {
        let template = format.template_text().filter(|_| options.chat_template.is_some());
        let template = template.map(str::to_string);
        let chat_template = template.is_some().then(|| Self::TEMPLATE.into());
        Self { format: options.format.clone(), chat_template, template }
    }

    /// Writes it into the folder of a run.
    pub fn write(&self, dir: &Path) -> monteclora::Result<()> {
        if let Some(text) = &self.template {
            files::write(&dir.join(Self::TEMPLATE), text.as_bytes())?;
        }
        RunFolder::new(dir).save_input(self)
    }

    /// The given format and chat template, and where they are not given, those of the run that wrote the adapter;
    /// and whether the format is from either.
    pub fn complete(
        options: &FormatOptions,
        adapter: Option<&Path>,
        given: &Given,
    ) -> Outcome<(FormatOptions, bool)> {
        let mut options = options.clone();
        let run = adapter.map(RunFolder::find_input::<Self>).transpose()?.flatten();
        let is_known = given.has("format") || run.is_some();
        if let Some((dir, input)) = run {
            if !given.has("format") {
                options.format = input.format.clone();
            }
            let of_run = input.chat_template.filter(|_| options.format == input.format);
            options.chat_template = options.chat_template.or(of_run.map(|name| dir.join(name)));
        }
        Ok((options, is_known))
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
        let is_gsm8k = matches!(format, RowFormat::Plain(Format::Gsm8k));
        let bundled = |name: &str| -> Outcome<Vec<Prompted>> {
            format.read(&PathBuf::from(asset("gsm8k")?).join(name))
        };
        let (mut rows, held_out) = match (&args.data, &args.held_out) {
            (Some(path), Some(held_out)) => (format.read(path)?, format.read(held_out)?),
            (Some(path), None) => format.read_parted(path)?,
            (None, Some(held_out)) if args.train.epochs == 0 => (Vec::new(), format.read(held_out)?),
            (None, _) if !is_gsm8k => return Err("the bundled rows are those of GSM8K: give --data".into()),
            (None, Some(held_out)) => (bundled("train.jsonl")?, format.read(held_out)?),
            (None, None) => (bundled("train.jsonl")?, bundled("test.jsonl")?),
        };
        rows.truncate(args.train.limit(&rows).len());
        if held_out.is_empty() {
            return Err("--data: too few rows to hold some out; give --held-out".into());
        }
        let held_out = measured(held_out, args.limit_held_out, |rows| vec![0; rows.len()]);
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
        let turn_ends: BTreeSet<u32> = train.ends.iter().chain(&encoded.ends).copied().collect();
        let turn_ends = turn_ends.into_iter().filter(|end| !config.eos_token_ids.contains(end));
        let stop = config.eos_token_ids.iter().copied().chain(turn_ends).collect();
        let train = if args.packing { pack(&train.rows, args.max_length) } else { train.rows };
        Ok(Self { train, held_out: encoded.rows, held_out_texts: held_out, prompt, stop })
    }
}
