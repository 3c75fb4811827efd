//! The variational parameters of one layer, and the specification of its draws.

use candle_core::{DType, Device, Tensor};

use super::evidence::{row_variances, MixtureMoments};
use super::noise::{DrawSpec, NoiseStreams};
use super::options::Compat;
use crate::dist::{Dirichlet, Wishart};
use crate::error::{Error, Result};
use crate::util::check::positive;
use crate::util::dtype::to_dtype_device;

/// The variational posterior over one layer's A: the parameters rho and c, and everything else that a draw
/// depends on besides its index.
///
/// # Example
/// ```
/// use candle_core::Device;
/// use monteclora::{MonteCLoRA, MonteCLoRAConfig, Noise, Params};
///
/// let params = Params::new(Noise::new(0), &Device::Cpu);
/// let config = MonteCLoRAConfig { rank: 2, num_components: 3, ..Default::default() };
/// let layer = MonteCLoRA::new(&params, "proj", "default", (6, 4), &config)?;
/// let posterior = layer.posterior();
/// // Draw 5 by its index: the same numbers at every call.
/// let draw = posterior.draw(&posterior.spec().generate(posterior.streams(), 5)?)?;
/// assert_eq!((draw.scale_tril.dims2()?, draw.delta.dims2()?), ((2, 2), (2, 6)));
/// let sum = draw.weights.sum_all()?.to_scalar::<f32>()?;
/// assert!((sum - 1.0).abs() < 1e-6);
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Posterior {
    std_prior: Tensor,
    expert_weights_prior: Tensor,
    spec: DrawSpec,
    streams: NoiseStreams,
}

impl Posterior {
    /// Creates the posterior with rho `std_prior`, `(r)`, and c `expert_weights_prior`, `(N)`.
    ///
    /// # Errors
    /// If an option of the specification's configuration is outside its domain, or a tensor does not have the
    /// shape, dtype and device of `spec`.
    pub fn new(
        std_prior: &Tensor,
        expert_weights_prior: &Tensor,
        spec: DrawSpec,
        streams: NoiseStreams,
    ) -> Result<Self> {
        spec.config.validate()?;
        if spec.dtype.size_in_bytes() < 4 {
            let reason = format!("its parameters are in single or double precision, got {:?}", spec.dtype);
            return Err(Error::tensor("std_prior", reason));
        }
        for (name, tensor, len) in [
            ("std_prior", std_prior, spec.config.rank),
            ("expert_weights_prior", expert_weights_prior, spec.config.num_components),
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
            spec,
            streams,
        })
    }

    /// The parameter rho, `(r)`.
    pub fn std_prior(&self) -> &Tensor {
        &self.std_prior
    }

    /// The parameter c, `(N)`.
    pub fn expert_weights_prior(&self) -> &Tensor {
        &self.expert_weights_prior
    }

    /// The scale eps of the perturbation.
    pub fn sample_scaler(&self) -> f64 {
        self.spec.config.sample_scaler
    }

    /// Sets eps, for example to adapt the scale of the perturbation.
    ///
    /// # Errors
    /// Unless eps is positive and finite; the old value is then kept.
    pub fn set_sample_scaler(&mut self, sample_scaler: f64) -> Result<()> {
        positive("sample_scaler", sample_scaler)?;
        self.spec.config.sample_scaler = sample_scaler;
        Ok(())
    }

    /// Computes the variances of a draw's perturbation, averaged over the covariance and the mixture weights:
    /// `eps^2 E ||pi||^2 df V_i` for every element of row i of A; the elements are uncorrelated. `(r)`.
    ///
    /// # Errors
    /// With [`Compat::Peft`], whose clipped variances have no such mean; if the mixture weights are drawn by an
    /// [`Estimator`](crate::dist::Estimator) other than `Exact`, since E ||pi||^2 is that of a Dirichlet; or if candle fails.
    pub fn row_variances(&self) -> Result<Vec<f64>> {
        let config = &self.spec.config;
        if config.compat == Compat::Peft {
            return Err(Error::config("compat", "the variances of PEFT's draws have no closed form"));
        }
        if !config.has_row_variances() {
            let reason = format!("the weights of {:?} are no Dirichlet draws: use Exact", config.estimator);
            return Err(Error::config("estimator", reason));
        }
        let wide =
            |tensor: &Tensor| to_dtype_device(&tensor.detach(), DType::F64, &Device::Cpu)?.unsqueeze(0);
        let wishart = Wishart::new(&wide(&self.std_prior)?, config.degrees(), config.covariance)?;
        let dirichlet = Dirichlet::new(&wide(&self.expert_weights_prior)?)?;
        let mixture = MixtureMoments::new(config.mixture, &dirichlet, None)?;
        // Of one column.
        let size = (1, config.degrees());
        let variances = row_variances(&wishart.scale()?, size, &mixture, &[config.sample_scaler])?;
        Ok(variances.flatten_all()?.to_vec1()?)
    }

    /// Whether `other` draws the same numbers, now and after every change of rho and c.
    pub(super) fn is(&self, other: &Self) -> bool {
        let tensors = |of: &Self| [of.std_prior.id(), of.expert_weights_prior.id()];
        let (spec, others) = (&self.spec, &other.spec);
        // Equal tensors have the same dtype and device.
        tensors(self) == tensors(other)
            && self.streams == other.streams
            && (&spec.config, spec.in_dim) == (&others.config, others.in_dim)
    }

    /// The specification of the draws: their shape and options.
    pub fn spec(&self) -> &DrawSpec {
        &self.spec
    }

    /// The streams that the noise of the draws comes from.
    pub fn streams(&self) -> &NoiseStreams {
        &self.streams
    }
}
