//! The code in what an instruction-tuned model answers to a prompt of HumanEval: in a fence of Markdown, or with
//! the function's header repeated, where the benchmark expects the body alone.

use std::borrow::Cow;

use super::code::STOP;

/// Which part of a text that was generated after a prompt of HumanEval is the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CodeAnswer {
    /// All of it, up to the first of [`STOP`]: it continues the prompt, as the LM evaluation harness has it.
    #[default]
    Continuation,
    /// The code in it, for instruction-tuned models, which answer in a fence of Markdown or with the function's
    /// header once more: [`extracted`]. They generate up to their own end.
    Extracted,
}

impl CodeAnswer {
    /// What ends a text while it is generated.
    pub fn stop(self) -> &'static [&'static str] {
        match self {
            Self::Continuation => &STOP,
            Self::Extracted => &[],
        }
    }

    /// The program that a text makes of its prompt, without its tests.
    pub fn program(self, prompt: &str, text: &str, entry_point: &str) -> String {
        match self {
            Self::Continuation => format!("{prompt}{text}"),
            Self::Extracted => extracted(prompt, text, entry_point),
        }
    }
}

/// The program that an answer to `prompt` amounts to, without its tests: what defines `entry_point`, with what
/// stands before that function in the prompt (imports, helpers), or the prompt with the body that continues it.
///
/// Of several fences the first that defines the function counts, else the first. A fence that only ends is the end
/// of a prompt that began inside one.
pub fn extracted(prompt: &str, answer: &str, entry_point: &str) -> String {
    let blocks: Vec<Cow<str>> =
        fences(answer).into_iter().map(|block| at_the_margin(block, entry_point)).collect();
    let defines = |block: &&Cow<str>| definition(block, entry_point).is_some();
    let fenced = blocks.iter().find(defines).or(blocks.first());
    let open = at_the_margin(answer, entry_point);
    let code: &str = fenced.unwrap_or(&open);
    match definition(code, entry_point) {
        Some(at) => {
            // What is around a function in the open is prose.
            let own = if fenced.is_some() { code } else { &code[at..at + end_of_code(&code[at..])] };
            let before = &prompt[..definition(prompt, entry_point).unwrap_or(0)];
            format!("{before}{own}")
        }
        None => {
            let end = STOP.iter().filter_map(|stop| code.find(stop)).min().unwrap_or(code.len());
            format!("{prompt}{}", &code[..end])
        }
    }
}

/// A text that begins with the function's header somewhere to the right, moved to the margin: a tokenizer may put a
/// blank before a text, a list of Markdown indents its fences.
fn at_the_margin<'a>(code: &'a str, entry_point: &str) -> Cow<'a, str> {
    let blanks = |line: &str| line.bytes().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let Some(first) = code.lines().find(|line| !line.trim().is_empty()) else { return code.into() };
    let indent = blanks(first);
    if indent == 0 || definition(&first[indent..], entry_point).is_none() {
        return code.into();
    }
    let lines = || code.split_inclusive('\n').filter(|line| !line.trim().is_empty());
    if lines().any(|line| blanks(line) < indent) {
        // The header alone is out of its place.
        return code.replacen(first, &first[indent..], 1).into();
    }
    let moved = code.split_inclusive('\n').map(|line| &line[blanks(line).min(indent)..]);
    moved.collect::<String>().into()
}

/// The texts in the fences of Markdown. One fence that only ends makes what is before it a text.
fn fences(answer: &str) -> Vec<&str> {
    let (mut blocks, mut open, mut at) = (Vec::new(), None, 0);
    for line in answer.split_inclusive('\n') {
        let (start, end) = (at, at + line.len());
        at = end;
        let Some(info) = line.trim().strip_prefix("```") else { continue };
        match open {
            Some(from) => {
                blocks.push(&answer[from..start]);
                open = None;
            }
            // The first line of a body is indented, or follows the header's line at once.
            None if blocks.is_empty() && info.is_empty() && continues(&answer[..start]) => {
                blocks.push(&answer[..start]);
            }
            None => open = Some(end),
        }
    }
    // Cut off, or never closed.
    blocks.extend(open.map(|from| &answer[from..]));
    blocks
}

/// Whether a text goes on with the body of a function.
fn continues(text: &str) -> bool {
    let first = text.lines().find(|line| !line.trim().is_empty());
    first.is_some_and(|line| line.starts_with([' ', '\t']))
}

/// Where the line begins that defines the function, at the top level.
fn definition(code: &str, entry_point: &str) -> Option<usize> {
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        let rest = line.strip_prefix("async ").unwrap_or(line);
        let name =
            rest.strip_prefix("def ").map(str::trim_start).and_then(|rest| rest.strip_prefix(entry_point));
        if name.is_some_and(|rest| rest.trim_start().starts_with(['(', '['])) {
            return Some(at);
        }
        at += line.len();
    }
    None
}

