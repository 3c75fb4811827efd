//! Robustness studies: grids of methods and hyperparameters, run cell by cell, and their report.

mod cell;
mod grid;
mod per_task;
#[cfg(feature = "plot")]
pub mod plot;
pub mod recipe;
mod report;
mod run;
pub mod stats;
mod store;
mod tfb;
mod treatments;
mod trial;

pub use cell::{Bin, CellCost, CellKey, CellResult, Status};
pub use grid::{Grid, Shard};
pub use per_task::PerTask;
pub use recipe::Recipe;
pub use report::write_report;
pub use run::{run, Progress};
pub use store::{pack, read_cells, StoredCell};
pub use trial::Trial;
