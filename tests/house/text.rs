//! A tokenizer for Rust that suffices for this crate's sources: it blanks out comments and literals and
//! removes items under `cfg(test)`.

/// A word or a punctuation mark of a text, and its line.
#[derive(Debug, Clone, Copy)]
pub struct Token<'a> {
    pub text: &'a str,
    pub line: usize,
}

/// `text` with comments, strings and characters blanked out; line numbers do not change.
pub fn blanked(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut i) = (bytes.to_vec(), 0);
    while i < bytes.len() {
        let end = literal_end(bytes, i);
        for byte in &mut out[i..end.max(i)] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        i = end.max(i + 1);
    }
    String::from_utf8(out).expect("blanks are ASCII")
}

/// The end of the comment or literal that starts at `i`; `i` itself if none starts there.
fn literal_end(bytes: &[u8], i: usize) -> usize {
    let rest = &bytes[i..];
    let until = |from: usize, found: &dyn Fn(usize) -> bool| {
        (from..bytes.len()).find(|at| found(*at)).unwrap_or(bytes.len())
    };
    if rest.starts_with(b"//") {
        return until(i, &|at| bytes[at] == b'\n');
    }
    if rest.starts_with(b"/*") {
        let (mut depth, mut at) = (1, i + 2);
        while at < bytes.len() && depth > 0 {
            match &bytes[at..] {
                [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
                [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
                _ => at += 1,
            }
        }
        return at;
    }
    let in_word = i > 0 && (bytes[i - 1].is_ascii_alphanumeric() || bytes[i - 1] == b'_');
    if rest[0] == b'r' && !in_word {
        let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
        if rest.get(1 + hashes) == Some(&b'"') {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            return until(i + hashes + 2, &|at| bytes[at..].starts_with(&close)) + close.len();
        }
    }
    if rest[0] == b'"' {
        let mut at = i + 1;
        while at < bytes.len() && bytes[at] != b'"' {
            at += if bytes[at] == b'\\' { 2 } else { 1 };
        }
        return (at + 1).min(bytes.len());
    }
    if rest[0] == b'\'' {
        // A character literal, or a lifetime, which is not blanked out.
        if rest.get(1) == Some(&b'\\') {
            return (until(i + 3, &|at| bytes[at] == b'\'') + 1).min(bytes.len());
        }
        let next = std::str::from_utf8(&rest[1..]).ok().and_then(|text| text.chars().next());
        let width = next.map_or(1, char::len_utf8);
        if rest.get(1 + width) == Some(&b'\'') {
            return i + width + 2;
        }
    }
    i
}

/// The tokens of a blanked text.
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut tokens, mut line, mut rest) = (Vec::new(), 1, text);
    while let Some(first) = rest.chars().next() {
        let len = if is_word(first) {
            rest.find(|c| !is_word(c)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        if !first.is_whitespace() {
            tokens.push(Token { text: &rest[..len], line });
        }
        line += usize::from(first == '\n');
        rest = &rest[len..];
    }
    tokens
}

/// The index after the bracket that closes the one at `open`.
pub fn behind(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// The tokens without the items under a `cfg` attribute that only holds in tests.
pub fn without_tests<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    let (mut kept, mut i) = (Vec::new(), 0);
    while i < tokens.len() {
        let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
        if text(i) == "#" && text(i + 1) == "[" {
            let end = behind(tokens, i + 1);
            if text(i + 2) == "cfg" && only_tests(&tokens[i + 4..end - 2]) {
                i = item_end(tokens, end);
                continue;
            }
        }
        kept.push(tokens[i]);
        i += 1;
    }
    kept
}

/// Whether a `cfg` predicate holds in tests only.
fn only_tests(predicate: &[Token]) -> bool {
    let Some(first) = predicate.first() else { return false };
    let mut parts = Vec::new();
    let inner = predicate.get(2..predicate.len().max(3) - 1).unwrap_or_default();
    let (mut start, mut i) = (0, 0);
    while i < inner.len() {
        match inner[i].text {
            "(" => i = behind(inner, i),
            "," => {
                parts.push(&inner[start..i]);
                (start, i) = (i + 1, i + 1);
            }
            _ => i += 1,
        }
    }
    if start < inner.len() {
        parts.push(&inner[start..]);
    }
    match first.text {
        "test" | "doctest" => predicate.len() == 1,
        "all" => parts.into_iter().any(only_tests),
        "any" => parts.into_iter().all(only_tests),
        _ => false,
    }
}

/// The index after the item, statement or field that starts at `start`.
fn item_end(tokens: &[Token], start: usize) -> usize {
    let mut i = start;
    while i + 1 < tokens.len() && tokens[i].text == "#" && tokens[i + 1].text == "[" {
        i = behind(tokens, i + 1);
    }
    let visible = tokens[i..].iter().take(8).map(|token| token.text);
    let word = visible.clone().find(|text| !["pub", "(", ")", "crate", "super", "in"].contains(text));
    let items = [
        "fn",
        "mod",
        "impl",
        "struct",
        "enum",
        "trait",
        "const",
        "static",
        "use",
        "type",
        "unsafe",
        "async",
        "extern",
        "macro_rules",
        "let",
    ];
    let (is_use, is_item) = (word == Some("use"), word.is_some_and(|word| items.contains(&word)));
    while i < tokens.len() {
        match tokens[i].text {
            ";" => return i + 1,
            "," if !is_item => return i + 1,
            "}" => return i,
            "{" if !is_use => return behind(tokens, i),
            "(" | "[" | "{" => i = behind(tokens, i),
            _ => i += 1,
        }
    }
    tokens.len()
}
