//! Tests of parquet files in the hub's layout, with one test per kind of error.

use std::path::Path;

use monteclora::data::glue;
use monteclora::data::parquet::{load_parquet, read};
use monteclora::data::table::{self, Columns, DataSet, Target};
use monteclora::data::task::{Example, Label, Task};
use monteclora::Labels;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use super::parquet_files::{store, store_with, Column};

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
fn tables_of_ones_own_have_words_numbers_or_named_numbers_as_labels() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine.parquet");
    let columns = Columns { text: "body".into(), ..Columns::default() };
    let texts = || Column::Text("body", vec!["a ", "b", "c"]);
    let read = || DataSet::read(&path, &columns, None).map_err(|error| error.to_string());
    let classes = |names: [&str; 2]| Target::Classes(Labels::new(names).unwrap());
    let labels = |data: &DataSet| data.train.iter().map(|row| row.label).collect::<Vec<_>>();
    store(
        &path,
        &[texts(), Column::Text("label", vec!["no", "yes", "no"]), Column::Text("other", vec!["", "", ""])],
    );
    let words = read().unwrap();
    assert_eq!((words.target.clone(), words.train[0].text_a.as_str()), (classes(["no", "yes"]), "a"));
    assert_eq!(labels(&words), [0, 1, 0].map(Label::Class));
    store(&path, &[texts(), Column::Class(vec![7, 3, 7])]);
    let numbers = read().unwrap();
    assert_eq!(
        (numbers.target.clone(), labels(&numbers)),
        (classes(["3", "7"]), [1, 0, 1].map(Label::Class).to_vec())
    );
    store(&path, &[texts(), Column::Score(vec![0.5, 1.0, 2.0])]);
    assert_eq!(labels(&read().unwrap()), [0.5, 1.0, 2.0].map(Label::Score));
    // The names of classes as Hugging Face's `datasets` writes them.
    let features = serde_json::json!({"info": {"features": {"label": {"names": ["spam", "ham"], "_type": "ClassLabel"}}}});
    let described = |classes: Vec<i64>| {
        let pairs = vec![KeyValue::new("huggingface".to_string(), features.to_string())];
        let properties = WriterProperties::builder().set_key_value_metadata(Some(pairs)).build();
        store_with(&path, &[texts(), Column::Class(classes)], properties);
    };
    described(vec![0, 1, 0]);
    let named = read().unwrap();
    assert_eq!(
        (named.target.clone(), labels(&named)),
        (classes(["ham", "spam"]), [1, 0, 1].map(Label::Class).to_vec())
    );
    described(vec![0, 1, 2]);
    assert!(read()
        .unwrap_err()
        .ends_with("mine.parquet: row 3: class 2, but the file's metadata names 2 classes"));
    // -1 means no label: such rows are read for prediction, but not for training.
    described(vec![0, -1, 1]);
    assert!(read().unwrap_err().ends_with("mine.parquet: row 2: no label"));
    assert_eq!(table::read(&path, &columns.unlabelled()).unwrap().records.len(), 3);
    let absent = DataSet::read(&path, &Columns::default(), None).unwrap_err().to_string();
    assert!(absent.ends_with("no column \"text\"; the file has: body, label"), "{absent}");
}

#[test]
fn test_sets_of_the_hub_are_read_without_their_labels() {
    let dir = tempfile::tempdir().unwrap();
    let rows = |label| [Column::Text("sentence", vec!["x", "y"]), Column::Class(vec![label; 2])];
    store(&dir.path().join("test-00000-of-00001.parquet"), &rows(-1));
    let sets = Task::Sst2.load_tests(dir.path()).unwrap();
    let expected: Vec<Example> = vec!["x".into(), "y".into()];
    assert_eq!(sets, [("test".to_string(), expected)]);
}

#[test]
fn every_format_gives_the_same_text() {
    // The sentences of SST-2 end in a space, of which byte-level tokenizers make a token.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.parquet");
    store(&path, &[Column::Text("sentence", vec!["fun . "]), Column::Class(vec![1])]);
    let tsv = "sentence\tlabel\nfun . \t1\n";
    let expected = Example { text_a: "fun .".to_owned(), text_b: None, label: Label::Class(1) };
    assert_eq!(read(Task::Sst2, &path).unwrap(), std::slice::from_ref(&expected));
    let from_tsv = glue::read_from(Task::Sst2, tsv.as_bytes(), &path).unwrap();
    assert_eq!(from_tsv, [expected]);
}

