//! A chat template, and the environment that transformers runs one in.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, ErrorKind};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::tojson::tojson;
use crate::error::{Error, Result};
use crate::models::chat_template::{find, special_tokens};
use crate::models::hub::ModelFiles;
use crate::util::json;

/// The most work for one text: instructions, and pieces of 64 bytes. A template comes from strangers and may
/// loop without end; real ones need some hundred instructions for a message. It also bounds the memory (64
/// MB).
const FUEL: u64 = 1_000_000;

/// The stack of the thread that renders, in bytes. Within [`FUEL`], a template can nest values so deeply that
/// their release, which recurses, overflows an ordinary stack and ends the process; here it needs less than
/// half. Only pages in use take memory.
const STACK: usize = 64 << 20;

const NAME: &str = "chat template";

/// The Jinja program that turns a conversation into the text that a model was trained on.
///
/// ```
/// use monteclora::data::chat::ChatTemplate;
///
/// let text = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}\
///             {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
/// let template = ChatTemplate::parse(text, "chat_template.jinja".as_ref(), &[("eos_token", "</s>")])?;
/// assert_eq!(template.prompt("Hello.")?, "<|user|>Hello.</s><|assistant|>");
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// The texts of the special tokens, by the names that templates use.
    tokens: BTreeMap<String, String>,
    path: PathBuf,
    text: Arc<str>,
}

impl ChatTemplate {
    /// The chat template of a model: `chat_template.jinja`, else that of `tokenizer_config.json` (the one
    /// named `default` of several), of `chat_template.json` or of the GGUF file; with the special tokens of
    /// the same files.
    ///
    /// # Errors
    /// If the model has none, or a file is malformed or not a Jinja template; the error names the file and
    /// the line.
    pub fn of_model(files: &ModelFiles) -> Result<Self> {
        let Some(found) = find(files)? else {
            let config = files.config_path();
            let model = if files.gguf().is_some() { config } else { config.parent().unwrap_or(config) };
            return Err(Error::format(model, "it has no chat template: give one (--chat-template FILE)"));
        };
        Self::compile(&found.text, found.path, found.field, special_tokens(files)?)
    }

    /// The chat template in the file `path`, with the special tokens of a model.
    ///
    /// # Errors
    /// If a file cannot be read or is malformed; the error names the file and the line.
    pub fn read(path: &Path, files: &ModelFiles) -> Result<Self> {
        Self::compile(&json::read_config(path)?, path.to_path_buf(), None, special_tokens(files)?)
    }

    /// The chat template `text`; `path` only names it in errors. `tokens` are the special tokens that it may
    /// write: `bos_token`, `eos_token`, `pad_token` and `unk_token` with their texts.
    ///
    /// # Errors
    /// If it is not a Jinja template; the error names the line.
    pub fn parse(text: &str, path: &Path, tokens: &[(&str, &str)]) -> Result<Self> {
        let tokens = tokens.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect();
        Self::compile(text, path.to_path_buf(), None, tokens)
    }

    fn compile(
        text: &str,
        path: PathBuf,
        field: Option<&str>,
        tokens: BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut environment = environment().map_err(|error| Error::format(&path, error.to_string()))?;
        environment.add_template_owned(NAME, without_generation_tags(text)).map_err(|error| {
            let reason = format!("not a chat template: {}", described(&error));
            match (field, error.line()) {
                // Lines of the template, which is one line of its file.
                (Some(field), line) => {
                    let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
                    Error::format(&path, format!("{field}{line}: {reason}"))
                }
                (None, Some(line)) => Error::format_at(&path, line, reason),
                (None, None) => Error::format(&path, reason),
            }
        })?;
        Ok(Self { environment: Arc::new(environment), tokens, path, text: text.into() })
    }

    /// The file that the template is from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The template itself.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text of a conversation that begins with this turn of the user, up to where the model answers.
    ///
    /// # Errors
    /// If the template fails, or refuses a conversation of one turn; the error names its file.
    pub fn prompt(&self, user: &str) -> Result<String> {
        let message = Value::from_pairs([("role", "user"), ("content", user)]);
        let text =
            with_room(|| self.render(&[message], &Value::from(()), true)).map_err(Error::io(&*self.path))?;
        text.map_err(|reason| Error::format(&self.path, reason))
    }

    /// The text of a conversation, with the beginning of an answer if `generation`. The error is the reason
    /// alone. To be called inside [`with_room`].
    pub(super) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        generation: bool,
    ) -> std::result::Result<String, String> {
        let none = Value::from(());
        // As transformers: what is not given is none, and not undefined.
        let given = [
            ("messages", Value::from(messages.to_vec())),
            ("tools", tools.clone()),
            ("documents", none),
            ("add_generation_prompt", generation.into()),
        ];
        let tokens = self.tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let template = self.environment.get_template(NAME).map_err(|error| error.to_string())?;
        template.render(Value::from_pairs(tokens.chain(given))).map_err(|error| why(&error))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("path", &self.path)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// Does work that renders templates, in a thread with room for any of them.
///
/// # Errors
/// If there is no thread.
pub(super) fn with_room<T: Send>(work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work)?;
        worker.join().or_else(|panic| resume_unwind(panic))
    })
}

/// The environment in which transformers renders chat templates, except for `strftime_now`: with today's date
/// in the texts, tokens and checksums would be others after midnight.
fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_debug(false); // it copies the template into each error
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    Ok(environment)
}

