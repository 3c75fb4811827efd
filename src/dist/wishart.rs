//! wishart
