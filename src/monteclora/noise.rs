//! The untransformed noise of one layer's draw, and how it is generated from the draw's index.
//!
//! The noise does not depend on the variational parameters, so that a buffer can prepare it ahead.
//!
//! Streams are keyed by `{path}.{adapter}`, not by the layer's path alone. Two adapters on one layer (tasks,
//! members of an ensemble) are two posteriors; if they shared their noise, their draws would be correlated
//! when they are averaged or compared. An adapter loaded under another name therefore draws other numbers
//! from the same distribution.

use candle_core::{DType, Device, Result, Tensor};

use super::config::MonteCLoRAConfig;
use super::options::Mixture;
use crate::dist::wishart::fill_bartlett;
use crate::noise::{Noise, Purpose, Stream};
use crate::util::dtype::to_dtype_device;

/// The specification of a layer's draws: the configuration, and the layer's width, dtype and device.
#[derive(Debug, Clone)]
pub struct DrawSpec {
    /// The options; the rank, components, degrees of freedom, covariance, estimator and mixture shape the
    /// noise.
    pub config: MonteCLoRAConfig,
    /// The width of A.
    pub in_dim: usize,
    /// The dtype of the parameters.
    pub dtype: DType,
    /// The device of the parameters.
    pub device: Device,
}

/// The three streams of noise of a layer's draws.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoiseStreams {
    wishart: Stream,
    dirichlet: Stream,
    gaussian: Stream,
}

impl NoiseStreams {
    /// Creates the streams of the adapter `name`.
    pub fn new(noise: Noise, name: &str) -> Self {
        Self {
            wishart: noise.stream(name, Purpose::Wishart),
            dirichlet: noise.stream(name, Purpose::Dirichlet),
            gaussian: noise.stream(name, Purpose::Gaussian),
        }
    }

    /// The keys of the Wishart, Dirichlet and Gaussian streams.
    #[cfg(feature = "cuda")]
    pub(super) fn keys(&self) -> [u64; 3] {
        [self.wishart.key(), self.dirichlet.key(), self.gaussian.key()]
    }
}

/// The noise of one draw, untransformed.
#[derive(Debug, Clone)]
pub struct DrawNoise {
    /// Bartlett's T, `(r, r)`; diagonal for [`Covariance::Diagonal`](crate::dist::Covariance::Diagonal).
    bartlett: Tensor,
    /// The noise of the weights, `(N)`, f64 on the host.
    weights: Tensor,
    /// Z, `(r, in_dim)`, or `(N, r, in_dim)` if explicit.
    z: Tensor,
}

impl DrawNoise {
    /// Creates the noise from given values.
    ///
    /// # Shapes
    /// - `bartlett`: T, `(r, r)`, lower triangular (diagonal for
    ///   [`Covariance::Diagonal`](crate::dist::Covariance::Diagonal))
    /// - `weights`: `(N)`; uniform numbers, or normals for
    ///   [`Estimator::LogisticNormal`](crate::dist::Estimator::LogisticNormal)
    /// - `z`: standard normals, `(r, in_dim)`, or `(N, r, in_dim)` for [`Mixture::Explicit`]
    ///
    /// # Errors
    /// If a shape does not fit, a size of `spec` is zero, or T is not lower triangular.
    pub fn new(spec: &DrawSpec, bartlett: &Tensor, weights: &Tensor, z: &Tensor) -> Result<Self> {
        spec.check()?;
        spec.check_shapes(bartlett, weights, z)?;
        let rows = to_dtype_device(bartlett, DType::F64, &Device::Cpu)?.to_vec2::<f64>()?;
        if rows.iter().enumerate().any(|(i, row)| row[i + 1..].iter().any(|t| *t != 0.0)) {
            candle_core::bail!("expected a lower triangular factor T, got {rows:?}")
        }
        Ok(Self {
            bartlett: to_dtype_device(bartlett, spec.dtype, &spec.device)?,
            weights: to_dtype_device(weights, DType::F64, &Device::Cpu)?,
            z: to_dtype_device(z, spec.dtype, &spec.device)?,
        })
    }

    /// T, `(r, r)`.
    pub(super) fn bartlett(&self) -> &Tensor {
        &self.bartlett
    }

    /// The noise of the weights, `(N)`, f64 on the host.
    pub(super) fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Z, `(r, in_dim)` or `(N, r, in_dim)`.
    pub(super) fn z(&self) -> &Tensor {
        &self.z
    }

    /// Checks that the noise has the shapes of `spec`.
    pub(super) fn check(&self, spec: &DrawSpec) -> Result<()> {
        spec.check_shapes(&self.bartlett, &self.weights, &self.z)
    }

