//! A backward pass that avoids launches per parameter and continues behind candle's graph along a [`Tape`].

use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

use super::collect::{Collecting, Contributions};
use super::tape::Tape;

/// Runs `loss.backward()`, and then the backward steps on the tape.
///
/// Candle accumulates gradients into zero-initialised tensors: on a device, a memset and a launch for each
/// parameter of each step. Here the gradients that this crate's ops compute for those `variables` that are on
/// a device are collected as they are, and the sums for all of them share launches. If no variable is on a
/// device, this is `loss.backward()`.
///
/// # Errors
/// As `loss.backward()`, and if a step on the tape fails.
pub(crate) fn backward(loss: &Tensor, variables: &[Tensor], tape: Option<&Tape>) -> Result<GradStore> {
    let on_device = |variable: &&Tensor| variable.is_variable() && !variable.device().is_cpu();
    let wanted: HashSet<TensorId> = variables.iter().filter(on_device).map(Tensor::id).collect();
    if wanted.is_empty() {
        return loss.backward();
    }
    collect_all(loss, wanted, tape)
}

fn collect_all(loss: &Tensor, mut wanted: HashSet<TensorId>, tape: Option<&Tape>) -> Result<GradStore> {
    wanted.extend(tape.iter().flat_map(|tape| tape.leaves()).map(|leaf| leaf.id()));
    let collecting = Collecting::begin(wanted);
    let mut store = loss.backward()?;
    let mut parts = collecting.end();
    for cut in tape.iter().flat_map(|tape| tape.take()) {
        let ids: Vec<TensorId> = cut.leaves.iter().map(Tensor::id).collect();
        let mut own = Contributions::new();
        for (id, leaf) in ids.iter().zip(&cut.leaves) {
            let of_candle = store.remove(leaf);
            let all: Vec<Tensor> = parts.remove(id).into_iter().flatten().chain(of_candle).collect();
            own.insert(*id, all);
        }
        let mut grads = summed(own)?;
        for (tensor, grad) in (cut.backward)(ids.iter().map(|id| grads.remove(id)).collect())? {
            parts.entry(tensor.id()).or_default().push(grad);
        }
    }
    for (id, parts) in &mut parts {
        parts.extend(store.get_id(*id).cloned());
    }
    for (id, sum) in summed(parts)? {
        store.insert_id(id, sum);
    }
    Ok(store)
}

/// Sums each tensor's parts. A round adds one pair of parts per tensor, all pairs at once.
fn summed(mut parts: Contributions) -> Result<HashMap<TensorId, Tensor>> {
    loop {
        let several = parts.iter_mut().filter(|(_, parts)| parts.len() > 1);
        let (ids, pairs): (Vec<TensorId>, Vec<(Tensor, Tensor)>) =
            several.filter_map(|(id, parts)| Some((*id, (parts.pop()?, parts.pop()?)))).unzip();
        if ids.is_empty() {
            return Ok(parts.into_iter().filter_map(|(id, mut parts)| Some((id, parts.pop()?))).collect());
        }
        for (id, sum) in ids.into_iter().zip(sums(&pairs)?) {
            parts.entry(id).or_default().push(sum);
        }
    }
}

#[cfg(feature = "cuda")]
pub(crate) use crate::kernels::multi_tensor::sums;

/// The sums of pairs of tensors.
#[cfg(not(feature = "cuda"))]
pub(crate) fn sums(pairs: &[(Tensor, Tensor)]) -> Result<Vec<Tensor>> {
    pairs.iter().map(|(a, b)| a + b).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::ops::{self, OpPath};

    /// The gradients of a graph with ops of this crate, candle's ops, and variables that are
    /// used several times.
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
            // Treats the variables as if they were on a device.
            let wanted = all.iter().map(|var| var.id()).collect();
            collect_all(&loss, wanted, None)?
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
    fn what_is_cut_off_is_differentiated_behind_candle_s_graph() -> Result<()> {
        let var = |x: f32| Var::new(&[x, -x], &Device::Cpu);
        let (a, b, tape) = (var(0.3)?, var(0.7)?, Tape::default());
        // The leaves of the cut are (a b, 2 a, unused); `a` reaches the loss along three paths.
        let results =
            vec![(a.as_detached_tensor() * b.as_detached_tensor())?, (a.as_detached_tensor() * 2.0)?];
        let results = results.into_iter().chain([a.as_detached_tensor().copy()?]).collect();
        let (a_in, b_in) = (a.as_tensor().clone(), b.as_tensor().clone());
        let leaves = tape.cut(results, move |grads| {
            let [Some(product), Some(double), None] = &grads[..] else { candle_core::bail!("{grads:?}") };
            let of_a = (product * b_in.detach())?;
            Ok(vec![
                (b_in.clone(), (product * a_in.detach())?),
                (a_in.clone(), of_a),
                (a_in, (double * 2.0)?),
            ])
        })?;
        let y = ops::gelu(&leaves[0], OpPath::Fused)?;
        let loss =
            ((y.sum_all()? + leaves[1].sqr()?.sum_all()?)? + (a.as_tensor() * &leaves[0])?.sum_all()?)?;
        let got = collect_all(&loss, [a.id(), b.id()].into(), Some(&tape))?;
        let product = (a.as_tensor() * b.as_tensor())?;
        let y = ops::gelu(&product, OpPath::Fused)?;
        let loss = ((y.sum_all()? + (a.as_tensor() * 2.0)?.sqr()?.sum_all()?)?
            + (a.as_tensor() * &product)?.sum_all()?)?;
        let want = loss.backward()?;
        for var in [&a, &b] {
            let of = |store: &GradStore| store.get(var).expect("a gradient").to_vec1::<f32>();
            for (got, want) in of(&got)?.into_iter().zip(of(&want)?) {
                assert!((got - want).abs() < 1e-6, "{got} {want}");
            }
        }
        assert!(tape.take().is_empty());
        Ok(())
    }

    #[test]
    fn a_pass_that_fails_leaves_nothing_to_the_next() -> Result<()> {
        let x = Var::new(&[1f32, 2.0], &Device::Cpu)?;
        let fails =
            ops::custom_vjp("fails", [x.as_tensor()], x.copy()?.detach(), |_| candle_core::bail!("no"))?;
        assert!(collect_all(&fails.sum_all()?, [x.id()].into(), None).is_err());
        let store = ops::gelu(&x.to_dtype(DType::F32)?, OpPath::Fused)?.sum_all()?.backward()?;
        assert!(store.get(&x).is_some());
        Ok(())
    }
}