#[test]
fn a_missing_shard_is_an_error_and_not_half_a_set() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [Column::Text("sentence", vec!["a"]), Column::Class(vec![1])];
    store(&dir.path().join("validation.parquet"), &rows);
    store(&dir.path().join("train-00001-of-00002.parquet"), &rows);
    let message = Task::Cola.load_folder(dir.path()).unwrap_err().to_string();
    assert!(message.ends_with("train-00001-of-00002.parquet: one of 2 files, but 1 is there"), "{message}");
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

/// Writes a file that consists of this footer only.
fn footer_alone(path: &Path, footer: &[u8]) {
    let length = (footer.len() as u32).to_le_bytes();
    std::fs::write(path, [b"PAR1", footer, &length, b"PAR1"].concat()).unwrap();
}

/// A footer whose schema is a list of groups with these numbers of members.
fn groups(members: impl ExactSizeIterator<Item = u32>) -> Vec<u8> {
    let varint = |mut value: u32| {
        let mut bytes = Vec::new();
        while value > 0x7f {
            bytes.push(value as u8 | 0x80);
            value >>= 7;
        }
        bytes.push(value as u8);
        bytes
    };
    // Thrift: version 1, then the list of groups, each with its repetition, name and number of members.
    let mut footer = [&[0x15, 2, 0x19, 0xfc][..], &varint(members.len() as u32)].concat();
    for members in members {
        footer.extend([&[0x35, 0, 0x18, 1, b'a', 0x15][..], &varint(members << 1), &[0]].concat());
    }
    footer.push(0);
    footer
}

#[test]
fn a_schema_that_would_end_the_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.parquet");
    let failure = || read(Task::Cola, &path).unwrap_err().to_string();
    footer_alone(&path, &groups((0..200_000).map(|_| 1)));
    assert!(failure().ends_with("groups are nested more than 32 deep"), "{}", failure());
    footer_alone(&path, &groups([i32::MAX as u32, 0].into_iter()));
    assert!(
        failure().ends_with("a group of 2147483647 columns, where the schema has 1 more"),
        "{}",
        failure()
    );
}

#[test]
fn a_page_that_would_take_all_memory_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.parquet");
    let columns = [Column::Text("sentence", vec!["a", "b"]), Column::Class(vec![1, 0])];
    let snappy = WriterProperties::builder().set_compression(Compression::SNAPPY);
    store_with(&path, &columns, snappy.build());
    let sound = std::fs::read(&path).unwrap();
    // The first page begins after `PAR1`: its type (dictionary), its size, its compressed size, and the
    // dictionary's header with the number of values.
    assert_eq!(sound[4..9], [0x15, 4, 0x15, 20, 0x15], "another layout: {:?}", &sound[..16]);
    let failure = |at: usize, number: &[u8]| {
        let spoilt = [&sound[..at], number, &sound[at + 1..]].concat();
        std::fs::write(&path, spoilt).unwrap();
        read(Task::Cola, &path).unwrap_err().to_string()
    };
    let huge = [0xfe, 0xff, 0xff, 0xff, 0x0f];
    let message = failure(7, &huge);
    assert!(
        message.contains("\"sentence\": a page of") && message.ends_with("uncompressed size, 2147483647"),
        "{message}"
    );
    let at = sound.windows(2).position(|pair| pair == [0x4c, 0x15]).unwrap() + 2;
    let message = failure(at, &huge);
    assert!(message.ends_with("a dictionary of 2147483647 values does not fit in 10 bytes"), "{message}");
}

#[test]
fn columns_that_are_not_asked_for_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.parquet");
    let columns =
        [Column::Text("odd", vec!["z"]), Column::Text("sentence", vec!["a"]), Column::Class(vec![1])];
    store(&path, &columns);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.iter().position(|byte| *byte == b'z').unwrap();
    bytes[at - 4..at].fill(0xff);
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(read(Task::Cola, &path).unwrap()[0].text_a, "a");
}