/// What a template says where it refuses a conversation.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(text: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, text.clone()).with_source(Refusal(text)))
}

/// Why a text could not be made.
fn why(error: &minijinja::Error) -> String {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(one) = cause {
        if let Some(Refusal(text)) = one.downcast_ref() {
            return format!("the chat template refuses it: {}", text.trim());
        }
        cause = one.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return "the chat template does more work than a conversation can need".to_string();
    }
    let line = error.line().map(|line| format!(" in its line {line}")).unwrap_or_default();
    let reason = described(error);
    let hint = match error.kind() == ErrorKind::UnknownFunction && reason.contains("strftime_now") {
        true => {
            " (today's date would change the tokens every day: give a --chat-template FILE with a fixed one)"
        }
        false => "",
    };
    format!("the chat template fails{line}: {reason}{hint}")
}

/// An error without the name and line of the template, which its reader adds.
fn described(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Replaces the tags `{% generation %}` and `{% endgeneration %}`, which mark what the assistant says for
/// transformers alone and are no Jinja, by an `if` that is always true, with the same blanks around it.
fn without_generation_tags(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.find("%}").map_or("", |end| &tag[..end]);
        let marks = ['-', '+'];
        let replaced = match inner.trim_start_matches(marks).trim_end_matches(marks).trim() {
            "generation" => inner.replacen("generation", "if true", 1),
            "endgeneration" => inner.replacen("endgeneration", "endif", 1),
            _ => {
                rest = tag;
                continue;
            }
        };
        out.push_str(&replaced);
        rest = &tag[inner.len()..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(template: &str, messages: &str) -> std::result::Result<String, String> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let template =
            ChatTemplate::parse(template, Path::new("t.jinja"), &tokens).map_err(|e| e.to_string())?;
        let messages: Vec<Value> = serde_json::from_str(messages).unwrap();
        with_room(|| template.render(&messages, &Value::from(()), false)).unwrap()
    }

    #[test]
    fn generation_tags_are_blocks_that_keep_their_dashes() {
        for (text, plain) in [
            ("a {% generation %}b{% endgeneration %}", "a {% if true %}b{% endif %}"),
            ("{%- generation -%} b {%+endgeneration-%}", "{%- if true -%} b {%+endif-%}"),
            ("{% if generation %}{% endif %}", "{% if generation %}{% endif %}"),
            ("{{ '{%' }}{% generation %}{% endgeneration %}", "{{ '{%' }}{% if true %}{% endif %}"),
            ("{% generation", "{% generation"),
        ] {
            assert_eq!(without_generation_tags(text), plain);
        }
        let text =
            "{% for m in messages %} {%- generation -%} {{ m.content }} {%- endgeneration %}\n;{% endfor %}";
        assert_eq!(rendered(text, r#"[{"content": "a"}, {"content": "b"}]"#).unwrap(), "a;b;");
    }

    #[test]
    fn a_template_runs_as_in_transformers() {
        let one = |template: &str| rendered(template, r#"[{"role": "user", "content": " <a> "}]"#);
        for (template, text) in [
            // Blocks take their line with them.
            ("{% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
            ("{{ bos_token }}{{ messages[0]['content'].strip().upper() }}", "<s><A>"),
            ("{{ messages[0].content | trim }}{{ pad_token }}", "<a>"),
            ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}", ""),
            ("{{ tools is none }} {{ strftime_now is defined }} {{ m is defined }}", "True False False"),
            ("{{ messages[0] | tojson }}", r#"{"role": "user", "content": " <a> "}"#),
            ("{% set ns = namespace(n=0) %}{% for m in [0] %}{% set ns.n = 1 %}{% endfor %}{{ ns.n }}", "1"),
            ("{%- macro f(x) -%}[{{ x }}]{%- endmacro -%}{{ f(messages | length) }}", "[1]"),
            ("{{ messages[::-1][0].role ~ messages[-1:] | length }}", "user1"),
        ] {
            assert_eq!(one(template).unwrap(), text, "{template}");
        }
    }

    #[test]
    fn a_failure_tells_its_line_and_a_refusal_its_text_alone() {
        let fails = |template: &str| rendered(template, "[]").unwrap_err();
        assert!(fails("\n{% if x %}").starts_with("t.jinja, line 2: not a chat template: syntax error: "));
        assert_eq!(
            fails("{% macro f() %}{{ raise_exception('No ' ~ 'system.') }}{% endmacro %}{{ f() }}"),
            "the chat template refuses it: No system."
        );
        assert!(fails("\n\n{{ a.b }}").starts_with("the chat template fails in its line 3: undefined value"));
        assert!(fails("{{ strftime_now('%Y') }}").contains("give a --chat-template FILE with a fixed one"));
        // Its values are nested so deeply that an ordinary stack is too small to release them.
        let nested = "{% set ns = namespace(x=0) %}{% for a in range(9999) %}{% for b in range(9999) %}\
                      {% set ns.x = namespace(x=ns.x) %}{% endfor %}{% endfor %}";
        assert_eq!(fails(nested), "the chat template does more work than a conversation can need");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}\
                       {% set x = a %}{% endfor %}{% endfor %}{% endfor %}";
        assert_eq!(fails(endless), "the chat template does more work than a conversation can need");
    }
}
