//! The text classification tasks of GLUE and SuperGLUE, and their examples.
//!
//! [`Task::load_folder`] reads a task from a folder, whatever of TSV, JSON lines and parquet is there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{glue, superglue};
use crate::error::{Error, Result};

/// A task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// Microsoft Research Paraphrase Corpus: do two sentences mean the same?
    Mrpc,
    /// Corpus of Linguistic Acceptability: is a sentence grammatical?
    Cola,
    /// Recognising Textual Entailment.
    Rte,
    /// Word in Context: does a word mean the same in two sentences?
    Wic,
    /// Yes/no questions about a passage.
    BoolQ,
    /// Stanford Sentiment Treebank, two classes.
    Sst2,
    /// Does a sentence answer a question?
    Qnli,
    /// Quora Question Pairs: are two questions duplicates?
    Qqp,
    /// Multi-genre natural language inference, three classes.
    Mnli,
    /// Semantic Textual Similarity Benchmark: a score from 0 to 5.
    Stsb,
}

/// The answer to an example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Label {
    /// A class, counted from 0 in the order of [`Task::label_names`].
    Class(u32),
    /// The number to predict, for regression.
    Score(f32),
}

impl Label {
    /// A similarity score, if it is in the benchmark's range.
    pub(crate) fn checked_score(score: f32) -> std::result::Result<Self, String> {
        if (0.0..=5.0).contains(&score) {
            Ok(Self::Score(score))
        } else {
            Err(format!("score {score}, expected a number from 0 to 5"))
        }
    }
}

/// One labelled example.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The first text, or the only one.
    pub text_a: String,
    /// The second text of a pair.
    pub text_b: Option<String>,
    /// The answer.
    pub label: Label,
}

/// A task's labelled examples.
#[derive(Debug, Clone, PartialEq)]
pub struct Splits {
    /// The training set.
    pub train: Vec<Example>,
    /// The development sets by name: `matched` and `mismatched` for MNLI, one `dev` otherwise.
    pub dev: Vec<(String, Vec<Example>)>,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 10] = [
        Self::Mrpc,
        Self::Cola,
        Self::Rte,
        Self::Wic,
        Self::BoolQ,
        Self::Sst2,
        Self::Qnli,
        Self::Qqp,
        Self::Mnli,
        Self::Stsb,
    ];

    /// The name, in lower case; also the task's configuration in its hub repository.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mrpc => "mrpc",
            Self::Cola => "cola",
            Self::Rte => "rte",
            Self::Wic => "wic",
            Self::BoolQ => "boolq",
            Self::Sst2 => "sst2",
            Self::Qnli => "qnli",
            Self::Qqp => "qqp",
            Self::Mnli => "mnli",
            Self::Stsb => "stsb",
        }
    }

    /// The names of the classes, in the order of their numbers; empty for regression.
    pub const fn label_names(self) -> &'static [&'static str] {
        match self {
            Self::Mrpc => &["not_equivalent", "equivalent"],
            Self::Cola => &["unacceptable", "acceptable"],
            Self::Rte | Self::Qnli => &["entailment", "not_entailment"],
            Self::Wic | Self::BoolQ => &["false", "true"],
            Self::Sst2 => &["negative", "positive"],
            Self::Qqp => &["not_duplicate", "duplicate"],
            Self::Mnli => &["entailment", "neutral", "contradiction"],
            Self::Stsb => &[],
        }
    }

    /// The number of outputs of a classification head: 1 for regression.
    pub const fn num_labels(self) -> usize {
        if self.is_regression() {
            1
        } else {
            self.label_names().len()
        }
    }

    /// Whether the answer is a number rather than a class.
    pub const fn is_regression(self) -> bool {
        matches!(self, Self::Stsb)
    }

    /// The metric that picks the best checkpoint: `matthews`, `pearson` or `accuracy`.
    pub const fn primary_metric(self) -> &'static str {
        match self {
            Self::Cola => "matthews",
            Self::Stsb => "pearson",
            _ => "accuracy",
        }
    }

    /// The names the task's folder has: the benchmark's first, then the hub's.
    pub const fn folder_names(self) -> &'static [&'static str] {
        match self {
            Self::Mrpc => &["MRPC", "mrpc"],
            Self::Cola => &["CoLA", "cola"],
            Self::Rte => &["RTE", "rte"],
            Self::Wic => &["WiC", "wic"],
            Self::BoolQ => &["BoolQ", "boolq"],
            Self::Sst2 => &["SST-2", "sst2"],
            Self::Qnli => &["QNLI", "qnli"],
            Self::Qqp => &["QQP", "qqp"],
            Self::Mnli => &["MNLI", "mnli"],
            Self::Stsb => &["STS-B", "stsb"],
        }
    }

    /// The data set repository on the hub.
    pub const fn hub_repo(self) -> &'static str {
        match self {
            Self::Wic | Self::BoolQ => "aps/super_glue",
            _ => "nyu-mll/glue",
        }
    }

    /// The sets by their names in [`Splits`] (`train` first) and on the hub.
    pub(crate) const fn hub_splits(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Mnli => &[
                ("train", "train"),
                ("matched", "validation_matched"),
                ("mismatched", "validation_mismatched"),
            ],
            _ => &[("train", "train"), ("dev", "validation")],
        }
    }

    /// The files to fetch from [`Self::hub_repo`]: (name of the set, path in the repository). The names
    /// are those that [`Splits`] has, with `train` first.
    pub fn hub_files(self) -> Vec<(String, String)> {
        let file = |split| format!("{}/{split}-00000-of-00001.parquet", self.name());
        self.hub_splits().iter().map(|(name, split)| ((*name).to_owned(), file(split))).collect()
    }

    /// Reads the task from `dir`, or from the folder of the task's name in `dir`.
    ///
    /// TSV (GLUE), JSON lines (SuperGLUE) and parquet (the hub's layout, in one or more shards) are told
    /// apart by which training file is there, in this order.
    ///
    /// # Errors
    /// There is no training file (the error names the paths tried), a file cannot be read or does not
    /// hold what it should, or a set is empty.
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
                    let dev = [("dev", superglue::DEV_FILE)];
                    return load(&train, &root, &dev, |path| superglue::read(task, path));
                }
                tried.push(train.display().to_string());
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
    let read = |path: &Path| read(path).and_then(|examples| some(examples, path));
    let dev = dev.iter().map(|(name, file)| Ok(((*name).to_owned(), read(&root.join(file))?)));
    Ok(Splits { dev: dev.collect::<Result<_>>()?, train: read(train)? })
}

