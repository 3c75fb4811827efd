//! MonteCLoRA: a posterior over the low-rank factor A, its draws and its regulariser.

mod buffer;
mod config;
mod draw;
mod evidence;
mod group;
mod layer;
mod layer_sums;
#[cfg(feature = "cuda")]
mod layer_sums_cuda;
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
pub use evidence::EvidenceBound;
pub(crate) use group::DrawGroup;
pub use layer::MonteCLoRA;
pub use linear::MonteCLoRALinear;
pub use noise::{DrawNoise, DrawSpec, NoiseStreams};
pub use options::{Compat, Initial, KlEvaluation, Mixture};
pub use posterior::Posterior;
#[cfg(feature = "train")]
pub(crate) use regularizer::training_rows;
pub use regularizer::{Regularizer, RegularizerTerms};
pub use released::{Released, ReleasedWalk};
pub use scaler::SampleScaler;
pub use schedule::ScalerSchedule;
