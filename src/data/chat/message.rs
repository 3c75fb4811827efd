//! A row of chat data as turns: which fields it may have, and which turns are learnt.

use minijinja::value::{Value, ValueKind};

use crate::data::lines::excerpt;

/// The turns of a row up to the last one that is learnt, as a chat template takes them.
#[derive(Debug, Clone)]
pub(super) struct Conversation {
    /// Objects with `role` and `content`, and what else the row has for a turn, in the order of its keys.
    pub messages: Vec<Value>,
    /// The descriptions of tools, or none.
    pub tools: Value,
    /// The turns to learn, ascending, at least one.
    pub learnt: Vec<usize>,
}

/// The roles, and the names that ShareGPT has for them.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
const SPEAKERS: [(&str, &str); 4] =
    [("human", "user"), ("gpt", "assistant"), ("system", "system"), ("tool", "tool")];

type Read<T> = std::result::Result<T, String>;

/// Reads the conversation of a row: `messages`; `conversations` with `from` and `value`, as in ShareGPT's
/// data; or `prompt` and `completion` as lists of messages, as TRL has them, of which only the completion is
/// learnt. `None` if no turn is to be learnt.
pub(super) fn conversation(row: &Value) -> Read<Option<Conversation>> {
    let (mut messages, first) = all_turns(row, true)?;
    let mut learnt: Vec<usize> = (first..messages.len()).filter(|turn| is_learnt(&messages[*turn])).collect();
    let Some(last) = learnt.last() else { return Ok(None) };
    messages.truncate(last + 1);
    if begin_with_system(row, &mut messages)? {
        learnt.iter_mut().for_each(|turn| *turn += 1);
    }
    Ok(Some(Conversation { messages, tools: tools(row)?, learnt }))
}

/// Reads the turns of a row that the assistant is to answer, and the tools: without the turns of the assistant
/// at their end, and without a `completion`.
pub(super) fn question(row: &Value) -> Read<(Vec<Value>, Value)> {
    let (mut messages, first) = all_turns(row, false)?;
    if field(row, "messages").or(field(row, "conversations")).is_none() {
        messages.truncate(first);
    }
    let asks = |turn: &Value| turn.get_attr("role").is_ok_and(|role| role.as_str() != Some("assistant"));
    messages.truncate(messages.iter().rposition(asks).map_or(0, |last| last + 1));
    if messages.is_empty() {
        return Err("there is nothing to answer".to_string());
    }
    begin_with_system(row, &mut messages)?;
    Ok((messages, tools(row)?))
}

/// All turns of a row, and the index of the first that may be learnt. `answered`: a prompt needs a completion.
fn all_turns(row: &Value, answered: bool) -> Read<(Vec<Value>, usize)> {
    if row.kind() != ValueKind::Map {
        return Err(format!("expected an object, got {}", shown(row)));
    }
    for name in ["messages", "conversations"] {
        if let Some(messages) = field(row, name) {
            return Ok((turns(&messages, name)?, 0));
        }
    }
    let completion = field(row, "completion");
    let Some(prompt) = field(row, "prompt").filter(|_| completion.is_some() || !answered) else {
        let keys: Vec<String> = row.try_iter().into_iter().flatten().map(|key| key.to_string()).collect();
        let present = excerpt(&keys.join(", "));
        let expected = "\"messages\", \"conversations\", or \"prompt\" and \"completion\"";
        return Err(format!("expected {expected}; the object has: {present}"));
    };
    let mut messages = turns(&prompt, "prompt")?;
    let first = messages.len();
    if let Some(completion) = completion {
        messages.extend(turns(&completion, "completion")?);
    }
    Ok((messages, first))
}

/// Puts the text of the field `system` before the turns, and returns whether there is one.
fn begin_with_system(row: &Value, messages: &mut Vec<Value>) -> Read<bool> {
    let Some(system) = field(row, "system").filter(says) else { return Ok(false) };
    let Some(text) = system.as_str() else {
        return Err(format!("field \"system\": expected a string, got {}", shown(&system)));
    };
    if messages[0].get_attr("role").is_ok_and(|role| role.as_str() == Some("system")) {
        return Err("a field \"system\" beside a system message: remove one of them".to_string());
    }
    messages.insert(0, message("system", text));
    Ok(true)
}

/// The value of a field that is there and not null.
fn field(object: &Value, name: &str) -> Option<Value> {
    object.get_attr(name).ok().filter(|value| !value.is_undefined() && !value.is_none())
}

/// Whether a value is something else than a blank text, null or an empty list.
fn says(value: &Value) -> bool {
    value.as_str().map_or_else(|| value.is_true(), |text| !text.trim().is_empty())
}

