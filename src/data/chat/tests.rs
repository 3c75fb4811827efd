//! Tests of conversations in the shapes of known templates: what is learnt of them, in bytes and in tokens.

use std::path::Path;

use serde_json::{json, Value};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::*;
use crate::data::causal::PromptEncoder;
use crate::data::instruct::Prompted;
use crate::error::Result;

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = \
    '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim \
    + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}\
    {% endfor %}{% if add_generation_prompt %}\
    {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
    {{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('Conversation roles must alternate') }}{% endif %}\
    {% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
    {% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] \
    | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
    {{ raise_exception('Conversation roles must alternate') }}{% endif %}\
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
    {% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}\
    {% endfor %}";

/// As Qwen 3's: only the last turn has a place for thoughts.
const THINKING: &str =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}\
    <think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

fn template(text: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::parse(text, Path::new("chat_template.jinja"), &tokens).unwrap()
}

fn read_rows(text: &str, rows: &str) -> Result<Conversations> {
    read_from(rows.as_bytes(), Path::new("x.jsonl"), &template(text))
}

/// A row in which user and assistant take turns.
fn turns(texts: &[&str]) -> String {
    let role = |i: usize| if i.is_multiple_of(2) { "user" } else { "assistant" };
    let messages: Vec<Value> =
        texts.iter().enumerate().map(|(i, text)| json!({"role": role(i), "content": text})).collect();
    json!({ "messages": messages }).to_string()
}

/// The text of a row, and the parts that are learnt of it.
fn parts(row: &Prompted) -> (String, Vec<String>) {
    let text = format!("{}{}", row.prompt, row.answer);
    let parts = row.learnt.as_ref().unwrap().iter().map(|part| text[part.clone()].to_string()).collect();
    (text, parts)
}

#[test]
fn the_turns_of_the_assistant_are_found_in_the_text_of_every_template() -> Result<()> {
    let chat = turns(&["q", "a", "r", "b"]);
    for (name, given, prompt, learnt) in [
        (
            CHATML,
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n\
             <|im_start|>user\nr<|im_end|>\n",
            "<|im_start|>assistant\n",
            ["a<|im_end|>\n", "b<|im_end|>\n"],
        ),
        (
            LLAMA_3,
            "<s><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>\
             <|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>\
             <|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ["a<|eot_id|>", "b<|eot_id|>"],
        ),
        (
            GEMMA,
            "<s><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n\
             <start_of_turn>user\nr<end_of_turn>\n",
            "<start_of_turn>model\n",
            ["a<end_of_turn>\n", "b<end_of_turn>\n"],
        ),
        (MISTRAL, "<s>[INST] q [/INST] a</s>[INST] r [/INST]", "", [" a</s>", " b</s>"]),
    ] {
        let read = read_rows(name, &chat)?;
        assert_eq!((read.rows.len(), read.split, read.left_out), (1, 0, 0), "{name}");
        let row = &read.rows[0];
        assert_eq!(row.prompt, format!("{given}{prompt}"));
        assert_eq!((row.answer.as_str(), parts(row).1), (learnt[1], learnt.map(String::from).to_vec()));
    }
    assert_eq!(template(CHATML).prompt("q")?, "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n");
    Ok(())
}

