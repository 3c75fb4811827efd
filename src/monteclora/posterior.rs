//! From variational parameters and noise to a draw of the posterior.
//!
//! ```text
//! Sigma = F F^T,  F = diag(exp rho) T;   pi ~ Dir(exp c);   Delta = eps sum_k pi_k F Z_k
//! ```

use candle_core::{Result, Tensor, D};
use candle_nn::ops::softmax;

use super::buffer::SampleBuffer;
use super::config::{positive, Compat, Mixture, MonteCLoRAConfig};
use super::noise::{DrawNoise, NoiseSpec, NoiseStreams};
use super::row_scales;
use crate::dist::{Dirichlet, Estimator, Wishart};
use crate::error::Error;
use crate::ops;

/// The variational parameters of one layer, and what its draws look like.
#[derive(Debug, Clone)]
pub struct Posterior {
    std_prior: Tensor,
    expert_weights_prior: Tensor,
    sample_scaler: f64,
    dirichlet_prior: f64,
    spec: NoiseSpec,
    streams: NoiseStreams,
}

/// One draw of the posterior.
#[derive(Debug, Clone)]
pub struct PosteriorDraw {
    /// The covariance's factor F, `(r, r)`.
    pub scale_tril: Tensor,
    /// The mixture weights pi, `(N)`; dense also for [`Mixture::Sparse`].
    pub weights: Tensor,
    /// The perturbation Delta of A, `(r, in_dim)`.
    pub delta: Tensor,
}

/// PEFT clips the drawn variances here.
const PEFT_VARIANCE: f64 = 1e-3;
/// PEFT clips the variances of the logits here, and adds as much again.
const PEFT_LOGITS: f64 = 1e-6;

impl Posterior {
    /// The posterior with rho `std_prior` `(r)` and c `expert_weights_prior` `(N)`.
    ///
    /// # Errors
    /// If an option is outside its domain, `spec` is not that of `config`, or a tensor has not the
    /// shape, dtype and device of `spec`.
    pub fn new(
        std_prior: &Tensor,
        expert_weights_prior: &Tensor,
        config: &MonteCLoRAConfig,
        spec: NoiseSpec,
        streams: NoiseStreams,
    ) -> crate::Result<Self> {
        config.validate()?;
        let agree = [
            ("rank", spec.rank == config.rank),
            ("num_components", spec.num_components == config.num_components),
            ("df", spec.df == config.degrees()),
            ("covariance", spec.covariance == config.covariance),
            ("estimator", spec.estimator == config.estimator),
            ("mixture", spec.mixture == config.mixture),
            ("compat", spec.compat == config.compat),
        ];
        if let Some((option, _)) = agree.into_iter().find(|(_, same)| !same) {
            return Err(Error::config(option, "the configuration and the noise's spec differ"));
        }
        for (name, tensor, len) in [
            ("std_prior", std_prior, spec.rank),
            ("expert_weights_prior", expert_weights_prior, spec.num_components),
        ] {
            let fits = tensor.dims() == [len]
                && tensor.dtype() == spec.dtype
                && tensor.device().same_device(&spec.device);
            if !fits {
                let (wanted, at) = (spec.dtype, spec.device.location());
                let (shape, dtype, place) = (tensor.shape(), tensor.dtype(), tensor.device().location());
                let reason = format!(
                    "expected [{len}] of {wanted:?} on {at:?}, got {shape:?} of {dtype:?} on {place:?}"
                );
                return Err(Error::tensor(name, reason));
            }
        }
        Ok(Self {
            std_prior: std_prior.clone(),
            expert_weights_prior: expert_weights_prior.clone(),
            sample_scaler: config.sample_scaler,
            dirichlet_prior: config.dirichlet_prior,
            spec,
            streams,
        })
    }

    /// rho, `(r)`.
    pub fn std_prior(&self) -> &Tensor {
        &self.std_prior
    }

    /// c, `(N)`.
    pub fn expert_weights_prior(&self) -> &Tensor {
        &self.expert_weights_prior
    }

    /// eps.
    pub fn sample_scaler(&self) -> f64 {
        self.sample_scaler
    }

