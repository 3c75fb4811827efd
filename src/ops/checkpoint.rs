//! Gradient checkpointing (Chen et al. 2016): a block's intermediate results are dropped and
//! recomputed in backward.

use candle_core::{bail, Result, Tensor, Var};

use super::backward::backward;
use super::constant::mul_constant;
use super::custom_vjp::custom_vjp;

/// `f(xs)`, keeping only `xs` and the result; backward runs `f` again.
///
/// This costs one more forward pass of the block. The memory is that of one block, however many follow each
/// other, plus a copy of the tracked parameters (small for adapters). `f` must be a pure function of `xs` and
/// `params`: its noise must be addressed ([`crate::adapter::Pass`]), so that both runs see the same draw and
/// drop the same elements.
///
/// # Shapes
/// - `params`: every variable that `f` uses besides `xs`, of one dtype and any shapes. Variables
///   that are missing here get no gradient, nor do variables that reach `f` only through tensors
///   computed outside of it
///
/// # Errors
/// If `f` fails, or the parameters' dtypes differ.
pub fn checkpoint(
    xs: &Tensor,
    params: &[Tensor],
    f: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let params: Vec<Tensor> = params.iter().filter(|param| param.track_op()).cloned().collect();
    if params.is_empty() && !xs.track_op() {
        return f(xs);
    }
    // Detached, so that the graph of this run is dropped; a copy, because the storage may be shared.
    let y = f(&xs.detach())?.detach().copy()?;
    if params.is_empty() {
        return custom_vjp("checkpoint", [xs], y, move |call| {
            let ([dx], _) = gradients(&f, &call.args[0], &call.grad, true, &[])?;
            Ok([dx])
        });
    }
    // Candle's ops take at most three arguments: the parameters are packed into one, whose gradient is
    // distributed by the backward of the concatenation.
    let flat = params.iter().map(|param| param.flatten_all()).collect::<Result<Vec<_>>>()?;
    if flat.iter().any(|param| param.dtype() != flat[0].dtype()) {
        bail!("checkpoint: the parameters have several dtypes");
    }
    let packed = Tensor::cat(&flat, 0)?;
    custom_vjp("checkpoint", [xs, &packed], y, move |call| {
        let ([dx], dparams) = gradients(&f, &call.args[0], &call.grad, call.needs[0], &params)?;
        Ok([dx, Some(Tensor::cat(&dparams, 0)?)])
    })
}

/// The gradients of `xs` and, flattened, of `params`, where `grad` is the gradient of the result of `f`.
fn gradients(
    f: &dyn Fn(&Tensor) -> Result<Tensor>,
    xs: &Tensor,
    grad: &Tensor,
    of_xs: bool,
    params: &[Tensor],
) -> Result<([Option<Tensor>; 1], Vec<Tensor>)> {
    let input = of_xs.then(|| Var::from_tensor(xs)).transpose()?;
    let y = f(input.as_ref().map_or(xs, Var::as_tensor))?;
    // The gradient of <y, grad> with respect to y is `grad`.
    let leaves: Vec<Tensor> = params.iter().chain(input.as_ref().map(Var::as_tensor)).cloned().collect();
    let mut store = backward(&mul_constant(&y, grad)?.sum_all()?, &leaves, None)?;
    let mut take = |tensor: &Tensor| match store.remove(tensor) {
        Some(grad) => Ok(grad),
        None => tensor.detach().zeros_like(),
    };
    let dparams = params.iter().map(|param| take(param)?.flatten_all()).collect::<Result<Vec<_>>>()?;
    Ok(([input.as_ref().map(|input| take(input.as_tensor())).transpose()?], dparams))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::noise::{Noise, Purpose};
    use crate::ops::{self, OpPath};

    #[test]
    fn gradients_are_those_of_the_block_itself_also_a_second_time() -> Result<()> {
        let random = |path: &str, shape: &[usize]| {
            let mut values = vec![0f64; shape.iter().product()];
            Noise::new(3).stream(path, Purpose::Init).fill_normal(0, &mut values);
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(DType::F32)
        };
        let (w, a) = (random("w", &[6, 5])?, Var::from_tensor(&random("a", &[2, 5])?)?);
        let (b, unused) = (Var::from_tensor(&random("b", &[6, 2])?)?, Var::from_tensor(&random("u", &[3])?)?);
        let input = Var::from_tensor(&random("x", &[4, 5])?)?;
        let stream = Noise::new(4).stream("drop", Purpose::Dropout);
        let (a_in, b_in) = (a.as_tensor().clone(), b.as_tensor().clone());
        let block = move |xs: &Tensor, path: OpPath| {
            let y = ops::adapted_linear(xs, &w, None, &a_in, &b_in, 0.7, path)?;
            ops::gelu(&ops::dropout(&y, 0.3, &stream, 5, path)?, path)
        };
        let params = [a.as_tensor().clone(), b.as_tensor().clone(), unused.as_tensor().clone()];
        let weight = random("weight", &[4, 6])?;
        for path in OpPath::ALL {
            for xs in [input.as_tensor().clone(), input.as_detached_tensor()] {
                let whole = block(&xs, path)?;
                let again = block.clone();
                let pieces = checkpoint(&xs, &params, move |xs| again(xs, path))?;
                assert_eq!(whole.to_vec2::<f32>()?, pieces.to_vec2::<f32>()?);
                let want = (&whole * &weight)?.sum_all()?.backward()?;
                let loss = (&pieces * &weight)?.sum_all()?;
                for _ in 0..2 {
                    let got = loss.backward()?;
                    for var in [&input, &a, &b] {
                        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
                        match (got.get(var), want.get(var)) {
                            (Some(got), Some(want)) => assert_eq!(flat(got)?, flat(want)?, "{path:?}"),
                            (got, want) => assert!(got.is_none() && want.is_none(), "{path:?}"),
                        }
                    }
                    assert_eq!(got.get(&unused).expect("a zero").to_vec1::<f32>()?, [0.0; 3]);
                }
            }
        }
        // Without a tracked argument, the result is that of `f` itself.
        let plain = checkpoint(&input.as_detached_tensor(), &[], move |xs| block(xs, OpPath::Fused))?;
        assert!(plain.track_op(), "the block's own parameters are tracked, though none was named");
        Ok(())
    }
}