#[test]
fn a_conversation_may_begin_with_the_assistant() -> Result<()> {
    let chat = json!({"messages": [
        {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "b"},
    ]});
    // Many templates look at the first turn.
    let looks = format!("{{% if messages[0]['role'] == 'system' %}}!{{% endif %}}{CHATML}");
    for (name, header, ends) in [
        (CHATML, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (&looks, "<|im_start|>assistant\n", "<|im_end|>\n"),
        (LLAMA_3, "<s><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    ] {
        let rows = read_rows(name, &chat.to_string())?.rows;
        let (text, learnt) = parts(&rows[0]);
        assert!(rows.len() == 1 && text.starts_with(&format!("{header}a{ends}")), "{text}");
        assert_eq!(learnt, [format!("a{ends}"), format!("b{ends}")], "{name}");
    }
    // What the template writes for the model to begin with is learnt in the first turn as in the others.
    let rows = read_rows(THINKING, &chat.to_string())?.rows;
    let thought = |text: &str| vec![format!("<think>\n\n</think>\n\n{text}<|im_end|>\n")];
    assert_eq!(rows.iter().map(|row| parts(row).1).collect::<Vec<_>>(), [thought("a"), thought("b")]);
    Ok(())
}

#[test]
fn a_prompt_ends_where_the_assistant_is_to_answer() -> Result<()> {
    let read = |row: &str| prompts_from(row.as_bytes(), Path::new("x.jsonl"), &template(CHATML));
    let asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n";
    let again = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n\
                 <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n";
    // The answers at the end, if there are any, are left to the model.
    for (texts, expected) in
        [(&["q"][..], asked), (&["q", "a"], asked), (&["q", "a", "r"], again), (&["q", "a", "r", "b"], again)]
    {
        assert_eq!(read(&turns(texts))?, [expected]);
    }
    let user = json!([{"role": "user", "content": "q"}]);
    let reply = json!([{"role": "assistant", "content": "a"}]);
    for row in [
        json!({"conversations": [{"from": "human", "value": "q"}]}),
        json!({"prompt": user}),
        json!({"prompt": user, "completion": reply}),
    ] {
        assert_eq!(read(&row.to_string())?, [asked]);
    }
    let with_system = read(&json!({"messages": user, "system": "s"}).to_string())?;
    assert_eq!(with_system, [format!("<|im_start|>system\ns<|im_end|>\n{asked}")]);
    let rows = [turns(&["q"]), json!({ "messages": reply }).to_string()].join("\n");
    let error = read(&rows).unwrap_err().to_string();
    assert!(error.contains("line 2: there is nothing to answer"), "{error}");
    assert!(read("").unwrap_err().to_string().contains("no examples"));
    Ok(())
}

#[test]
fn a_conversation_is_split_where_its_template_writes_earlier_turns_differently() -> Result<()> {
    let rows = [turns(&["q", "a", "r", "b"]), turns(&["q", "a"])].join("\n");
    let read = read_rows(THINKING, &rows)?;
    assert_eq!((read.rows.len(), read.split), (3, 1));
    assert_eq!(read.conversations, [0, 0, 1]);
    let (texts, learnt): (Vec<_>, Vec<_>) = read.rows.iter().map(parts).unzip();
    let first = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\na<|im_end|>\n";
    let second =
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n\
                  <|im_start|>assistant\n<think>\n\n</think>\n\nb<|im_end|>\n";
    assert_eq!(texts, [first, second, first]);
    let thought = |text: &str| vec![format!("<think>\n\n</think>\n\n{text}<|im_end|>\n")];
    assert_eq!(learnt, [thought("a"), thought("b"), thought("a")]);
    Ok(())
}

/// A tokenizer of words, blanks and letters of its own, which puts `<s>` before and `</s>` behind a text.
fn tokenizer() -> Tokenizer {
    let words = [
        "?",
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "user",
        "assistant",
        "\n",
        " ",
        "a",
        "b",
        "\u{e9}",
    ];
    let vocab = words.iter().enumerate().map(|(id, word)| (word.to_string(), id as u32)).collect();
    let model = WordLevel::builder().vocab(vocab).unk_token("?".into()).build().unwrap();
    let around = TemplateProcessing::builder()
        .try_single("<s> $A </s>")
        .unwrap()
        .special_tokens(vec![("<s>", 1), ("</s>", 2)])
        .build()
        .unwrap();
    let pieces = Split::new(SplitPattern::Regex(r"\w+|\s".into()), SplitDelimiterBehavior::Isolated, false);
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(pieces.unwrap())).with_post_processor(Some(around));
    let special = words[1..5].iter().map(|word| AddedToken::from(word.to_string(), true));
    tokenizer.add_special_tokens(special).unwrap();
    tokenizer
}

#[test]
fn in_tokens_both_turns_are_learnt_with_their_ends_but_without_the_newline_behind() -> Result<()> {
    let encoder = PromptEncoder::new(tokenizer(), 64, 64, [2], false)?.of_rendered();
    let read = read_rows(CHATML, &turns(&["a", "b a", "b", "\u{e9}"]))?;
    let encoded = encoder.encode(&read.rows)?;
    let row = &encoded.rows[0];
    let user = |id: u32| vec![3, 5, 7, id, 4, 7];
    let assistant = |ids: &[u32]| [&[3, 6, 7], ids, &[4, 7]].concat();
    assert_eq!(row.ids, [user(9), assistant(&[10, 8, 9]), user(10), assistant(&[11])].concat());
    let masked = |answer: usize| [vec![false; 3], vec![true; answer + 1], vec![false]].concat();
    assert_eq!(row.learnt, [vec![false; 6], masked(3), vec![false; 6], masked(1)].concat());
    assert_eq!((encoded.ends.as_slice(), encoded.cut), (&[4][..], 0));
    assert_eq!(turn_ends(&template(CHATML), &encoder)?, [4]);
    assert_eq!(encoder.length(&read.rows[0])?, row.ids.len());
    // What a model is asked to continue is the beginning of the row.
    let prompt = encoder.prompt(&read.rows[0].prompt)?;
    assert_eq!(prompt, row.ids[..row.ids.len() - 3]);
    // An encoder of other texts adds what the tokenizer adds.
    let plain = PromptEncoder::new(tokenizer(), 64, 64, [2], false)?.encode(&read.rows)?;
    assert_eq!((plain.rows[0].ids.first(), plain.rows[0].ids.last()), (Some(&1), Some(&2)));
    Ok(())
}

#[test]
fn a_rendered_text_gets_no_second_start_or_end_and_its_own_are_kept() -> Result<()> {
    let encoder = PromptEncoder::new(tokenizer(), 64, 64, [2], false)?.of_rendered();
    let read = read_rows(MISTRAL, &turns(&["a", "b"]))?;
    let encoded = encoder.encode(&read.rows)?;
    let (ids, learnt) = (&encoded.rows[0].ids, &encoded.rows[0].learnt);
    assert_eq!(
        (ids.iter().filter(|id| **id == 1).count(), ids.iter().filter(|id| **id == 2).count()),
        (1, 1)
    );
    assert_eq!((ids[0], &ids[ids.len() - 3..]), (1, &[8, 10, 2][..]));
    assert_eq!(learnt.iter().filter(|learnt| **learnt).count(), 3);
    assert_eq!(encoded.ends, [2]);
    Ok(())
}

#[test]
fn bytes_of_letters_with_several_do_not_shift_what_is_learnt() -> Result<()> {
    let read = read_rows(CHATML, &turns(&["\u{e9}\u{6f22}\u{1f600}", "\u{e9}"]))?;
    assert_eq!(parts(&read.rows[0]).1, ["\u{e9}<|im_end|>\n"]);
    let encoder = PromptEncoder::new(tokenizer(), 64, 64, None, false)?.of_rendered();
    let row = encoder.encode(&read.rows)?.rows.swap_remove(0);
    let learnt = row.ids.iter().zip(&row.learnt).filter(|(_, learnt)| **learnt).map(|(id, _)| *id);
    assert_eq!(learnt.collect::<Vec<_>>(), [11, 4]);
    Ok(())
}

#[test]
fn conversations_are_read_in_each_form_and_what_follows_the_last_answer_is_cut() -> Result<()> {
    let whole = parts(&read_rows(CHATML, &turns(&["q", "a"]))?.rows[0]);
    let turn = |role: &str, content: Value| json!({"role": role, "content": content});
    let (user, assistant) = (turn("user", json!("q")), turn("assistant", json!("a")));
    let in_parts = turn("assistant", json!([{"type": "text", "text": ""}, {"type": "text", "text": "a"}]));
    let ignored = json!({"role": "assistant", "content": "b", "weight": 0});
    for row in [
        json!({"messages": [user, assistant, user]}),
        json!({"messages": [user, in_parts, turn("assistant", json!(" "))]}),
        json!({"messages": [user, assistant, user, ignored], "system": ""}),
        json!({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        json!({"conversations": [
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"},
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "weight": 0}
        ]}),
        json!({"prompt": [user], "completion": [assistant], "messages": null}),
    ] {
        assert_eq!(parts(&read_rows(CHATML, &row.to_string())?.rows[0]), whole, "{row}");
    }
    // Of a completion, the turns in the prompt are not learnt.
    let row =
        json!({"prompt": [user, assistant, user], "completion": [assistant], "system": "s"}).to_string();
    let (text, learnt) = parts(&read_rows(CHATML, &row)?.rows[0]);
    assert!(text.starts_with("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>"), "{text}");
    assert_eq!(learnt, ["a<|im_end|>\n"]);
    let silent = json!({ "messages": [user] });
    let array = format!("[{silent}, {}, {silent}]", turns(&["q", "a"]));
    let read = read_rows(CHATML, &array)?;
    assert_eq!((read.rows.len(), read.left_out, read.conversations.as_slice()), (1, 2, &[0][..]));
    Ok(())
}

#[test]
fn tools_and_other_keys_reach_the_template_in_their_order() -> Result<()> {
    let dump = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}\n{% endfor %}";
    let calls = r#"[{"name": "f", "arguments": {"z": 1, "a": 2}}]"#;
    let call = &format!(r#"{{"role": "assistant", "tool_calls": {calls}, "content": null}}"#);
    let result = r#"{"role": "tool", "name": "f", "content": "3"}"#;
    let tools = r#"[{"name": "f", "description": "<f>"}]"#;
    let question = r#"{"role": "user", "content": "q"}"#;
    let answer = r#"{"role": "assistant", "content": "a"}"#;
    let messages = [question, call.as_str(), result, answer].join(", ");
    for told in [tools.to_string(), Value::from(tools).to_string()] {
        let read = read_rows(dump, &format!("{{\"messages\": [{messages}], \"tools\": {told}}}"))?;
        let (text, learnt) = parts(&read.rows[0]);
        assert_eq!(text, format!("{tools}{question}\n{call}\n{result}\n{answer}\n"));
        assert_eq!(learnt, [format!("{call}\n"), format!("{answer}\n")]);
    }
    Ok(())
}

#[test]
fn errors_name_the_line_and_the_message() {
    let fails = |template: &str, row: &str| {
        read_rows(template, &format!("{}\n\n{row}", turns(&["q", "a"]))).unwrap_err().to_string()
    };
    let turn = |role: &str| json!({"role": role, "content": "x"});
    let message = |third: Value| json!({ "messages": [turn("user"), turn("assistant"), third] }).to_string();
    let content = |content: Value| message(json!({"role": "user", "content": content}));
    let image = json!([{"type": "image", "url": "u"}]);
    let texts = json!({"prompt": "q", "completion": "a"});
    let tools = turns(&["q", "a"]).replace("{\"messages", "{\"tools\": 3, \"messages");
    for (row, expected) in [
        (message(turn("bot")), "message 3: role \"bot\": expected system, user, assistant or tool"),
        (message(json!({"content": "x"})), "message 3: no role"),
        (
            message(json!({"from": "bot", "value": "x"})),
            "message 3: from \"bot\": expected human, gpt, system or tool",
        ),
        (message(json!({"from": "gpt"})), "message 3: value: expected a string, got undefined"),
        (message(json!({"role": "user"})), "message 3: no content"),
        (message(json!("x")), "message 3: expected an object with role and content, got \"x\""),
        (content(json!(3)), "message 3: content: expected a string or a list of texts, got number"),
        (content(image), "message 3: content: a part of type \"image\": only texts are supported"),
        (json!({"messages": "q"}).to_string(), "field \"messages\": expected a list of messages, got \"q\""),
        (
            texts.to_string(),
            "field \"prompt\": expected a list of messages, got \"q\" (texts are read in the format \
             completion)",
        ),
        (
            json!({"question": "q"}).to_string(),
            "expected \"messages\", \"conversations\", or \"prompt\" and \"completion\"; the object has: \
             question",
        ),
        ("3".to_string(), "expected an object, got number"),
        (tools, "field \"tools\": expected a list, got number"),
    ] {
        assert_eq!(fails(CHATML, &row), format!("x.jsonl, line 3: {expected}"));
    }
    assert!(fails(CHATML, "{").starts_with("x.jsonl, line 3: not a JSON object: EOF"));
    let refused = "the chat template refuses it: System role not supported";
    let with_system = turns(&["q", "a"]).replace("[{", r#"[{"role": "system", "content": "s"}, {"#);
    assert_eq!(fails(GEMMA, &with_system), format!("x.jsonl, line 3: {refused}"));
    let array = format!("[{}, {with_system}]", turns(&["q", "a"]));
    let error = read_rows(GEMMA, &array).unwrap_err().to_string();
    assert_eq!(error, format!("x.jsonl: record 2: {refused}"));
    let twice = with_system.replace("{\"messages", "{\"system\": \"s\", \"messages");
    let expected = "a field \"system\" beside a system message: remove one of them";
    assert!(fails(CHATML, &twice).ends_with(expected));
    // A template that writes the number of turns first.
    let counted = format!("{{{{ messages | length }}}}{CHATML}");
    let error = read_rows(&counted, &turns(&["q", "a"])).unwrap_err().to_string();
    assert_eq!(
        error,
        "x.jsonl, line 1: message 2: in the chat template's text, nothing tells where it begins"
    );
    let silent = json!({"messages": [{"role": "user", "content": "q"}]}).to_string();
    assert_eq!(
        read_rows(CHATML, &silent).unwrap_err().to_string(),
        "x.jsonl: no conversation has an answer of the assistant"
    );
    assert_eq!(read_rows(CHATML, "\n").unwrap_err().to_string(), "x.jsonl: no examples");
    assert!(read(Path::new("no/such"), &template(CHATML)).unwrap_err().to_string().contains("no/such"));
}
