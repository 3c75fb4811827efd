//! The test sets of a task, which are distributed without labels.

use std::path::Path;

use super::folder::shards;
use super::task::{non_empty, Example, Task};
use super::{glue, superglue};
use crate::error::{Error, Result};

impl Task {
    /// Reads the task's test sets, without labels, from `dir` or from its subfolder with the task's name. The
    /// set is called `test`; MNLI has `matched` and `mismatched`. Every row of a file is kept, in order.
    ///
    /// # Errors
    /// As [`Task::load_folder`], except for label errors.
    pub fn load_tests(&self, dir: &Path) -> Result<Vec<(String, Vec<Example>)>> {
        let task = *self;
        let sets: &[(&str, &str)] = match task {
            Self::Mnli => &[("matched", "test_matched"), ("mismatched", "test_mismatched")],
            _ => &[("test", "test")],
        };
        let roots = std::iter::once(dir.to_owned()).chain(task.folder_names().iter().map(|n| dir.join(n)));
        let mut tried = Vec::new();
        for root in roots {
            let file = |stem: &str, ending: &str| root.join(format!("{stem}.{ending}"));
            let there = |ending: &str| sets.iter().all(|(_, stem)| file(stem, ending).is_file());
            let read = |ending: &str, read: &dyn Fn(&Path) -> Result<Vec<Example>>| {
                let set = |(name, stem): &(&str, &str)| {
                    let path = file(stem, ending);
                    Ok(((*name).to_owned(), non_empty(read(&path)?, &path)?))
                };
                sets.iter().map(set).collect::<Result<Vec<_>>>()
            };
            if glue::has_tsv(task) && there("tsv") {
                return read("tsv", &|path| glue::read_unlabelled(task, path));
            }
            if superglue::has_jsonl(task) && there("jsonl") {
                return read("jsonl", &|path| superglue::read_unlabelled(task, path));
            }
            if !shards(&root, sets[0].1)?.is_empty() {
                return sets
                    .iter()
                    .map(|(name, stem)| Ok(((*name).to_owned(), of_shards(task, &root, stem)?)))
                    .collect();
            }
            tried.push(root.join(sets[0].1).display().to_string());
        }
        Err(Error::format(
            dir,
            format!("no test set of {task}; tried, as tsv, jsonl and parquet: {}", tried.join(", ")),
        ))
    }
}

#[cfg(feature = "parquet")]
fn of_shards(task: Task, root: &Path, stem: &str) -> Result<Vec<Example>> {
    let mut rows = Vec::new();
    for path in shards(root, stem)? {
        rows.append(&mut super::parquet::read_unlabelled(task, &path)?);
    }
    non_empty(rows, &root.join(stem))
}

#[cfg(not(feature = "parquet"))]
fn of_shards(task: Task, root: &Path, _: &str) -> Result<Vec<Example>> {
    let reason = format!("{task} is here as parquet, which needs this crate's feature `parquet`");
    Err(Error::format(root, reason))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn test_sets_are_found_by_what_is_there_and_keep_their_rows() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Task::Mnli.load_tests(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("no test set of mnli; tried") && missing.contains("MNLI"), "{missing}");
        let mnli = dir.path().join("MNLI");
        create_dir_all(&mnli).unwrap();
        let rows = "index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td\n";
        write(mnli.join("test_matched.tsv"), rows).unwrap();
        write(mnli.join("test_mismatched.tsv"), "index\tsentence1\tsentence2\n0\te\tf\n").unwrap();
        let sets = Task::Mnli.load_tests(dir.path()).unwrap();
        let pairs: Vec<Example> = vec![("a", "b").into(), ("c", "d").into()];
        assert_eq!(
            sets,
            [("matched".to_string(), pairs), ("mismatched".to_string(), vec![("e", "f").into()])]
        );
        let boolq = dir.path().join("BoolQ");
        create_dir_all(&boolq).unwrap();
        write(boolq.join("test.jsonl"), "{\"question\": \"q\", \"passage\": \"p\", \"idx\": 0}\n").unwrap();
        let sets = Task::BoolQ.load_tests(&boolq).unwrap();
        assert_eq!(sets, [("test".to_string(), vec![("q", "p").into()])]);
    }
}
