//! Placeholder: special.
