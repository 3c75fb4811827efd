//! The JSON-lines files of SuperGLUE: BoolQ, WiC and RTE.
//!
//! One object per line in `train.jsonl` and `val.jsonl`. Fields that are not needed are ignored. BoolQ as its
//! authors distribute it has `dev.jsonl`, and the label in the field `answer`.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::lines::each_line;
use super::row::{self, field, text, Cell};
use super::task::{Example, Label, Task};
use crate::error::{Error, Result};

/// The file of the development set.
pub const DEV_FILE: &str = "val.jsonl";
/// The file of the development set as BoolQ's authors distribute it.
pub const OWN_DEV_FILE: &str = "dev.jsonl";

/// Whether SuperGLUE distributes this task.
pub fn has_jsonl(task: Task) -> bool {
    matches!(task, Task::BoolQ | Task::Wic | Task::Rte)
}

/// The first text of a WiC example: `"{word}: {sentence1}"`. The second is `sentence2` unchanged.
///
/// This tells the model which word is meant and keeps the two sentences a pair.
pub fn wic_text(word: &str, sentence1: &str) -> String {
    format!("{word}: {sentence1}")
}

/// Reads one labelled JSON-lines file.
///
/// BoolQ gives (question, passage), RTE (premise, hypothesis), WiC [`wic_text`] and the second sentence.
/// Labels are `true` and `false` (classes 1 and 0), or the class names for RTE.
///
/// # Errors
/// If the file cannot be read or is not UTF-8, a line is not a JSON object with the task's fields (the error
/// names the line), or SuperGLUE has no such task.
pub fn read(task: Task, path: &Path) -> Result<Vec<Example>> {
    let file = File::open(path).map_err(Error::io(path))?;
    read_from(task, file, path)
}

/// Reads one JSON-lines file without labels, such as the benchmark's test sets.
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
    if !has_jsonl(task) {
        return Err(Error::config("task", format!("{task} is not distributed as JSONL, but as TSV")));
    }
    let mut examples = Vec::new();
    each_line(source, path, |number, line| {
        let example = parse(task, line, labelled).map_err(|reason| Error::format_at(path, number, reason))?;
        examples.push(example);
        Ok(())
    })?;
    Ok(examples)
}

fn parse(task: Task, line: &str, labelled: bool) -> std::result::Result<Example, String> {
    let row = row::parse(line)?;
    let (text_a, text_b) = match task {
        Task::BoolQ => (text(&row, "question")?.to_owned(), text(&row, "passage")?),
        Task::Wic => (wic_text(text(&row, "word")?, text(&row, "sentence1")?), text(&row, "sentence2")?),
        _ => (text(&row, "premise")?.to_owned(), text(&row, "hypothesis")?),
    };
    if !labelled {
        return Ok(Example::new(&text_a, Some(text_b), Label::Unknown));
    }
    let answer = row.get("answer").filter(|_| task == Task::BoolQ && !row.contains_key("label"));
    let label = label(task, answer.map_or_else(|| field(&row, "label"), Ok)?)?;
    Ok(Example::new(&text_a, Some(text_b), label))
}

fn label(task: Task, value: &Cell) -> std::result::Result<Label, String> {
    let names = task.label_names();
    let class = match value {
        Cell::Flag(flag) if task != Task::Rte => Some(usize::from(*flag)),
        Cell::Text(name) if task == Task::Rte => names.iter().position(|known| known == name),
        _ => None,
    };
    match class {
        Some(class) => Ok(Label::Class(class as u32)),
        None => Err(format!("unknown label {value}, expected one of {}", names.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIC: &str =
        r#"{"word": "bed", "sentence1": "A bed.", "sentence2": "Sea bed.", "idx": 0, "label": false}"#;
    const BOOLQ: &str = r#"{"question": "is it", "passage": "It is.", "idx": 0, "label": true}"#;
    const RTE: &str = r#"{"premise": "A.", "hypothesis": "B.", "label": "not_entailment", "idx": 0}"#;

    fn one(task: Task, text: &str) -> Result<Vec<Example>> {
        read_from(task, text.as_bytes(), Path::new("x.jsonl"))
    }

    fn failure(task: Task, text: &str) -> String {
        one(task, text).unwrap_err().to_string()
    }

    fn pair(a: &str, b: &str, class: u32) -> Vec<Example> {
        vec![Example { text_a: a.into(), text_b: Some(b.into()), label: Label::Class(class) }]
    }

    #[test]
    fn the_three_tasks_are_read() {
        assert_eq!(one(Task::Wic, WIC).unwrap(), pair("bed: A bed.", "Sea bed.", 0));
        assert_eq!(one(Task::BoolQ, &format!("{BOOLQ}\r\n")).unwrap(), pair("is it", "It is.", 1));
        assert_eq!(one(Task::Rte, &format!("{RTE}\n\n")).unwrap(), pair("A.", "B.", 1));
        let own = BOOLQ.replace("label", "answer").replace("idx", "title");
        assert_eq!(one(Task::BoolQ, &own).unwrap(), pair("is it", "It is.", 1));
        assert!(failure(Task::Wic, &WIC.replace("label", "answer")).contains("no field \"label\""));
        let spaced = BOOLQ.replace("is it", "is it ").replace("It is.", "It is.\\n");
        assert_eq!(one(Task::BoolQ, &spaced).unwrap(), pair("is it", "It is.", 1));
    }

    #[test]
    fn errors_name_line_and_expectation() {
        let start = |task, text: &str, expected: &str| {
            let message = failure(task, text);
            assert!(message.starts_with(expected), "{message}");
        };
        start(Task::BoolQ, &format!("{BOOLQ}\n{{"), "x.jsonl, line 2: not a JSON object");
        start(Task::BoolQ, "[1]", "x.jsonl, line 1: not a JSON object");
        start(Task::BoolQ, RTE, "x.jsonl, line 1: no field \"question\"; the object has: ");
        start(
            Task::Rte,
            &RTE.replace("not_", "no_"),
            "x.jsonl, line 1: unknown label \"no_entailment\", expected one of entailment, not_entailment",
        );
        start(
            Task::BoolQ,
            &BOOLQ.replace("true", "1"),
            "x.jsonl, line 1: unknown label 1, expected one of false, true",
        );
        start(
            Task::BoolQ,
            &BOOLQ.replace("\"is it\"", "3"),
            "x.jsonl, line 1: field \"question\" is not a string",
        );
        start(Task::Cola, "", "invalid task: cola is not distributed as JSONL");
    }

    #[test]
    fn what_lies_deep_is_passed_over_without_recursion() {
        let deep = "[".repeat(200_000);
        assert!(failure(Task::Wic, &format!("{{\"word\":{deep}")).contains("not a JSON object: EOF"));
    }
}
