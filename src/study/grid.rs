//! A grid of hyperparameters, its cells in a fixed order, and their distribution over machines.

use std::str::FromStr;

use super::cell::CellKey;
use super::recipe::Recipe;
use crate::error::{Error, Result};
use crate::util::check::at_least_one;

/// A grid: every combination of the values of its lists.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    /// The names of the tasks.
    pub tasks: Vec<String>,
    /// The recipes.
    pub methods: Vec<String>,
    /// The learning rates.
    pub lrs: Vec<f64>,
    /// The batch sizes.
    pub batch_sizes: Vec<usize>,
    /// The seeds.
    pub seeds: Vec<u64>,
}

impl Grid {
    /// The paper's nine settings for RoBERTa: three learning rates by three batch sizes.
    pub fn paper(tasks: Vec<String>, methods: Vec<String>) -> Self {
        let (lrs, batch_sizes) = (vec![3e-4, 5e-5, 1e-5], vec![8, 32, 64]);
        Self { tasks, methods, lrs, batch_sizes, seeds: vec![1] }
    }

    /// The paper's six settings for LLaMA: two learning rates by three batch sizes.
    pub fn paper_llama(tasks: Vec<String>, methods: Vec<String>) -> Self {
        let (lrs, batch_sizes) = (vec![3e-4, 3e-5], vec![8, 16, 32]);
        Self { lrs, batch_sizes, ..Self::paper(tasks, methods) }
    }

    /// Returns all cells. Methods vary fastest, then learning rates, so that a grid stopped half-way has run
    /// all methods in the settings it finished.
    ///
    /// # Errors
    /// If a list is empty or has a duplicate, a method is not a recipe, or a number is not positive.
    pub fn cells(&self) -> Result<Vec<CellKey>> {
        self.methods.iter().try_for_each(|method| method.parse::<Recipe>().map(drop))?;
        if let Some(lr) = self.lrs.iter().find(|lr| !(**lr > 0.0 && lr.is_finite())) {
            return Err(Error::config("lrs", format!("expected positive numbers, got {lr}")));
        }
        self.batch_sizes.iter().try_for_each(|size| at_least_one("batch_sizes", *size))?;
        let mut cells = Vec::new();
        for task in &self.tasks {
            for seed in &self.seeds {
                for batch_size in &self.batch_sizes {
                    for lr in &self.lrs {
                        cells.extend(self.methods.iter().map(|method| CellKey {
                            task: task.clone(),
                            method: method.clone(),
                            lr: *lr,
                            batch_size: *batch_size,
                            seed: *seed,
                        }));
                    }
                }
            }
        }
        let mut names: Vec<String> = cells.iter().map(CellKey::folder_name).collect();
        names.sort();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::config("grid", format!("{} comes twice", pair[0])));
        }
        if cells.is_empty() {
            return Err(Error::config("grid", "it has no cell: a list is empty"));
        }
        Ok(cells)
    }
}

/// One machine's share of a grid: every n-th cell, beginning with the i-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    index: usize, // from 0
    count: usize,
}

impl Shard {
    /// The share of process `rank` of `world` within this shard: every `world`-th of its cells.
    ///
    /// # Panics
    /// Unless `rank` is below `world`.
    pub fn share(self, rank: usize, world: usize) -> Self {
        assert!(rank < world, "process {rank} of {world}");
        Self { index: self.index + self.count * rank, count: self.count * world }
    }

    /// Whether the shard is the whole grid.
    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// The whole grid.
    pub const WHOLE: Self = Self { index: 0, count: 1 };

