//! The project's own rules, checked on its sources and documents: which module may import which, the
//! functions that `docs/METHOD.md` names, references in documents, help of the examples, and how CUDA devices
//! are made.
//!
//! These tests only read files; they need neither candle nor the crate itself.

mod devices;
mod documents;
mod examples;
mod floors;
mod formulas;
mod source;
mod text;
