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
use ::parquet::record::Field;
use ::parquet::schema::types::{Type, TypePtr};

use super::lines::excerpt;
use super::row::Cell;
use super::superglue::wic_text;
use super::task::{non_empty, Example, Label, Splits, Task};
use crate::error::{Error, Result};
use crate::util::lfs_pointer;

/// The text columns of a task in the hub's data sets. WiC has its word before the two sentences.
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

/// Reads one labelled parquet file. WiC's texts are composed by [`wic_text`].
///
/// # Errors
/// If the file cannot be opened, is not parquet or lacks a column (the error names those present), or if a
/// row has no text or no usable label (unlabelled test sets have -1). Rows are counted from 1.
pub fn read(task: Task, path: &Path) -> Result<Vec<Example>> {
    read_rows(task, path, true)
}

/// As [`read`], but without labels, even if the file has them.
///
/// # Errors
/// As [`read`], except for label errors.
pub fn read_unlabelled(task: Task, path: &Path) -> Result<Vec<Example>> {
    read_rows(task, path, false)
}

fn read_rows(task: Task, path: &Path, labelled: bool) -> Result<Vec<Example>> {
    let texts = text_columns(task);
    let columns: Vec<&str> = texts.iter().copied().chain(labelled.then_some("label")).collect();
    let mut examples = Vec::new();
    each_row(path, &columns, &mut |_, fields| {
        let example = parse(task, &columns, fields)?;
        let text = example.text_a.len() + example.text_b.as_ref().map_or(0, String::len);
        examples.push(example);
        Ok(text + size_of::<Example>())
    })?;
    Ok(examples)
}

/// Calls `take` with the 1-based number of each row and its values in `columns`, in their order; `take`
/// returns how many bytes it keeps.
///
/// # Errors
/// If the file cannot be opened, is not parquet or lacks a column, if a column has no plain values, if the
/// rows take far more memory than the file, or if `take` fails.
pub(super) fn each_row(path: &Path, columns: &[&str], take: &mut Take) -> Result<()> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut beginning = Vec::new();
    file.by_ref().take(256).read_to_end(&mut beginning).map_err(Error::io(path))?;
    lfs_pointer::refuse(&beginning, path)?;
    // The decoder expects valid files; if a damaged one makes it panic, report that as an error of the file.
    catch_unwind(AssertUnwindSafe(|| read_file(columns, file, path, take)))
        .unwrap_or_else(|_| Err(Error::format(path, "the parquet file is damaged: its decoder panicked")))
}

/// The callback for the values of a row.
type Take<'a> = dyn FnMut(usize, &[&Field]) -> std::result::Result<usize, String> + 'a;

fn read_file(wanted: &[&str], file: File, path: &Path, take: &mut Take) -> Result<()> {
    let unfit = |reason: String| Error::format(path, format!("not readable as parquet: {reason}"));
    let damaged = |error: ParquetError| unfit(error.to_string());
    let mut most = Allowance::of(file.metadata().map_err(Error::io(path))?.len());
    let reader = open(&file, path)?;
    let schema = reader.metadata().file_metadata().schema();
    // Read only these columns: the others may be many, and of any type.
    let chosen = schema.get_fields().iter().filter(|field| wanted.contains(&field.name()));
    let chosen: Vec<TypePtr> = chosen.cloned().collect();
    let position = |name: &&str| {
        chosen.iter().position(|field| field.name() == *name).ok_or_else(|| {
            let present: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
            Error::format(path, format!("no column {name:?}; the file has: {}", excerpt(&present.join(", "))))
        })
    };
    let places = wanted.iter().map(position).collect::<Result<Vec<_>>>()?;
    if chosen.len() > wanted.len() || chosen.iter().any(|field| !field.is_primitive()) {
        let reason = format!("expected one column of plain values for each of {}", wanted.join(", "));
        return Err(Error::format(path, reason));
    }
    guard::check_pages(&file, reader.metadata(), wanted).map_err(unfit)?;
    let chosen = Type::group_type_builder(schema.name()).with_fields(chosen).build().map_err(damaged)?;
    for (index, row) in reader.get_row_iter(Some(chosen)).map_err(damaged)?.enumerate() {
        let row = row.map_err(damaged)?;
        let fields: Vec<&Field> = row.get_column_iter().map(|(_, field)| field).collect();
        let fields: Option<Vec<&Field>> = places.iter().map(|place| fields.get(*place).copied()).collect();
        fields
            .ok_or_else(|| "too few columns".to_string())
            .and_then(|fields| take(index + 1, &fields))
            .and_then(|size| most.take(size))
            .map_err(|reason| Error::format(path, format!("row {}: {reason}", index + 1)))?;
    }
    Ok(())
}

