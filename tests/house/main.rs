//! The house's own rules, on its sources and documents alone: who may import whom, and that the
//! mathematics of `docs/METHOD.md` is where the document says, and that documents lead somewhere.
//!
//! Nothing here needs candle or the crate itself: it reads files.

mod devices;
mod documents;
mod examples;
mod floors;
mod formulas;
mod source;
mod text;
