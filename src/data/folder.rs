//! Reads a task from a local folder with TSV, JSON lines or parquet files.

use std::path::{Path, PathBuf};

use super::task::{non_empty, Example, Splits, Task};
use super::{glue, superglue, wic};
use crate::error::{Error, Result};

impl Task {
    /// Reads the task from `dir` or from its subfolder with the task's name.
    ///
    /// The format is recognised by the training file, tried in this order: TSV (GLUE), JSON lines (SuperGLUE,
    /// and BoolQ's original files), WiC's original text files, parquet (the hub's layout, in one or more
    /// shards).
    ///
    /// # Errors
    /// If there is no training file (the error lists the paths tried), a file cannot be read or is malformed,
    /// a parquet shard is missing, or a set is empty.
    pub fn load_folder(&self, dir: &Path) -> Result<Splits> {
        let task = *self;
        let roots = std::iter::once(dir.to_owned()).chain(task.folder_names().iter().map(|n| dir.join(n)));
        let mut tried: Vec<String> = Vec::new();
        for root in roots {
            if glue::has_tsv(task) {
                let train = root.join("train.tsv");
                if train.is_file() {
                    return load(&train, &root, glue::dev_files(task), |path| glue::read(task, path));
                }
                tried.push(train.display().to_string());
            }
            if superglue::has_jsonl(task) {
                let train = root.join("train.jsonl");
                if train.is_file() {
                    let (theirs, own) = (superglue::DEV_FILE, superglue::OWN_DEV_FILE);
                    let is_own = root.join(own).is_file() && !root.join(theirs).is_file();
                    let dev = [("dev", if is_own { own } else { theirs })];
                    return load(&train, &root, &dev, |path| superglue::read(task, path));
                }
                tried.push(train.display().to_string());
            }
            if task == Task::Wic {
                if let Some(train) = wic::file(&root, "train") {
                    let dev = wic::file(&root, "dev");
                    let dev =
                        dev.ok_or_else(|| Error::format(&root, "no dev.data.txt beside train.data.txt"))?;
                    let read = |path: &Path| wic::read(path).and_then(|rows| non_empty(rows, path));
                    return Ok(Splits { train: read(&train)?, dev: vec![("dev".to_owned(), read(&dev)?)] });
                }
                tried.push(root.join("train/train.data.txt").display().to_string());
            }
            if !shards(&root, "train")?.is_empty() {
                return load_shards(task, &root);
            }
            tried.push(root.join("train-*.parquet").display().to_string());
        }
        Err(Error::format(dir, format!("no data of {task}; tried: {}", tried.join(", "))))
    }
}

/// Reads a training file and the development files next to it.
fn load(
    train: &Path,
    root: &Path,
    dev: &[(&str, &str)],
    read: impl Fn(&Path) -> Result<Vec<Example>>,
) -> Result<Splits> {
    let read = |path: &Path| read(path).and_then(|examples| non_empty(examples, path));
    let dev = dev.iter().map(|(name, file)| Ok(((*name).to_owned(), read(&root.join(file))?)));
    Ok(Splits { dev: dev.collect::<Result<_>>()?, train: read(train)? })
}

/// The parquet files of one set, sorted; empty if the folder does not exist. An incomplete set is an error:
/// if names end in `-of-00002`, there must be two files.
pub(super) fn shards(root: &Path, split: &str) -> Result<Vec<PathBuf>> {
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(Error::io(root))? {
        let path = entry.map_err(Error::io(root))?.path();
        let stem = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".parquet"));
        let rest = stem.and_then(|stem| stem.strip_prefix(split));
        if rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-')) {
            found.push(path);
        }
    }
    found.sort();
    for path in &found {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let Some((_, total)) = stem.rsplit_once("-of-") else { continue };
        // Older data sets on the hub append a hash: train-00000-of-00001-0123456789abcdef.
        let total = total.split('-').next().unwrap_or(total);
        if total.parse() != Ok(found.len()) {
            let there =
                if found.len() == 1 { "1 is there".into() } else { format!("{} are there", found.len()) };
            let total = total.trim_start_matches('0');
            return Err(Error::format(path, format!("one of {total} files, but {there}")));
        }
    }
    Ok(found)
}

