//! Half the expected squared norm of low-rank updates, computed from Gram matrices of size (rank, rank).

use candle_core::{bail, Result, Tensor, D};

use super::custom_vjp::custom_vjp;
use super::path::OpPath;

/// `1/2 sum_l w_l tr[(A_l A_l^T + diag v_l) B_l^T B_l]`: half the expectation of `||B_l (A_l + D_l)||_F^2`,
/// weighted by layer. The rows i of the perturbations D_l are uncorrelated and have expected squared norms
/// v_li. The update itself, out_dim x in_dim, is never computed.
///
/// One node for all layers, with `dA = w (B^T B) A`, `dB = w B (A A^T + diag v)`, `dv_i = w/2 (B^T B)_ii`.
/// The gradient of A is zero while B is zero.
///
/// # Shapes
/// - `a`: `(layers, rank, in_dim)`, `b`: `(layers, out_dim, rank)`, `variances`: `(layers, rank)`
/// - `weights`: one per layer
/// - output: a scalar
///
/// # Errors
/// If the shapes do not fit.
pub fn update_energy(
    a: &Tensor,
    b: &Tensor,
    variances: &Tensor,
    weights: &[f64],
    path: OpPath,
) -> Result<Tensor> {
    let ((layers, rank, _), (also, _, columns)) = (a.dims3()?, b.dims3()?);
    let fits = (also, columns) == (layers, rank) && variances.dims() == [layers, rank];
    if !fits || weights.len() != layers {
        let (a, b, v) = (a.dims(), b.dims(), variances.dims());
        bail!("update energy: a {a:?}, b {b:?}, variances {v:?}, {} weights", weights.len())
    }
    let weights = Tensor::new(weights, a.device())?.to_dtype(a.dtype())?.reshape((layers, 1, 1))?;
    if path == OpPath::Reference {
        let (inner, outer) = grams(a, b, variances)?;
        return (inner * outer)?.broadcast_mul(&weights)?.sum_all()? * 0.5;
    }
    let (inner, outer) = grams(&a.detach(), &b.detach(), &variances.detach())?;
    let energy = ((&inner * &outer)?.broadcast_mul(&weights)?.sum_all()? * 0.5)?;
    custom_vjp("update-energy", [a, b, variances], energy, move |call| {
        let [a, b, _] = &call.args;
        let weights = weights.broadcast_mul(&call.grad)?;
        let along = |gram: &Tensor| gram.broadcast_mul(&weights);
        let da = call.needs[0].then(|| along(&outer)?.matmul(a)).transpose()?;
        let db = call.needs[1].then(|| b.matmul(&along(&inner)?)).transpose()?;
        let dv = call.needs[2].then(|| (along(&b.sqr()?.sum_keepdim(1)?)? * 0.5)?.squeeze(1)).transpose()?;
        Ok([da, db, dv])
    })
}

/// `A A^T + diag v` and `B^T B`, each `(layers, rank, rank)`.
fn grams(a: &Tensor, b: &Tensor, variances: &Tensor) -> Result<(Tensor, Tensor)> {
    let eye = Tensor::eye(variances.dim(D::Minus1)?, a.dtype(), a.device())?;
    let diagonal = variances.unsqueeze(D::Minus1)?.broadcast_mul(&eye)?;
    Ok(((a.matmul(&a.t()?)? + diagonal)?, b.t()?.matmul(b)?))
}
