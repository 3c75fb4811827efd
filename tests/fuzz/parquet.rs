//! Fuzzes the reader of the hub's parquet files.

use std::path::Path;

use monteclora::data::parquet::read as read_parquet;
use monteclora::data::task::Task;
use parquet::basic::{Compression, Encoding};
use parquet::file::properties::{WriterProperties, WriterVersion};

use super::mutate::{bytes, Rng};
use super::parquet_files::{store, store_with, Column};
use super::reader::{Folder, Input, Reader};

const TASKS: [Task; 3] = [Task::Cola, Task::Stsb, Task::Wic];

/// Files of each task: with both page versions, compressed and not, with and without dictionaries.
fn seeds(dir: &Path) -> Vec<Vec<Vec<u8>>> {
    let path = dir.join("seed.parquet");
    let compressions =
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())];
    let of = |columns: &[Column]| -> Vec<Vec<u8>> {
        let mut files = Vec::new();
        store(&path, columns);
        files.push(std::fs::read(&path).unwrap());
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            for compression in compressions {
                let properties =
                    WriterProperties::builder().set_writer_version(version).set_compression(compression);
                let plain = properties.clone().set_dictionary_enabled(false).set_encoding(Encoding::PLAIN);
                for properties in [properties, plain] {
                    store_with(&path, columns, properties.build());
                    files.push(std::fs::read(&path).unwrap());
                }
            }
        }
        files
    };
    let texts = || vec!["a text of some length", "a", "a text of some length", "caf\u{e9}"];
    vec![
        of(&[Column::Text("sentence", texts()), Column::Class(vec![1, 0, 1, 1])]),
        of(&[
            Column::Text("sentence1", texts()),
            Column::Text("sentence2", texts()),
            Column::Score(vec![0.5, 1.0, 5.0, 0.0]),
        ]),
        of(&[
            Column::Text("word", texts()),
            Column::Text("sentence1", texts()),
            Column::Text("sentence2", texts()),
            Column::Class(vec![1, 0, 1, 1]),
        ]),
    ]
}

/// The offset of the footer in a file.
fn footer(file: &[u8]) -> usize {
    let length =
        file.len().checked_sub(8).map_or(0, |at| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()));
    file.len().saturating_sub(8 + length as usize)
}

#[test]
fn files_of_every_kind() {
    let folder = Folder::new(&["x.parquet"]);
    let seeds = seeds(folder.outside());
    let path = folder.path().join("x.parquet");
    let read = |input: &Input| read_parquet(TASKS[input.kind], &path).map(drop);
    for (kind, files) in seeds.iter().enumerate() {
        for file in files {
            read(&folder.put(Input::one(kind, file.clone()))).unwrap();
        }
    }
    // Zigzag varints as in the footer and the page headers: 0, -1, 2^31 - 1, 2^40.
    let tokens =
        ["\u{0}", "\u{1}", "\u{7f}", "PAR1", "sentence", "\x15\x7e", "\x16\x00", "\x19\x1c", "\x1c", "label"];
    let huge: [&[u8]; 3] =
        [&[0xfe, 0xff, 0xff, 0xff, 0x0f], &[0x80, 0x80, 0x80, 0x80, 0x80, 0x40], &[0xff; 9]];
    let make = |rng: &mut Rng| {
        let kind = rng.below(TASKS.len());
        let files = &seeds[kind];
        let mut file = files[rng.below(files.len())].clone();
        match rng.below(4) {
            // Mutations anywhere: most are detected at once.
            0 => file = bytes(rng, files, &tokens),
            // Mutations only in the footer or only in the pages; the footer's length stays correct.
            part => {
                let at = footer(&file);
                let (pages, rest) = file.split_at(at);
                let (meta, _) = rest.split_at(rest.len() - 8);
                let (mut pages, mut meta) = (pages.to_vec(), meta.to_vec());
                let spoilt = if part == 1 { &mut meta } else { &mut pages };
                match rng.below(4) {
                    0 => *spoilt = bytes(rng, std::slice::from_ref(spoilt), &tokens),
                    1 => {
                        let (at, number) = (rng.below(spoilt.len()), huge[rng.below(huge.len())]);
                        // Replaces one byte, so that the following bytes keep their meaning.
                        spoilt.splice(at..at + 1, number.iter().copied());
                    }
                    _ => {
                        for _ in 0..=rng.below(3) {
                            let at = rng.below(spoilt.len());
                            spoilt[at] = rng.word() as u8;
                        }
                    }
                }
                let length = (meta.len() as u32).to_le_bytes();
                file = [&pages[..], &meta, &length, b"PAR1"].concat();
            }
        }
        folder.put(Input::one(kind, file))
    };
    let names = folder.outside().display().to_string();
    // One page of each column is in memory at a time, compressed and decompressed.
    Reader { name: "parquet", cost: 10, fixed: 80 << 20, times: 64, names }.run(make, read);
}
