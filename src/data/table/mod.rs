//! User-supplied data sets: tables with a text and a label column, as CSV, TSV, JSON lines or parquet.

mod columns;
mod dataset;
mod delimited;
mod read;
mod target;

pub use columns::Columns;
pub use dataset::{DataSet, LabelCount};
pub use read::{read, read_from, Record, Table};
pub use target::{ProblemType, Target};