/// Where the first line begins, after one of code, that is none at the top level.
fn end_of_code(code: &str) -> usize {
    let mut at = 0;
    for line in code.split_inclusive('\n') {
        let goes_on = line.trim().is_empty()
            || line.starts_with([' ', '\t', '#', '@', ')', ']', '}'])
            || ["def ", "async def ", "class ", "import ", "from "].iter().any(|word| line.starts_with(word));
        if !goes_on {
            return at;
        }
        at += line.len();
    }
    at
}

#[cfg(test)]
mod tests {
    use super::super::code::passing;
    use super::super::sandbox::{Limits, Sandbox};
    use super::*;
    use crate::data::instruct::ProgramTests;

    const PROMPT: &str =
        "import math\n\ndef helper(x):\n    return x\n\ndef add(a, b):\n    \"\"\"Sum.\"\"\"\n";
    const BODY: &str = "    return a + b\n";
    const WHOLE: &str = "def add(a, b):\n    return a + b\n";

    fn of(answer: &str) -> String {
        extracted(PROMPT, answer, "add")
    }

    #[test]
    fn a_body_continues_its_prompt_fenced_or_not() {
        let expected = format!("{PROMPT}{BODY}");
        for answer in [
            BODY.to_string(),
            // The prompt stood in a fence, which the answer closes.
            format!("{BODY}```\n\nThis adds two numbers.\n\n```python\nprint(add(1, 2))\n```\n"),
            format!("\n{BODY}```"),
            format!("Here is the body:\n```python\n{BODY}```\nIt adds."),
            format!("```\n{BODY}```"),
        ] {
            assert_eq!(
                of(&answer).replace(":\n\n    return", ":\n    return").replace("\"\n\n", "\"\n"),
                expected
            );
        }
        // What the harness stops at ends a body here, too.
        assert_eq!(of(&format!("{BODY}\nprint(add(1, 2))\n")), expected);
    }

    #[test]
    fn a_repeated_header_replaces_the_function_and_keeps_what_stands_before_it() {
        let before = "import math\n\ndef helper(x):\n    return x\n\n";
        for answer in [
            WHOLE.to_string(),
            format!("Sure! Here is the function:\n\n```python\n{WHOLE}```\n\nThis adds."),
            format!("```Python\n{WHOLE}\n"), // cut off
            format!("Sure:\n\n{WHOLE}\nThis function adds two numbers.\n"),
            // As public reports have it: a blank before the header, calls after it, a fence in a list.
            format!(" {WHOLE}\nprint(add(2, 3))\nprint(add(5, 7))"),
            format!("1. So:\n   ```python\n   {}   ```\n", WHOLE.replace("\n    ", "\n       ")),
            format!("{BODY}{WHOLE}"),
            format!("First install it:\n```bash\npip install x\n```\nThen:\n```python\n{WHOLE}```"),
        ] {
            let program = of(&answer);
            assert!(program.starts_with(before), "{program}");
            assert_eq!(program[before.len()..].trim_end(), WHOLE.trim_end(), "{answer}");
        }
        // Of its own imports and helpers all that is fenced is kept.
        let own = format!("from typing import List\n\n{WHOLE}");
        assert_eq!(of(&format!("```python\n{own}```")), format!("{before}{own}"));
        // Another function of a similar name is none.
        let other = "def add_all(xs):\n    return sum(xs)\n";
        assert_eq!(of(&format!("```python\n{other}```")), format!("{PROMPT}{other}"));
    }

    #[test]
    fn an_answer_without_code_is_no_panic() {
        for answer in
            ["", "```", "``````", "```\n```", "I cannot.", "\u{e9}```\n\u{e9}", "    ```\n```python"]
        {
            assert!(of(answer).starts_with("import math"), "{answer:?}");
        }
    }

    #[test]
    fn instruction_tuned_answers_pass_where_they_are_extracted_and_only_there() {
        let Ok(sandbox) = Sandbox::new("python3", Limits::default()) else {
            crate::testing::skipped("programs cannot be limited here");
            return;
        };
        let test = "def check(candidate):\n    assert candidate(1, 2) == 3\n".to_string();
        let tests = ProgramTests { entry_point: "add".to_string(), test };
        let answers = [
            format!("Sure:\n```python\n{WHOLE}```\nIt adds."),
            format!(" {WHOLE}\nprint(add(2, 3))\n"),
            format!("{BODY}```\n"),
        ];
        let passed = |answer: CodeAnswer| {
            let programs = answers.each_ref().map(|text| answer.program(PROMPT, text, "add"));
            passing(&tests, &programs, &sandbox).unwrap()
        };
        assert_eq!((passed(CodeAnswer::Extracted), passed(CodeAnswer::Continuation)), (3, 0));
    }
}
