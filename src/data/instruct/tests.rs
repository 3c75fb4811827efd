//! Tests of each format's template, and of errors that name the line.

use std::path::Path;

use super::*;
use crate::error::Result;

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
    let rows = one(Format::Completion, r#"{"prompt": "The sky is", "completion": " blue."}"#)?;
    assert_eq!((rows[0].prompt.as_str(), rows[0].answer.as_str()), ("The sky is", " blue."));
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
fn prompts_are_read_with_and_without_answers() -> Result<()> {
    let read = |format, text: &str| prompts_from(text.as_bytes(), Path::new("x.json"), format);
    for (format, bare, with_answer) in [
        (Format::Gsm8k, r#"{"question": "1+1?"}"#, r#"{"question": "1+1?", "answer": "2"}"#),
        (
            Format::Instruct,
            r#"{"instruction": "Add.", "input": "1 2"}"#,
            r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#,
        ),
        (Format::Completion, r#"{"prompt": "The sky"}"#, r#"{"prompt": "The sky", "completion": " is"}"#),
        (Format::Code, r#"{"prompt": "def f():"}"#, r#"{"prompt": "def f():", "canonical_solution": " 1"}"#),
    ] {
        let prompts = read(format, &format!("{bare}\n{with_answer}"))?;
        let learnt = &one(format, with_answer)?[0].prompt;
        assert_eq!(prompts, [learnt.as_str(); 2]);
        assert_eq!(read(format, &format!("[{bare}]"))?, [learnt.as_str()]);
    }
    assert_eq!(read(Format::Text, "one\n\n two\n")?, ["one", " two"]);
    assert_eq!(read(Format::Text, r#"{"text": "one"}"#)?, ["one"]);
    let error = read(Format::Gsm8k, "{\"question\": \"q\"}\n{}").unwrap_err().to_string();
    assert!(error.starts_with("x.json, line 2: no field \"question\""), "{error}");
    let error = read(Format::Instruct, r#"{"instruction": "a", "system": "b"}"#).unwrap_err().to_string();
    assert!(error.contains("would be lost"), "{error}");
    assert!(read(Format::Text, " \n").unwrap_err().to_string().contains("no examples"));
    Ok(())
}

#[test]
fn an_instruction_without_an_answer_is_left_out_unless_all_are() {
    let row = |output: &str| format!(r#"{{"instruction": "do", "input": "", "output": "{output}"}}"#);
    for text in [
        format!("{}\n{}\n{}", row("a"), row(" "), row("b")),
        format!("[{}, {}, {}]", row("a"), row(""), row("b")),
    ] {
        let answers: Vec<String> =
            one(Format::Instruct, &text).unwrap().into_iter().map(|row| row.answer).collect();
        assert_eq!(answers, ["a", "b"]);
    }
    let error = one(Format::Instruct, &row("")).unwrap_err().to_string();
    assert!(error.contains("every text or answer is empty"), "{error}");
}

#[test]
fn an_empty_text_or_completion_is_left_out() -> Result<()> {
    let texts = one(Format::Text, "{\"text\": \"one\"}\n{\"text\": \" \"}\n{\"text\": \"two\"}")?;
    assert_eq!(texts.iter().map(|row| row.answer.as_str()).collect::<Vec<_>>(), ["one", "two"]);
    let row = |completion: &str| format!(r#"{{"prompt": "p", "completion": "{completion}"}}"#);
    assert_eq!(one(Format::Completion, &format!("{}\n{}", row(""), row("c")))?[0].answer, "c");
    Ok(())
}

#[test]
fn an_array_is_read_as_records_in_every_format_with_and_without_a_byte_order_mark() -> Result<()> {
    let (text, question) =
        ("[{\"text\": \"one\"},\n {\"text\": \"two\"}]", "[{\"question\": \"q\", \"answer\": \"a\"}]");
    for mark in ["", "\u{feff}"] {
        let texts = one(Format::Text, &format!("{mark}{text}"))?;
        assert_eq!(texts.iter().map(|row| row.answer.as_str()).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(one(Format::Gsm8k, &format!("{mark}{question}"))?[0].answer, " a");
        assert_eq!(one(Format::Text, &format!("{mark}plain"))?[0].answer, "plain");
    }
    // A damaged array, or one of something else, is no text to learn.
    for other in [&text[..text.len() - 1], "[\"one\", \"two\"]"] {
        let error = one(Format::Text, other).unwrap_err().to_string();
        assert!(error.contains("not a JSON array of objects"), "{error}");
    }
    Ok(())
}

#[test]
fn a_sample_continues_the_prompt_or_the_first_words_of_a_text() {
    let opening = |prompt: &str, answer: &str| {
        Prompted { prompt: prompt.into(), answer: answer.into(), ..Prompted::default() }.opening().to_string()
    };
    assert_eq!(opening("Why?", " Because."), "Why?");
    assert_eq!(opening("", "  one two three four"), "one two");
    assert_eq!(opening("", "a  b c d e f g h i j k l m n o p q r"), "a  b c d e f g h");
    assert_eq!((opening("", "word"), opening("", "")), ("word".to_string(), String::new()));
    let long = "\u{6f22}".repeat(100); // no blanks, three bytes each
    assert_eq!(opening("", &long), "\u{6f22}".repeat(21));
}

#[test]
fn errors_name_the_line_or_the_record() {
    let fails = |format, text: &str| one(format, text).unwrap_err().to_string();
    let good = r#"{"question": "q", "answer": "a"}"#;
    let cases = [
        (fails(Format::Gsm8k, &format!("{good}\n{{\"question\": 1}}")), "x.json, line 2: field \"question\""),
        (fails(Format::Gsm8k, &format!("{good}\n{{")), "x.json, line 2: not a JSON object"),
        (
            fails(Format::Gsm8k, &format!("[{good}, {{\"question\": \"q\"}}]")),
            "record 2: no field \"answer\"",
        ),
        (fails(Format::Gsm8k, &format!("[{good},\n 3]")), "x.json, line 2: not a JSON array"),
        (fails(Format::Gsm8k, &format!("[{good}")), "not a JSON array"),
        (fails(Format::Text, "\n \n"), "no examples"),
        (fails(Format::Gsm8k, "[]"), "no examples"),
        (fails(Format::Text, "{\"text\": \" \"}"), "every text or answer is empty"),
        (fails(Format::Gsm8k, r#"{"question": "q", "answer": ""}"#), "line 1: the answer is empty"),
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
    let bytes = |bytes: &[u8]| read_from(bytes, Path::new("x.json"), Format::Code).unwrap_err().to_string();
    assert!(bytes(&[0x1f, 0x8b, 8, 0]).contains("x.json: it is compressed by gzip"));
    assert!(bytes(b"PAR1\x15\x04").contains("x.json: it is parquet"));
    assert!(bytes(b"{\"prompt\": \"\xff\"}").contains("x.json, line 1: not UTF-8"));
    assert!(bytes(b"[{\"prompt\": \"\xff\"}]").contains("x.json, line 1: not a JSON array"));
    assert!("chat".parse::<Format>().unwrap_err().to_string().contains("invalid format"));
    assert!(read(Path::new("no/such"), Format::Text).unwrap_err().to_string().contains("no/such"));
}

#[test]
fn a_conversation_does_not_lose_its_earlier_turns() -> Result<()> {
    let row = |more: &str| format!(r#"{{"instruction": "And then?", "input": "", "output": "la"{more}}}"#);
    for empty in ["", r#", "system": "", "history": []"#, r#", "history": null"#] {
        assert_eq!(one(Format::Instruct, &row(empty))?.len(), 1);
    }
    for (name, value) in [("history", r#"[["Sing.", "do"]]"#), ("system", r#""You sing.""#)] {
        let error = one(Format::Instruct, &row(&format!(r#", "{name}": {value}"#))).unwrap_err().to_string();
        assert!(error.contains(&format!("line 1: field \"{name}\" is not supported")), "{error}");
    }
    Ok(())
}

#[test]
fn no_format_but_text_takes_a_row_with_a_conversation_beside_its_fields() -> Result<()> {
    for (format, fields) in [
        (Format::Completion, r#""prompt": "p", "completion": "c""#),
        (Format::Gsm8k, r#""question": "q", "answer": "a""#),
        (Format::Code, r#""prompt": "p", "canonical_solution": "c""#),
    ] {
        for field in [r#""system": "You sing.""#, r#""messages": [{"role": "user", "content": "q"}]"#] {
            let error = one(format, &format!("{{{fields}, {field}}}")).unwrap_err().to_string();
            let name = field.split(':').next().unwrap();
            let expected = format!("x.json, line 1: field {name} is not supported and would be lost: read");
            assert!(error.starts_with(&expected), "{error}");
        }
    }
    // Of data sets that have a rendered conversation beside the turns.
    let rows = one(Format::Text, r#"{"text": "all of it", "messages": [{"role": "user"}]}"#)?;
    assert_eq!(rows[0].answer, "all of it");
    Ok(())
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
