//! Reads text files line by line, and shortens texts for error messages.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::util::lfs_pointer;

/// Maximum length of a line in bytes, including its end; the texts of these tasks are far shorter.
pub(super) const MAX_LINE: usize = 16 << 20;

/// The beginning of a text, short enough for an error message.
pub(super) fn excerpt(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// What to say of the bytes of a file that is no text, if its first bytes tell what it is.
pub(super) fn no_text(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0x1f, 0x8b, ..] => Some("it is compressed by gzip: decompress it with gunzip first"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("it is UTF-16: save it as UTF-8"),
        [b'P', b'K', 3, 4, ..] => Some("it is a zip or a spreadsheet: save its rows as text in UTF-8"),
        [b'P', b'A', b'R', b'1', ..] => {
            Some("it is parquet: save its rows as JSON lines (in Python, to_json(.., lines=True))")
        }
        _ => None,
    }
}

/// Calls `visit` with the 1-based number and text of every line that is not empty.
pub(super) fn each_line(
    source: impl Read,
    path: &Path,
    mut visit: impl FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    let mut source = BufReader::new(source);
    let (mut buffer, mut number) = (Vec::new(), 0);
    loop {
        buffer.clear();
        let mut limited = source.by_ref().take(MAX_LINE as u64 + 1);
        if limited.read_until(b'\n', &mut buffer).map_err(Error::io(path))? == 0 {
            return Ok(());
        }
        number += 1;
        if buffer.len() > MAX_LINE {
            return Err(Error::format_at(path, number, format!("longer than {MAX_LINE} bytes")));
        }
        let mut line = buffer.strip_suffix(b"\n").unwrap_or(&buffer);
        line = line.strip_suffix(b"\r").unwrap_or(line);
        if number == 1 {
            lfs_pointer::refuse(line, path)?;
            line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
        }
        let line = std::str::from_utf8(line)
            .map_err(|error| Error::format_at(path, number, format!("not UTF-8: {error}")))?;
        if !line.is_empty() {
            visit(number, line)?;
        }
    }
}
