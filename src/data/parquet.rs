//! The parquet files of the hub's `glue` and `super_glue` data sets.
//!
//! Columns are found by name; labels are class numbers, or scores for STS-B.

use std::fs::File;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::{Field, Row};

use super::folder::some;
use super::superglue::wic_text;
use super::task::{Example, Label, Splits, Task};
use crate::error::{Error, Result};

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
    let file = File::open(path).map_err(Error::io(path))?;
    // The decoder is written for files that are sound: should a damaged one make it panic, that is an
    // error of the file.
    catch_unwind(AssertUnwindSafe(|| read_file(task, file, path)))
        .unwrap_or_else(|_| Err(Error::format(path, "the parquet file is damaged: its decoder panicked")))
}

fn read_file(task: Task, file: File, path: &Path) -> Result<Vec<Example>> {
    let damaged = |error: ParquetError| Error::format(path, format!("not readable as parquet: {error}"));
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let present: Vec<String> = schema.get_fields().iter().map(|field| field.name().to_owned()).collect();
    let position = |name: &str| {
        present.iter().position(|column| column == name).ok_or_else(|| {
            Error::format(path, format!("no column {name:?}; the file has: {}", present.join(", ")))
        })
    };
    let texts = text_columns(task).iter().map(|name| position(name)).collect::<Result<Vec<_>>>()?;
    let label = position("label")?;
    let rows = reader.get_row_iter(None).map_err(damaged)?;
    let mut examples = Vec::new();
    for (index, row) in rows.enumerate() {
        let row = row.map_err(damaged)?;
        let example = parse(task, &row, &texts, label)
            .map_err(|reason| Error::format(path, format!("row {}: {reason}", index + 1)))?;
        examples.push(example);
    }
    Ok(examples)
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
        examples[set].append(&mut some(read(task, path)?, path)?);
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
    use crate::noise::{Noise, Purpose};
    use ::parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
    use ::parquet::file::writer::SerializedFileWriter;
    use ::parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    enum Column {
        Text(&'static str, Vec<&'static str>),
        Class(Vec<i64>),
        Score(Vec<f64>),
    }

    fn store(path: &Path, columns: &[Column]) {
        let fields = columns.iter().map(|column| match column {
            Column::Text(name, _) => format!("required binary {name} (UTF8); "),
            Column::Class(_) => "required int64 label; ".to_owned(),
            Column::Score(_) => "required double label; ".to_owned(),
        });
        let fields: String = fields.collect();
        let schema = Arc::new(parse_message_type(&format!("message schema {{ {fields}}}")).unwrap());
        let mut writer =
            SerializedFileWriter::new(File::create(path).unwrap(), schema, Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for column in columns {
            let mut target = group.next_column().unwrap().unwrap();
            match column {
                Column::Text(_, rows) => {
                    let rows: Vec<ByteArray> = rows.iter().map(|row| ByteArray::from(*row)).collect();
                    target.typed::<ByteArrayType>().write_batch(&rows, None, None).unwrap();
                }
                Column::Class(rows) => {
                    target.typed::<Int64Type>().write_batch(rows, None, None).unwrap();
                }
                Column::Score(rows) => {
                    target.typed::<DoubleType>().write_batch(rows, None, None).unwrap();
                }
            }
            target.close().unwrap();
        }
        group.close().unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn files_are_read_back_in_the_hubs_layout() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("mrpc");
        std::fs::create_dir(&folder).unwrap();
        let pair = |a, b, class| {
            [
                Column::Text("sentence1", vec![a, "c"]),
                Column::Text("sentence2", vec![b, "d"]),
                Column::Class(vec![class, 0]),
            ]
        };
        store(&folder.join("train-00001-of-00002.parquet"), &pair("x", "y", 0));
        store(&folder.join("train-00000-of-00002.parquet"), &pair("caf\u{e9}", "b", 1));
        let message = Task::Mrpc.load_folder(dir.path()).unwrap_err().to_string();
        assert!(message.ends_with("no file of dev; mrpc needs: train, dev"), "{message}");
        store(&folder.join("validation-00000-of-00001.parquet"), &pair("p", "q", 1));
        let splits = Task::Mrpc.load_folder(dir.path()).unwrap();
        let first: Vec<_> = splits.train.iter().map(|row| row.text_a.as_str()).collect();
        assert_eq!(first, ["caf\u{e9}", "c", "x", "c"]);
        assert_eq!((splits.train[0].label, splits.dev[0].1.len()), (Label::Class(1), 2));
        let stranger = load_parquet(Task::Mrpc, &[("test".into(), folder)]).unwrap_err().to_string();
        assert!(stranger.contains("\"test\" is no set of mrpc, expected one of train, dev"), "{stranger}");
    }

    #[test]
    fn scores_and_words_have_their_own_columns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let sentences = |label| {
            [
                Column::Text("word", vec!["bed"]),
                Column::Text("sentence1", vec!["A bed."]),
                Column::Text("sentence2", vec!["Sea bed."]),
                label,
            ]
        };
        store(&path, &sentences(Column::Score(vec![2.5])));
        assert_eq!(read(Task::Stsb, &path).unwrap()[0].label, Label::Score(2.5));
        assert!(read(Task::Wic, &path).unwrap_err().to_string().contains("row 1: label 2.5"));
        store(&path, &sentences(Column::Class(vec![0])));
        let text_a = "bed: A bed.".to_owned();
        let expected = Example { text_a, text_b: Some("Sea bed.".into()), label: Label::Class(0) };
        assert_eq!(read(Task::Wic, &path).unwrap(), [expected]);
    }

    #[test]
    fn every_format_gives_the_same_text() {
        // SST-2 ends its sentences in a space, which byte-level tokenizers make a token of.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        store(&path, &[Column::Text("sentence", vec!["fun . "]), Column::Class(vec![1])]);
        let tsv = "sentence\tlabel\nfun . \t1\n";
        let expected = Example { text_a: "fun .".to_owned(), text_b: None, label: Label::Class(1) };
        assert_eq!(read(Task::Sst2, &path).unwrap(), std::slice::from_ref(&expected));
        let from_tsv = super::super::glue::read_from(Task::Sst2, tsv.as_bytes(), &path).unwrap();
        assert_eq!(from_tsv, [expected]);
    }

    #[test]
    fn a_missing_shard_is_an_error_and_not_half_a_set() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [Column::Text("sentence", vec!["a"]), Column::Class(vec![1])];
        store(&dir.path().join("validation.parquet"), &rows);
        store(&dir.path().join("train-00001-of-00002.parquet"), &rows);
        let message = Task::Cola.load_folder(dir.path()).unwrap_err().to_string();
        assert!(
            message.ends_with("train-00001-of-00002.parquet: one of 2 files, but 1 is there"),
            "{message}"
        );
        store(&dir.path().join("train-00000-of-00002.parquet"), &rows);
        assert_eq!(Task::Cola.load_folder(dir.path()).unwrap().train.len(), 2);
        store(&dir.path().join("train.parquet"), &rows);
        let message = Task::Cola.load_folder(dir.path()).unwrap_err().to_string();
        assert!(message.ends_with("one of 2 files, but 3 are there"), "{message}");
    }

    #[test]
    fn older_names_of_shards_have_a_hash_behind() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [Column::Text("sentence", vec!["a"]), Column::Class(vec![1])];
        store(&dir.path().join("validation-00000-of-00001-0123456789abcdef.parquet"), &rows);
        store(&dir.path().join("train-00000-of-00002-fedcba9876543210.parquet"), &rows);
        let message = Task::Cola.load_folder(dir.path()).unwrap_err().to_string();
        assert!(message.ends_with("fedcba9876543210.parquet: one of 2 files, but 1 is there"), "{message}");
        store(&dir.path().join("train-00001-of-00002-0011223344556677.parquet"), &rows);
        let splits = Task::Cola.load_folder(dir.path()).unwrap();
        assert_eq!((splits.train.len(), splits.dev[0].1.len()), (2, 1));
    }

    #[test]
    fn a_set_without_rows_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let rows = |texts: Vec<&'static str>| {
            let classes = vec![1; texts.len()];
            [Column::Text("sentence", texts), Column::Class(classes)]
        };
        store(&dir.path().join("train.parquet"), &rows(vec!["a"]));
        store(&dir.path().join("validation.parquet"), &rows(Vec::new()));
        let message = Task::Cola.load_folder(dir.path()).unwrap_err().to_string();
        assert!(message.ends_with("validation.parquet: no examples"), "{message}");
    }

    #[test]
    fn errors_name_row_and_columns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        let failure = |task| read(task, &path).unwrap_err().to_string();
        store(&path, &[Column::Text("sentence", vec!["a", "b"]), Column::Class(vec![1, -1])]);
        assert!(failure(Task::Cola).ends_with("row 2: label -1: the set is not labelled"));
        assert!(failure(Task::Mrpc).ends_with("no column \"sentence1\"; the file has: sentence, label"));
        store(&path, &[Column::Text("sentence", vec!["a"]), Column::Class(vec![2])]);
        assert!(failure(Task::Sst2).ends_with("row 1: label 2, expected a class number from 0 to 1"));
        std::fs::write(&path, b"PAR1 this is not parquet PAR1").unwrap();
        assert!(failure(Task::Sst2).contains("not readable as parquet"));
        std::fs::write(&path, b"").unwrap();
        assert!(failure(Task::Sst2).contains("not readable as parquet"));
    }

    #[test]
    fn damaged_files_are_errors_and_never_panics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.parquet");
        store(&path, &[Column::Text("sentence", vec!["a", "b"]), Column::Class(vec![1, 0])]);
        let sound = std::fs::read(&path).unwrap();
        let stream = Noise::new(13).stream("fuzz", Purpose::Shuffle);
        for round in 0..500 {
            let mut bytes = sound.clone();
            let w = stream.words(round, 0);
            if w[1].is_multiple_of(4) {
                bytes.truncate(w[0] as usize % sound.len());
            } else {
                bytes[w[0] as usize % sound.len()] = w[2] as u8;
            }
            std::fs::write(&path, &bytes).unwrap();
            let _ = read(Task::Cola, &path).map_err(|error| error.to_string());
        }
    }
}
