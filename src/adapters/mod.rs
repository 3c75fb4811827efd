//! Other adapters.
