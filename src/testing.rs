//! What unit tests share.

use std::io::Write;

/// Says that a test did nothing, where the test runner does not hide it.
pub(crate) fn skipped(why: &str) {
    writeln!(std::io::stderr(), "skipped: {why}").ok();
}
