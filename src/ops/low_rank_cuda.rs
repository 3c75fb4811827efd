//! The low-rank adapter of f32 on a CUDA device, beside a base of f32 or bf16.
//!
//! No activation is cast. A bf16 activation meets A and B as sums of three bf16 parts, which hold all 24 bits of them
//! (`kernels/linear.cu`), in products that are summed in f32; so A, a draw around it included, is never rounded. The
//! products `x A^T` and `dY B` are small and stay in f32; where they meet B, A and the activations again, they are two
//! parts of 16 bits, which is 2^-14 of their terms.
//!
//! The low-rank part of an output, with the bias, is written first, and the large product is added to it in f32: that
//! rounds the output once, and the small part by its own size. An output that was written first and added to would be
//! rounded twice by the size of the whole. Either way an element is written, read and written.

use candle_core::{DType, Result, Tensor};

use super::dropout::DropoutPlan;
use super::linear as base;
use crate::kernels::gemm::{add_product, product, Mat};
use crate::kernels::linear::{bias_rows, Parts};
use crate::kernels::supports;

/// Whether this way is open: an adapter of f32, activations of f32 or bf16, nothing empty, on a device.
pub(super) fn supports_low_rank(xs: &Tensor, a: &Tensor, b: &Tensor) -> bool {
    let takes = |tensor: &Tensor| supports(tensor.elem_count(), tensor.dtype(), tensor.device());
    takes(xs) && [a, b].iter().all(|factor| takes(factor) && factor.dtype() == DType::F32)
}

/// What forward leaves for backward, as thin as the rank: `s x A^T` and the factors, of bf16 parts beside bf16.
pub(super) struct Thin {
    product: Tensor,
    a: Tensor,
    b: Tensor,
    rank: usize,
    parts: Option<Parts>,
    scale: f64,
    /// What the low-rank part sees its input through; applied anew in backward.
    dropout: Option<DropoutPlan>,
}

impl Thin {
    /// `y = x W^T + bias + s (d A^T) B^T` in the dtype of `xs`, or without the frozen layer `s (d A^T) B^T` in f32, d being
    /// x or, where there is dropout, what it leaves; of detached tensors.
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
        let parts = (x.dtype() == DType::BF16).then(|| Parts::new(rank, bias.is_some()));
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
            // Among the parts the bias is a column of B, which meets a one.
            None => product(1.0, &left, &right, if frozen.is_some() { x.dtype() } else { DType::F32 })?,
        };
        if let Some((weight, _)) = frozen {
            let weight = weight.to_dtype(x.dtype())?.contiguous()?;
            add_product(&y, 1.0, &Mat::new(&x)?, &Mat::new(&weight)?.t())?;
        }
        Ok((y.reshape(shape)?, Self { product: small, a, b, rank, parts, scale, dropout }))
    }

    /// With `u = s dY B`: `dX = dY W + u A`, `dA = u^T X`, `dB = dY^T (s X A^T)`, `u A` and X through the dropout where there
    /// is one; of detached tensors.
    pub fn backward(
        &self,
        xs: &Tensor,
        needs: [bool; 3],
        grad: &Tensor,
        weight: Option<&Tensor>,
    ) -> Result<[Option<Tensor>; 3]> {
        // Without the frozen layer the output was f32: that of a bf16 input is rounded to it, and so is its gradient.
        let (x, dy) = (base::rows(xs)?, base::rows(&grad.to_dtype(xs.dtype())?)?);
        let (whole, halves) = match self.parts {
            Some(parts) => (parts.whole(), parts.halves()),
            None => (0..self.rank, 0..self.rank),
        };
        let unled = self.parts.map(Parts::unled);
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
