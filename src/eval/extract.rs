//! Extracts the code from an instruction-tuned model's answer to a HumanEval prompt. Such models answer in a
//! Markdown fence or repeat the function's header, while the benchmark expects the body alone.

use std::borrow::Cow;

use super::code::STOP;

/// Which part of a text generated after a HumanEval prompt is the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CodeAnswer {
    /// The whole text up to the first of [`STOP`], as a continuation of the prompt, like the LM evaluation
    /// harness.
    #[default]
    Continuation,
    /// The code in the text ([`extracted`]), for instruction-tuned models, which answer in a Markdown fence
    /// or repeat the function's header. They generate up to their own end of text.
    Extracted,
}

impl CodeAnswer {
    /// Returns the texts that end generation.
    pub fn stop(self) -> &'static [&'static str] {
        match self {
            Self::Continuation => &STOP,
            Self::Extracted => &[],
        }
    }

    /// Returns the program that a prompt and its answer make, without tests.
    pub fn program(self, prompt: &str, text: &str, entry_point: &str) -> String {
        match self {
            Self::Continuation => format!("{prompt}{text}"),
            Self::Extracted => extracted(prompt, text, entry_point),
        }
    }
}

/// Returns the program in an answer to `prompt`, without tests. If the answer defines `entry_point`, the
/// program is that code after everything that precedes the function in the prompt (imports, helpers);
/// otherwise it is the prompt continued by the answer's code.
///
/// Of several fences the first that defines the function is used, else the first. A closing fence without an
/// opening one ends a fence that began in the prompt.
pub fn extracted(prompt: &str, answer: &str, entry_point: &str) -> String {
    let blocks: Vec<Cow<str>> =
        fences(answer).into_iter().map(|block| at_the_margin(block, entry_point)).collect();
    let defines = |block: &&Cow<str>| definition(block, entry_point).is_some();
    let fenced = blocks.iter().find(defines).or(blocks.first());
    let open = at_the_margin(answer, entry_point);
    let code: &str = fenced.unwrap_or(&open);
    match definition(code, entry_point) {
        Some(at) => {
            // Outside a fence, the text around the function is prose.
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

/// Removes the indentation of a text that begins with the function's header: tokenisers may put a blank
/// before a text, and Markdown lists indent their fences.
fn at_the_margin<'a>(code: &'a str, entry_point: &str) -> Cow<'a, str> {
    let blanks = |line: &str| line.bytes().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let Some(first) = code.lines().find(|line| !line.trim().is_empty()) else { return code.into() };
    let indent = blanks(first);
    if indent == 0 || definition(&first[indent..], entry_point).is_none() {
        return code.into();
    }
    let lines = || code.split_inclusive('\n').filter(|line| !line.trim().is_empty());
    if lines().any(|line| blanks(line) < indent) {
        // Only the header is indented.
        return code.replacen(first, &first[indent..], 1).into();
    }
    let moved = code.split_inclusive('\n').map(|line| &line[blanks(line).min(indent)..]);
    moved.collect::<String>().into()
}

/// Returns the contents of the Markdown fences. A closing fence without an opening one closes a block that
/// begins at the start of the answer.
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
            // A text that begins indented is a function's body: this fence closes one that the prompt opened.
            None if blocks.is_empty() && info.is_empty() && continues(&answer[..start]) => {
                blocks.push(&answer[..start]);
            }
            None => open = Some(end),
        }
    }
    // The last fence was never closed, or the answer is cut off.
    blocks.extend(open.map(|from| &answer[from..]));
    blocks
}

/// Whether a text begins with the body of a function: its first line is indented.
fn continues(text: &str) -> bool {
    let first = text.lines().find(|line| !line.trim().is_empty());
    first.is_some_and(|line| line.starts_with([' ', '\t']))
}

/// Returns the offset of the line that defines the function at the top level.
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

/// Returns the offset of the first top-level line that is not code, in a text that begins with code.
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
            // The prompt opened a fence, which the answer closes.
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
        // The harness's stop texts end a body here, too.
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
            // As in public reports: a blank before the header, calls after it, a fence in a list.
            format!(" {WHOLE}\nprint(add(2, 3))\nprint(add(5, 7))"),
            format!("1. So:\n   ```python\n   {}   ```\n", WHOLE.replace("\n    ", "\n       ")),
            format!("{BODY}{WHOLE}"),
            format!("First install it:\n```bash\npip install x\n```\nThen:\n```python\n{WHOLE}```"),
        ] {
            let program = of(&answer);
            assert!(program.starts_with(before), "{program}");
            assert_eq!(program[before.len()..].trim_end(), WHOLE.trim_end(), "{answer}");
        }
        // Imports and helpers in the answer's fence are kept.
        let own = format!("from typing import List\n\n{WHOLE}");
        assert_eq!(of(&format!("```python\n{own}```")), format!("{before}{own}"));
        // A function whose name only begins with the entry point does not count.
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
