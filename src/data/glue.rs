//! The tab-separated files of GLUE, as the benchmark distributes them.
//!
//! Lines are split on tabs only: quotes are ordinary text, balanced or not. Columns are found by their names
//! in the header (CoLA's labelled files have none). A UTF-8 byte order mark, `\r\n` and empty lines are
//! tolerated.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::lines::{each_line, excerpt};
use super::task::{Example, Label, Task};
use crate::error::{Error, Result};

/// Maximum number of columns of a table; MNLI, the widest, has 16.
const MAX_COLUMNS: usize = 1000;

/// The header names of a task's text and label columns.
struct Columns {
    text_a: &'static str,
    text_b: Option<&'static str>,
    label: Option<&'static str>,
}

/// The positions of these columns, and the number of columns that every row must have.
struct Layout {
    text_a: usize,
    text_b: Option<usize>,
    label: Option<usize>,
    width: usize,
}

/// The header names of a task, or `None` if GLUE does not distribute it as TSV.
fn columns(task: Task) -> Option<Columns> {
    let (text_a, text_b, label) = match task {
        Task::Cola => ("sentence", None, "label"),
        Task::Sst2 => ("sentence", None, "label"),
        Task::Mrpc => ("#1 String", Some("#2 String"), "Quality"),
        Task::Rte => ("sentence1", Some("sentence2"), "label"),
        Task::Qnli => ("question", Some("sentence"), "label"),
        Task::Qqp => ("question1", Some("question2"), "is_duplicate"),
        Task::Mnli => ("sentence1", Some("sentence2"), "gold_label"),
        Task::Stsb => ("sentence1", Some("sentence2"), "score"),
        Task::Wic | Task::BoolQ => return None,
    };
    Some(Columns { text_a, text_b, label: Some(label) })
}

/// A task's development sets, as (name in [`super::task::Splits`], file name).
pub fn dev_files(task: Task) -> &'static [(&'static str, &'static str)] {
    match task {
        Task::Mnli => &[("matched", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv")],
        _ => &[("dev", "dev.tsv")],
    }
}

/// Whether GLUE distributes this task as tab-separated files.
pub fn has_tsv(task: Task) -> bool {
    columns(task).is_some()
}

/// Reads one labelled TSV file.
///
/// The official QQP files contain a few truncated rows. QQP rows with fewer columns than the header are
/// therefore skipped, with their number in a warning. QQP rows with more columns, and any wrong number of
/// columns in other tasks, are errors.
///
/// # Errors
/// If the file cannot be read, is not UTF-8 or lacks a column; if a row has a wrong number of columns or an
/// unknown label; or if the task has no TSV files. The error names the line where there is one.
pub fn read(task: Task, path: &Path) -> Result<Vec<Example>> {
    let file = File::open(path).map_err(Error::io(path))?;
    read_from(task, file, path)
}

/// Reads one TSV file without labels, such as a test set. The file needs a header, and a row with a wrong
/// number of columns is an error in every task.
///
/// # Errors
/// As [`read`], except for label errors.
pub fn read_unlabelled(task: Task, path: &Path) -> Result<Vec<Example>> {
    let file = File::open(path).map_err(Error::io(path))?;
    rows(task, file, path, false)
}

/// [`read`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(task: Task, source: impl Read, path: &Path) -> Result<Vec<Example>> {
    rows(task, source, path, true)
}

