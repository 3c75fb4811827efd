//! Extracts and compares answers of GSM8K as the LM evaluation harness does (its task `gsm8k`).

use std::sync::LazyLock;

use fancy_regex::Regex;

/// The harness's stop texts.
pub const STOP: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];

/// The mark before the number of an answer.
pub const MARK: &str = "#### ";

/// The value of an answer without a match.
const INVALID: &str = "[invalid]";

static STRICT: LazyLock<Regex> = LazyLock::new(|| constant(r"#### (\-?[0-9\.\,]+)"));
static FLEXIBLE: LazyLock<Regex> = LazyLock::new(|| constant(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"));
static BEFORE_THE_NUMBER: LazyLock<Regex> = LazyLock::new(|| constant(r"(?s).*#### "));

/// Compiles a pattern of this file.
fn constant(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a test compiles every pattern of this file")
}

/// Returns the number after the first `#### `, or `[invalid]`.
pub fn strict_match(text: &str) -> String {
    let captures = STRICT.captures(text).ok().flatten();
    let number = captures.as_ref().and_then(|captures| captures.get(1));
    number.map_or(INVALID, |number| number.as_str().trim()).to_string()
}

/// Returns the last match that looks like a number, or `[invalid]`.
pub fn flexible_extract(text: &str) -> String {
    let last = FLEXIBLE.find_iter(text).filter_map(Result::ok).last();
    last.map_or(INVALID, |number| number.as_str().trim()).to_string()
}

/// Whether an extracted answer equals the reference, the data's whole `answer`. Ignores thousands separators,
/// dollar signs, everything up to `#### `, a final full stop and letter case.
pub fn exact_match(extracted: &str, reference: &str) -> bool {
    normal(extracted) == normal(reference)
}

fn normal(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = BEFORE_THE_NUMBER.replace_all(&text, "");
    text.strip_suffix('.').unwrap_or(&text).to_lowercase()
}

/// Returns a generated text up to the first of [`STOP`].
pub fn truncated(text: &str) -> &str {
    let end = STOP.iter().filter_map(|stop| text.find(stop)).min();
    &text[..end.unwrap_or(text.len())]
}

/// Whether the strictly and the flexibly extracted answers of a text are right.
pub(super) fn rights(text: &str, reference: &str) -> [bool; 2] {
    let text = truncated(text);
    [strict_match(text), flexible_extract(text)].map(|answer| exact_match(&answer, reference))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extraction_is_that_of_the_harness() {
        // Expected values from the harness's own expressions and filters.
        for (text, strict, flexible) in [
            ("2+2 = 4\n#### 4", "4", "4"),
            ("#### -1,234.50.", "-1,234.50.", "-1,234.50."),
            ("#### 12\nQ\n#### 13", "12", "13"),
            ("####4", INVALID, "4"),
            ("#### $5", INVALID, "$5"),
            ("It costs $18.", INVALID, "$18."),
            ("She has 3 apples and 7 pears", INVALID, "7"),
            ("so -5", INVALID, "-5"),
            ("ten, or more.", INVALID, INVALID),
            ("a list..., 6", INVALID, "6"),
            ("he said 6 ...", INVALID, "..."),
            ("", INVALID, INVALID),
            ("1/2", INVALID, "2"),
        ] {
            assert_eq!(
                (strict_match(text).as_str(), flexible_extract(text).as_str()),
                (strict, flexible),
                "{text:?}"
            );
        }
    }

    #[test]
    fn numbers_are_compared_without_their_dress() {
        let reference = "She pays 1000+234 = $<<1000+234=1234>>1,234.\n#### 1,234";
        for right in ["1234", "1,234", "$1234.", "#### 1,234", "$1,234."] {
            assert!(exact_match(right, reference), "{right}");
        }
        for wrong in ["1234.0", "234", INVALID, "", "1234.."] {
            assert!(!exact_match(wrong, reference), "{wrong}");
        }
    }

    #[test]
    fn texts_end_where_the_next_question_begins() {
        for (text, reference, right) in [
            ("it is 5\n#### 5\nQuestion: 1+1? #### 2", "#### 5", [true, true]),
            ("maybe 7", "#### 7", [false, true]),
            ("no", "#### 1", [false, false]),
        ] {
            assert_eq!(rights(text, reference), right, "{text}");
        }
    }
}
