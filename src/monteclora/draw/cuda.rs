//! Draws on a CUDA device with our own kernels: two launches in the forward pass for all layers of a group.
//! The backward pass takes one launch for all layers with a tape, and one per layer without. Nothing passes
//! through the host.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use crate::adapter::Context;
use crate::dist::wishart::check_draw;
use crate::dist::{Covariance, Estimator};
use crate::kernels::draws::{self, DrawnLayer, Draws};
use crate::monteclora::group::{DrawRequest, GroupMember};
use crate::monteclora::noise::DrawSpec;
use crate::monteclora::options::{Compat, Mixture};
use crate::monteclora::posterior::Posterior;
use crate::ops::{custom_vjp, Tape};

/// Whether the kernels support this draw: they make the default draws, in single precision.
pub(super) fn serves(spec: &DrawSpec) -> bool {
    let config = &spec.config;
    let method = config.compat == Compat::None && config.estimator == Estimator::Exact;
    let device = spec.device.is_cuda() && spec.dtype == DType::F32;
    device && method && config.mixture != Mixture::Explicit && draws::supports(config.rank)
}

/// Computes `A + eps ||pi||_2 diag(exp rho) T Z` of draw number `draw`, without the norm if sparse.
///
/// # Errors
/// If there is no such draw, a tensor has another device or shape, or the device fails.
pub(super) fn perturbed(asked: &DrawRequest, draw: u64) -> Result<Tensor> {
    let (draws, mut outs) = draws::perturb(&[layer(asked, draw)?], draw)?;
    tracked(asked, draws, 0, outs.remove(0))
}

/// [`perturbed`] for all members that the kernels support and that are on the device of `asking`.
///
/// # Errors
/// As [`perturbed`].
pub(super) fn perturbed_together(
    members: &[Option<GroupMember>],
    asking: &Posterior,
    draw: u64,
    cx: &Context,
) -> Result<Vec<Option<Tensor>>> {
    let device: &Device = &asking.spec().device;
    let served = |member: &&GroupMember| {
        let spec = member.posterior.spec();
        serves(spec) && spec.device.same_device(device)
    };
    let asked: Vec<Option<DrawRequest>> = members
        .iter()
        .map(|member| {
            let GroupMember { mean, posterior, .. } = member.as_ref().filter(served)?;
            Some(DrawRequest { posterior, mean, eps: member.as_ref()?.eps(cx) * cx.pass.sign() })
        })
        .collect();
    let layers = asked.iter().flatten().map(|asked| layer(asked, draw)).collect::<Result<Vec<_>>>()?;
    let (draws, outs) = draws::perturb(&layers, draw)?;
    let outs = match cx.tape() {
        Some(tape) => cut(tape, asked.iter().flatten(), draws, outs)?,
        None => {
            let own = |(which, (asked, out))| tracked(asked, draws.clone(), which, out);
            asked.iter().flatten().zip(outs).enumerate().map(own).collect::<Result<Vec<_>>>()?
        }
    };
    let mut outs = outs.into_iter();
    Ok(asked.iter().map(|asked| asked.as_ref().and_then(|_| outs.next())).collect())
}

/// Returns `outs` as leaves whose gradients are propagated to A, rho and c of all layers at once.
fn cut<'a>(
    tape: &Tape,
    asked: impl Iterator<Item = &'a DrawRequest<'a>>,
    draws: Arc<Draws>,
    outs: Vec<Tensor>,
) -> Result<Vec<Tensor>> {
    let parameters: Vec<[Tensor; 3]> = asked.map(|asked| parameters(asked).map(Tensor::clone)).collect();
    tape.cut(outs, move |grads| {
        let places = grads.into_iter().enumerate();
        let grads = places.filter_map(|(which, grad)| Some((which, grad?.contiguous())));
        let grads: Vec<(usize, Tensor)> =
            grads.map(|(which, grad)| Ok((which, grad?))).collect::<Result<_>>()?;
        let slopes = draws.slopes(&grads)?;
        let mut all = Vec::new();
        for ((which, grad), (drho, dc)) in grads.into_iter().zip(slopes) {
            let [a, rho, c] = &parameters[which];
            all.extend([(a.clone(), grad), (rho.clone(), drho)]);
            all.extend(dc.map(|dc| (c.clone(), dc)));
        }
        Ok(all)
    })
}