fn rows(task: Task, source: impl Read, path: &Path, labelled: bool) -> Result<Vec<Example>> {
    let names = columns(task)
        .ok_or_else(|| Error::config("task", format!("{task} is not distributed as TSV, but as JSONL")))?;
    let names = Columns { label: names.label.filter(|_| labelled), ..names };
    // CoLA's fixed columns: source, label, the author's mark, sentence.
    let fixed = Layout { text_a: 3, text_b: None, label: Some(1), width: 4 };
    let mut layout = (task == Task::Cola && labelled).then_some(fixed);
    let (mut examples, mut broken) = (Vec::new(), 0usize);
    each_line(source, path, |number, line| {
        // Count before collecting: the fields of a line of tabs would take many times its size.
        let width = 1 + line.bytes().filter(|byte| *byte == b'\t').count();
        let fields = || line.split('\t').collect::<Vec<&str>>();
        let Some(layout) = &layout else {
            if width > MAX_COLUMNS {
                let reason = format!("expected at most {MAX_COLUMNS} columns, got {width}");
                return Err(Error::format_at(path, number, reason));
            }
            layout = Some(header(&names, &fields(), path, number)?);
            return Ok(());
        };
        if task == Task::Qqp && labelled && width < layout.width {
            broken += 1;
            return Ok(());
        }
        if width != layout.width {
            let reason = format!("expected {} columns, got {width}", layout.width);
            return Err(Error::format_at(path, number, reason));
        }
        let fields = fields();
        let label = layout.label.map_or(Ok(Label::Unknown), |column| parse_label(task, fields[column]));
        let label = label.map_err(|reason| Error::format_at(path, number, reason))?;
        let text_b = layout.text_b.map(|column| fields[column]);
        examples.push(Example::new(fields[layout.text_a], text_b, label));
        Ok(())
    })?;
    if broken > 0 {
        tracing::warn!("{}: {broken} rows with too few columns left out", path.display());
    }
    Ok(examples)
}

fn header(names: &Columns, fields: &[&str], path: &Path, line: usize) -> Result<Layout> {
    let find = |name: &str| {
        fields.iter().position(|field| field.trim() == name).ok_or_else(|| {
            let reason = format!("no column {name:?} in the header; it has: {}", excerpt(&fields.join(", ")));
            Error::format_at(path, line, reason)
        })
    };
    Ok(Layout {
        text_a: find(names.text_a)?,
        text_b: names.text_b.map(find).transpose()?,
        label: names.label.map(find).transpose()?,
        width: fields.len(),
    })
}

