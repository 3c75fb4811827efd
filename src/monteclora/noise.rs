//! The untransformed noise of one draw of one layer, and how it is made from its address.
//!
//! Nothing here depends on the variational parameters, so a buffer can prepare it ahead.
//!
//! Streams are keyed by `{path}.{adapter}`, not by the layer's path alone: two adapters on one layer
//! (tasks, members of an ensemble) are two posteriors, and draws that shared their noise would be
//! correlated where they are averaged or compared. An adapter loaded under another name therefore
//! draws other numbers of the same law.

use candle_core::{DType, Device, Result, Tensor};

use super::config::{Compat, Mixture, MonteCLoRAConfig};
use crate::dist::wishart::fill_bartlett;
use crate::dist::{Covariance, Estimator};
use crate::noise::{Noise, Purpose, Stream};
use crate::ops::place;
use crate::simd::vectorized;

/// What the noise of a layer's draws looks like.
#[derive(Debug, Clone)]
pub struct NoiseSpec {
    /// r.
    pub rank: usize,
    /// The width of A.
    pub in_dim: usize,
    /// N.
    pub num_components: usize,
    /// The Wishart's degrees of freedom.
    pub df: f64,
    /// How much of the covariance is kept.
    pub covariance: Covariance,
    /// How the weights are drawn.
    pub estimator: Estimator,
    /// How many matrices a draw needs: N for [`Mixture::Explicit`], else one.
    pub mixture: Mixture,
    /// Whose numbers.
    pub compat: Compat,
    /// The dtype of the parameters.
    pub dtype: DType,
    /// Where the parameters are.
    pub device: Device,
}

/// The three streams that a layer's draws come from.
#[derive(Debug, Clone)]
pub struct NoiseStreams {
    wishart: Stream,
    dirichlet: Stream,
    gaussian: Stream,
}

impl NoiseStreams {
    /// The streams of the adapter called `name`.
    pub fn new(noise: Noise, name: &str) -> Self {
        Self {
            wishart: noise.stream(name, Purpose::Wishart),
            dirichlet: noise.stream(name, Purpose::Dirichlet),
            gaussian: noise.stream(name, Purpose::Gaussian),
        }
    }

    /// The keys of the Wishart's, the Dirichlet's and the Gaussian's stream.
    #[cfg(feature = "cuda")]
    pub(super) fn keys(&self) -> [u64; 3] {
        [self.wishart.key(), self.dirichlet.key(), self.gaussian.key()]
    }
}

/// The noise of one draw.
#[derive(Debug, Clone)]
pub struct DrawNoise {
    /// Bartlett's T, `(r, r)`; diagonal for [`Covariance::Diagonal`].
    pub(super) bartlett: Tensor,
    /// The noise of the weights, `(N)`, f64 on the host.
    pub(super) weights: Tensor,
    /// `T Z` (under [`Compat::Peft`] Z alone), `(r, in_dim)`, or `(N, r, in_dim)` if explicit.
    pub(super) matrices: Tensor,
}

impl DrawNoise {
    /// Noise given from outside.
    ///
    /// # Shapes
    /// - `bartlett`: T, `(r, r)`, lower triangular (diagonal for [`Covariance::Diagonal`])
    /// - `weights`: `(N)`; uniform numbers, or normals for [`Estimator::LogisticNormal`]
    /// - `z`: standard normals, `(r, in_dim)`, or `(N, r, in_dim)` for [`Mixture::Explicit`]
    ///
    /// # Errors
    /// If a shape is another, or a size of `spec` is zero.
    pub fn new(spec: &NoiseSpec, bartlett: &Tensor, weights: &Tensor, z: &Tensor) -> Result<Self> {
        spec.check()?;
        spec.check_shapes(bartlett, weights, z)?;
        let (bartlett, z) = (place(bartlett, spec.dtype, &spec.device)?, place(z, spec.dtype, &spec.device)?);
        let matrices = match spec.compat {
            Compat::None => bartlett.broadcast_matmul(&z)?,
            Compat::Peft => z, // its clip of V T T^T comes between the two
        };
        let weights = place(weights, DType::F64, &Device::Cpu)?;
        Ok(Self { bartlett, weights, matrices })
    }

    /// Checks that the noise is of the shapes of `spec`.
    pub(super) fn check(&self, spec: &NoiseSpec) -> Result<()> {
        spec.check_shapes(&self.bartlett, &self.weights, &self.matrices)
    }

