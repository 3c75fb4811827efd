//! Turns a row of each format into a prompt and its answer.

use std::str::FromStr;

use super::prompted::{Choices, ProgramTests, Prompted};
use crate::data::row::{says, text, Cell, Row};
use crate::error::{Error, Result};

/// Maximum number of choices. Each stores a copy of the output, so without a limit a row could take the
/// square of its size.
const MAX_CHOICES: usize = 26;

/// The format of a file's rows, with the fields it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `instruction`, `input` (optional), `output`, and `answer` if the output is one of several choices.
    Instruct,
    /// `prompt`, `completion`, as TRL has them.
    Completion,
    /// `question`, `answer`.
    Gsm8k,
    /// `text`; or a file that is not JSON, with one text per line.
    Text,
    /// `prompt`, `canonical_solution`, and `entry_point` and `test` if the answer can be tested.
    Code,
}

impl Format {
    /// The template of a row: the prompt up to `|`, the answer after it.
    pub fn template(self) -> &'static str {
        match self {
            Self::Instruct => {
                "Below is an instruction that describes a task. Write a response that appropriately completes \
                 the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n|{output}"
            }
            Self::Gsm8k => "Question: {question}\nAnswer:| {answer}",
            Self::Completion => "{prompt}|{completion}",
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
            "completion" => Ok(Self::Completion),
            "gsm8k" => Ok(Self::Gsm8k),
            "text" => Ok(Self::Text),
            "code" => Ok(Self::Code),
            other => {
                let known = "instruct, completion, gsm8k, text or code";
                Err(Error::config("format", format!("expected {known}, got {other}")))
            }
        }
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

/// Fields with which other formats store earlier turns and the system prompt of a conversation.
const OF_CONVERSATIONS: [&str; 4] = ["system", "history", "messages", "conversations"];

/// The first of these fields that says something, which only conversations read.
pub(super) fn of_conversation(row: &Row) -> Option<&'static str> {
    OF_CONVERSATIONS.into_iter().find(|name| says(row, name))
}

/// The prompt of a row; of [`Format::Text`], its text.
pub(super) fn prompt(row: &Row, format: Format) -> std::result::Result<String, String> {
    if let Some(name) = of_conversation(row).filter(|_| format != Format::Text) {
        return Err(format!(
            "field {name:?} is not supported and would be lost: read conversations in the format chat \
             (--format chat), put its text into the prompt, or remove it"
        ));
    }
    Ok(match format {
        Format::Instruct => {
            let given = row.get("input").is_some_and(|input| *input != Cell::Null);
            let input = if given { text(row, "input")? } else { "" };
            instruction_prompt(text(row, "instruction")?, input)
        }
        Format::Gsm8k => format!("Question: {}\nAnswer:", text(row, "question")?),
        Format::Completion | Format::Code => text(row, "prompt")?.to_string(),
        Format::Text => text(row, "text")?.to_string(),
    })
}

/// Converts a row into prompt and answer. Returns `None` if there is nothing to learn: for an empty text or
/// completion, or an instruction with an empty output, as Alpaca has some.
pub(super) fn prompted(row: &Row, format: Format) -> std::result::Result<Option<Prompted>, String> {
    let given = prompt(row, format)?;
    let (prompt, answer) = match format {
        Format::Instruct => (given, text(row, "output")?.to_string()),
        Format::Gsm8k => (given, format!(" {}", text(row, "answer")?)),
        Format::Completion => (given, text(row, "completion")?.to_string()),
        Format::Code => (given, text(row, "canonical_solution")?.to_string()),
        Format::Text => (String::new(), given),
    };
    if answer.trim().is_empty() {
        return match format {
            Format::Instruct | Format::Completion | Format::Text => Ok(None),
            Format::Gsm8k | Format::Code => Err("the answer is empty".to_string()),
        };
    }
    let choices = match format {
        Format::Instruct if row.contains_key("answer") => choices(row, &answer)?,
        _ => None,
    };
    let tests = match format {
        Format::Code if row.contains_key("test") => Some(tests(row)?),
        _ => None,
    };
    Ok(Some(Prompted { prompt, answer, choices, tests, learnt: None }))
}

/// Reads the tests of a program.
fn tests(row: &Row) -> std::result::Result<ProgramTests, String> {
    let (entry_point, test) = (text(row, "entry_point")?.to_string(), text(row, "test")?.to_string());
    let mut letters = entry_point.chars();
    let head = letters.next().is_some_and(|c| c.is_alphabetic() || c == '_');
    if !head || !letters.all(|c| c.is_alphanumeric() || c == '_') {
        return Err(format!("field \"entry_point\" is no function's name: {entry_point:?}"));
    }
    Ok(ProgramTests { entry_point, test })
}

/// Reads the choices that an instruction lists after `Answer format:`. The answer text of each choice is the
/// output with the right choice at its end replaced.
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