    /// Changes eps, as an adaptive scale of the perturbation does.
    ///
    /// # Errors
    /// Unless it is positive and finite, as in the configuration; it then keeps its value.
    pub fn set_sample_scaler(&mut self, sample_scaler: f64) -> crate::Result<()> {
        positive("sample_scaler", sample_scaler)?;
        self.sample_scaler = sample_scaler;
        Ok(())
    }

    /// The same posterior with eps times `factor`.
    pub(super) fn scaled(&self, factor: f64) -> Self {
        Self { sample_scaler: self.sample_scaler * factor, ..self.clone() }
    }

    /// b, the concentration of the Dirichlet prior.
    pub fn dirichlet_prior(&self) -> f64 {
        self.dirichlet_prior
    }

    /// What the noise of a draw looks like.
    pub fn spec(&self) -> &NoiseSpec {
        &self.spec
    }

    /// The streams that the noise comes from.
    pub fn streams(&self) -> &NoiseStreams {
        &self.streams
    }

    /// `A + Delta` of draw number `draw`, `(r, in_dim)`: what a forward pass needs. By a kernel where one
    /// serves, from the buffer's noise elsewhere.
    ///
    /// # Errors
    /// If there is no such draw, or `a` is not of this posterior's shapes.
    pub(super) fn perturbed_at(&self, a: &Tensor, draw: u64, buffer: &SampleBuffer) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if super::kernel_draw::serves(&self.spec) {
            let parameters = [a, &self.std_prior, &self.expert_weights_prior];
            return super::kernel_draw::perturbed(
                parameters,
                &self.spec,
                &self.streams,
                self.sample_scaler,
                draw,
            );
        }
        self.perturbed(a, &buffer.get(draw)?)
    }

    /// `A + Delta` of a draw given by its noise, `(r, in_dim)`.
    ///
    /// # Errors
    /// If the noise or `a` is not of this posterior's shapes.
    pub fn perturbed(&self, a: &Tensor, noise: &DrawNoise) -> Result<Tensor> {
        noise.check(&self.spec)?;
        match self.spec.mixture {
            Mixture::Explicit => {
                let (rows, matrix) = (self.rows(noise, None)?, mix(&self.weights(noise)?, &noise.matrices)?);
                a + matrix.broadcast_mul(&rows.unsqueeze(1)?)?
            }
            Mixture::Collapsed if self.is_exact_on_cpu() => {
                let (rho, c) = (&self.std_prior, &self.expert_weights_prior);
                let rows = row_scales::collapsed(rho, c, &noise.weights, self.sample_scaler)?;
                ops::add_scaled_rows(a, &rows, &noise.matrices)
            }
            Mixture::Collapsed => {
                let rows = self.rows(noise, Some(norm(&self.weights(noise)?)?))?;
                ops::add_scaled_rows(a, &rows, &noise.matrices)
            }
            Mixture::Sparse => ops::add_scaled_rows(a, &self.rows(noise, None)?, &noise.matrices),
        }
    }

    /// The whole draw.
    ///
    /// # Errors
    /// If the noise is not of this posterior's shapes.
    pub fn draw(&self, noise: &DrawNoise) -> Result<PosteriorDraw> {
        noise.check(&self.spec)?;
        let weights = self.weights(noise)?;
        let rows = |factor| self.rows(noise, factor)?.unsqueeze(1);
        let delta = match self.spec.mixture {
            Mixture::Explicit => mix(&weights, &noise.matrices)?.broadcast_mul(&rows(None)?)?,
            Mixture::Collapsed => ops::mul_constant(&rows(Some(norm(&weights)?))?, &noise.matrices)?,
            Mixture::Sparse => ops::mul_constant(&rows(None)?, &noise.matrices)?,
        };
        let scale_tril = match self.spec.compat {
            Compat::None => {
                Wishart::new(&self.std_prior, self.spec.df, self.spec.covariance)?.rsample(&noise.bartlett)?
            }
            Compat::Peft => {
                let r = self.spec.rank;
                let eye = Tensor::eye(r, self.spec.dtype, &self.spec.device)?;
                ops::mul_constant(&self.row_scale(noise)?.unsqueeze(1)?, &eye)?
            }
        };
        Ok(PosteriorDraw { scale_tril, weights, delta })
    }

    fn is_exact_on_cpu(&self) -> bool {
        let NoiseSpec { compat, estimator, device, .. } = &self.spec;
        let exact = *compat == Compat::None && *estimator == Estimator::Exact;
        exact && device.is_cpu() && !ops::slow_lane_forced()
    }

    /// `eps` times the row scale and a factor, `(r)`: T is in the noise's matrices already.
    fn rows(&self, noise: &DrawNoise, factor: Option<Tensor>) -> Result<Tensor> {
        let rows = (self.row_scale(noise)? * self.sample_scaler)?;
        match factor {
            Some(factor) => rows.broadcast_mul(&factor),
            None => Ok(rows),
        }
    }

    /// exp rho; under PEFT the root of its clipped variances, `sqrt(max(V_i T_ii^2, 1e-3))`.
    fn row_scale(&self, noise: &DrawNoise) -> Result<Tensor> {
        match self.spec.compat {
            Compat::None => self.std_prior.exp(),
            Compat::Peft => peft_variance(&self.std_prior, &noise.bartlett.sqr()?.sum(D::Minus1)?)?.sqrt(),
        }
    }

    /// The mixture weights, `(N)`.
    fn weights(&self, noise: &DrawNoise) -> Result<Tensor> {
        weights(&self.expert_weights_prior, &self.spec, &noise.weights)
    }
}

