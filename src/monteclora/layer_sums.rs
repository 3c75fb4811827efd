//! The sums over layers that the regulariser consists of. Layers that share a shape and options are stacked
//! and computed in one batch.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::config::MonteCLoRAConfig;
use super::draw::weights;
use super::evidence::{row_variances, EvidenceBound, MixtureMoments};
use super::layer::MonteCLoRA;
use super::noise::LatentNoise;
use super::options::Compat;
use super::peft_compat;
use super::posterior::Posterior;
use crate::adapter::{Context, LowRank, Prior, PriorForm, PriorStart};
use crate::dist::{Dirichlet, Gaussian, Wishart};
use crate::error::{Error, Result};
use crate::ops::{carry, Tape};

/// A layer as the regulariser sees it.
pub(super) struct RegularizedLayer {
    pub posterior: Posterior,
    /// A and B, needed by a prior and the evidence bound, and eps with the schedule's factor.
    pub pair: Option<(LowRank, f64)>,
}

impl RegularizedLayer {
    pub fn of(adapter: &MonteCLoRA, cx: &Context) -> Self {
        let pair = Some((adapter.low_rank().clone(), adapter.eps(cx)));
        Self { posterior: adapter.posterior().clone(), pair }
    }

    /// A layer without A and B.
    pub fn of_posterior(posterior: &Posterior) -> Self {
        Self { posterior: posterior.clone(), pair: None }
    }
}

/// The options for terms beyond the paper's.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExtraTerms<'a> {
    /// The number of layers, over all groups.
    pub layers: usize,
    pub prior: Option<&'a Prior>,
    pub start: Option<&'a PriorStart>,
    pub evidence: Option<&'a EvidenceBound>,
    /// Differentiates operations on the parameters of all layers together, if set.
    pub tape: Option<&'a Tape>,
}

/// Layers that are computed in one batch.
#[derive(Default)]
struct SameShape<'a> {
    posteriors: Vec<&'a Posterior>,
    noise: Vec<&'a LatentNoise>,
    pairs: Vec<&'a LowRank>,
    eps: Vec<f64>,
}

/// Sums over layers: KL_N, KL_W, KL_D and L_C, and the terms of a prior and of the evidence bound.
pub(super) struct Sums {
    pub terms: [Tensor; 4],
    pub prior: Option<Tensor>,
    pub kl_mean: Option<Tensor>,
}

/// Computes the sums over all layers, at their draws or in expectation; `None` if there is no layer.
///
/// # Errors
/// If a term needs A and B, or the start of training, and these are missing.
pub(super) fn sums(
    layers: &[RegularizedLayer],
    draws: Option<&[LatentNoise]>,
    extra: ExtraTerms,
) -> Result<Option<Sums>> {
    let with_pairs = extra.prior.is_some() || extra.evidence.is_some();
    let mut groups: BTreeMap<String, SameShape> = BTreeMap::new();
    for (i, layer) in layers.iter().enumerate() {
        let group = groups.entry(group_key(layer, with_pairs)?).or_default();
        group.posteriors.push(&layer.posterior);
        group.noise.extend(draws.map(|draws| &draws[i]));
        if let Some((pair, eps)) = &layer.pair {
            group.pairs.push(pair);
            group.eps.push(*eps);
        }
    }
    let mut total: Option<Sums> = None;
    for group in groups.values() {
        let sums = group.sums(extra)?.on(&layers[0].posterior.spec().device)?;
        total = Some(match total {
            None => sums,
            Some(total) => total.add(sums)?,
        });
    }
    Ok(total)
}

impl Sums {
    /// Moves the sums to a device.
    fn on(self, device: &Device) -> Result<Self> {
        let there = |sum: &Tensor| carry(sum, device);
        let [a, b, c, d] = &self.terms;
        Ok(Self {
            terms: [there(a)?, there(b)?, there(c)?, there(d)?],
            prior: self.prior.as_ref().map(there).transpose()?,
            kl_mean: self.kl_mean.as_ref().map(there).transpose()?,
        })
    }

    fn add(self, other: Self) -> Result<Self> {
        let add = |a: &Tensor, b: &Tensor| a + b;
        let both = |a: Option<Tensor>, b: Option<Tensor>| a.zip(b).map(|(a, b)| add(&a, &b)).transpose();
        let of = |i: usize| add(&self.terms[i], &other.terms[i]);
        Ok(Self {
            terms: [of(0)?, of(1)?, of(2)?, of(3)?],
            prior: both(self.prior, other.prior)?,
            kl_mean: both(self.kl_mean, other.kl_mean)?,
        })
    }
}

