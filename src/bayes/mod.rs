//! Bayesian methods that need no special training: MC dropout, checkpoint ensembles, temperature scaling,
//! Laplace approximations and training-free Bayesianisation.

mod eigen;
mod ensemble;
pub mod laplace;
mod parameter_draws;
mod temperature;
pub mod tfb;

pub use ensemble::{Ensemble, McDropout};
pub use laplace::{Laplace, LastLayer, Linearised, Scope, Taps};
pub use parameter_draws::ParameterDraws;
pub use temperature::{Temperature, BOUNDS as TEMPERATURE_BOUNDS};
pub use tfb::Tfb;
