//! A backward pass that hands gradients to variables without a launch.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

/// The variables that a backward pass on this thread collects for itself, and what it has collected. It lasts for the
/// one call of [`backward`]: candle gives an op no other way to reach who called.
struct Collected {
    wanted: HashSet<TensorId>,
    grads: HashMap<TensorId, Tensor>,
}

thread_local! {
    static COLLECTED: RefCell<Option<Collected>> = const { RefCell::new(None) };
}

/// `loss.backward()`, with the same gradients.
///
/// Candle adds each gradient to what a tensor has, the first one to zeros: on a device a memset and a launch for each
/// parameter of each step. Here the ops of this crate hand theirs over as they are to those of `variables` that are on
/// one. (On the CPU nothing is gained, and nothing is different.)
///
/// # Errors
/// As `loss.backward()`.
pub(crate) fn backward(loss: &Tensor, variables: &[Tensor]) -> Result<GradStore> {
    let on_device = |variable: &&Tensor| variable.is_variable() && !variable.device().is_cpu();
    let wanted: HashSet<TensorId> = variables.iter().filter(on_device).map(Tensor::id).collect();
    if wanted.is_empty() {
        return loss.backward();
    }
    collect_all(loss, wanted)
}

fn collect_all(loss: &Tensor, wanted: HashSet<TensorId>) -> Result<GradStore> {
    let collecting = Collecting::begin(Collected { wanted, grads: HashMap::new() });
    let mut store = loss.backward()?;
    for (id, grad) in collecting.end() {
        let sum = match store.get_id(id) {
            Some(other) => (other + grad)?,
            None => grad,
        };
        store.insert_id(id, sum);
    }
    Ok(store)
}

/// Takes the gradient of an argument of an op, if the backward pass on this thread collects it.
pub(super) fn collect(arg: &Tensor, grad: Tensor) -> Result<Option<Tensor>> {
    COLLECTED.with_borrow_mut(|collected| {
        let Some(Collected { wanted, grads }) = collected else { return Ok(Some(grad)) };
        if !wanted.contains(&arg.id()) {
            return Ok(Some(grad));
        }
        let sum = match grads.remove(&arg.id()) {
            Some(other) => (other + grad)?,
            None => grad,
        };
        grads.insert(arg.id(), sum);
        Ok(None)
    })
}

/// What was collected around this pass comes back when it ends, however it ends.
struct Collecting(Option<Collected>);

impl Collecting {
    fn begin(collected: Collected) -> Self {
        Self(COLLECTED.replace(Some(collected)))
    }

    fn end(self) -> HashMap<TensorId, Tensor> {
        COLLECTED.with_borrow_mut(Option::take).map(|collected| collected.grads).unwrap_or_default()
    }
}

impl Drop for Collecting {
    fn drop(&mut self) {
        COLLECTED.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::{self, OpPath};

    /// The gradients of a graph in which variables meet ops of this crate, candle's, and each other.
    fn grads(collected: bool) -> Result<Vec<Option<Vec<f32>>>> {
        let var = |shape: (usize, usize), slope: f64| -> Result<Var> {
            let values = Tensor::arange(0f32, (shape.0 * shape.1) as f32, &Device::Cpu)?;
            Var::from_tensor(&(values.reshape(shape)? * slope)?.cos()?)
        };
        let (x, w, a) = (var((3, 4), 0.9)?, var((4, 4), 0.3)?, var((2, 4), 0.7)?);
        let (b, unused) = (var((4, 2), 0.2)?, var((2, 2), 0.1)?);
        let path = OpPath::Fused;
        let y = ops::linear(&x, &w, None, path)?;
        let (w_too, a_too, b_too) = (w.as_tensor().clone(), a.as_tensor().clone(), b.as_tensor().clone());
        let params = [w_too.clone(), a_too.clone(), b_too.clone()];
        let block = move |xs: &Tensor| {
            ops::gelu(&ops::adapted_linear(xs, &w_too, None, &a_too, &b_too, 0.5, path)?, path)
        };
        let y = ops::checkpoint(&y, &params, block)?;
        let loss = (ops::low_rank(&y, &a, &b, 2.0, path)?.sqr()?.sum_all()? + w.sqr()?.sum_all()?)?;
        let all = [&x, &w, &a, &b, &unused];
        let store = if collected {
            // As of variables on a device.
            let wanted = all.iter().map(|var| var.id()).collect();
            collect_all(&loss, wanted)?
        } else {
            loss.backward()?
        };
        let flat = |var: &&Var| store.get(var).map(|grad| grad.flatten_all()?.to_vec1()).transpose();
        all.iter().map(flat).collect()
    }

    #[test]
    fn collected_gradients_are_those_of_candle() -> Result<()> {
        let (got, want) = (grads(true)?, grads(false)?);
        assert_eq!(got.iter().filter(|grad| grad.is_some()).count(), 4);
        for (got, want) in got.iter().zip(&want) {
            let pair = got.as_ref().zip(want.as_ref());
            assert_eq!(got.is_some(), pair.is_some());
            for (got, want) in pair.into_iter().flat_map(|(got, want)| got.iter().zip(want)) {
                assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn a_pass_that_fails_leaves_nothing_to_the_next() -> Result<()> {
        let x = Var::new(&[1f32, 2.0], &Device::Cpu)?;
        let fails =
            ops::custom_vjp("fails", [x.as_tensor()], x.copy()?.detach(), |_| candle_core::bail!("no"))?;
        assert!(collect_all(&fails.sum_all()?, [x.id()].into()).is_err());
        let store = ops::gelu(&x.to_dtype(DType::F32)?, OpPath::Fused)?.sum_all()?.backward()?;
        assert!(store.get(&x).is_some() && COLLECTED.with_borrow(Option::is_none));
        Ok(())
    }
}