/// The examples, unless there are none.
pub(crate) fn some(examples: Vec<Example>, path: &Path) -> Result<Vec<Example>> {
    if examples.is_empty() {
        return Err(Error::format(path, "no examples"));
    }
    Ok(examples)
}

/// The parquet files of one set, in order; none if the folder is not there.
fn shards(root: &Path, split: &str) -> Result<Vec<PathBuf>> {
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
    Ok(found)
}

#[cfg(feature = "hub")]
fn load_shards(task: Task, root: &Path) -> Result<Splits> {
    let mut files = Vec::new();
    for (name, split) in task.hub_splits() {
        files.extend(shards(root, split)?.into_iter().map(|path| ((*name).to_owned(), path)));
    }
    super::parquet::load_parquet(task, &files)
}

#[cfg(not(feature = "hub"))]
fn load_shards(task: Task, root: &Path) -> Result<Splits> {
    let reason = format!("{task} is here as parquet, which needs this crate's feature `hub`");
    Err(Error::format(root, reason))
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = Error;

    /// Reads a name in upper or lower case, with or without its hyphen (`sst2`, `SST-2`).
    fn from_str(text: &str) -> Result<Self> {
        let plain = text.to_ascii_lowercase().replace(['-', '_'], "");
        Self::ALL.into_iter().find(|task| task.name() == plain).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::config("task", format!("{text:?}, expected one of {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{create_dir_all, write};

    #[test]
    fn names_are_read_back_and_strangers_refused() {
        for task in Task::ALL {
            assert_eq!(task.name().parse::<Task>().unwrap(), task);
            assert_eq!(task.folder_names()[0].parse::<Task>().unwrap(), task);
            assert_eq!(task.num_labels() == 1, task.is_regression());
            assert_eq!(task.hub_files()[0].0, "train");
        }
        let message = "wnli".parse::<Task>().unwrap_err().to_string();
        assert!(message.starts_with("invalid task: \"wnli\", expected one of mrpc, cola,"), "{message}");
        let files = Task::Mnli.hub_files();
        assert_eq!(files[2].1, "mnli/validation_mismatched-00000-of-00001.parquet");
    }

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
        write(rte.join("val.jsonl"), row).unwrap();
        assert_eq!(Task::Rte.load_folder(dir.path()).unwrap().dev[0].0, "dev");
        let nothing = Task::Wic.load_folder(dir.path()).unwrap_err().to_string();
        assert!(nothing.contains("no data of wic; tried: ") && nothing.contains("train.jsonl"), "{nothing}");
    }

    #[test]
    fn the_official_files_have_their_official_sizes() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let found = here.ancestors().skip(1).map(|up| up.join("shared/data/glue")).find(|p| p.is_dir());
        let Some(dir) = found else {
            println!("skipped: no shared/data/glue beside the crate");
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
