//! The text of the CUDA program.

/// All kernels, as one program.
pub(super) const SOURCE: &str = concat!(
    include_str!("dialect.cu"),
    include_str!("noise.cu"),
    include_str!("gamma.cu"),
    include_str!("blocks.cu"),
    include_str!("norm.cu"),
    include_str!("draw.cu"),
    include_str!("divergence.cu"),
    include_str!("energy.cu"),
    include_str!("update.cu"),
    include_str!("attention.cu"),
    include_str!("loss.cu"),
    include_str!("gather.cu"),
    include_str!("activation.cu"),
    include_str!("linear.cu"),
);