/// A value in an error.
fn shown(value: &Value) -> String {
    match value.as_str() {
        Some(text) => format!("{:?}", excerpt(text)),
        None => value.kind().to_string(),
    }
}

fn message(role: &str, content: &str) -> Value {
    Value::from_pairs([("role", role), ("content", content)])
}

/// The turns in the field `name`.
fn turns(list: &Value, name: &str) -> Read<Vec<Value>> {
    if list.kind() != ValueKind::Seq {
        let hint = match list.kind() == ValueKind::String && ["prompt", "completion"].contains(&name) {
            true => " (texts are read in the format completion)",
            false => "",
        };
        return Err(format!("field {name:?}: expected a list of messages, got {}{hint}", shown(list)));
    }
    let turn = |(i, one): (usize, Value)| {
        let place = match name {
            "completion" => format!("message {} of the completion", i + 1),
            _ => format!("message {}", i + 1),
        };
        turn(&one).map_err(|reason| format!("{place}: {reason}"))
    };
    list.try_iter().into_iter().flatten().enumerate().map(turn).collect()
}

/// One turn, with a role that templates know and a content that is one text.
fn turn(one: &Value) -> Read<Value> {
    if one.kind() != ValueKind::Map {
        return Err(format!("expected an object with role and content, got {}", shown(one)));
    }
    if let (None, Some(from)) = (field(one, "role"), field(one, "from")) {
        let Some((_, role)) = SPEAKERS.into_iter().find(|(name, _)| from.as_str() == Some(name)) else {
            return Err(format!("from {}: expected human, gpt, system or tool", shown(&from)));
        };
        let value = field(one, "value").unwrap_or_default();
        return match value.as_str() {
            Some(text) => Ok(match field(one, "weight") {
                Some(weight) => Value::from_pairs([
                    ("role", Value::from(role)),
                    ("content", Value::from(text)),
                    ("weight", weight),
                ]),
                None => message(role, text),
            }),
            None => Err(format!("value: expected a string, got {}", shown(&value))),
        };
    }
    let Some(role) = field(one, "role") else { return Err("no role".to_string()) };
    if !ROLES.iter().any(|known| role.as_str() == Some(known)) {
        return Err(format!("role {}: expected system, user, assistant or tool", shown(&role)));
    }
    let Some(content) = field(one, "content") else {
        // The text of a turn that calls tools may be null.
        let calls = field(one, "tool_calls").is_some_and(|calls| says(&calls));
        return if calls { Ok(one.clone()) } else { Err("no content".to_string()) };
    };
    let text = text(&content)?;
    let keys = one.try_iter().into_iter().flatten();
    let pair = |key: Value| {
        let value = match key.as_str() {
            Some("content") => Value::from(text.as_str()),
            _ => one.get_item(&key).unwrap_or_default(),
        };
        (key, value)
    };
    Ok(Value::from_pairs(keys.map(pair)))
}

/// The text of a content: a string, or a list of parts that are texts.
fn text(content: &Value) -> Read<String> {
    match content.kind() {
        ValueKind::String => return Ok(content.to_string()),
        ValueKind::Seq => {}
        _ => return Err(format!("content: expected a string or a list of texts, got {}", shown(content))),
    }
    let part = |part: Value| {
        let kind = field(&part, "type").unwrap_or_default();
        match (kind.as_str(), field(&part, "text")) {
            (Some("text"), Some(text)) if text.as_str().is_some() => Ok(text.to_string()),
            _ => Err(format!("content: a part of type {}: only texts are supported", shown(&kind))),
        }
    };
    content.try_iter().into_iter().flatten().map(part).collect()
}

/// Whether a turn is to be learnt: the assistant's, with a text or calls of tools, unless its `weight` is 0,
/// as in OpenAI's data.
fn is_learnt(turn: &Value) -> bool {
    let has = |name: &str| field(turn, name).is_some_and(|value| says(&value));
    let is_ignored = field(turn, "weight").is_some_and(|weight| weight == Value::from(0));
    field(turn, "role").is_some_and(|role| role.as_str() == Some("assistant"))
        && (has("content") || has("tool_calls"))
        && !is_ignored
}

/// The descriptions of tools: a list, or its JSON as a text, as in files that cannot have nested values.
fn tools(row: &Value) -> Read<Value> {
    let none = Value::from(());
    let Some(mut tools) = field(row, "tools").filter(says) else { return Ok(none) };
    if let Some(text) = tools.as_str() {
        tools = serde_json::from_str(text).map_err(|e| format!("field \"tools\": not JSON: {e}"))?;
    }
    match tools.kind() {
        ValueKind::Seq => Ok(if tools.is_true() { tools } else { none }),
        _ => Err(format!("field \"tools\": expected a list, got {}", shown(&tools))),
    }
}
