//! WiC as its authors distribute it: `train.data.txt` with `train.gold.txt`, and the same for `dev`.
//!
//! A line of the data file has five columns, separated by tabs: the word, its part of speech, its positions
//! in the two sentences, and the sentences. The same line of the gold file is `T` or `F`.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::lines::{each_line, excerpt};
use super::superglue::wic_text;
use super::task::{Example, Label};
use crate::error::{Error, Result};

const DATA: &str = ".data.txt";

/// The data file of a set, in `root` or in the subfolder with the set's name.
pub(super) fn file(root: &Path, set: &str) -> Option<PathBuf> {
    let name = format!("{set}{DATA}");
    [root.join(&name), root.join(set).join(&name)].into_iter().find(|path| path.is_file())
}

/// Reads a `*.data.txt` and the `*.gold.txt` beside it. The texts are those of the SuperGLUE reader
/// ([`wic_text`]).
///
/// # Errors
/// If a file cannot be read or is not UTF-8, a line is malformed (the error names it), or the two files have
/// different numbers of lines.
pub(super) fn read(path: &Path) -> Result<Vec<Example>> {
    let name =
        path.file_name().map(|name| name.to_string_lossy().replace(DATA, ".gold.txt")).unwrap_or_default();
    let gold = path.with_file_name(name);
    let mut labels = Vec::new();
    each_line(File::open(&gold).map_err(Error::io(&gold))?, &gold, |number, line| {
        labels.push(match line.trim() {
            "T" => Label::Class(1),
            "F" => Label::Class(0),
            other => {
                let reason = format!("unknown label {:?}, expected T or F", excerpt(other));
                return Err(Error::format_at(&gold, number, reason));
            }
        });
        Ok(())
    })?;
    let mut rows = Vec::with_capacity(labels.len());
    each_line(File::open(path).map_err(Error::io(path))?, path, |number, line| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [word, _, _, first, second] = columns[..] else {
            let reason = format!("expected 5 columns separated by tabs, got {}", columns.len());
            return Err(Error::format_at(path, number, reason));
        };
        rows.push((wic_text(word, first), second.to_owned()));
        Ok(())
    })?;
    if rows.len() != labels.len() {
        let reason = format!("{} lines, but {} has {}", rows.len(), gold.display(), labels.len());
        return Err(Error::format(path, reason));
    }
    let example =
        |((first, second), label): ((String, String), _)| Example::new(&first, Some(&second), label);
    Ok(rows.into_iter().zip(labels).map(example).collect())
}

#[cfg(test)]
mod tests {
    use super::super::task::Task;
    use super::*;
    use std::fs::{create_dir_all, write};

    const ROWS: &str = "bed\tN\t1-1\tA bed .\tSea bed .\nplace\tN\t7-6\tMy place .\tA place of rest .\n";

    #[test]
    fn the_authors_own_files_are_read_as_superglue_s() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("WiC_dataset");
        for set in ["train", "dev"] {
            create_dir_all(root.join(set)).unwrap();
            write(root.join(set).join(format!("{set}.data.txt")), ROWS).unwrap();
            write(root.join(set).join(format!("{set}.gold.txt")), "F\nT\n").unwrap();
        }
        for folder in [dir.path().to_path_buf(), root.clone()] {
            let splits = Task::Wic.load_folder(&folder).unwrap();
            let row = Example::new("place: My place .", Some("A place of rest ."), Label::Class(1));
            assert_eq!((splits.train.len(), &splits.train[1], &splits.dev[0].1[1]), (2, &row, &row));
        }
        std::fs::remove_dir_all(root.join("dev")).unwrap();
        assert!(Task::Wic.load_folder(&root).unwrap_err().to_string().contains("no dev.data.txt"));
    }

    #[test]
    fn what_is_wrong_is_told_with_file_and_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dev.data.txt");
        let message = |rows: &str, gold: &str| {
            write(&path, rows).unwrap();
            write(dir.path().join("dev.gold.txt"), gold).unwrap();
            read(&path).unwrap_err().to_string()
        };
        let short = message("bed\tN\t1-1\tA bed .\n", "F\n");
        assert!(
            short.ends_with("dev.data.txt, line 1: expected 5 columns separated by tabs, got 4"),
            "{short}"
        );
        let odd = message(ROWS, "F\nmaybe\n");
        assert!(odd.ends_with("dev.gold.txt, line 2: unknown label \"maybe\", expected T or F"), "{odd}");
        let lost = message(ROWS, "F\n");
        assert!(
            lost.contains("dev.data.txt: 2 lines, but ") && lost.ends_with("dev.gold.txt has 1"),
            "{lost}"
        );
        std::fs::remove_file(dir.path().join("dev.gold.txt")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("dev.gold.txt"));
    }
}
