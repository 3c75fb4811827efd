//! Placeholder: metrics.
