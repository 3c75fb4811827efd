//! Checks that no source file is longer than what one reads at once.

use crate::source::sources_of;

const MOST_LINES: usize = 450;

#[test]
fn no_source_file_is_too_long() {
    let (mut files, mut long) = (0, Vec::new());
    for folder in ["benches", "examples", "src", "tests"] {
        for (name, text) in sources_of(folder) {
            files += 1;
            let lines = text.lines().count();
            if lines > MOST_LINES {
                long.push(format!("{folder}/{name}: {lines} lines"));
            }
        }
    }
    assert!(files > 300, "{files}: the search finds too few");
    assert!(long.is_empty(), "more than {MOST_LINES} lines: {long:#?}");
}
