//! Prompts and their answers: instruction data, GSM8K, code and plain text.
//!
//! Templates, with the prompt up to `|` and the answer after it:
//!
//! - `instruct` (Alpaca's, which LLM-Adapters and the paper's authors use):
//!   `Below is an instruction that describes a task. Write a response that appropriately completes
//!   the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n|{output}`; a row with an
//!   `input` says so and has it between the two under `### Input:\n`;
//! - `gsm8k` (the LM evaluation harness's): `Question: {question}\nAnswer:| {answer}`;
//! - `code` (HumanEval): `{prompt}|{canonical_solution}`;
//! - `text`: an empty prompt, and all of the text.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};

use super::lines::each_line;
use super::row::{self, text, Cell, Row};
use crate::error::{Error, Result};

/// The most answers to choose from. Each has a copy of the output: with any number of them, a row
/// would take the square of its size.
const MAX_CHOICES: usize = 26;

/// What the rows of a file are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `instruction`, `input` (may be absent), `output`, and `answer` where the answer is a choice.
    Instruct,
    /// `question`, `answer`.
    Gsm8k,
    /// `text`; or a file that is no JSON, a text a line.
    Text,
    /// `prompt`, `canonical_solution`, and `entry_point` and `test` where the answer can be tested.
    Code,
}

impl Format {
    /// What a row becomes: the prompt up to `|`, the answer after it.
    pub fn template(self) -> &'static str {
        match self {
            Self::Instruct => {
                "Below is an instruction that describes a task. Write a response that appropriately completes \
                 the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n|{output}"
            }
            Self::Gsm8k => "Question: {question}\nAnswer:| {answer}",
            Self::Code => "{prompt}|{canonical_solution}",
            Self::Text => "|{text}",
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "instruct" => Ok(Self::Instruct),
            "gsm8k" => Ok(Self::Gsm8k),
            "text" => Ok(Self::Text),
            "code" => Ok(Self::Code),
            other => {
                Err(Error::config("format", format!("expected instruct, gsm8k, text or code, got {other}")))
            }
        }
    }
}

/// A prompt and the answer to learn.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prompted {
    /// What is given.
    pub prompt: String,
    /// What is to follow it.
    pub answer: String,
    /// The answers to choose from, where the instruction lists them.
    pub choices: Option<Choices>,
    /// What tests a generated answer, where it completes a program.
    pub tests: Option<ProgramTests>,
}

impl Prompted {
    /// The choices of the row at place `i`.
    ///
    /// # Errors
    /// If it has none; the error counts rows from 1.
    pub(crate) fn choices(&self, i: usize) -> Result<&Choices> {
        let none = || Error::config("data", format!("row {} has no choices (no `Answer format:`)", i + 1));
        self.choices.as_ref().ok_or_else(none)
    }

    /// The tests of the row at place `i`.
    ///
    /// # Errors
    /// If it has none; the error counts rows from 1.
    pub(crate) fn tests(&self, i: usize) -> Result<&ProgramTests> {
        let none = || Error::config("data", format!("row {} has no tests (`entry_point`, `test`)", i + 1));
        self.tests.as_ref().ok_or_else(none)
    }
}

/// How a completed program is tested, as in HumanEval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramTests {
    /// The name of the function that the prompt begins.
    pub entry_point: String,
    /// A program that defines `check(candidate)`.
    pub test: String,
}

/// The answers of a multiple-choice question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    /// Their names, such as `answer1`, in the order of the instruction.
    pub names: Vec<String>,
    /// What would follow the prompt for each of them.
    pub answers: Vec<String>,
    /// Which is right.
    pub correct: usize,
}

/// Reads a file of JSON lines, or of one JSON array, or for [`Format::Text`] of plain lines.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, holds no row, or a row is not an object with the
/// format's fields; the error names the line, or the record of an array.
pub fn read(path: &Path, format: Format) -> Result<Vec<Prompted>> {
    let file = File::open(path).map_err(Error::io(path))?;
    read_from(file, path, format)
}

