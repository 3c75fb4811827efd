//! The parquet files of the hub's `glue` and `super_glue` data sets.
//!
//! Columns are found by name; labels are class numbers, or scores for STS-B.

mod guard;
mod thrift;

use std::fs::File;
use std::io::Read;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};
use ::parquet::schema::types::{Type, TypePtr};

use super::lines::excerpt;
use super::superglue::wic_text;
use super::task::{non_empty, Example, Label, Splits, Task};
use crate::error::{Error, Result};
use crate::util::pointer;

/// The columns of a task's texts in the hub's data sets. WiC has its word before the two sentences.
const fn text_columns(task: Task) -> &'static [&'static str] {
    match task {
        Task::Cola | Task::Sst2 => &["sentence"],
        Task::Mrpc | Task::Rte | Task::Stsb => &["sentence1", "sentence2"],
        Task::Qnli => &["question", "sentence"],
        Task::Qqp => &["question1", "question2"],
        Task::Mnli => &["premise", "hypothesis"],
        Task::BoolQ => &["question", "passage"],
        Task::Wic => &["word", "sentence1", "sentence2"],
    }
}

/// Reads one labelled parquet file. WiC's texts are composed as in
/// [`wic_text`].
///
/// # Errors
/// The file cannot be opened, is not parquet, lacks a column (the error names those present), or a row
/// has no usable label (as the unlabelled test sets: -1) or text; rows are counted from 1.
pub fn read(task: Task, path: &Path) -> Result<Vec<Example>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut beginning = Vec::new();
    file.by_ref().take(256).read_to_end(&mut beginning).map_err(Error::io(path))?;
    pointer::refuse(&beginning, path)?;
    // The decoder is written for files that are sound: should a damaged one make it panic, that is an
    // error of the file.
    catch_unwind(AssertUnwindSafe(|| read_file(task, file, path)))
        .unwrap_or_else(|_| Err(Error::format(path, "the parquet file is damaged: its decoder panicked")))
}

fn read_file(task: Task, file: File, path: &Path) -> Result<Vec<Example>> {
    let unfit = |reason: String| Error::format(path, format!("not readable as parquet: {reason}"));
    let damaged = |error: ParquetError| unfit(error.to_string());
    let mut most = Allowance::of(file.metadata().map_err(Error::io(path))?.len());
    guard::check_footer(&file).map_err(unfit)?;
    let reader = SerializedFileReader::new(file.try_clone().map_err(Error::io(path))?).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted: Vec<&str> = text_columns(task).iter().copied().chain(["label"]).collect();
    // The other columns are not read: they may be many, and of any kind.
    let chosen = schema.get_fields().iter().filter(|field| wanted.contains(&field.name()));
    let chosen: Vec<TypePtr> = chosen.cloned().collect();
    let position = |name: &str| {
        chosen.iter().position(|field| field.name() == name).ok_or_else(|| {
            let present: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
            Error::format(path, format!("no column {name:?}; the file has: {}", excerpt(&present.join(", "))))
        })
    };
    let texts = text_columns(task).iter().map(|name| position(name)).collect::<Result<Vec<_>>>()?;
    let label = position("label")?;
    if chosen.len() > wanted.len() || chosen.iter().any(|field| !field.is_primitive()) {
        let reason = format!("expected one column of plain values for each of {}", wanted.join(", "));
        return Err(Error::format(path, reason));
    }
    guard::check_pages(&file, reader.metadata(), &wanted).map_err(unfit)?;
    let chosen = Type::group_type_builder(schema.name()).with_fields(chosen).build().map_err(damaged)?;
    let rows = reader.get_row_iter(Some(chosen)).map_err(damaged)?;
    let mut examples = Vec::new();
    for (index, row) in rows.enumerate() {
        let row = row.map_err(damaged)?;
        let example = parse(task, &row, &texts, label)
            .and_then(|example| most.take(example))
            .map_err(|reason| Error::format(path, format!("row {}: {reason}", index + 1)))?;
        examples.push(example);
    }
    Ok(examples)
}

/// What the rows of a file may still take: a few bytes of a parquet file can stand for any number of
/// rows.
struct Allowance {
    file: u64,
    left: u64,
}

impl Allowance {
    /// Rows may take this many times the size of their file, and 64 MiB. Texts are compressed to a
    /// tenth; beyond a hundredth they repeat one another.
    const TIMES: u64 = 200;

    fn of(file: u64) -> Self {
        Self { file, left: file.saturating_mul(Self::TIMES).saturating_add(64 << 20) }
    }