/// Opens a reader after a check of the footer.
fn open(file: &File, path: &Path) -> Result<SerializedFileReader<File>> {
    let unfit = |reason: String| Error::format(path, format!("not readable as parquet: {reason}"));
    guard::check_footer(file).map_err(unfit)?;
    SerializedFileReader::new(file.try_clone().map_err(Error::io(path))?).map_err(|e| unfit(e.to_string()))
}

/// The class names of a numeric column, if the file's metadata has them (`ClassLabel` of Hugging Face's
/// datasets).
///
/// # Errors
/// If the file cannot be opened, or is not parquet.
pub(super) fn class_names(path: &Path, column: &str) -> Result<Option<Vec<String>>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let named = || {
        let reader = open(&file, path)?;
        let pairs = reader.metadata().file_metadata().key_value_metadata();
        let text = pairs.into_iter().flatten().find(|pair| pair.key == "huggingface");
        let Some(text) = text.and_then(|pair| pair.value.as_ref()) else { return Ok(None) };
        // Ignore metadata in any other form.
        let json: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let names = json["info"]["features"][column]["names"].as_array();
        let names =
            names.and_then(|names| names.iter().map(|name| name.as_str().map(str::to_string)).collect());
        Ok(names)
    };
    catch_unwind(AssertUnwindSafe(named))
        .unwrap_or_else(|_| Err(Error::format(path, "the parquet file is damaged: its decoder panicked")))
}

/// Converts a value to the type that all formats share.
pub(super) fn cell(field: &Field) -> std::result::Result<Cell, String> {
    Ok(match field {
        Field::Null => Cell::Null,
        Field::Bool(flag) => Cell::Flag(*flag),
        Field::Str(text) => Cell::Text(text.clone()),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Cell::Text(text.to_owned()),
            Err(error) => return Err(format!("not UTF-8: {error}")),
        },
        Field::Byte(number) => Cell::Number(number.to_string()),
        Field::Short(number) => Cell::Number(number.to_string()),
        Field::Int(number) => Cell::Number(number.to_string()),
        Field::Long(number) => Cell::Number(number.to_string()),
        Field::UByte(number) => Cell::Number(number.to_string()),
        Field::UShort(number) => Cell::Number(number.to_string()),
        Field::UInt(number) => Cell::Number(number.to_string()),
        Field::ULong(number) => Cell::Number(number.to_string()),
        Field::Float(number) => Cell::Number(format!("{number:?}")),
        Field::Double(number) => Cell::Number(format!("{number:?}")),
        other => Cell::Other(other.to_string()),
    })
}

/// The memory that the rows of a file may still take: a few bytes of parquet can encode any number of rows.
struct Allowance {
    file: u64,
    left: u64,
}

impl Allowance {
    /// Rows may take this many times the size of their file, plus 64 MiB. Compression reduces texts to a
    /// tenth; to less than a hundredth only if they repeat each other.
    const TIMES: u64 = 200;

    fn of(file: u64) -> Self {
        Self { file, left: file.saturating_mul(Self::TIMES).saturating_add(64 << 20) }
    }

    /// Subtracts `bytes`, or fails if fewer are left.
    fn take(&mut self, bytes: usize) -> std::result::Result<(), String> {
        match self.left.checked_sub(bytes as u64) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(format!(
                "a file of {} bytes cannot hold so much: its rows take too much memory",
                self.file
            )),
        }
    }
}

/// Builds an example from the values of a task's columns; a label comes last.
fn parse(task: Task, columns: &[&str], fields: &[&Field]) -> std::result::Result<Example, String> {
    let (mut found, mut label) = (Vec::with_capacity(fields.len()), Label::Unknown);
    for (name, field) in columns.iter().zip(fields) {
        if *name == "label" {
            label = parse_label(task, field)?;
            continue;
        }
        found.push(match field {
            Field::Str(text) => text.as_str(),
            Field::Bytes(bytes) => {
                std::str::from_utf8(bytes.data()).map_err(|error| format!("{name} is not UTF-8: {error}"))?
            }
            other => return Err(format!("{name} is {other}, expected a text")),
        });
    }
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

/// Reads a task from files, each with the name of its set: `train`, and the names of [`Splits::dev`] (or
/// `validation`, `validation_matched` and `validation_mismatched`). Files of the same set are joined in the
/// order given. [`Task::hub_files`] lists the files to fetch.
///
/// # Errors
/// If a set is unknown, missing or empty, or a file cannot be read (see [`read`]).
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
        let mut left = Allowance::of(1000);
        let refused = (0..100).find_map(|_| left.take(1 << 20).err());
        assert!(refused.unwrap().contains("a file of 1000 bytes cannot hold so much"));
        let mut left = Allowance::of(1 << 20);
        assert!((0..100).all(|_| left.take(1 << 20).is_ok()));
    }
}
