//! The project's own rules, checked on its sources and documents: which module may import which, the
//! functions that `docs/METHOD.md` names, references in documents, help of the examples, how CUDA devices are
//! made, and how long files are.
//!
//! These tests only read files; they need neither candle nor the crate itself.

mod devices;
mod documents;
mod examples;
mod floors;
mod formulas;
mod lengths;
mod source;
mod text;