    /// The example, if there is still room for it.
    fn take(&mut self, example: Example) -> std::result::Result<Example, String> {
        let text = example.text_a.len() + example.text_b.as_ref().map_or(0, String::len);
        match self.left.checked_sub((text + size_of::<Example>()) as u64) {
            Some(left) => {
                self.left = left;
                Ok(example)
            }
            None => Err(format!("a file of {} bytes cannot hold so much: it repeats itself", self.file)),
        }
    }
}

fn parse(task: Task, row: &Row, texts: &[usize], label: usize) -> std::result::Result<Example, String> {
    let fields: Vec<(&String, &Field)> = row.get_column_iter().collect();
    let field = |column: usize| fields.get(column).copied().ok_or("too few columns");
    let mut found = Vec::with_capacity(texts.len());
    for &column in texts {
        found.push(match field(column)? {
            (_, Field::Str(text)) => text.as_str(),
            (name, Field::Bytes(bytes)) => {
                std::str::from_utf8(bytes.data()).map_err(|error| format!("{name} is not UTF-8: {error}"))?
            }
            (name, other) => return Err(format!("{name} is {other}, expected a text")),
        });
    }
    let label = parse_label(task, field(label)?.1)?;
    match found[..] {
        [a] => Ok(Example::new(a, None, label)),
        [a, b] => Ok(Example::new(a, Some(b), label)),
        [word, a, b] => Ok(Example::new(&wic_text(word, a), Some(b), label)),
        _ => Err("too few columns".to_owned()),
    }
}

fn parse_label(task: Task, field: &Field) -> std::result::Result<Label, String> {
    if task.is_regression() {
        return match field {
            Field::Float(score) => Label::checked_score(*score),
            Field::Double(score) => Label::checked_score(*score as f32),
            other => Err(format!("label {other}, expected a floating-point number")),
        };
    }
    let class = match field {
        Field::Bool(flag) => Some(i64::from(*flag)),
        Field::Byte(class) => Some(i64::from(*class)),
        Field::Short(class) => Some(i64::from(*class)),
        Field::Int(class) => Some(i64::from(*class)),
        Field::Long(class) => Some(*class),
        _ => None,
    };
    let count = task.num_labels();
    match class.and_then(|class| u32::try_from(class).ok()).filter(|class| (*class as usize) < count) {
        Some(class) => Ok(Label::Class(class)),
        None if class == Some(-1) => Err("label -1: the set is not labelled".to_owned()),
        None => Err(format!("label {field}, expected a class number from 0 to {}", count - 1)),
    }
}

/// Reads a task from its files, each with the name of the set it belongs to: `train`, and the names of
/// [`Splits::dev`] (`validation`, `validation_matched` and `validation_mismatched` are understood too).
/// Files of the same set are joined in the order given. [`Task::hub_files`] lists what to fetch.
///
/// # Errors
/// A set is unknown, missing or empty, or a file is at fault (see [`read`]).
pub fn load_parquet(task: Task, files: &[(String, PathBuf)]) -> Result<Splits> {
    let sets = task.hub_splits();
    let expected = || sets.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let mut examples: Vec<Vec<Example>> = vec![Vec::new(); sets.len()];
    let mut seen = vec![false; sets.len()];
    for (split, path) in files {
        let Some(set) = sets.iter().position(|(name, hub)| split == name || split == hub) else {
            let reason = format!("{split:?} is no set of {task}, expected one of {}", expected());
            return Err(Error::config("split", reason));
        };
        examples[set].append(&mut non_empty(read(task, path)?, path)?);
        seen[set] = true;
    }
    if let Some(missing) = seen.iter().position(|seen| !seen) {
        let reason = format!("no file of {}; {task} needs: {}", sets[missing].0, expected());
        return Err(match files.first().and_then(|(_, path)| path.parent()) {
            Some(folder) => Error::format(folder, reason),
            None => Error::config("split", reason),
        });
    }
    let mut named = sets.iter().map(|(name, _)| (*name).to_owned()).zip(examples);
    let train = named.next().map(|(_, train)| train).unwrap_or_default();
    Ok(Splits { train, dev: named.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_repeat_themselves_without_end_are_refused() {
        let example =
            |length: usize| Example { text_a: "x".repeat(length), text_b: None, label: Label::Class(0) };
        let mut left = Allowance::of(1000);
        let refused = (0..100).find_map(|_| left.take(example(1 << 20)).err());
        assert!(refused.unwrap().contains("a file of 1000 bytes cannot hold so much"));
        let mut left = Allowance::of(1 << 20);
        assert!((0..100).all(|_| left.take(example(1 << 20)).is_ok()));
    }
}
