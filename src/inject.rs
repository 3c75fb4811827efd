//! Placeholder: inject.
