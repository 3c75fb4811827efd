//! Checks of a parquet file before its decoder may read it.
//!
//! The decoder allocates memory by the numbers in the footer and in the header of each page, and follows the
//! schema recursively. In a damaged file these numbers can have any value, and running out of memory or stack
//! ends the process, which `catch_unwind` cannot prevent. So the numbers are checked here first.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

use ::parquet::basic::Type as Physical;
use ::parquet::file::metadata::ParquetMetaData;

use super::thrift::{Result, Thrift, DEPTH, I32, LIST, STRUCT};

/// Maximum size of a decompressed page in bytes, unless `EXPANSION` times its compressed size is more.
/// Writers make pages of about one megabyte.
const PAGE: u64 = 16 << 20;
const EXPANSION: u64 = 64;
/// Minimum size of a dictionary value in bytes, except for values of a fixed length (1).
const VALUE: u64 = 4;

/// Checks the schema in the footer: that each group has the declared number of columns, and that groups are
/// not nested too deeply.
pub(super) fn check_footer(file: &File) -> Result<()> {
    let mut tail = [0; 8];
    let end = len(file)?.checked_sub(8).ok_or("it is too short")?;
    reader(file, end)?.read_exact(&mut tail).map_err(|e| e.to_string())?;
    let length = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if &tail[4..] != b"PAR1" {
        return Err("it does not end with PAR1".to_string());
    }
    let start =
        end.checked_sub(length).ok_or_else(|| format!("a footer of {length} bytes does not fit in it"))?;
    let mut thrift = Thrift::new(reader(file, start)?.take(length));
    thrift.structure(DEPTH, |thrift, field| match field {
        (2, LIST) => schema(thrift).map(|()| true),
        _ => Ok(false),
    })
}

/// Reads the list of the schema's elements, in which each group precedes its members.
fn schema(thrift: &mut Thrift<impl Read>) -> Result<()> {
    let (kind, mut left) = thrift.list()?;
    // The number of members that each enclosing group still lacks, innermost last.
    let mut open: Vec<u64> = Vec::new();
    while left > 0 {
        left -= 1;
        let mut members = 0;
        if kind != STRUCT {
            return Err("its schema is no list of columns".to_string());
        }
        thrift.structure(DEPTH, |thrift, field| match field {
            (5, I32) => thrift.number().map(|number| {
                members = number;
                true
            }),
            _ => Ok(false),
        })?;
        let members = u64::try_from(members).map_err(|_| format!("a group cannot have {members} columns"))?;
        if members > left {
            return Err(format!("a group of {members} columns, where the schema has {left} more"));
        }
        while open.last() == Some(&0) {
            open.pop();
        }
        if let Some(missing) = open.last_mut() {
            *missing -= 1;
        }
        if members > 0 {
            open.push(members);
        }
        if open.len() > DEPTH {
            return Err(format!("groups are nested more than {DEPTH} deep"));
        }
    }
    Ok(())
}

/// Checks the pages of the columns with these names: that they lie within the file, and that their declared
/// sizes are plausible.
pub(super) fn check_pages(file: &File, metadata: &ParquetMetaData, names: &[&str]) -> Result<()> {
    let size = len(file)?;
    for column in metadata.row_groups().iter().flat_map(|group| group.columns()) {
        let name = column.column_path().parts().first().map_or("", String::as_str);
        if !names.contains(&name) {
            continue;
        }
        let outside = || format!("column {name:?} lies outside the file");
        let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
        let mut at = u64::try_from(start).map_err(|_| outside())?;
        let length = u64::try_from(column.compressed_size()).map_err(|_| outside())?;
        let end = at.checked_add(length).filter(|end| *end <= size).ok_or_else(outside)?;
        let short = column.column_type() == Physical::FIXED_LEN_BYTE_ARRAY;
        while at < end {
            let mut thrift = Thrift::new(reader(file, at)?.take(end - at));
            let page = Page::read(&mut thrift)?;
            page.check(if short { 1 } else { VALUE })
                .map_err(|reason| format!("column {name:?}: {reason}"))?;
            at = at.saturating_add(thrift.read).saturating_add(page.compressed);
            if at > end {
                return Err(format!("column {name:?} ends within a page"));
            }
        }
    }
    Ok(())
}

/// The relevant numbers of a page header.
#[derive(Default)]
struct Page {
    compressed: u64,
    uncompressed: u64,
    dictionary: u64,
    encoding: i64,
}

impl Page {
    fn read(thrift: &mut Thrift<impl Read>) -> Result<Self> {
        let mut page = Self::default();
        let number = |thrift: &mut Thrift<_>| {
            let number = thrift.number()?;
            u64::try_from(number).map_err(|_| format!("a page cannot have {number} bytes or values"))
        };
        thrift.structure(DEPTH, |thrift, field| {
            match field {
                (2, I32) => page.uncompressed = number(thrift)?,
                (3, I32) => page.compressed = number(thrift)?,
                (5, STRUCT) => thrift.one_number(2, &mut page.encoding)?,
                (7, STRUCT) => {
                    let mut values = 0;
                    thrift.one_number(1, &mut values)?;
                    page.dictionary = u64::try_from(values)
                        .map_err(|_| format!("a dictionary cannot have {values} values"))?;
                }
                (8, STRUCT) => thrift.one_number(4, &mut page.encoding)?,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(page)
    }

    fn check(&self, value: u64) -> Result<()> {
        let Self { compressed, uncompressed, dictionary, encoding } = *self;
        if uncompressed > PAGE.max(compressed.saturating_mul(EXPANSION)) {
            return Err(format!(
                "a page of {compressed} bytes has an implausible uncompressed size, {uncompressed}"
            ));
        }
        if dictionary.saturating_mul(value) > uncompressed {
            return Err(format!("a dictionary of {dictionary} values does not fit in {uncompressed} bytes"));
        }
        // Decoders of these two allocate memory by a number within the page. The hub's files use neither.
        match encoding {
            6 => Err("the encoding DELTA_LENGTH_BYTE_ARRAY is not supported".to_string()),
            7 => Err("the encoding DELTA_BYTE_ARRAY is not supported".to_string()),
            _ => Ok(()),
        }
    }
}

fn len(file: &File) -> Result<u64> {
    file.metadata().map(|metadata| metadata.len()).map_err(|e| e.to_string())
}

/// A reader of the file from byte `start` on.
fn reader(file: &File, start: u64) -> Result<BufReader<&File>> {
    let mut source = file;
    source.seek(SeekFrom::Start(start)).map_err(|e| e.to_string())?;
    Ok(BufReader::with_capacity(512, source))
}
