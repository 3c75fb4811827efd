//! The low-rank adapter in f32 on a CUDA device, beside a base in f32 or bf16.
//!
//! No activation is cast. For products with bf16 activations, A and B are each split into three bf16 parts,
//! which hold all 24 bits (`kernels/linear.cu`), and the products are summed in f32: A, or a draw around
//! it, is never rounded. The products `x A^T` and `dY B` are small and stay in f32. Where they are
//! multiplied by B, A and the activations, they are split into two bf16 parts, 16 bits, which loses at most
//! 2^-14 of the terms.
//!
//! The low-rank part of an output, with the bias, is written first, and the large product is added to it
//! in f32. This rounds the output once, and the low-rank part relative to its own size. In the opposite
//! order the output would be rounded twice relative to its whole size. Both orders write, read and
//! rewrite each element.

use candle_core::{DType, Result, Tensor};

use super::dropout::DropoutPlan;
use super::linear as base;
use crate::kernels::gemm::{add_product, product, Mat};
use crate::kernels::linear::{bias_rows, SplitLayout};
use crate::kernels::supports;

/// Whether the kernels take these tensors: `a` and `b` in f32, `xs` in f32 or bf16, all on CUDA
/// devices and not empty.
pub(super) fn supports_low_rank(xs: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let takes = |tensor: &Tensor| supports(tensor.elem_count(), tensor.dtype(), tensor.device());
    takes(xs) && [a, b].iter().all(|factor| takes(factor) && factor.dtype() == DType::F32)
}

/// What forward keeps for backward, all of the size of the rank: `s x A^T` and the factors, as bf16 parts
/// for bf16 activations.
pub(super) struct Thin {
    product: Tensor,
    a: Tensor,
    b: Tensor,
    rank: usize,
    parts: Option<SplitLayout>,
    scale: f64,
    /// The dropout on the input of the low-rank part, recomputed in backward.
    dropout: Option<DropoutPlan>,
}

impl Thin {
    /// `y = x W^T + bias + s (d A^T) B^T` in the dtype of `xs`, or `s (d A^T) B^T` in f32 without the frozen
    /// layer, where `d` is x after dropout, if any. All tensors are detached.
    pub fn forward(
        xs: &Tensor,
        frozen: Option<(&Tensor, Option<&Tensor>)>,
        dropout: Option<DropoutPlan>,
        a: &Tensor,
        b: &Tensor,
        scale: f64,
    ) -> Result<(Tensor, Self)> {
        let (rank, shape) = (a.dim(0)?, base::with_last(xs, b.dim(0)?));
        let (x, a, b) = (base::rows(xs)?, a.contiguous()?, b.contiguous()?);
        let bias = frozen.and_then(|(_, bias)| bias);
        let parts = (x.dtype() == DType::BF16).then(|| SplitLayout::new(rank, bias.is_some()));
        let [a, b] = match parts {
            Some(parts) => {
                let bias = bias.map(|bias| bias.to_dtype(DType::BF16)?.contiguous()).transpose()?;
                parts.factors(&a, &b, bias.as_ref())?
            }
            None => [a, b],
        };
        let whole = parts.map_or(0..rank, |parts| parts.unled().whole());
        let dropped = dropout.as_ref().map_or(Ok(x.clone()), |dropout| dropout.apply(&x))?;
        let thirds = product(scale, &Mat::new(&dropped)?, &Mat::new(&a)?.rows(whole).t(), DType::F32)?;
        drop(dropped);
        let small = parts.map_or(Ok(thirds.clone()), |parts| parts.product(&thirds))?;
        let facing = parts.map_or(0..rank, |parts| parts.facing());
        let (left, right) = (Mat::new(&small)?, Mat::new(&b)?.columns(facing).t());
        let y = match bias.filter(|_| parts.is_none()) {
            Some(bias) => {
                let y = bias_rows(&bias.to_dtype(DType::F32)?, &shape.clone().into())?;
                add_product(&y, 1.0, &left, &right)?;
                y
            }
            // With parts, the bias is a column of B that is multiplied by ones.
            None => product(1.0, &left, &right, if frozen.is_some() { x.dtype() } else { DType::F32 })?,
        };
        if let Some((weight, _)) = frozen {
            let weight = weight.to_dtype(x.dtype())?.contiguous()?;
            add_product(&y, 1.0, &Mat::new(&x)?, &Mat::new(&weight)?.t())?;
        }
        Ok((y.reshape(shape)?, Self { product: small, a, b, rank, parts, scale, dropout }))
    }

    /// The gradients of x, A and B. With `u = s dY B`: `dX = dY W + u A`, `dA = u^T X`,
    /// `dB = dY^T (s X A^T)`, where dropout, if any, applies to `u A` and X. All tensors are detached.
    pub fn backward(
        &self,
        xs: &Tensor,
        needs: [bool; 3],
        grad: &Tensor,
        weight: Option<&Tensor>,
    ) -> Result<[Option<Tensor>; 3]> {
        // Without the frozen layer the output was f32, which is then rounded to the dtype of the input:
        // so is its gradient.
        let (x, dy) = (base::rows(xs)?, base::rows(&grad.to_dtype(xs.dtype())?)?);
        let (whole, halves) = match self.parts {
            Some(parts) => (parts.whole(), parts.halves()),
            None => (0..self.rank, 0..self.rank),
        };
        let unled = self.parts.map(SplitLayout::unled);
        let thirds = product(self.scale, &Mat::new(&dy)?, &Mat::new(&self.b)?.columns(whole), DType::F32)?;
        let u = unled.map_or(Ok(thirds.clone()), |parts| parts.product(&thirds))?;
        let dx = needs[0].then(|| {
            let facing = unled.map_or(0..self.rank, |parts| parts.facing());
            let (left, right) = (Mat::new(&u)?, Mat::new(&self.a)?.rows(facing));
            let dx = self.dropped(product(1.0, &left, &right, x.dtype())?)?;
            if let Some(weight) = weight {
                let weight = weight.to_dtype(x.dtype())?.contiguous()?;
                add_product(&dx, 1.0, &Mat::new(&dy)?, &Mat::new(&weight)?)?;
            }
            dx.reshape(xs.dims())
        });
        let da = needs[1].then(|| {
            let columns = unled.map_or(0..self.rank, |parts| parts.halves());
            let dropped = self.dropped(x.clone())?;
            product(1.0, &Mat::new(&u)?.columns(columns).t(), &Mat::new(&dropped)?, DType::F32)
        });
        let db = needs[2].then(|| {
            let small = Mat::new(&self.product)?.columns(halves);
            product(1.0, &Mat::new(&dy)?.t(), &small, DType::F32)
        });
        let (dx, da, db) = (dx.transpose()?, da.transpose()?, db.transpose()?);
        let [da, db] = match self.parts {
            Some(parts) => parts.gradients(da.as_ref(), db.as_ref())?,
            None => [da, db],
        };
        Ok([dx, da, db])
    }
    fn dropped(&self, xs: Tensor) -> Result<Tensor> {
        match &self.dropout {
            Some(dropout) => dropout.apply(&xs),
            None => Ok(xs),
        }
    }
}