/// [`read`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(mut source: impl Read, path: &Path, format: Format) -> Result<Vec<Prompted>> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return Err(Error::format(path, "it is compressed by gzip: give the file that gunzip makes of it"));
    }
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace() && !matches!(byte, 0xEF | 0xBB | 0xBF));
    let mut rows = Vec::new();
    match first {
        Some(b'[') if format != Format::Text => {
            let mut json = serde_json::Deserializer::from_slice(&bytes);
            let read = Records(format).deserialize(&mut json).and_then(|rows| json.end().map(|()| rows));
            let read = read
                .map_err(|e| Error::format_at(path, e.line(), format!("not a JSON array of objects: {e}")))?;
            rows = read.map_err(|reason| Error::format(path, reason))?;
        }
        first => each_line(bytes.as_slice(), path, |number, line| {
            if line.trim().is_empty() {
                return Ok(());
            }
            let row = if format == Format::Text && first != Some(&b'{') {
                Ok(Prompted { answer: line.to_string(), ..Prompted::default() })
            } else {
                row::parse(line).and_then(|record| prompted(&record, format))
            };
            rows.push(row.map_err(|reason| Error::format_at(path, number, reason))?);
            Ok(())
        })?,
    }
    if rows.is_empty() {
        return Err(Error::format(path, "no examples"));
    }
    Ok(rows)
}

/// The records of a JSON array, or what is wrong with the first of them that is. One record at a time
/// is in memory.
struct Records(Format);

impl<'de> DeserializeSeed<'de> for Records {
    type Value = std::result::Result<Vec<Prompted>, String>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Records {
    type Value = std::result::Result<Vec<Prompted>, String>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut records: A) -> std::result::Result<Self::Value, A::Error> {
        let mut rows = Vec::new();
        while let Some(record) = records.next_element::<Row>()? {
            match prompted(&record, self.0) {
                Ok(row) => rows.push(row),
                Err(reason) => {
                    // A file that is no JSON further down is told as such.
                    while records.next_element::<IgnoredAny>()?.is_some() {}
                    return Ok(Err(format!("record {}: {reason}", rows.len() + 1)));
                }
            }
        }
        Ok(Ok(rows))
    }
}

/// The prompt of an instruction in Alpaca's template.
pub fn instruction_prompt(instruction: &str, input: &str) -> String {
    let (context, input) = if input.trim().is_empty() {
        ("", String::new())
    } else {
        (", paired with an input that provides further context", format!("### Input:\n{input}\n\n"))
    };
    format!(
        "Below is an instruction that describes a task{context}. Write a response that appropriately \
         completes the request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
    )
}

fn prompted(row: &Row, format: Format) -> std::result::Result<Prompted, String> {
    let (prompt, answer) = match format {
        Format::Instruct => {
            let given = row.get("input").is_some_and(|input| *input != Cell::Null);
            let input = if given { text(row, "input")? } else { "" };
            let instruction = text(row, "instruction")?;
            (instruction_prompt(instruction, input), text(row, "output")?.to_string())
        }
        Format::Gsm8k => {
            (format!("Question: {}\nAnswer:", text(row, "question")?), format!(" {}", text(row, "answer")?))
        }
        Format::Code => (text(row, "prompt")?.to_string(), text(row, "canonical_solution")?.to_string()),
        Format::Text => (String::new(), text(row, "text")?.to_string()),
    };
    if answer.trim().is_empty() {
        return Err("the answer is empty".to_string());
    }
    let choices = match format {
        Format::Instruct if row.contains_key("answer") => choices(row, &answer)?,
        _ => None,
    };
    let tests = match format {
        Format::Code if row.contains_key("test") => Some(tests(row)?),
        _ => None,
    };
    Ok(Prompted { prompt, answer, choices, tests })
}

/// The tests of a program.
fn tests(row: &Row) -> std::result::Result<ProgramTests, String> {
    let (entry_point, test) = (text(row, "entry_point")?.to_string(), text(row, "test")?.to_string());
    let mut letters = entry_point.chars();
    let head = letters.next().is_some_and(|c| c.is_alphabetic() || c == '_');
    if !head || !letters.all(|c| c.is_alphanumeric() || c == '_') {
        return Err(format!("field \"entry_point\" is no function's name: {entry_point:?}"));
    }
    Ok(ProgramTests { entry_point, test })
}