#[cfg(feature = "parquet")]
fn load_shards(task: Task, root: &Path) -> Result<Splits> {
    let mut files = Vec::new();
    for (name, split) in task.hub_splits() {
        files.extend(shards(root, split)?.into_iter().map(|path| ((*name).to_owned(), path)));
    }
    super::parquet::load_parquet(task, &files)
}

#[cfg(not(feature = "parquet"))]
fn load_shards(task: Task, root: &Path) -> Result<Splits> {
    let reason = format!("{task} is here as parquet, which needs this crate's feature `parquet`");
    Err(Error::format(root, reason))
}

#[cfg(test)]
mod tests {
    use super::super::task::Label;
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn folders_are_found_by_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let mnli = dir.path().join("MNLI");
        create_dir_all(&mnli).unwrap();
        let rows = |label| format!("sentence1\tsentence2\tgold_label\na\tb\t{label}\n");
        write(mnli.join("train.tsv"), rows("entailment")).unwrap();
        write(mnli.join("dev_matched.tsv"), rows("neutral")).unwrap();
        let missing = Task::Mnli.load_folder(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("dev_mismatched.tsv"), "{missing}");
        write(mnli.join("dev_mismatched.tsv"), rows("contradiction")).unwrap();
        for root in [dir.path(), &mnli] {
            let splits = Task::Mnli.load_folder(root).unwrap();
            let dev: Vec<_> = splits.dev.iter().map(|(name, set)| (name.as_str(), set[0].label)).collect();
            assert_eq!(dev, [("matched", Label::Class(1)), ("mismatched", Label::Class(2))]);
            assert_eq!(splits.train[0].label, Label::Class(0));
        }
        let row = "{\"premise\": \"p\", \"hypothesis\": \"h\", \"label\": \"entailment\"}\n";
        let rte = dir.path().join("RTE");
        create_dir_all(&rte).unwrap();
        write(rte.join("train.jsonl"), row).unwrap();
        write(rte.join("val.jsonl"), "\n").unwrap();
        let empty = Task::Rte.load_folder(dir.path()).unwrap_err().to_string();
        assert!(empty.ends_with("val.jsonl: no examples"), "{empty}");
        let sst2 = dir.path().join("SST-2");
        create_dir_all(&sst2).unwrap();
        write(sst2.join("dev.tsv"), "sentence\tlabel\na\t1\n").unwrap();
        write(sst2.join("train.tsv"), "sentence\tlabel\n").unwrap();
        let header_only = Task::Sst2.load_folder(dir.path()).unwrap_err().to_string();
        assert!(header_only.ends_with("train.tsv: no examples"), "{header_only}");
        write(rte.join("val.jsonl"), row).unwrap();
        assert_eq!(Task::Rte.load_folder(dir.path()).unwrap().dev[0].0, "dev");
        let boolq = dir.path().join("BoolQ");
        create_dir_all(&boolq).unwrap();
        let row = |answer| format!("{{\"question\": \"q\", \"passage\": \"p\", \"answer\": {answer}}}\n");
        write(boolq.join("train.jsonl"), row(true)).unwrap();
        let missing = Task::BoolQ.load_folder(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("val.jsonl"), "{missing}");
        write(boolq.join("dev.jsonl"), row(false)).unwrap();
        let splits = Task::BoolQ.load_folder(dir.path()).unwrap();
        assert_eq!((splits.train[0].label, splits.dev[0].1[0].label), (Label::Class(1), Label::Class(0)));
        let nothing = Task::Wic.load_folder(dir.path()).unwrap_err().to_string();
        assert!(nothing.contains("no data of wic; tried: ") && nothing.contains("train.jsonl"), "{nothing}");
    }

    #[test]
    fn the_official_files_have_their_official_sizes() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let found = here.ancestors().skip(1).map(|up| up.join("shared/data/glue")).find(|p| p.is_dir());
        let Some(dir) = found else {
            crate::testing::skipped("no shared/data/glue beside the crate");
            return;
        };
        for (task, train, dev) in [
            (Task::Cola, 8551, 1043),
            (Task::Mrpc, 3668, 408),
            (Task::Rte, 2490, 277),
            (Task::Sst2, 67349, 872),
        ] {
            let splits = task.load_folder(&dir).unwrap();
            assert_eq!((splits.train.len(), splits.dev[0].1.len()), (train, dev), "{task}");
            assert!(splits.train.iter().all(|row| !row.text_a.is_empty()));
        }
    }
}