/// Parses a label as spelled in the TSV files.
fn parse_label(task: Task, text: &str) -> std::result::Result<Label, String> {
    let text = text.trim();
    if task.is_regression() {
        let score: f32 = text.parse().map_err(|_| format!("score {:?}, expected a number", excerpt(text)))?;
        return Label::checked_score(score);
    }
    let digits: &[&str] = &["0", "1"];
    let spellings = match task {
        Task::Rte | Task::Qnli | Task::Mnli => task.label_names(),
        _ => digits,
    };
    match spellings.iter().position(|name| *name == text) {
        Some(class) => Ok(Label::Class(class as u32)),
        None => Err(format!("unknown label {:?}, expected one of {}", excerpt(text), spellings.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::MAX_LINE;
    use super::*;

    fn parse(task: Task, text: &str) -> Result<Vec<Example>> {
        read_from(task, text.as_bytes(), Path::new("x.tsv"))
    }

    fn failure(task: Task, text: &str) -> String {
        parse(task, text).unwrap_err().to_string()
    }

    fn pair(a: &str, b: &str, label: Label) -> Vec<Example> {
        vec![Example { text_a: a.into(), text_b: Some(b.into()), label }]
    }

    #[test]
    fn every_task_finds_its_columns() {
        let single = |a: &str, label| vec![Example { text_a: a.into(), text_b: None, label }];
        let class = Label::Class;
        assert_eq!(parse(Task::Cola, "gj04\t0\t*\tOne \"two.\n").unwrap(), single("One \"two.", class(0)));
        assert_eq!(parse(Task::Sst2, "sentence\tlabel\nfun . \t1").unwrap(), single("fun .", class(1)));
        let mrpc = "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t\"a\tb\r\n";
        assert_eq!(parse(Task::Mrpc, mrpc).unwrap(), pair("\"a", "b", class(1)));
        let rte = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n\n";
        assert_eq!(parse(Task::Rte, rte).unwrap(), pair("a", "b", class(1)));
        let qnli = "index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment";
        assert_eq!(parse(Task::Qnli, qnli).unwrap(), pair("q", "s", class(0)));
        let mnli = "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction";
        assert_eq!(parse(Task::Mnli, mnli).unwrap(), pair("a", "b", class(2)));
        let stsb = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.750";
        assert_eq!(parse(Task::Stsb, stsb).unwrap(), pair("a", "b", Label::Score(3.75)));
        let qqp = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tbroken\n1\t2\t3\ta\tb\t1\n";
        assert_eq!(parse(Task::Qqp, qqp).unwrap(), pair("a", "b", class(1)));
    }

    #[test]
    fn errors_name_line_and_expectation() {
        assert_eq!(failure(Task::Cola, "a\t1\t\tb\na\t1\tb\n"), "x.tsv, line 2: expected 4 columns, got 3");
        assert_eq!(
            failure(Task::Rte, "sentence1\tsentence2\tlabel\na\tb\tmaybe"),
            "x.tsv, line 2: unknown label \"maybe\", expected one of entailment, not_entailment"
        );
        assert_eq!(
            failure(Task::Sst2, "text\tlabel\n"),
            "x.tsv, line 1: no column \"sentence\" in the header; it has: text, label"
        );
        for score in ["nan", "inf", "5.1", "-0.1", "x"] {
            let text = format!("sentence1\tsentence2\tscore\na\tb\t{score}");
            assert!(failure(Task::Stsb, &text).starts_with("x.tsv, line 2: score"), "{score}");
        }
        let latin = read_from(Task::Cola, &b"a\t1\t\tb\na\t1\t\t\xe9\n"[..], Path::new("x.tsv"));
        assert!(latin.unwrap_err().to_string().starts_with("x.tsv, line 2: not UTF-8"));
        assert!(failure(Task::Wic, "").contains("not distributed as TSV"));
        let long = "id\tquestion1\tquestion2\tis_duplicate\n1\ta\tb\t1\t0";
        assert_eq!(failure(Task::Qqp, long), "x.tsv, line 2: expected 4 columns, got 5");
    }

    #[test]
    fn test_sets_are_read_without_labels_and_row_for_row() {
        let test = |task, text: &str| rows(task, text.as_bytes(), Path::new("test.tsv"), false);
        let unknown = |texts: &[&str]| texts.iter().map(|text| Example::from(*text)).collect::<Vec<_>>();
        // CoLA's test set has a header, unlike its other files.
        assert_eq!(
            test(Task::Cola, "index\tsentence\n0\tOne.\n1\tTwo.\n").unwrap(),
            unknown(&["One.", "Two."])
        );
        assert_eq!(test(Task::Rte, "index\tsentence1\tsentence2\n0\ta\tb\n").unwrap(), [("a", "b").into()]);
        let labelled = "sentence\tlabel\nfun\t1\n";
        assert_eq!(test(Task::Sst2, labelled).unwrap(), unknown(&["fun"]));
        // A submission needs a line for every row: none may be skipped.
        let broken = test(Task::Qqp, "id\tquestion1\tquestion2\n0\ta\n").unwrap_err().to_string();
        assert_eq!(broken, "test.tsv, line 2: expected 3 columns, got 2");
    }

    #[test]
    fn a_line_of_tabs_is_refused_by_its_number_of_columns() {
        let tabs = "\t".repeat(1000);
        assert_eq!(failure(Task::Sst2, &tabs), "x.tsv, line 1: expected at most 1000 columns, got 1001");
        let row = format!("sentence\tlabel\n{tabs}");
        assert_eq!(failure(Task::Sst2, &row), "x.tsv, line 2: expected 2 columns, got 1001");
    }

    #[test]
    fn a_line_without_end_is_refused_before_it_fills_the_memory() {
        let endless = std::io::repeat(b'a').take(4 * MAX_LINE as u64);
        let source = b"sentence\tlabel\n".chain(endless);
        let message = read_from(Task::Sst2, source, Path::new("x.tsv")).unwrap_err().to_string();
        assert_eq!(message, "x.tsv, line 2: longer than 16777216 bytes");
    }
}
