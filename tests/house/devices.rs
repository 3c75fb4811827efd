//! Checks that CUDA devices are made with `cuda_device`: candle's own have a stream per host thread.

use std::collections::BTreeSet;
use std::path::Path;

use crate::source::root;

#[test]
fn nothing_makes_a_device_with_a_stream_for_each_thread() {
    let mut found = BTreeSet::new();
    for folder in ["src", "examples", "benches", "tests", "docs", "README.md"] {
        look(&root().join(folder), &mut found);
    }
    assert!(found.is_empty(), "take `cuda_device` in: {found:#?}");
}

/// Collects the files at or below `path` that call candle's constructors.
fn look(path: &Path, found: &mut BTreeSet<String>) {
    if path.is_dir() {
        let skipped = path.ends_with("target") || path.ends_with("assets") || path.ends_with("results");
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten().filter(|_| !skipped);
        entries.for_each(|entry| look(&entry.path(), found));
    } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
        let text = std::fs::read_to_string(path).expect("a text");
        // In two parts, so that this file itself does not match.
        let calls = [concat!("new_cuda", "("), concat!("cuda_if_", "available(")];
        if calls.iter().any(|call| text.contains(call)) {
            found.insert(path.display().to_string());
        }
    }
}