    /// The noise of the covariance and the weights, on the host.
    pub(super) fn latents(&self) -> Result<LatentNoise> {
        let bartlett = to_dtype_device(&self.bartlett, DType::F64, &Device::Cpu)?;
        Ok(LatentNoise { bartlett: bartlett.flatten_all()?.to_vec1()?, weights: self.weights.to_vec1()? })
    }
}

/// The noise of one draw's covariance and weights on the host, as the regulariser needs it.
pub(super) struct LatentNoise {
    /// T, row-major, `r * r` numbers.
    pub(super) bartlett: Vec<f64>,
    /// N numbers.
    pub(super) weights: Vec<f64>,
}

/// The noise of one draw on the host, before it becomes tensors.
pub(super) struct HostNoise {
    latents: LatentNoise,
    z: Values,
}

enum Values {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl DrawSpec {
    /// Creates the specification of the draws of a layer of width `in_dim`.
    pub fn new(config: &MonteCLoRAConfig, in_dim: usize, dtype: DType, device: &Device) -> Self {
        Self { config: config.at_width(in_dim), in_dim, dtype, device: device.clone() }
    }

    /// The rank r, the width and N.
    fn sizes(&self) -> [usize; 3] {
        [self.config.rank, self.in_dim, self.config.num_components]
    }

    fn check(&self) -> Result<()> {
        let [rank, in_dim, num_components] = self.sizes();
        if rank == 0 || in_dim == 0 || num_components == 0 {
            candle_core::bail!(
                "noise of rank {rank}, width {in_dim}, {num_components} components: each is 1 or more"
            )
        }
        Ok(())
    }

    fn check_shapes(&self, bartlett: &Tensor, weights: &Tensor, z: &Tensor) -> Result<()> {
        let [rank, in_dim, num_components] = self.sizes();
        let z_shape = self.z_shape();
        if bartlett.dims() != [rank, rank] || weights.dims() != [num_components] || z.dims() != z_shape {
            candle_core::bail!(
                "noise of rank {rank}, width {in_dim}, {num_components} components: got {:?}, {:?}, {:?}",
                bartlett.shape(),
                weights.shape(),
                z.shape()
            )
        }
        Ok(())
    }

    fn z_shape(&self) -> Vec<usize> {
        let [rank, in_dim, num_components] = self.sizes();
        match self.config.mixture {
            Mixture::Explicit => vec![num_components, rank, in_dim],
            Mixture::Collapsed | Mixture::Sparse => vec![rank, in_dim],
        }
    }

    /// The number of bytes of one draw's noise.
    pub fn bytes_per_draw(&self) -> usize {
        let numbers = self.z_shape().iter().product::<usize>() + self.config.rank * self.config.rank;
        numbers * self.dtype.size_in_bytes() + self.config.num_components * size_of::<f64>()
    }

    /// Generates the noise of a draw's covariance and weights, on the host.
    pub(super) fn latents(&self, streams: &NoiseStreams, draw: u64) -> Result<LatentNoise> {
        self.check()?;
        let config = &self.config;
        let (mut bartlett, mut weights) =
            (vec![0.0; config.rank * config.rank], vec![0.0; config.num_components]);
        let (df, covariance) = (config.degrees(), config.covariance);
        fill_bartlett(&streams.wishart, draw, config.rank, df, covariance, &mut bartlett)?;
        config.estimator.fill_noise(&streams.dirichlet, draw, &mut weights);
        Ok(LatentNoise { bartlett, weights })
    }

    /// Generates all noise of a draw, on the host.
    pub(super) fn host(&self, streams: &NoiseStreams, draw: u64) -> Result<HostNoise> {
        let latents = self.latents(streams, draw)?;
        let count = self.z_shape().iter().product();
        let z = if self.dtype == DType::F64 {
            let mut z = vec![0.0; count];
            streams.gaussian.fill_normal(draw, &mut z);
            Values::Double(z)
        } else {
            let mut z = vec![0.0; count];
            streams.gaussian.fill_normal_f32(draw, &mut z);
            Values::Single(z)
        };
        Ok(HostNoise { latents, z })
    }

    /// Converts noise on the host to tensors on the device.
    pub(super) fn upload(&self, host: HostNoise) -> Result<DrawNoise> {
        let HostNoise { latents: LatentNoise { bartlett, weights }, z } = host;
        let rank = self.config.rank;
        let bartlett = Tensor::from_vec(bartlett, (rank, rank), &Device::Cpu)?;
        Ok(DrawNoise {
            bartlett: to_dtype_device(&bartlett, self.dtype, &self.device)?,
            weights: Tensor::from_vec(weights, self.config.num_components, &Device::Cpu)?,
            z: match z {
                Values::Single(z) => Tensor::from_vec(z, self.z_shape(), &self.device)?,
                Values::Double(z) => Tensor::from_vec(z, self.z_shape(), &self.device)?,
            },
        })
    }

