//! What unit tests share.

use std::io::Write;

/// Says that a test did nothing, where the test runner does not hide it.
pub(crate) fn skipped(why: &str) {
    say(&format!("skipped: {why}"));
}

/// Says something where the test runner does not hide it.
pub(crate) fn say(what: &str) {
    writeln!(std::io::stderr(), "{what}").ok();
}
