//! The regulariser in expectation on a CUDA device: one launch for all layers, differentiated by a tape.

use candle_core::{DType, Result, Tensor};

use super::layer_sums::RegularizedLayer;
use super::options::{Compat, Mixture};
use super::posterior::Posterior;
use crate::adapter::LowRank;
use crate::dist::Covariance;
use crate::kernels::divergence::{divergences, Divergences, LatentParameters};
use crate::kernels::energy::Spread;
use crate::ops::Tape;

/// Computes the means over layers of KL_N, KL_W, KL_D and L_C, which carry no gradient, and the total with
/// the given weights of the divergences and the cooperative loss, which the tape differentiates. Returns
/// `None` if the kernel does not support the layers: it needs single precision on one device.
///
/// # Errors
/// If the device fails.
pub(super) fn means_and_total(
    layers: &[RegularizedLayer],
    [kl, cooperative]: [f64; 2],
    tape: &Tape,
) -> Result<Option<([Tensor; 4], Tensor)>> {
    let posteriors: Vec<&Posterior> = layers.iter().map(|layer| &layer.posterior).collect();
    if posteriors.is_empty() || !posteriors.iter().all(|posterior| serves(posterior, posteriors[0])) {
        return Ok(None);
    }
    let parameters: Vec<LatentParameters> =
        posteriors.iter().map(|posterior| parameters(posterior)).collect();
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

/// Returns A and B of each layer, with the spread of its draws for a prior in expectation; `None` without A
/// and B.
pub(super) fn pairs<'a>(layers: &'a [RegularizedLayer]) -> Option<Vec<(&'a LowRank, Option<Spread>)>> {
    let of = |layer: &'a RegularizedLayer| {
        let ((pair, eps), spec) = (layer.pair.as_ref()?, layer.posterior.spec());
        let factor = spec.in_dim as f64 * eps * eps * spec.config.degrees();
        let weighted = spec.config.mixture != Mixture::Sparse;
        let c = weighted.then(|| layer.posterior.expert_weights_prior().clone());
        Some((pair, Some(Spread { rho: layer.posterior.std_prior().clone(), c, factor })))
    };
    layers.iter().map(of).collect()
}

fn serves(posterior: &Posterior, first: &Posterior) -> bool {
    let (spec, device) = (posterior.spec(), &first.spec().device);
    let vectors = [posterior.std_prior(), posterior.expert_weights_prior()];
    let place = spec.device.is_cuda() && spec.device.same_device(device) && spec.dtype == DType::F32;
    place && spec.config.compat == Compat::None && vectors.iter().all(|vector| vector.is_contiguous())
}

fn parameters(posterior: &Posterior) -> LatentParameters<'_> {
    let config = &posterior.spec().config;
    LatentParameters {
        rho: posterior.std_prior(),
        c: posterior.expert_weights_prior(),
        degrees: config.degrees(),
        prior: config.dirichlet_prior,
        diagonal: config.covariance == Covariance::Diagonal,
    }
}

#[cfg(test)]
mod tests {
    use crate::adapter::{Context, Init, Params, Pass, Prior, PriorForm, Role};
    use crate::monteclora::{Mixture, MonteCLoRA, MonteCLoRAConfig, Regularizer};
    use crate::noise::{Noise, Purpose};
    use crate::ops::{self, Tape};
    use crate::util::device::cuda_device;
    use candle_core::{Device, Tensor};

    type Numbers = Vec<f32>;

    /// The total and the terms, and the gradients of a quarter of the total, for three layers in two shapes
    /// and a head.
    fn numbers(of: &MonteCLoRAConfig, device: &Device, with_tape: bool) -> crate::Result<(Numbers, Numbers)> {
        let params = Params::new(Noise::new(3), device);
        let config = |rank| MonteCLoRAConfig { rank, num_components: 3, ..of.clone() };
        // An odd rank: its matrices do not fill words of 16 bytes.
        let layers = [("a", 3), ("b", 2), ("c", 3)]
            .map(|(path, rank)| MonteCLoRA::new(&params, path, "default", (9, 7), &config(rank)));
        let layers = layers.into_iter().collect::<crate::Result<Vec<_>>>()?;
        params.create("head", Role::Head, (3, 7), &Init::Normal(1.0))?;
        let regularizer = Regularizer::new(&config(2)).for_training(&params, 5)?;
        let (mut variables, tape) = (Vec::new(), Tape::default());
        for (name, param) in params.all() {
            let mut values = vec![0f32; param.var.elem_count()];
            Noise::new(8).stream(&name, Purpose::Init).fill_normal_f32(0, &mut values);
            params.set(&name, &Tensor::from_vec(values, param.var.shape(), device)?)?;
            variables.push(param.var.as_tensor().clone());
        }
        let cx = Context::from(Pass::Train { draw: 0 });
        let cx = if with_tape { cx.with_tape(&tape) } else { cx };
        let terms = regularizer.for_layers(&layers.iter().collect::<Vec<_>>(), &cx)?;
        let store = ops::backward(&(&terms.total * 0.25)?, &variables, Some(&tape))?;
        let gradients = variables.iter().filter_map(|variable| store.get(variable));
        let gradients: Vec<Vec<f32>> = gradients
            .map(|gradient| gradient.flatten_all()?.to_vec1())
            .collect::<candle_core::Result<_>>()?;
        let paper = [terms.total, terms.kl_gaussian, terms.kl_wishart, terms.kl_dirichlet, terms.cooperative];
        let terms = paper.iter().chain(&terms.prior).map(Tensor::to_scalar);
        Ok((terms.collect::<candle_core::Result<_>>()?, gradients.concat()))
    }

    #[test]
    fn few_launches_say_what_the_operations_say_here_and_on_the_host() -> crate::Result<()> {
        let device = cuda_device(0)?;
        let std = 0.6;
        let forms = [
            PriorForm::Mean { std },
            PriorForm::Start { std },
            PriorForm::Factors { std_a: std, std_b: 0.9 },
            PriorForm::Update { std },
            PriorForm::ExpectedUpdate { std },
        ];
        let with = |form| Prior { form, ..Prior::calibrated() };
        let mut priors: Vec<Option<Prior>> = forms.into_iter().map(|form| Some(with(form))).collect();
        priors.extend([None, Some(Prior { head_std: None, ..Prior::calibrated() })]);
        for (prior, mixture) in priors.iter().flat_map(|p| [(p, Mixture::Collapsed), (p, Mixture::Sparse)]) {
            let config =
                MonteCLoRAConfig { prior: *prior, mixture, sample_scaler: 0.2, ..MonteCLoRAConfig::paper() };
            let (terms, gradients) = numbers(&config, &device, true)?;
            for (want_terms, want) in
                [numbers(&config, &device, false)?, numbers(&config, &Device::Cpu, true)?]
            {
                assert_eq!((terms.len(), gradients.len()), (want_terms.len(), want.len()), "{config:?}");
                for (got, want) in terms.iter().zip(&want_terms) {
                    assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{prior:?}: {got} {want}");
                }
                let size = want.iter().fold(0f32, |size, x| size.max(x.abs()));
                for (got, want) in gradients.iter().zip(&want) {
                    assert!((got - want).abs() <= 1e-5 * size, "{prior:?}: {got} {want} of {size}");
                }
            }
        }
        Ok(())
    }
}