/// `||pi||_2`: `sum_k pi_k S_k` has independent columns `N(0, ||pi||^2 Sigma)`.
fn norm(weights: &Tensor) -> Result<Tensor> {
    weights.sqr()?.sum_all()?.sqrt()
}

/// `sum_k pi_k matrix_k`, `(r, in_dim)` of `(N, r, in_dim)`.
fn mix(weights: &Tensor, matrices: &Tensor) -> Result<Tensor> {
    let (n, r, in_dim) = matrices.dims3()?;
    let matrices = matrices.reshape((n, r * in_dim))?;
    ops::matmul_constant(&weights.reshape((1, n))?, &matrices)?.reshape((r, in_dim))
}

/// PEFT's clipped variances `max(V q, 1e-3)`, elementwise.
pub(super) fn peft_variance(log_std: &Tensor, q: &Tensor) -> Result<Tensor> {
    at_least(&ops::mul_constant(&(log_std * 2.0)?.exp()?, q)?, PEFT_VARIANCE)
}

/// `max(xs, least)` in which NaN stays NaN: candle's own maximum on CUDA makes `least` of it.
fn at_least(xs: &Tensor, least: f64) -> Result<Tensor> {
    let floor = (xs.detach().zeros_like()? + least)?;
    xs.detach().lt(&floor)?.where_cond(&floor, xs)
}

/// Mixture weights of one layer `(N)` or of many `(.., N)` from noise of the same shape.
pub(super) fn weights(log_concentration: &Tensor, spec: &NoiseSpec, noise: &Tensor) -> Result<Tensor> {
    let dirichlet = Dirichlet::new(log_concentration)?;
    match spec.compat {
        Compat::None => dirichlet.rsample(spec.estimator, noise),
        Compat::Peft => {
            let (mean, variance) = dirichlet.laplace()?;
            let std = (at_least(&variance, PEFT_LOGITS)? + PEFT_LOGITS)?.sqrt()?;
            let z = noise.to_dtype(mean.dtype())?.to_device(mean.device())?;
            softmax(&(mean + ops::mul_constant(&std, &z)?)?, D::Minus1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn a_floor_lifts_what_is_below_it_and_keeps_nan() -> Result<()> {
        let xs = Var::new(&[f64::NAN, 0.5, 1.0, 2.0, f64::NEG_INFINITY], &Device::Cpu)?;
        let ys = at_least(&xs, 1.0)?;
        let (got, slopes) = (ys.to_vec1::<f64>()?, ys.sum_all()?.backward()?);
        assert!(got[0].is_nan() && got[1..] == [1.0, 1.0, 2.0, 1.0], "{got:?}");
        assert_eq!(slopes.get(&xs).expect("a gradient").to_vec1::<f64>()?, [1.0, 0.0, 1.0, 1.0, 0.0]);
        Ok(())
    }
}