    /// The share of this member of a SLURM job array, from `SLURM_ARRAY_TASK_ID`, `SLURM_ARRAY_TASK_COUNT`
    /// and, if ids do not begin at zero, `SLURM_ARRAY_TASK_MIN`; the whole grid if the first is not set.
    /// `get` reads the environment.
    ///
    /// # Errors
    /// If a variable is not a number, or they are inconsistent (an array with gaps).
    pub fn from_slurm(get: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let number = |name: &str| -> Result<Option<usize>> {
            let parse = |value: String| {
                value.parse().map_err(|_| Error::config(name, format!("expected a number, got {value:?}")))
            };
            get(name).map(parse).transpose()
        };
        let Some(id) = number("SLURM_ARRAY_TASK_ID")? else { return Ok(Self::WHOLE) };
        let first = number("SLURM_ARRAY_TASK_MIN")?.unwrap_or(0);
        let count = number("SLURM_ARRAY_TASK_COUNT")?
            .ok_or_else(|| Error::config("SLURM_ARRAY_TASK_COUNT", "it is not set"))?;
        match id.checked_sub(first) {
            Some(index) if index < count => Ok(Self { index, count }),
            _ => {
                let reason =
                    format!("expected one of {count} ids from {first}, got {id}: use an array without gaps");
                Err(Error::config("SLURM_ARRAY_TASK_ID", reason))
            }
        }
    }

    /// Whether the cell at this position in the grid's order belongs to the shard.
    pub fn owns(&self, place: usize) -> bool {
        place % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = Error;

    /// Parses `i/n` with i from 1 to n.
    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((i, count)) if (1..=count).contains(&i) => Ok(Self { index: i - 1, count }),
            _ => Err(Error::config("shard", format!("expected i/n with i from 1 to n, got {text:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid() -> Grid {
        let list = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Grid { seeds: vec![1, 2], ..Grid::paper(list(&["mrpc", "rte"]), list(&["lora", "monteclora:n=8"])) }
    }

    #[test]
    fn shards_share_all_cells_and_none_twice() -> Result<()> {
        let cells = grid().cells()?;
        assert_eq!(cells.len(), 2 * 2 * 9 * 2);
        assert_eq!((cells[0].method.as_str(), cells[1].method.as_str()), ("lora", "monteclora:n=8"));
        let shards: Vec<Shard> = (1..=5).map(|i| format!("{i}/5").parse()).collect::<Result<_>>()?;
        for place in 0..cells.len() {
            assert_eq!(shards.iter().filter(|shard| shard.owns(place)).count(), 1);
        }
        // Machines with several processes.
        let of_processes = |shard: Shard, world| (0..world).map(move |rank| shard.share(rank, world));
        for (shard, world) in shards.iter().zip([2, 3, 1, 2, 4]) {
            for place in 0..cells.len() {
                let owners = of_processes(*shard, world).filter(|part| part.owns(place)).count();
                assert_eq!(owners, usize::from(shard.owns(place)), "{place} of {shard:?}");
            }
        }
        assert!(Shard::WHOLE.is_whole() && !Shard::WHOLE.share(0, 2).is_whole());
        for text in ["0/3", "4/3", "1", "a/b", "1/0"] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
        Ok(())
    }

    #[test]
    fn a_slurm_array_is_a_shard() -> Result<()> {
        let read = |vars: &[(&str, &str)]| {
            let vars: Vec<(String, String)> =
                vars.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            Shard::from_slurm(|name| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        assert_eq!(read(&[])?, Shard::WHOLE);
        let of = |id, first| {
            read(&[
                ("SLURM_ARRAY_TASK_ID", id),
                ("SLURM_ARRAY_TASK_COUNT", "4"),
                ("SLURM_ARRAY_TASK_MIN", first),
            ])
        };
        assert_eq!(of("1", "1")?, "1/4".parse()?);
        assert_eq!(of("3", "0")?, "4/4".parse()?);
        assert!(of("9", "0").is_err() && of("0", "1").is_err());
        assert!(read(&[("SLURM_ARRAY_TASK_ID", "1")]).is_err());
        Ok(())
    }

    #[test]
    fn what_cannot_be_run_is_refused_before_anything_runs() {
        let wrong = [
            Grid { lrs: vec![1e-3, -1.0], ..grid() },
            Grid { batch_sizes: vec![0], ..grid() },
            Grid { seeds: vec![1, 1], ..grid() },
            Grid { methods: vec!["qlora".into()], ..grid() },
            Grid { tasks: vec![], ..grid() },
        ];
        for grid in wrong {
            assert!(grid.cells().is_err(), "{grid:?}");
        }
    }
}