    pub(super) fn small(&self) -> Result<SmallNoise> {
        let bartlett = place(&self.bartlett, DType::F64, &Device::Cpu)?;
        Ok(SmallNoise { bartlett: bartlett.flatten_all()?.to_vec1()?, weights: self.weights.to_vec1()? })
    }
}

/// The noise of one draw's covariance and weights, on the host: what the regulariser needs.
pub(super) struct SmallNoise {
    /// T, row-major, `r * r` numbers.
    pub(super) bartlett: Vec<f64>,
    /// N numbers.
    pub(super) weights: Vec<f64>,
}

/// The noise of one draw on the host, before it becomes tensors.
pub(super) struct HostNoise {
    small: SmallNoise,
    z: Values,
}

enum Values {
    Single(Vec<f32>),
    Double(Vec<f64>),
}

impl NoiseSpec {
    /// The noise that `config` asks of a layer of this width.
    pub fn new(config: &MonteCLoRAConfig, in_dim: usize, dtype: DType, device: &Device) -> Self {
        Self {
            rank: config.rank,
            in_dim,
            num_components: config.num_components,
            df: config.degrees(),
            covariance: config.covariance,
            estimator: config.estimator,
            mixture: config.mixture,
            compat: config.compat,
            dtype,
            device: device.clone(),
        }
    }

    fn check(&self) -> Result<()> {
        let NoiseSpec { rank, in_dim, num_components, .. } = *self;
        if rank == 0 || in_dim == 0 || num_components == 0 {
            candle_core::bail!(
                "noise of rank {rank}, width {in_dim}, {num_components} components: each is 1 or more"
            )
        }
        Ok(())
    }

