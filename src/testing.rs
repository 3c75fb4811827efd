//! Helpers shared by unit tests.

use std::io::Write;

/// Reports a skipped test directly on stderr, which the test runner does not capture.
pub(crate) fn skipped(why: &str) {
    writeln!(std::io::stderr(), "skipped: {why}").ok();
}