fn layer<'a>(asked: &DrawRequest<'a>, draw: u64) -> Result<DrawnLayer<'a>> {
    let DrawRequest { posterior, mean, eps } = *asked;
    let config = &posterior.spec().config;
    let degrees = config.degrees();
    check_draw(draw, config.rank, degrees)?;
    let rho = posterior.std_prior();
    let c = (config.mixture != Mixture::Sparse).then(|| posterior.expert_weights_prior());
    let diagonal = config.covariance == Covariance::Diagonal;
    Ok(DrawnLayer { mean, rho, c, keys: posterior.streams().keys(), degrees, eps, diagonal })
}

fn parameters<'a>(asked: &DrawRequest<'a>) -> [&'a Tensor; 3] {
    [asked.mean, asked.posterior.std_prior(), asked.posterior.expert_weights_prior()]
}

/// Returns `out` as a differentiable function of A, rho and c of layer `which` of `draws`.
fn tracked(asked: &DrawRequest, draws: Arc<Draws>, which: usize, out: Tensor) -> Result<Tensor> {
    custom_vjp("draw", parameters(asked), out, move |call| {
        let grad_a = call.needs[0].then(|| call.grad.clone());
        if !call.needs[1] && !call.needs[2] {
            return Ok([grad_a, None, None]);
        }
        let slopes = draws.slopes(&[(which, call.grad)])?.pop();
        let (drho, dc) = slopes.unzip();
        Ok([grad_a, drho, dc.flatten()])
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::adapter::{Params, Pass};
    use crate::monteclora::buffer::SampleBuffer;
    use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig, NoiseStreams};
    use crate::noise::{Noise, Purpose};
    use crate::ops::OpPath;
    use crate::util::device::cuda_device;

    /// `A + Delta` of a draw, and the gradients of A, rho and c; zeros if there is no gradient.
    fn draw(device: &Device, path: OpPath, config: &MonteCLoRAConfig, width: usize) -> Result<[Vec<f32>; 4]> {
        let values = |which: u64, len: usize| {
            let mut xs = vec![0f32; len];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
            Tensor::from_vec(xs, len, device)
        };
        let (r, n) = (config.rank, config.num_components);
        let a = Var::from_tensor(&values(0, r * width)?.reshape((r, width))?)?;
        let (rho, c) = (Var::from_tensor(&values(1, r)?)?, Var::from_tensor(&values(2, n)?)?);
        let spec = DrawSpec::new(config, width, DType::F32, device);
        let streams = NoiseStreams::new(Noise::new(7), "layer.default");
        let buffer = SampleBuffer::new(spec.clone(), streams.clone(), 0, None);
        let posterior = Posterior::new(&rho, &c, spec, streams).expect("a posterior");
        let asked = DrawRequest { posterior: &posterior, mean: &a, eps: config.sample_scaler };
        let cx = Context::from(Pass::Train { draw: 5 }).with_path(path);
        let y = crate::monteclora::draw::perturbed(&asked, 5, &buffer, None, &cx)?;
        let weight = values(3, r * width)?.reshape((r, width))?;
        let grads = (&y * weight)?.sum_all()?.backward()?;
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => grad.flatten_all()?.to_vec1(),
            None => Ok(vec![0.0; var.elem_count()]),
        };
        Ok([y.flatten_all()?.to_vec1()?, of(&a)?, of(&rho)?, of(&c)?])
    }

    #[test]
    fn the_kernels_draw_what_composed_operations_draw_here_and_on_the_host() -> Result<()> {
        let (host, device) = (Device::Cpu, cuda_device(0)?);
        for (rank, num_components, mixture, covariance, width) in [
            (8, 4, Mixture::Collapsed, Covariance::Full, 70),
            (8, 4, Mixture::Collapsed, Covariance::Diagonal, 768),
            (1, 1, Mixture::Collapsed, Covariance::Full, 3),
            (100, 300, Mixture::Collapsed, Covariance::Full, 130),
            (4, 6, Mixture::Sparse, Covariance::Full, 64),
        ] {
            let paper = MonteCLoRAConfig { sample_scaler: 0.4, ..MonteCLoRAConfig::paper() };
            let config = MonteCLoRAConfig { rank, num_components, mixture, covariance, ..paper };
            let kernels = draw(&device, OpPath::Fused, &config, width)?;
            for other in [
                draw(&device, OpPath::Composed, &config, width)?,
                draw(&host, OpPath::Fused, &config, width)?,
            ] {
                for (got, want) in kernels.iter().zip(&other) {
                    assert_eq!(got.len(), want.len(), "{rank} {mixture:?}");
                    let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                    let error = got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(error <= 1e-5 * size, "{rank} {mixture:?}: {error} of {size}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn layers_draw_together_what_each_draws_alone_and_see_every_change() -> Result<()> {
        let device = crate::cuda_device(0)?;
        let params = Params::new(Noise::new(5), &device);
        // Several ranks and widths, one and many tiles, and one layer that the kernels do not support.
        let layers = [(1, 3, Mixture::Collapsed), (8, 768, Mixture::Collapsed), (70, 130, Mixture::Sparse)];
        let layers = layers.into_iter().chain([(4, 40, Mixture::Explicit), (40, 90, Mixture::Collapsed)]);
        let group = Arc::default();
        let layers: Vec<MonteCLoRA> = (0..)
            .zip(layers)
            .map(|(i, (rank, width, mixture))| {
                let config =
                    MonteCLoRAConfig { rank, num_components: 5, mixture, ..MonteCLoRAConfig::paper() };
                MonteCLoRA::in_group(&group, &params, &format!("layer{i}"), "default", (width, 99), &config)
            })
            .collect::<crate::Result<_>>()
            .map_err(candle_core::Error::wrap)?;
        let cx = Context::from(Pass::Train { draw: 2 });
        let numbers = |cx: &Context, layer: &MonteCLoRA| -> Result<Vec<f32>> {
            let a = layer.effective_a(cx)?;
            let weight = a.detach().sin()?;
            let grads = (a.as_ref() * weight)?.sum_all()?.backward()?;
            let mut numbers = a.flatten_all()?.to_vec1::<f32>()?;
            for tensor in [layer.low_rank().a(), layer.posterior().std_prior()] {
                numbers.extend(grads.get(tensor).expect("a gradient").flatten_all()?.to_vec1::<f32>()?);
            }
            if let Some(dc) = grads.get(layer.posterior().expert_weights_prior()) {
                numbers.extend(dc.to_vec1::<f32>()?);
            }
            Ok(numbers)
        };
        let mut before: Vec<Vec<f32>> = Vec::new();
        for _ in 0..2 {
            let pass = cx.of_one_pass();
            // In reverse order, so that the first layer to run is not the first of the group.
            let together =
                layers.iter().rev().map(|layer| numbers(&pass, layer)).collect::<Result<Vec<_>>>()?;
            let alone = layers.iter().rev().map(|layer| numbers(&cx, layer)).collect::<Result<Vec<_>>>()?;
            assert!(together == alone && together.iter().all(|numbers| !before.contains(numbers)));
            before.extend(together);
            for (_, param) in params.all() {
                param.var.set(&(param.var.as_detached_tensor() + 0.25)?)?;
            }
        }
        Ok(())
    }
}
