//! Embedding look-up.

use candle_core::{bail, DType, Result, Tensor, D};

use super::custom_vjp::custom_vjp;
use super::host::{add_assign, for_rows, tensor, Host};
use super::path::{Implementation, OpPath};
use super::reference;

/// Returns the rows of `weight` at `ids`.
///
/// A frozen table gets no gradient. The gradient of a tracked table is a scatter-add in the order of the ids,
/// for any number of threads.
///
/// # Shapes
/// - `ids`: `(..)` of u32
/// - `weight`: `(vocabulary, dim)`
/// - output: `(.., dim)`
///
/// # Errors
/// If an id is outside the vocabulary (on the CPU), or the weight is not a matrix.
pub fn embedding(ids: &Tensor, weight: &Tensor, path: OpPath) -> Result<Tensor> {
    let how = path.on(&[weight]);
    if how == Implementation::Reference {
        return reference::embedding(ids, weight);
    }
    let (vocabulary, dim) = weight.dims2()?;
    let mut shape = ids.dims().to_vec();
    shape.push(dim);
    let flat = ids.flatten_all()?.to_dtype(DType::U32)?.contiguous()?;
    if flat.device().is_cpu() {
        // Candle checks as well, but reports neither the position nor the size of the vocabulary.
        let ids = flat.to_vec1::<u32>()?;
        if let Some((at, id)) = ids.iter().enumerate().find(|(_, &id)| id as usize >= vocabulary) {
            bail!("embedding: id {id} at position {at} is outside a vocabulary of {vocabulary}");
        }
    }
    let y = weight.detach().contiguous()?.index_select(&flat, 0)?.reshape(shape)?;
    custom_vjp("embedding", [weight], y, move |call| {
        if how == Implementation::Slices {
            return Ok([Some(scatter(&flat, &call.grad, vocabulary)?)]);
        }
        let rows = call.grad.reshape((flat.elem_count(), dim))?;
        Ok([Some(call.args[0].zeros_like()?.contiguous()?.index_add(&flat, &rows, 0)?)])
    })
}

/// For each id, the sum of the rows of `grad` that belong to it.
fn scatter(ids: &Tensor, grad: &Tensor, vocabulary: usize) -> Result<Tensor> {
    let dim = grad.dim(D::Minus1)?;
    let ids = ids.to_vec1::<u32>()?;
    // Sorted by id, ties in input order, so that each piece of the table finds its ids by bisection.
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&at| ids[at]);
    let grad = Host::of(grad)?;
    let grad: &[f32] = &grad;
    let mut out = vec![0f32; vocabulary * dim];
    for_rows(&mut out, dim, |first, rows| {
        let end = first + rows.len() / dim.max(1);
        let start = order.partition_point(|&at| (ids[at] as usize) < first);
        for &at in order[start..].iter().take_while(|&&at| (ids[at] as usize) < end) {
            let row = ids[at] as usize - first;
            add_assign(&mut rows[row * dim..(row + 1) * dim], &grad[at * dim..(at + 1) * dim]);
        }
    });
    tensor(out, (vocabulary, dim))
}
