//! MonteCLoRA: a posterior over the low-rank factor A, its draws and its regulariser.

mod buffer;
mod config;
mod draw;
mod layer;
mod linear;
mod noise;
mod options;
mod peft_compat;
mod posterior;
mod regularizer;
mod released;
mod scaler;
mod schedule;

pub use buffer::SampleBuffer;
pub use config::{MonteCLoRAConfig, MAX_BUFFER_SIZE};
pub use draw::PosteriorDraw;
pub use layer::MonteCLoRA;
pub use linear::MonteCLoRALinear;
pub use noise::{DrawNoise, DrawSpec, NoiseStreams};
pub use options::{Compat, Initial, KlEvaluation, Mixture};
pub use posterior::Posterior;
pub use regularizer::{Regularizer, RegularizerTerms};
pub use released::{Released, Walk};
pub use scaler::SampleScaler;
pub use schedule::ScalerSchedule;
