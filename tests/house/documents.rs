//! Checks that the documents refer to existing files and that the README stays short.

use std::collections::BTreeSet;
use std::path::Path;

use crate::source::root;

const DOCUMENTS: [&str; 7] = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/ARCHITECTURE.md",
    "docs/GUIDE.md",
    "docs/METHOD.md",
    "docs/RESULTS.md",
];

/// Folders of the repository that the published package lacks, so that nothing in them can be checked there.
const NOT_PUBLISHED: [&str; 5] =
    [".ci", "examples/assets", "examples/results", "examples/serve", "tests/integration"];

#[test]
fn every_file_that_a_document_names_exists() {
    let mut missing = BTreeSet::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root().join(document)).expect(document);
        let here = Path::new(document).parent().expect("a folder");
        for target in links(&text).filter(|target| !target.contains(':')) {
            let is_there = match target.strip_prefix('#') {
                Some(heading) => headings(&text).any(|own| own == heading),
                None => root().join(here).join(target).exists(),
            };
            if !is_there {
                missing.insert(format!("{document} links to {target}"));
            }
        }
        for named in text.split('`').skip(1).step_by(2).filter(|span| is_path(span)) {
            let published = NOT_PUBLISHED.iter().find(|folder| named.starts_with(**folder));
            let expected = published.is_none_or(|folder| root().join(folder).exists());
            if expected && !root().join(named).exists() {
                missing.insert(format!("{document} names {named}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn the_readme_is_one_screen() {
    let lines = std::fs::read_to_string(root().join("README.md")).expect("the README").lines().count();
    assert!(lines <= 150, "{lines} lines: what is more belongs into docs/");
}

/// The targets of `[text](target)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split(')').next())
}

/// The headings of a document, in the form of link targets.
fn headings(text: &str) -> impl Iterator<Item = String> + '_ {
    let is_kept = |letter: &char| letter.is_alphanumeric() || [' ', '-', '_'].contains(letter);
    let plain =
        move |line: &str| line.trim_start_matches('#').trim().chars().filter(is_kept).collect::<String>();
    let name = move |line| plain(line).to_lowercase().replace(' ', "-");
    text.lines().filter(|line| line.starts_with('#')).map(name)
}

/// Whether a code span is a path from the root of the repository.
fn is_path(span: &str) -> bool {
    let folders = ["docs/", "src/", "tests/", "examples/", "benches/", ".ci/"];
    folders.iter().any(|folder| span.starts_with(folder)) && !span.contains([' ', '*', '{'])
}
