//! One Kronecker-factored block of the curvature, in its eigenbasis.
//!
//! ```text
//! G (x) A = (U_G (x) U_A) diag(gamma_i alpha_j) (U_G (x) U_A)^T
//! ```

use candle_core::Tensor;

use crate::bayes::eigen::Eigen;
use crate::bayes::linearised::LayerRecord;
use crate::error::Result;

/// The running sums of one block's two factors over the batches.
#[derive(Debug)]
pub(super) struct Sums {
    inputs: Tensor,
    outputs: Tensor,
    tokens: f64,
}

/// The curvature `G (x) A` of one weight `(o, i)`: eigenvalues and eigenvectors of both factors.
#[derive(Debug, Clone)]
pub(super) struct KroneckerBlock {
    /// Of A, averaged over tokens.
    pub inputs: Eigen,
    /// Of G, summed over tokens.
    pub outputs: Eigen,
}

impl Sums {
    pub fn new(layer: &LayerRecord, roots: &[Vec<Vec<f64>>]) -> Result<Self> {
        let (inputs, outputs) = (layer.input_square()?, layer.output_square(roots)?);
        Ok(Self { inputs, outputs, tokens: layer.tokens })
    }

    pub fn add(&mut self, other: &Self) -> Result<()> {
        self.inputs = (&self.inputs + &other.inputs)?;
        self.outputs = (&self.outputs + &other.outputs)?;
        self.tokens += other.tokens;
        Ok(())
    }

    /// Decomposes `A = sum x x^T / tokens` and `G = scale sum g g^T`; `scale` extrapolates to the rows that
    /// were not read.
    pub fn block(&self, name: &str, scale: f64) -> Result<KroneckerBlock> {
        Ok(KroneckerBlock {
            inputs: Eigen::new(name, &(&self.inputs / self.tokens.max(1.0))?)?,
            outputs: Eigen::new(name, &(&self.outputs * scale)?)?,
        })
    }
}

impl KroneckerBlock {
    /// The eigenvalues `gamma_i alpha_j`, in row-major order of the weight.
    pub fn eigenvalues(&self) -> impl Iterator<Item = f64> + '_ {
        let row = |gamma: &f64| {
            let gamma = *gamma;
            self.inputs.values.iter().map(move |alpha| gamma * alpha)
        };
        self.outputs.values.iter().flat_map(row)
    }

    /// Adds `J_k Sigma J_l^T` of every example to `sums[d][n][k c + l]`, where
    /// `Sigma = (G (x) A + delta_d)^-1`.
    pub fn add_covariance(
        &self,
        layer: &LayerRecord,
        deltas: &[f64],
        sums: &mut [Vec<Vec<f64>>],
    ) -> Result<()> {
        let classes = layer.gradients.len();
        let turned = (0..classes).map(|k| self.turn(&layer.jacobian(k)?)).collect::<Result<Vec<_>>>()?;
        for (delta, sums) in deltas.iter().zip(sums) {
            let variances: Vec<f64> = self.eigenvalues().map(|value| 1.0 / (value + delta)).collect();
            for (n, sums) in sums.iter_mut().enumerate() {
                for k in 0..classes {
                    for l in 0..=k {
                        let (left, right) = (&turned[k][n], &turned[l][n]);
                        let terms = left.iter().zip(right).zip(&variances);
                        let sum: f64 = terms.map(|((left, right), variance)| left * right * variance).sum();
                        sums[k * classes + l] += sum;
                        if l < k {
                            sums[l * classes + k] += sum;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// `U_G^T J U_A` of every example, flattened; J is `(b, o, i)`.
    fn turn(&self, jacobian: &Tensor) -> Result<Vec<Vec<f64>>> {
        // Each as one product of all rows, where a batched one would copy the eigenvectors for every example.
        let times = |rows: &Tensor, vectors: &Tensor| -> Result<Tensor> {
            let (b, rows_of, width) = rows.dims3()?;
            let product =
                rows.contiguous()?.reshape((b * rows_of, width))?.matmul(&vectors.t()?.contiguous()?)?;
            Ok(product.reshape((b, rows_of, vectors.dim(0)?))?)
        };
        let right = times(jacobian, &self.inputs.vectors)?.transpose(1, 2)?; // (b, i, o)
        let turned = times(&right, &self.outputs.vectors)?.transpose(1, 2)?; // (b, o, i)
        Ok(turned.contiguous()?.flatten_from(1)?.to_vec2::<f64>()?)
    }
}
