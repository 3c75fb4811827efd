//! Bayesian methods that need no special training: MC dropout, checkpoint ensembles, temperature scaling,
//! Laplace approximations, linearised predictions and training-free Bayesianisation.

mod eigen;
mod ensemble;
pub mod laplace;
mod linearised;
mod parameter_draws;
mod precision;
mod temperature;
pub mod tfb;
mod trained_classifier;

pub use ensemble::{Ensemble, McDropout};
pub use laplace::{Laplace, LastLayer, Scope};
pub use linearised::{Linearised, LinearisedClassifier, LinearisedPosterior, Taps};
pub use parameter_draws::ParameterDraws;
pub use precision::PRECISION_BOUNDS;
pub use temperature::{Temperature, BOUNDS as TEMPERATURE_BOUNDS};
pub use tfb::Tfb;
pub use trained_classifier::TrainedClassifier;