/// The choices that an instruction lists after `Answer format:`, each put where the output has the
/// right one.
fn choices(row: &Row, output: &str) -> std::result::Result<Option<Choices>, String> {
    let instruction = text(row, "instruction")?;
    let Some((_, list)) = instruction.rsplit_once("Answer format:") else {
        return Ok(None);
    };
    let count = list.split('/').count();
    if count > MAX_CHOICES {
        return Err(format!("{count} choices, expected at most {MAX_CHOICES}"));
    }
    let names: Vec<String> = list.trim().split('/').map(|name| name.trim().to_string()).collect();
    let answer = text(row, "answer")?.trim();
    let Some(correct) = names.iter().position(|name| name == answer) else {
        return Err(format!("answer {answer:?} is none of the choices {}", names.join("/")));
    };
    let Some(stem) = output.trim_end().strip_suffix(answer) else {
        return Err(format!("the output does not end with the answer {answer:?}"));
    };
    let answers = names.iter().map(|name| format!("{stem}{name}")).collect();
    Ok(Some(Choices { names, answers, correct }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHOICE: &str = r#"{"instruction": "Which?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "input": "", "output": "the correct answer is answer2", "answer": "answer2"}"#;

    #[test]
    fn more_choices_than_letters_are_refused() {
        let failure = |count: usize| {
            let row = CHOICE.replace("answer1/answer2", &format!("{}answer2", "a/".repeat(count - 1)));
            read_from(row.replace('\n', " ").as_bytes(), Path::new("x.json"), Format::Instruct).err()
        };
        assert!(failure(26).is_none());
        let error = failure(27).unwrap().to_string();
        assert!(error.starts_with("x.json, line 1: 27 choices, expected at most 26"), "{error}");
    }

    const PROGRAM: &str = r#"{"prompt": "def f():\n", "canonical_solution": "    pass",
        "entry_point": "NAME", "test": "check = print"}"#;

    fn one(format: Format, text: &str) -> Result<Vec<Prompted>> {
        read_from(text.as_bytes(), Path::new("x.json"), format)
    }

    #[test]
    fn every_format_has_its_template() -> Result<()> {
        let rows = one(Format::Gsm8k, r#"{"question": "1+1?", "answer": "It is 2\n#### 2"}"#)?;
        assert_eq!(
            (rows[0].prompt.as_str(), rows[0].answer.as_str()),
            ("Question: 1+1?\nAnswer:", " It is 2\n#### 2")
        );
        let rows = one(Format::Code, r#"{"prompt": "def f():\n", "canonical_solution": "    pass"}"#)?;
        assert_eq!((rows[0].prompt.as_str(), rows[0].answer.as_str()), ("def f():\n", "    pass"));
        assert_eq!(rows[0].tests, None);
        let tested = PROGRAM.replace("NAME", "f").replace('\n', "");
        let tests = one(Format::Code, &tested)?.swap_remove(0).tests;
        assert_eq!(tests, Some(ProgramTests { entry_point: "f".into(), test: "check = print".into() }));
        for source in ["one\n\ntwo\r\n", "{\"text\": \"one\"}\n{\"text\": \"two\"}"] {
            let rows = one(Format::Text, source)?;
            assert_eq!(rows.iter().map(|row| row.answer.as_str()).collect::<Vec<_>>(), ["one", "two"]);
            assert!(rows.iter().all(|row| row.prompt.is_empty()));
        }
        // A text may begin with a bracket.
        assert_eq!(one(Format::Text, "[1] a footnote")?[0].answer, "[1] a footnote");
        let rows = one(Format::Instruct, &format!("[{CHOICE}]"))?;
        assert!(rows[0].prompt.starts_with("Below is an instruction that describes a task. Write"));
        assert!(rows[0].prompt.ends_with("Answer format: answer1/answer2\n\n### Response:\n"));
        let choices = rows[0].choices.clone().unwrap();
        assert_eq!(choices.answers, ["the correct answer is answer1", "the correct answer is answer2"]);
        assert_eq!((choices.names[1].as_str(), choices.correct), ("answer2", 1));
        let null = one(Format::Instruct, r#"{"instruction": "Sing.", "input": null, "output": "la"}"#)?;
        assert_eq!(null[0].prompt, instruction_prompt("Sing.", ""));
        let with_input = instruction_prompt("Add.", "1 2");
        assert!(with_input.contains("paired with an input") && with_input.contains("### Input:\n1 2\n\n###"));
        Ok(())
    }

    #[test]
    fn errors_name_the_line_or_the_record() {
        let fails = |format, text: &str| one(format, text).unwrap_err().to_string();
        let good = r#"{"question": "q", "answer": "a"}"#;
        let cases = [
            (
                fails(Format::Gsm8k, &format!("{good}\n{{\"question\": 1}}")),
                "x.json, line 2: field \"question\"",
            ),
            (fails(Format::Gsm8k, &format!("{good}\n{{")), "x.json, line 2: not a JSON object"),
            (
                fails(Format::Gsm8k, &format!("[{good}, {{\"question\": \"q\"}}]")),
                "record 2: no field \"answer\"",
            ),
            (fails(Format::Gsm8k, &format!("[{good},\n 3]")), "x.json, line 2: not a JSON array"),
            (fails(Format::Gsm8k, &format!("[{good}")), "not a JSON array"),
            (fails(Format::Text, "\n \n"), "no examples"),
            (fails(Format::Gsm8k, "[]"), "no examples"),
            (fails(Format::Text, "{\"text\": \" \"}"), "line 1: the answer is empty"),
            (
                fails(Format::Instruct, &CHOICE.replace("\"answer2\"}", "\"b\"}").replace('\n', "")),
                "none of the choices",
            ),
            (
                fails(Format::Code, &PROGRAM.replace("NAME", "f(); import os").replace("\n       ", "")),
                "line 1: field \"entry_point\" is no function's name",
            ),
            (
                fails(Format::Instruct, &CHOICE.replace("is answer2", "is it").replace('\n', "")),
                "does not end with the answer",
            ),
        ];
        for (message, expected) in cases {
            assert!(message.contains(expected), "{expected}: {message}");
        }
        let bytes =
            |bytes: &[u8]| read_from(bytes, Path::new("x.json"), Format::Code).unwrap_err().to_string();
        assert!(bytes(&[0x1f, 0x8b, 8, 0]).contains("x.json: it is compressed by gzip"));
        assert!(bytes(b"{\"prompt\": \"\xff\"}").contains("x.json, line 1: not UTF-8"));
        assert!(bytes(b"[{\"prompt\": \"\xff\"}]").contains("x.json, line 1: not a JSON array"));
        assert!("chat".parse::<Format>().unwrap_err().to_string().contains("invalid format"));
        assert!(read(Path::new("no/such"), Format::Text).unwrap_err().to_string().contains("no/such"));
    }

    #[test]
    fn the_authors_files_are_read() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let Some(dir) = here.ancestors().skip(1).map(|up| up.join("shared/data")).find(|p| p.is_dir()) else {
            crate::testing::skipped("no shared/data beside the crate");
            return;
        };
        for (file, format, count, names) in [
            ("commonsense/piqa/test.json", Format::Instruct, 1838, 2),
            ("commonsense/winogrande/test.json", Format::Instruct, 1267, 2),
            ("commonsense/openbookqa/train.json", Format::Instruct, 4957, 4),
            ("commonsense/ARC-Easy/test.json", Format::Instruct, 2376, 3),
            ("gsm8k/test.jsonl", Format::Gsm8k, 1319, 0),
        ] {
            let rows = read(&dir.join(file), format).unwrap();
            assert_eq!(rows.len(), count, "{file}");
            for row in &rows {
                let Some(choices) = &row.choices else {
                    assert_eq!(names, 0);
                    continue;
                };
                assert!(choices.names.len() >= names, "{file}: {:?}", choices.names);
                assert_eq!(choices.answers[choices.correct], row.answer);
            }
        }
    }
}
