//! The regulariser in expectation on a CUDA device: one launch for all layers, differentiated behind a tape.

use candle_core::{DType, Result, Tensor};

use super::layer_sums::Layer;
use super::options::Compat;
use super::posterior::Posterior;
use crate::dist::Covariance;
use crate::kernels::divergence::{divergences, Divergences, Layer as Parameters};
use crate::ops::Tape;

/// The means over layers of KL_N, KL_W, KL_D and L_C, which are values, and the total under the weights of the
/// divergences and of the cooperative loss, which the tape differentiates. None where the kernel does not serve: it takes
/// single precision on one device.
///
/// # Errors
/// If the device fails.
pub(super) fn means_and_total(
    layers: &[Layer],
    [kl, cooperative]: [f64; 2],
    tape: &Tape,
) -> Result<Option<([Tensor; 4], Tensor)>> {
    let posteriors: Vec<&Posterior> = layers.iter().map(|layer| &layer.posterior).collect();
    if posteriors.is_empty() || !posteriors.iter().all(|posterior| serves(posterior, posteriors[0])) {
        return Ok(None);
    }
    let parameters: Vec<Parameters> = posteriors.iter().map(|posterior| parameters(posterior)).collect();
    let Divergences { means, total, slopes } = divergences(&parameters, kl, cooperative)?;
    let variables = posteriors.iter().flat_map(|p| [p.std_prior(), p.expert_weights_prior()]);
    let variables: Vec<Tensor> = variables.cloned().collect();
    let leaves = tape.cut(vec![total], move |grads| {
        let Some(Some(grad)) = grads.into_iter().next() else { return Ok(Vec::new()) };
        let (scaled, mut at) = (slopes.broadcast_mul(&grad)?, 0);
        let own = |variable: Tensor| {
            let slope = scaled.narrow(0, at, variable.elem_count())?;
            at += variable.elem_count();
            Ok((variable, slope))
        };
        variables.into_iter().map(own).collect()
    })?;
    let mean = |i: usize| means.get(i);
    let means = [mean(0)?, mean(1)?, mean(2)?, mean(3)?];
    Ok(leaves.into_iter().next().map(|total| (means, total)))
}

fn serves(posterior: &Posterior, first: &Posterior) -> bool {
    let (spec, device) = (posterior.spec(), &first.spec().device);
    let vectors = [posterior.std_prior(), posterior.expert_weights_prior()];
    let place = spec.device.is_cuda() && spec.device.same_device(device) && spec.dtype == DType::F32;
    place && spec.config.compat == Compat::None && vectors.iter().all(|vector| vector.is_contiguous())
}

fn parameters(posterior: &Posterior) -> Parameters<'_> {
    let config = &posterior.spec().config;
    Parameters {
        rho: posterior.std_prior(),
        c: posterior.expert_weights_prior(),
        degrees: config.degrees(),
        prior: config.dirichlet_prior,
        diagonal: config.covariance == Covariance::Diagonal,
    }
}

#[cfg(test)]
mod tests {
    use crate::adapter::{Context, Params, Pass};
    use crate::monteclora::{MonteCLoRA, MonteCLoRAConfig, Regularizer};
    use crate::noise::{Noise, Purpose};
    use crate::ops::{self, Tape};
    use crate::util::device::cuda_device;
    use candle_core::{Device, Tensor};

    type Numbers = Vec<f32>;

    /// The total, the terms and the gradients of a quarter of the total, of three layers in two shapes.
    fn numbers(device: &Device, with_tape: bool) -> crate::Result<(Numbers, Numbers)> {
        let params = Params::new(Noise::new(3), device);
        let config = |rank| MonteCLoRAConfig { rank, num_components: 3, ..MonteCLoRAConfig::paper() };
        let layers = [("a", 4), ("b", 2), ("c", 4)]
            .map(|(path, rank)| MonteCLoRA::new(&params, path, "default", (9, 7), &config(rank)));
        let layers = layers.into_iter().collect::<crate::Result<Vec<_>>>()?;
        let (mut variables, tape) = (Vec::new(), Tape::default());
        for (name, param) in params.all() {
            let mut values = vec![0f32; param.var.elem_count()];
            Noise::new(8).stream(&name, Purpose::Init).fill_normal_f32(0, &mut values);
            params.set(&name, &Tensor::from_vec(values, param.var.shape(), device)?)?;
            variables.push(param.var.as_tensor().clone());
        }
        let cx = Context::from(Pass::Train { draw: 0 });
        let cx = if with_tape { cx.with_tape(&tape) } else { cx };
        let regularizer = Regularizer::new(&config(2));
        let terms = regularizer.for_layers(&layers.iter().collect::<Vec<_>>(), &cx)?;
        let store = ops::backward(&(&terms.total * 0.25)?, &variables, Some(&tape))?;
        let gradients = variables.iter().filter_map(|variable| store.get(variable));
        let gradients: Vec<Vec<f32>> = gradients
            .map(|gradient| gradient.flatten_all()?.to_vec1())
            .collect::<candle_core::Result<_>>()?;
        let terms = [terms.total, terms.kl_gaussian, terms.kl_wishart, terms.kl_dirichlet, terms.cooperative];
        let terms = terms.iter().map(Tensor::to_scalar).collect::<candle_core::Result<_>>()?;
        Ok((terms, gradients.concat()))
    }

    #[test]
    fn one_launch_says_what_the_operations_say_here_and_on_the_host() -> crate::Result<()> {
        let device = cuda_device(0)?;
        let (terms, gradients) = numbers(&device, true)?;
        for (want_terms, want) in [numbers(&device, false)?, numbers(&Device::Cpu, true)?] {
            assert_eq!((terms.len(), gradients.len()), (want_terms.len(), want.len()));
            for (got, want) in terms.iter().zip(&want_terms) {
                assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} {want}");
            }
            let size = want.iter().fold(0f32, |size, x| size.max(x.abs()));
            for (got, want) in gradients.iter().zip(&want) {
                assert!((got - want).abs() <= 1e-5 * size, "{got} {want} of {size}");
            }
        }
        Ok(())
    }
}
