//! Reads conversations from JSON lines or a JSON array.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use minijinja::value::Value;

use super::message::{conversation, question, Conversation};
use super::spans;
use super::template::{with_room, ChatTemplate};
use crate::data::causal::PromptEncoder;
use crate::data::instruct::Prompted;
use crate::data::lines::each_line;
use crate::data::records;
use crate::error::{Error, Result};

/// The rows of a file of conversations, as texts, and what became of the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversations {
    /// The rows, with the parts to learn: the turns of the assistant. The prompt is the text up to the last
    /// answer.
    pub rows: Vec<Prompted>,
    /// The conversation of each row, counted from 0 without those left out, so that rows of one conversation
    /// can stay together.
    pub conversations: Vec<usize>,
    /// The number of conversations in which the assistant says nothing, which are left out.
    pub left_out: usize,
    /// The number of conversations that became a row for each turn of the assistant, because the template
    /// writes a turn differently once others follow.
    pub split: usize,
}

/// Reads a file of JSON lines or of one JSON array. A row has `messages` with `role` (system, user, assistant
/// or tool) and `content`, and perhaps `tools`; or `conversations` with `from` (human, gpt, system or tool)
/// and `value`; or `prompt` and `completion` as lists of messages, of which the completion is learnt. A row
/// may have its system prompt in a field `system`. Turns after the last one of the assistant are left out,
/// and turns of the assistant with `weight` 0 are not learnt.
///
/// # Errors
/// If the file cannot be read, is not UTF-8 or has no row in which the assistant says something; if a row is
/// not such an object, has a role or a content that is not supported, or is refused by the template. The
/// error names the line, or the record of an array.
pub fn read(path: &Path, template: &ChatTemplate) -> Result<Conversations> {
    let file = File::open(path).map_err(Error::io(path))?;
    read_from(file, path, template)
}

/// [`read`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(source: impl Read, path: &Path, template: &ChatTemplate) -> Result<Conversations> {
    let bytes = records::bytes(source, path)?;
    with_room(|| parsed(&bytes, path, template)).map_err(Error::io(path))?
}

/// Reads the conversations of a file as prompts, for answers of the assistant: each up to its last turn that is
/// not the assistant's, rendered up to where the model answers. Rows are as for [`read`], also without answers.
///
/// # Errors
/// As [`read`], and if a row has nothing to answer.
pub fn read_prompts(path: &Path, template: &ChatTemplate) -> Result<Vec<String>> {
    let file = File::open(path).map_err(Error::io(path))?;
    prompts_from(file, path, template)
}

/// [`read_prompts`] from any source; `path` only names it in errors.
///
/// # Errors
/// As [`read_prompts`].
pub fn prompts_from(source: impl Read, path: &Path, template: &ChatTemplate) -> Result<Vec<String>> {
    let bytes = records::bytes(source, path)?;
    let read = || {
        let mut prompts = Vec::new();
        each_row(&bytes, path, |row| {
            let (messages, tools) = question(&row)?;
            prompts.push(template.render(&messages, &tools, true)?);
            Ok(())
        })?;
        match prompts.is_empty() {
            true => Err(Error::format(path, "no examples")),
            false => Ok(prompts),
        }
    };
    with_room(read).map_err(Error::io(path))?
}

/// The special tokens with which a template ends the assistant's turns, ascending: where a model that has learnt
/// them stops.
///
/// # Errors
/// If the template refuses a question with an answer, or the tokenizer fails.
pub fn turn_ends(template: &ChatTemplate, encoder: &PromptEncoder) -> Result<Vec<u32>> {
    let turn = |role: &str| Value::from_pairs([("role", role), ("content", "a")]);
    let conversation = Conversation {
        messages: vec![turn("user"), turn("assistant")],
        tools: Value::from(()),
        learnt: vec![1],
    };
    let rows = with_room(|| spans::rows(template, &conversation)).map_err(Error::io(template.path()))?;
    let rows = rows.map_err(|reason| Error::format(template.path(), reason))?;
    Ok(encoder.clone().of_rendered().encode(&rows)?.ends)
}

/// The conversations of a file with these bytes.
fn parsed(bytes: &[u8], path: &Path, template: &ChatTemplate) -> Result<Conversations> {
    let (mut read, mut count) = (Conversations::default(), 0);
    each_row(bytes, path, |row| {
        let Some(conversation) = conversation(&row)? else {
            read.left_out += 1;
            return Ok(());
        };
        let rows = spans::rows(template, &conversation)?;
        read.split += usize::from(rows.len() > 1);
        read.conversations.extend(rows.iter().map(|_| count));
        read.rows.extend(rows);
        count += 1;
        Ok(())
    })?;
    match (read.rows.len(), read.left_out) {
        (0, 0) => Err(Error::format(path, "no examples")),
        (0, _) => Err(Error::format(path, "no conversation has an answer of the assistant")),
        _ => Ok(read),
    }
}

/// Calls `keep` with every row of JSON lines or of a JSON array.
fn each_row(
    bytes: &[u8],
    path: &Path,
    mut keep: impl FnMut(Value) -> std::result::Result<(), String>,
) -> Result<()> {
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[') {
        return records::each_of_array(bytes, path, keep);
    }
    each_line(bytes, path, |number, line| {
        if line.trim().is_empty() {
            return Ok(());
        }
        let row = serde_json::from_str(line).map_err(|error| format!("not a JSON object: {error}"));
        row.and_then(&mut keep).map_err(|reason| Error::format_at(path, number, reason))
    })
}
