//! Parts that the encoders share: embeddings, the post-norm layer with absolute or relative positions, and the
//! stack of layers.

pub mod config;
mod embeddings;
mod post_norm;
mod relative;
mod stack;

pub use embeddings::{Embeddings, EmbeddingsShape, PositionIds};
pub use post_norm::{LayerNames, LayerShape, PostNormLayer};
pub use relative::{Buckets, RelativePositions};
pub use stack::{Block, Stack};
