//! Checks that `docs/METHOD.md` names a function for every formula and that these functions exist.

use crate::source::root;
use crate::text::{behind, blanked, tokens, Token};

/// The minimal number of references: fewer mean that their format has changed and is no longer recognised.
const LEAST: usize = 150;

#[test]
fn every_item_that_the_method_names_exists() {
    let document = std::fs::read_to_string(root().join("docs/METHOD.md")).expect("the document");
    let pairs = references(&document);
    assert!(pairs.len() >= LEAST, "only {} references were found", pairs.len());
    let missing: Vec<String> = pairs.iter().filter_map(|(file, item)| missing(file, item)).collect();
    assert!(missing.is_empty(), "{} of {}:\n{}", missing.len(), pairs.len(), missing.join("\n"));
}

#[test]
fn no_section_and_no_formula_is_without_its_function() {
    let document = std::fs::read_to_string(root().join("docs/METHOD.md")).expect("the document");
    let mut bare = Vec::new();
    for section in document.split("\n## ").skip(1) {
        let title = section.lines().next().unwrap_or_default();
        if references(section).is_empty() {
            bare.push(format!("the section {title:?}"));
        }
        // Parts are text and formula in turn; a formula's references stand before the next formula.
        let parts: Vec<&str> = section.split("```").collect();
        for (formula, after) in parts[1..].iter().step_by(2).zip(parts[1..].iter().skip(1).step_by(2)) {
            if references(after).is_empty() {
                bare.push(format!("in {title:?}: {}", formula.trim_start_matches("text").trim()));
            }
        }
    }
    assert!(bare.is_empty(), "no function is named for:\n{}", bare.join("\n"));
}

/// Every `` `src/file.rs`: `item`, `item` `` of a text as (file, item) pairs.
fn references(text: &str) -> Vec<(String, String)> {
    let is_file = |span: &str| {
        (span.starts_with("src/") || span.starts_with("tests/"))
            && (span.ends_with(".rs") || span.ends_with(".cu"))
    };
    // Every second part is a code span; the text between two spans tells whether they belong together.
    let spans: Vec<&str> = text.split('`').collect();
    let joined = |at: usize, by: &str| spans.get(at + 1).is_some_and(|between| between.trim() == by);
    let (mut pairs, mut i) = (Vec::new(), 1);
    while i + 2 < spans.len() {
        if is_file(spans[i]) && joined(i, ":") {
            let mut at = i + 2;
            pairs.push((spans[i].to_string(), spans[at].to_string()));
            while joined(at, ",") && at + 2 < spans.len() {
                at += 2;
                pairs.push((spans[i].to_string(), spans[at].to_string()));
            }
            i = at;
        }
        i += 2;
    }
    pairs
}

/// The error in a reference, if there is one.
fn missing(file: &str, item: &str) -> Option<String> {
    let Ok(text) = std::fs::read_to_string(root().join(file)) else {
        return Some(format!("{file}: no such file (for {item})"));
    };
    (!defines(&text, item)).then(|| format!("{file} does not define {item}"))
}

/// Whether Rust or kernel source defines `name` or `Type::name`.
fn defines(text: &str, item: &str) -> bool {
    let blank = blanked(text);
    let tokens = tokens(&blank);
    match item.split_once("::") {
        None => defines_here(&tokens, item),
        Some((kind, name)) => bodies(&tokens, kind).into_iter().any(|body| match body {
            Body::Impl(body) => defines_here(body, name),
            Body::Enum(body) => names_variant(body, name),
        }),
    }
}

fn defines_here(tokens: &[Token], name: &str) -> bool {
    let words = ["fn", "struct", "enum", "trait", "type", "const", "static"];
    let rust = |of: &[Token]| words.contains(&of[0].text) && of[1].text == name;
    // A kernel: `KERNEL name(`, `DEVICE double name(`.
    let is_type = |word: &str| {
        word.starts_with(char::is_uppercase) || ["void", "double", "float", "u32", "u64"].contains(&word)
    };
    let kernel = |of: &[Token]| is_type(of[0].text) && of[1].text == name && of[2].text == "(";
    tokens.windows(2).any(rust) || tokens.windows(3).any(kernel)
}

enum Body<'a, 'b> {
    Impl(&'a [Token<'b>]),
    Enum(&'a [Token<'b>]),
}

/// The bodies of every `impl`, `trait` and `enum` of a type.
fn bodies<'a, 'b>(tokens: &'a [Token<'b>], kind: &str) -> Vec<Body<'a, 'b>> {
    let mut found = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if !["impl", "trait", "enum"].contains(&token.text) {
            continue;
        }
        let Some(open) = (i..tokens.len()).find(|at| ["{", ";"].contains(&tokens[*at].text)) else {
            continue;
        };
        if tokens[open].text == ";" {
            continue;
        }
        let head = &tokens[i + 1..open];
        // The type is the last name outside of angle brackets.
        let mut depth = 0;
        let mut last = "";
        for token in head.iter().take_while(|token| token.text != "where") {
            match token.text {
                "<" => depth += 1,
                ">" => depth -= 1,
                word if depth == 0 && word.starts_with(char::is_alphabetic) => last = word,
                _ => {}
            }
        }
        let named = if token.text == "impl" { last } else { head.first().map_or("", |token| token.text) };
        if named == kind {
            let body = &tokens[open + 1..behind(tokens, open) - 1];
            found.push(if token.text == "enum" { Body::Enum(body) } else { Body::Impl(body) });
        }
    }
    found
}

/// Whether an enum's body has a variant of this name: a name at the start, or after a comma or an attribute.
fn names_variant(body: &[Token], name: &str) -> bool {
    let (mut i, mut fresh) = (0, true);
    while i < body.len() {
        match body[i].text {
            "#" => {}
            "(" | "{" => {
                i = behind(body, i);
                continue;
            }
            "[" => {
                i = behind(body, i);
                fresh = true;
                continue;
            }
            "," => fresh = true,
            text if fresh && text == name => return true,
            _ => fresh = false,
        }
        i += 1;
    }
    false
}

#[test]
fn references_are_read_in_their_one_form() {
    let text =
        "The factor: `src/a.rs`: `A::b`, `c`. And `src/d.rs` alone, `x`: `y`.\n| f | `src/e.cu`: `g` |";
    let want = [("src/a.rs", "A::b"), ("src/a.rs", "c"), ("src/e.cu", "g")];
    assert_eq!(references(text), want.map(|(file, item)| (file.to_string(), item.to_string())));
}

#[test]
fn a_definition_is_told_from_a_mention() {
    let text = "/// fn absent\nstruct A<T>(T);\nimpl<T: Into<X>> std::fmt::Debug for A<T> { fn b(&self) { absent() } }\n\
                pub(crate) enum E { /// One.\n #[default] One, Two(u8), Three { x: u8 } }\nimpl E { const C: u8 = 1; }\n\
                const K: &str = \"fn absent\";\nfn free() {}";
    for item in ["A", "A::b", "E", "E::One", "E::Two", "E::Three", "E::C", "K", "free"] {
        assert!(defines(text, item), "{item}");
    }
    for item in ["absent", "A::absent", "A::free", "E::b", "E::x", "E::u8", "X", "T"] {
        assert!(!defines(text, item), "{item}");
    }
    let kernel = "DEVICE double one(u32 i) { return two(i); } KERNEL three(u32 n) {}";
    assert!(defines(kernel, "one") && defines(kernel, "three") && !defines(kernel, "two"));
}
