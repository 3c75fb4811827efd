//! dirichlet