    fn check_shapes(&self, bartlett: &Tensor, weights: &Tensor, z: &Tensor) -> Result<()> {
        let NoiseSpec { rank, in_dim, num_components, .. } = *self;
        let z_shape = self.matrix_shape();
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

    fn matrix_shape(&self) -> Vec<usize> {
        match self.mixture {
            Mixture::Explicit => vec![self.num_components, self.rank, self.in_dim],
            Mixture::Collapsed | Mixture::Sparse => vec![self.rank, self.in_dim],
        }
    }

    /// The bytes that one draw's noise takes.
    pub fn bytes_per_draw(&self) -> usize {
        let numbers = self.matrix_shape().iter().product::<usize>() + self.rank * self.rank;
        numbers * self.dtype.size_in_bytes() + self.num_components * size_of::<f64>()
    }

    /// The noise of a draw's covariance and weights, on the host.
    pub(super) fn small(&self, streams: &NoiseStreams, draw: u64) -> Result<SmallNoise> {
        self.check()?;
        let (mut bartlett, mut weights) = (vec![0.0; self.rank * self.rank], vec![0.0; self.num_components]);
        fill_bartlett(&streams.wishart, draw, self.rank, self.df, self.covariance, &mut bartlett)?;
        self.estimator.fill_noise(&streams.dirichlet, draw, &mut weights);
        Ok(SmallNoise { bartlett, weights })
    }

    /// All noise of a draw, on the host.
    pub(super) fn host(&self, streams: &NoiseStreams, draw: u64) -> Result<HostNoise> {
        let small = self.small(streams, draw)?;
        let count = self.matrix_shape().iter().product();
        let z = if self.dtype == DType::F64 {
            let mut z = vec![0.0; count];
            streams.gaussian.fill_normal(draw, &mut z);
            Values::Double(z)
        } else {
            let mut z = vec![0.0; count];
            streams.gaussian.fill_normal_f32(draw, &mut z);
            Values::Single(z)
        };
        Ok(HostNoise { small, z })
    }

    /// The tensors of noise on the host.
    pub(super) fn upload(&self, host: HostNoise) -> Result<DrawNoise> {
        let HostNoise { small: SmallNoise { bartlett: t, weights }, mut z } = host;
        // Here and in place where it is small: candle's product asks the system for its number of cores
        // each time, which takes longer than the product.
        let small = self.rank <= SMALL_RANK;
        if small && self.compat == Compat::None {
            match &mut z {
                Values::Single(z) => lower_product(&t, z, self.rank, self.in_dim, |t| t as f32),
                Values::Double(z) => lower_product(&t, z, self.rank, self.in_dim, |t| t),
            }
        }
        let bartlett = Tensor::from_vec(t, (self.rank, self.rank), &Device::Cpu)?;
        let weights = Tensor::from_vec(weights, self.num_components, &Device::Cpu)?;
        let z = match z {
            Values::Single(z) => Tensor::from_vec(z, self.matrix_shape(), &self.device)?,
            Values::Double(z) => Tensor::from_vec(z, self.matrix_shape(), &self.device)?,
        };
        match small {
            true => {
                Ok(DrawNoise { bartlett: place(&bartlett, self.dtype, &self.device)?, weights, matrices: z })
            }
            false => DrawNoise::new(self, &bartlett, &weights, &z),
        }
    }

    /// The noise of draw number `draw`: a pure function of its arguments.
    ///
    /// # Errors
    /// If `draw` is 2^63 or more, a size is zero, or `df` is outside its domain.
    pub fn generate(&self, streams: &NoiseStreams, draw: u64) -> Result<DrawNoise> {
        self.upload(self.host(streams, draw)?)
    }
}

/// Up to this rank a draw's `T Z` is a plain loop; beyond, a product in blocks is worth its price.
const SMALL_RANK: usize = 32;

/// `T Z` in place of every matrix Z `(r, width)` in `zs`, T `(r, r)` lower triangular: from the last row
/// up, each needs only itself and those above it.
fn lower_product<T>(t: &[f64], zs: &mut [T], r: usize, width: usize, round: impl Fn(f64) -> T)
where
    T: Copy + std::ops::Mul<Output = T> + std::ops::AddAssign,
{
    vectorized!(for z in zs.chunks_exact_mut(r * width) {
        for i in (0..r).rev() {
            let (above, row) = z.split_at_mut(i * width);
            let row = &mut row[..width];
            let own = round(t[i * r + i]);
            row.iter_mut().for_each(|x| *x = *x * own);
            for (j, above) in above.chunks_exact(width).enumerate() {
                let factor = round(t[i * r + j]);
                row.iter_mut().zip(above).for_each(|(x, a)| *x += *a * factor);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slot::Pass;
    use crate::special::gamma_quantile;

    fn parts(spec: &NoiseSpec, streams: &NoiseStreams, pass: Pass) -> Result<[Vec<f64>; 4]> {
        let draw = pass.posterior_draw()?.expect("a pass with a draw");
        let HostNoise { small, z } = spec.host(streams, draw)?;
        let (r, t) = (spec.rank, small.bartlett);
        let chi = (0..r).map(|i| t[i * r + i]).collect();
        let normals = (1..r).flat_map(|i| t[i * r..i * r + i].to_vec()).collect();
        let Values::Double(z) = z else { unreachable!("the spec is of double precision") };
        Ok([chi, normals, small.weights, z])
    }

    #[test]
    fn noise_made_here_is_that_given_from_outside() -> Result<()> {
        for config in [MonteCLoRAConfig::paper(), MonteCLoRAConfig::paper_literal(), MonteCLoRAConfig::peft()]
        {
            let spec = NoiseSpec::new(&config, 5, DType::F64, &Device::Cpu);
            let streams = NoiseStreams::new(Noise::new(6), "layer.default");
            let HostNoise { small, z } = spec.host(&streams, 3)?;
            let Values::Double(z) = z else { unreachable!("the spec is of double precision") };
            let t = Tensor::from_vec(small.bartlett, (8, 8), &Device::Cpu)?;
            let weights = Tensor::new(small.weights, &Device::Cpu)?;
            let z = Tensor::from_vec(z, spec.matrix_shape(), &Device::Cpu)?;
            let (want, got) = (DrawNoise::new(&spec, &t, &weights, &z)?, spec.generate(&streams, 3)?);
            let error = (&got.matrices - &want.matrices)?.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(error < 1e-13, "{error}");
            assert_eq!(got.bartlett.to_vec2::<f64>()?, want.bartlett.to_vec2::<f64>()?);
        }
        Ok(())
    }

    #[test]
    fn training_noise_stays_at_its_addresses_and_predictive_noise_is_other_in_every_part() -> Result<()> {
        for config in [MonteCLoRAConfig::paper(), MonteCLoRAConfig::paper_literal(), MonteCLoRAConfig::peft()]
        {
            let spec = NoiseSpec::new(&config, 5, DType::F64, &Device::Cpu);
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
                // Value stability: a change of these addresses changes every run that is under way.
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
