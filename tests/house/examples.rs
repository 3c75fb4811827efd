//! Checks that every option of the examples has a line of help.

use std::collections::BTreeSet;

use crate::source::sources_of;

#[test]
fn every_option_of_an_example_has_a_line_of_help() {
    let (mut options, mut silent) = (0, BTreeSet::new());
    for (name, text) in sources_of("examples") {
        options += text.lines().filter(|line| is_option(line)).count();
        silent.extend(without_help(&name, &text));
        silent.extend(described(&name, &text));
    }
    assert!(options > 80, "{options}: the search finds too few");
    assert!(silent.is_empty(), "{silent:#?}");
}

fn is_option(line: &str) -> bool {
    line.trim_start().starts_with("#[arg(")
}

/// Options without a doc comment, which clap shows as help, by file and line.
fn without_help(name: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
    let silent = |(i, line): (usize, &&str)| {
        let explained = i > 0 && lines[i - 1].starts_with("///");
        (is_option(line) && !explained).then(|| format!("{name}:{}", i + 1))
    };
    lines.iter().enumerate().filter_map(silent).collect()
}

/// Structs of options with a doc comment: when such a struct is flattened into a program's options, clap
/// shows its doc comment in place of the program's description.
fn described(name: &str, text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let pairs = lines.windows(2).filter(|pair| pair[0].starts_with("///") && pair[1].contains("clap::Args"));
    pairs.map(|pair| format!("{name}: {}", pair[0])).collect()
}

#[test]
fn an_option_without_help_is_found() {
    let text = "struct A {\n    /// Told.\n    #[arg(long)]\n    a: u8,\n    #[arg(long)]\n    b: u8,\n}";
    assert_eq!(without_help("x.rs", text), ["x.rs:5"]);
    let text =
        "/// Sizes.\n#[derive(clap::Args, Clone)]\nstruct A;\n// Sizes.\n#[derive(clap::Args)]\nstruct B;";
    assert_eq!(described("x.rs", text), ["x.rs: /// Sizes."]);
}