    /// Generates the noise of draw number `draw`: a pure function of its arguments.
    ///
    /// # Errors
    /// If `draw` is 2^63 or more, a size is zero, or `df` is outside its domain.
    pub fn generate(&self, streams: &NoiseStreams, draw: u64) -> Result<DrawNoise> {
        self.upload(self.host(streams, draw)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Pass;
    use crate::dist::Covariance;
    use crate::special::gamma_quantile;

    fn parts(spec: &DrawSpec, streams: &NoiseStreams, pass: Pass) -> Result<[Vec<f64>; 4]> {
        let draw = pass.posterior_draw()?.expect("a pass with a draw");
        let HostNoise { latents, z } = spec.host(streams, draw)?;
        let (r, t) = (spec.config.rank, latents.bartlett);
        let chi = (0..r).map(|i| t[i * r + i]).collect();
        let normals = (1..r).flat_map(|i| t[i * r..i * r + i].to_vec()).collect();
        let Values::Double(z) = z else { unreachable!("the spec is of double precision") };
        Ok([chi, normals, latents.weights, z])
    }

    #[test]
    fn noise_made_here_is_that_given_from_outside() -> Result<()> {
        for config in [MonteCLoRAConfig::paper(), MonteCLoRAConfig::paper_literal(), MonteCLoRAConfig::peft()]
        {
            let spec = DrawSpec::new(&config, 5, DType::F64, &Device::Cpu);
            let streams = NoiseStreams::new(Noise::new(6), "layer.default");
            let HostNoise { latents, z } = spec.host(&streams, 3)?;
            let Values::Double(z) = z else { unreachable!("the spec is of double precision") };
            let t = Tensor::from_vec(latents.bartlett, (8, 8), &Device::Cpu)?;
            let weights = Tensor::new(latents.weights, &Device::Cpu)?;
            let z = Tensor::from_vec(z, spec.z_shape(), &Device::Cpu)?;
            let (want, got) = (DrawNoise::new(&spec, &t, &weights, &z)?, spec.generate(&streams, 3)?);
            let error = (&got.z - &want.z)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-13, "{error}");
            assert_eq!(got.bartlett.to_vec2::<f64>()?, want.bartlett.to_vec2::<f64>()?);
        }
        Ok(())
    }

    #[test]
    fn training_noise_stays_at_its_addresses_and_predictive_noise_is_other_in_every_part() -> Result<()> {
        for config in [MonteCLoRAConfig::paper(), MonteCLoRAConfig::paper_literal(), MonteCLoRAConfig::peft()]
        {
            let spec = DrawSpec::new(&config, 5, DType::F64, &Device::Cpu);
            let streams = NoiseStreams::new(Noise::new(6), "layer.default");
            for draw in [0, 1, 2, 9, (1 << 62) - 1] {
                let train = parts(&spec, &streams, Pass::Train { draw })?;
                let predict = parts(&spec, &streams, Pass::Posterior { draw })?;
                for (i, (train, predict)) in train.iter().zip(&predict).enumerate() {
                    assert_eq!(train.len(), predict.len());
                    assert!(
                        train.iter().zip(predict).all(|(a, b)| a != b || *a == 0.0),
                        "part {i} of {draw}"
                    );
                }
                // The values must stay stable: other indices would change every run that is resumed.
                let [chi, normals, weights, z] = train;
                let mut want = vec![0.0; chi.len()];
                streams.wishart.fill_uniform(2 * draw, &mut want);
                for (i, (chi, u)) in chi.iter().zip(&want).enumerate() {
                    let lost = if config.covariance == Covariance::Full { i as f64 } else { 0.0 };
                    let q = 2.0 * gamma_quantile((8.0 - lost) / 2.0, *u).z();
                    assert!((chi * chi / q - 1.0).abs() < 1e-12);
                }
                let mut want = vec![0.0; normals.len()];
                if config.covariance == Covariance::Full {
                    streams.wishart.fill_normal(2 * draw + 1, &mut want);
                }
                assert_eq!(normals, want);
                let mut want = vec![0.0; weights.len()];
                config.estimator.fill_noise(&streams.dirichlet, draw, &mut want);
                assert_eq!(weights, want);
                let mut want = vec![0.0; z.len()];
                streams.gaussian.fill_normal(draw, &mut want);
                assert_eq!(z, want);
            }
        }
        Ok(())
    }
}
