//! Robustness studies: grids of methods and hyperparameters that are run cell by cell, and their reports.

mod arm;
mod cell;
mod checksums;
mod evaluated;
mod grid;
mod language;
mod paired;
mod per_task;
mod plan;
#[cfg(feature = "plot")]
pub mod plot;
pub mod recipe;
mod report;
mod rows;
mod run;
pub mod stats;
mod store;
mod tfb;
mod training;
mod treatment;
mod treatments;
mod trial;

pub use arm::Arm;
pub use cell::{Bin, CellCost, CellKey, CellResult, Status, TaskResult};
pub use checksums::{checksums_of_data, checksums_of_recipes};
pub use evaluated::EvaluatedTask;
pub use grid::{Grid, Shard};
pub use language::LanguageTrial;
pub use paired::RowScore;
pub use per_task::PerTask;
pub use plan::{Comparison, Criterion, Methods, Plan, Variation};
pub use recipe::Recipe;
pub use report::write_report;
pub use rows::CellRows;
pub use run::{run, Progress};
pub use store::{pack, read_cells, read_rows, StoredCell};
pub use trial::Trial;
