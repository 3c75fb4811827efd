//! Finds the assistant's turns in the text of a conversation, by comparing it with the texts of its
//! beginnings.

use std::ops::Range;

use minijinja::value::Value;

use super::message::Conversation;
use super::template::ChatTemplate;
use crate::data::instruct::Prompted;

type Read<T> = std::result::Result<T, String>;

/// The rows of a conversation: one that learns all its turns; or, where the template writes a turn
/// differently once others follow (Qwen 3 drops what was thought before the last question), one row for each
/// turn.
pub(super) fn rows(template: &ChatTemplate, conversation: &Conversation) -> Read<Vec<Prompted>> {
    let Conversation { messages, tools, learnt } = conversation;
    let whole = Text { template, tools, text: template.render(messages, tools, false)? };
    let spans: Option<Vec<Range<usize>>> = learnt.iter().map(|turn| whole.turn(messages, *turn)).collect();
    if let Some(spans) = spans.filter(|spans| spans.windows(2).all(|pair| pair[0].end <= pair[1].start)) {
        return Ok(whole.row(spans).into_iter().collect());
    }
    let row = |turn: &usize| {
        let messages = &messages[..=*turn];
        let whole = Text { template, tools, text: template.render(messages, tools, false)? };
        let unclear =
            || format!("message {}: in the chat template's text, nothing tells where it begins", turn + 1);
        let span = whole.turn(messages, *turn).ok_or_else(unclear)?;
        Ok(whole.row(vec![span]))
    };
    learnt.iter().map(row).filter_map(Read::transpose).collect()
}

/// The text of a conversation.
struct Text<'a> {
    template: &'a ChatTemplate,
    tools: &'a Value,
    text: String,
}

impl Text<'_> {
    /// The bytes of a turn: from where the model is asked to go on (or, where the template has no such place,
    /// from where the turns before it end) up to the end of the text with this turn. `None` if the text does
    /// not begin like those of its beginnings.
    fn turn(&self, messages: &[Value], turn: usize) -> Option<Range<usize>> {
        let before = &messages[..turn];
        let start = match (self.beginning(before, true), before) {
            // Before the first turn, nothing is no place where the model is asked.
            (Some(0) | None, []) => self.first_content(&messages[0])?,
            (Some(start), _) => start,
            (None, _) => self.beginning(before, false)?,
        };
        let end = match turn + 1 == messages.len() {
            true => self.text.len(),
            false => self.beginning(&messages[..=turn], false)?,
        };
        (start < end).then_some(start..end)
    }

    /// The length of the text of these first turns, if the whole text begins with it. Templates may refuse
    /// what is no conversation yet.
    fn beginning(&self, messages: &[Value], generation: bool) -> Option<usize> {
        let text = self.template.render(messages, self.tools, generation).ok()?;
        self.text.starts_with(&text).then_some(text.len())
    }

    /// Where the content of the first turn begins: as far as texts with other contents agree. Templates refuse a
    /// conversation without turns, or write it without its start.
    fn first_content(&self, first: &Value) -> Option<usize> {
        let with = |content: &str| {
            let pair = |key: Value| match key.as_str() {
                Some("content") => (key, Value::from(content)),
                _ => (key.clone(), first.get_item(&key).unwrap_or_default()),
            };
            let other = Value::from_pairs(first.try_iter().ok()?.map(pair));
            self.template.render(&[other], self.tools, false).ok()
        };
        let (one, other) = (with("a")?, with("b")?);
        let shared = one.bytes().zip(other.bytes()).take_while(|(one, other)| one == other).count();
        (shared < one.len() && self.text.starts_with(one.get(..shared)?)).then_some(shared)
    }

    /// The row that learns these parts: the last is its answer, and what stands before it the prompt.
    fn row(self, spans: Vec<Range<usize>>) -> Option<Prompted> {
        let start = spans.last()?.start;
        let (prompt, answer) = self.text.split_at(start);
        let (prompt, answer) = (prompt.to_string(), answer.to_string());
        Some(Prompted { prompt, answer, learnt: Some(spans), ..Prompted::default() })
    }
}
