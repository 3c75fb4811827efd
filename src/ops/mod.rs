//! Differentiable building blocks, forward and backward side by side.
//!
//! Candle records every elementary operation: a layer norm becomes nine graph nodes, a frozen linear layer
//! computes a weight gradient that is never used, and every intermediate is kept. Here each block is a single
//! node with a closed-form backward that computes only the gradients that are needed: a tensor gets a
//! gradient if and only if candle tracks it.
//!
//! Every block has three implementations; [`OpPath`] selects one. Speed-ups in these docs compare the
//! CPU time of forward plus backward with `OpPath::Reference`, on two cores in f32, at batch 8 x 128
//! of RoBERTa-base. Twelve of its layers with rank-8 adapters on q, k, v and dropout take 5.4 s
//! instead of 14.2 s.

mod activation;
mod attention;
mod attention_fused;
mod attention_mask;
mod attention_softmax;
mod backward;
mod carry;
mod checkpoint;
mod collect;
mod constant;
mod custom_vjp;
mod disentangled;
mod disentangled_fused;
mod disentangled_shape;
mod dropout;
mod dropout_mask;
mod embedding;
mod feed_forward;
mod gemm;
mod host;
mod linear;
mod linear_loss;
mod loss;
mod low_rank;
#[cfg(feature = "cuda")]
mod low_rank_cuda;
mod norm;
mod norm_modules;
mod path;
mod precision;
mod quantized;
mod reference;
mod rotary;
mod rows;
mod scaled_rows;
mod skinny_gemm;
mod soft_cap;
mod swiglu;
mod tape;
#[cfg(test)]
mod tests;
mod update_energy;
mod vmath;

pub use activation::{gelu, gelu_tanh_mul, silu, silu_mul};
pub use attention::attention;
pub use attention_mask::{CausalMask, Mask, Scores, Window};
pub(crate) use backward::{backward, sums};
pub use carry::carry;
#[cfg(feature = "models")]
pub(crate) use carry::{carried, copied};
pub(crate) use carry::{joined, stacked};
pub use checkpoint::checkpoint;
pub use constant::{add_constant, matmul_constant, mul_constant, scale};
pub(crate) use custom_vjp::custom_vjp;
pub use disentangled::disentangled_attention;
pub use dropout::dropout;
pub use embedding::embedding;
pub use feed_forward::feed_forward;
pub(crate) use host::sum_of_squares;
pub use linear::linear;
pub use linear_loss::{capped_linear_cross_entropy, linear_cross_entropy};
pub use loss::{cross_entropy, mean_squared_error, IGNORED_LABEL};
pub use low_rank::{
    adapted_linear, adapted_linear_with_dropout, add_low_rank, linear_and_low_rank, low_rank,
};
pub use norm::{add_layer_norm, layer_norm, rms_norm};
pub use norm_modules::{LayerNorm, RmsNorm};
pub use path::OpPath;
pub use precision::{allow_tf32, tf32_allowed};
pub use quantized::{quantized_linear, QuantizedWeight, Weight};
pub use rotary::rotary;
pub use rows::Rows;
pub use scaled_rows::add_scaled_rows;
pub use soft_cap::soft_cap;
pub use swiglu::swiglu;
pub use tape::Tape;
pub use update_energy::update_energy;