/// The properties that layers must share to be computed in one batch, as a key.
fn group_key(layer: &RegularizedLayer, with_pairs: bool) -> Result<String> {
    let (spec, config) = (layer.posterior.spec(), &layer.posterior.spec().config);
    let key = format!(
        "{} {} {} {} {:?} {:?} {:?} {:?} {:?}",
        config.rank,
        config.num_components,
        config.degrees(),
        config.dirichlet_prior,
        config.covariance,
        config.estimator,
        config.compat,
        spec.dtype,
        spec.device.location()
    );
    match &layer.pair {
        Some((pair, _)) if with_pairs => {
            Ok(format!("{key} {:?} {:?} {:?}", config.mixture, pair.a().dims(), pair.b().dims()))
        }
        None if with_pairs => {
            Err(Error::config("prior", "a prior or the evidence bound needs layers with A and B"))
        }
        _ => Ok(key),
    }
}

impl SameShape<'_> {
    /// Computes the sums over layers of one shape, stacked: `log_std` (l, r), `log_concentration` (l, N).
    /// Without noise, terms that depend on the draw are expectations.
    fn sums(&self, extra: ExtraTerms) -> Result<Sums> {
        let config = &self.posteriors[0].spec().config;
        let (log_std, c) = (
            self.stack(Posterior::std_prior, extra.tape)?,
            self.stack(Posterior::expert_weights_prior, extra.tape)?,
        );
        let wishart = Wishart::new(&log_std, config.degrees(), config.covariance)?;
        let dirichlet = Dirichlet::new(&c)?;
        let terms = dirichlet.kl_terms_symmetric(config.dirichlet_prior)?;
        let kl_dirichlet = match config.compat {
            Compat::None => Dirichlet::kl_of_terms(terms)?,
            Compat::Peft => peft_compat::kl_dirichlet(terms)?,
        };
        let pi = if self.noise.is_empty() { None } else { Some(self.weights(config, &c)?) };
        let factors: Vec<&[f64]> = self.noise.iter().map(|noise| noise.bartlett.as_slice()).collect();
        let (kl_gaussian, cooperative) = match &pi {
            None => (Gaussian::expected_kl_standard(&wishart)?, dirichlet.expected_cooperative()?),
            Some(pi) => {
                let kl_gaussian = match config.compat {
                    Compat::None => Gaussian::sampled_kl_standard(&wishart, &factors)?,
                    Compat::Peft => {
                        let squares = wishart.bartlett_squares(&factors)?;
                        peft_compat::kl_gaussian(&log_std, &squares, config.num_components)?
                    }
                };
                (kl_gaussian, Dirichlet::cooperative(pi)?)
            }
        };
        let prior = extra.prior.map(|prior| self.prior(prior, extra, &wishart, &dirichlet)).transpose()?;
        let kl_mean = match extra.evidence {
            Some(bound) => {
                let mixture = MixtureMoments::new(config.mixture, &dirichlet, pi.as_ref())?;
                let (trace, log_det) = match &pi {
                    None => Gaussian::expected_moments(&wishart)?,
                    Some(_) => Gaussian::sampled_moments(&wishart, &factors)?,
                };
                Some(bound.divergence(&self.pairs, (&trace, &log_det), &mixture, &self.eps)?)
            }
            None => None,
        };
        let kl_wishart = wishart.kl_standard()?.sum_all()?;
        let terms = [kl_gaussian.sum_all()?, kl_wishart, kl_dirichlet.sum_all()?, cooperative.sum_all()?];
        Ok(Sums { terms, prior, kl_mean })
    }

    /// Stacks one vector of each layer, `(l, ..)`.
    fn stack(&self, of: fn(&Posterior) -> &Tensor, tape: Option<&Tape>) -> candle_core::Result<Tensor> {
        let rows: Vec<_> = self.posteriors.iter().map(|posterior| of(posterior)).collect();
        if let Some(stacked) = tape.map(|tape| tape.stack(&rows)).transpose()?.flatten() {
            return Ok(stacked);
        }
        // `Tensor::stack` would add a graph node for each layer.
        Tensor::cat(&rows, 0)?.reshape((rows.len(), rows[0].elem_count()))
    }

    /// Computes the drawn mixture weights, `(l, N)`.
    fn weights(&self, config: &MonteCLoRAConfig, c: &Tensor) -> candle_core::Result<Tensor> {
        let uniforms: Vec<f64> = self.noise.iter().flat_map(|noise| noise.weights.iter().copied()).collect();
        weights(c, config, &Tensor::from_vec(uniforms, c.shape(), &Device::Cpu)?)
    }

    /// Computes the energy of the prior on these layers.
    fn prior(
        &self,
        prior: &Prior,
        ExtraTerms { start, layers, .. }: ExtraTerms,
        wishart: &Wishart,
        dirichlet: &Dirichlet,
    ) -> Result<Tensor> {
        if !matches!(prior.form, PriorForm::ExpectedUpdate { .. }) {
            return prior.energy(&self.pairs, None, start, layers);
        }
        let spec = self.posteriors[0].spec();
        let mixture = MixtureMoments::new(spec.config.mixture, dirichlet, None)?;
        let size = (spec.in_dim, spec.config.degrees());
        let variances = row_variances(&wishart.scale()?, size, &mixture, &self.eps)?;
        prior.energy(&self.pairs, Some(&variances), start, layers)
    }
}
