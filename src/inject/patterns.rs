//! Matches names, regular expressions and block numbers against the paths of a model's layers by PEFT's
//! rules, for targets and for PEFT's own files.
//!
//! Each pattern is compiled once for many paths and dropped before the next, because a compiled expression
//! takes a thousand times the memory of its text.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// A regular expression in Python's syntax, and the part of a name that it must match.
#[derive(Clone, Copy)]
pub(crate) enum Pattern<'a> {
    /// The whole name.
    Whole(&'a str),
    /// The whole name, or its end after a dot.
    End(&'a str),
    /// Consecutive segments anywhere in the name.
    Within(&'a str),
}

/// Whether each of the names matches.
pub(crate) fn matching(pattern: Pattern, names: &[&str], option: &str) -> Result<Vec<bool>> {
    if let Some(text) = pattern.without_engine() {
        return Ok(names.iter().map(|name| pattern.is_in(name, text)).collect());
    }
    let text = match pattern {
        Pattern::Whole(text) => format!("^(?:{text})$"),
        Pattern::End(text) => format!(r"^(?:.*\.)?(?:{text})$"),
        Pattern::Within(text) => format!(r"(^|.*\.){text}($|\..*)"),
    };
    let regex = compile(&text, option)?;
    names.iter().map(|name| regex.is_match(name).map_err(gave_up(&text, option))).collect()
}

/// For each path, the value of the first pattern that matches the path or its end after a dot.
pub(crate) fn first_values<'a, T: Copy>(
    patterns: impl IntoIterator<Item = (&'a str, T)>,
    paths: &[&str],
    option: &str,
) -> Result<Vec<Option<T>>> {
    let mut values = vec![None; paths.len()];
    let mut open: Vec<usize> = (0..paths.len()).collect();
    let mut left: Vec<&str> = paths.to_vec();
    for (pattern, value) in patterns {
        if open.is_empty() {
            break;
        }
        let found = matching(Pattern::End(pattern), &left, option)?;
        if found.contains(&true) {
            open.iter()
                .zip(&found)
                .filter(|(_, found)| **found)
                .for_each(|(at, _)| values[*at] = Some(value));
            open = open.into_iter().zip(found).filter(|(_, found)| !found).map(|(at, _)| at).collect();
            left = open.iter().map(|at| paths[*at]).collect();
        }
    }
    Ok(values)
}

/// The block numbers of the paths: the group `idx` of the first expression that matches in each path.
pub(crate) fn block_numbers(
    expressions: &[String],
    paths: &[&str],
    option: &str,
) -> Result<Vec<Option<usize>>> {
    let mut found = vec![None; paths.len()];
    for expression in expressions {
        let regex = compile(expression, option)?;
        for (found, path) in found.iter_mut().zip(paths).filter(|(found, _)| found.is_none()) {
            let captures = regex.captures(path).map_err(gave_up(expression, option))?;
            *found = captures.and_then(|c| c.name("idx")?.as_str().parse().ok());
        }
    }
    Ok(found)
}

/// A path, and each of its ends after a dot.
pub(crate) fn ends(path: &str) -> impl Iterator<Item = &str> {
    std::iter::once(path).chain(path.match_indices('.').map(|(dot, _)| &path[dot + 1..]))
}

/// Whether `name` is the whole path, or its end after a dot.
pub(crate) fn is_end(name: &str, path: &str) -> bool {
    ends(path).any(|end| end == name)
}

/// Turns an engine error into an error: a backtracking expression can give up, which is not "no match".
fn gave_up<'a>(text: &'a str, option: &'a str) -> impl Fn(fancy_regex::Error) -> Error + 'a {
    move |error| Error::config(option, format!("{text:?}: {error}"))
}

fn compile(pattern: &str, option: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|e| Error::config(option, format!("{pattern:?} is no regular expression: {e}")))
}

/// Whether a pattern is a plain name, as nearly all are.
pub(crate) fn is_plain(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

impl<'a> Pattern<'a> {
    /// The text, if it is a plain name, which is then compared directly: its dots match any character, the
    /// rest matches itself. So few bytes are not worth compiling an expression.
    fn without_engine(self) -> Option<&'a [u8]> {
        let (Self::Whole(text) | Self::End(text) | Self::Within(text)) = self;
        is_plain(text).then_some(text.as_bytes())
    }

    /// Whether a plain text matches `name` where the pattern may match.
    fn is_in(self, name: &str, text: &[u8]) -> bool {
        if name.is_ascii() {
            self.places(name.as_bytes(), text)
        } else {
            self.places(&name.chars().collect::<Vec<_>>(), text)
        }
    }

    /// [`Self::is_in`] for a name as bytes or as characters.
    fn places<C: Copy + PartialEq + From<u8>>(self, name: &[C], text: &[u8]) -> bool {
        let (dot, line_end) = (C::from(b'.'), C::from(b'\n'));
        let Some(last) = name.len().checked_sub(text.len()) else { return false };
        let after_dot = |start: usize| start == 0 || name[start - 1] == dot;
        let before_dot = |end: usize| end == name.len() || name[end] == dot;
        // A dot in the text matches any character except a line end.
        let stands = |start: usize| {
            name[start..].iter().zip(text).all(|(found, wanted)| match wanted {
                b'.' => *found != line_end,
                wanted => *found == C::from(*wanted),
            })
        };
        match self {
            Self::Whole(_) => last == 0 && stands(0),
            Self::End(_) => after_dot(last) && stands(last),
            Self::Within(_) => {
                (0..=last).any(|start| after_dot(start) && before_dot(start + text.len()) && stands(start))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A group around a plain text sends it to the regex engine, which must give the same result.
    #[test]
    fn plain_texts_match_as_the_engine_does() -> Result<()> {
        let names = [
            "",
            ".",
            "a",
            "b",
            "ab",
            "a.b",
            "a.b.",
            ".a",
            "a..b",
            "b.a",
            "xa",
            "ax",
            "x.a",
            "a.x",
            "x.a.x",
            "x.ab.c",
            "a.1.b",
            "a-1.b",
            "axb",
            "c.axb",
            "a.b.a.b",
            "layer.1.q",
            "layer.10.q",
            "a\u{e9}b",
            "x.a\u{e9}b",
            "\u{e9}.a",
            "a.b\u{e9}",
            "a\nb",
        ];
        let mut found = 0;
        for text in ["", ".", "a", "b", "a.b", ".a", "a.", "ab", "a-1", "..", "layer.1", "layer.1.q", "x.a"] {
            let grouped = format!("(?:{text})");
            for (plain, engine) in [
                (Pattern::Whole(text), Pattern::Whole(&grouped)),
                (Pattern::End(text), Pattern::End(&grouped)),
                (Pattern::Within(text), Pattern::Within(&grouped)),
            ] {
                assert!(plain.without_engine().is_some() && engine.without_engine().is_none());
                let (plain, engine) = (matching(plain, &names, "x")?, matching(engine, &names, "x")?);
                assert_eq!(plain, engine, "{text:?}");
                found += plain.iter().filter(|found| **found).count();
            }
        }
        assert!(found > 50, "{found}");
        Ok(())
    }
}
