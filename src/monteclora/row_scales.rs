//! The scales of a collapsed draw's rows, `eps ||pi||_2 exp(rho_i)`, as one node on the CPU.

use candle_core::{DType, Device, Result, Tensor};

use crate::ops::attach;
use crate::special::gamma_quantile;
use crate::special::tensor::{normalised, normalised_slope};

/// `eps ||pi||_2 exp(rho)`, pi the normalised gamma draws of concentration `exp c` at `uniforms`
/// ([`Estimator::Exact`](crate::dist::Estimator::Exact)).
///
/// In double precision on the host, and what backward needs is kept: as tensor operations of a few
/// numbers each it is thirty nodes and the quantiles twice.
///
/// # Shapes
/// - `rho`: `(r)`, `c` and `uniforms`: `(N)`, all on the CPU
/// - output: `(r)`
///
/// # Errors
/// If a tensor has not one dimension.
pub(super) fn collapsed(rho: &Tensor, c: &Tensor, uniforms: &Tensor, eps: f64) -> Result<Tensor> {
    let scales: Vec<f64> = host(rho)?.into_iter().map(|rho| eps * rho.exp()).collect();
    let shapes: Vec<f64> = host(c)?.into_iter().map(f64::exp).collect();
    let draws: Vec<_> = shapes.iter().zip(host(uniforms)?).map(|(a, u)| gamma_quantile(*a, u)).collect();
    let pi = normalised(&draws);
    let norm = pi.iter().map(|pi| pi * pi).sum::<f64>().sqrt();
    let rows = scales.iter().map(|scale| scale * norm).collect();
    let rows = Tensor::from_vec(rows, scales.len(), &Device::Cpu)?.to_dtype(rho.dtype())?;
    attach("row-scales", [rho, c], rows, move |call| {
        let grad = host(&call.grad)?;
        let along: Vec<f64> = grad.iter().zip(&scales).map(|(g, scale)| g * scale).collect();
        let dnorm: f64 = along.iter().sum();
        let drho = along.iter().map(|along| along * norm).collect();
        let dpi: Vec<f64> = pi.iter().map(|pi| dnorm * pi / norm).collect();
        let dc = normalised_slope(&shapes, &draws, &pi, &dpi);
        let place = |xs: Vec<f64>| Tensor::new(xs, &Device::Cpu).map(Some);
        Ok([place(drho)?, place(dc)?])
    })
}

fn host(xs: &Tensor) -> Result<Vec<f64>> {
    xs.detach().to_dtype(DType::F64)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::dist::{Dirichlet, Estimator};

    #[test]
    fn value_and_gradients_are_those_of_the_elementary_operations() -> Result<()> {
        let device = Device::Cpu;
        for (c, us) in [(vec![0.3, -0.8, 1.1], vec![0.4, 0.9, 0.05]), (vec![0.2], vec![0.7])] {
            let rho = Var::new(&[0.1, -0.4], &device)?;
            let (c, us) = (Var::new(c, &device)?, Tensor::new(us, &device)?);
            let weight = Tensor::new(&[1.3, -0.7], &device)?;
            let ours = collapsed(&rho, &c, &us, 0.02)?;
            let pi = Dirichlet::new(&c)?.rsample(Estimator::Exact, &us)?;
            let plain = (rho.exp()? * 0.02)?.broadcast_mul(&pi.sqr()?.sum_all()?.sqrt()?)?;
            let grads = |ys: &Tensor| -> Result<_> { (ys * &weight)?.sum_all()?.backward() };
            let (got, want) = (grads(&ours)?, grads(&plain)?);
            let close = |a: &Tensor, b: &Tensor| -> Result<bool> {
                Ok((a - b)?.abs()?.max_all()?.to_scalar::<f64>()? < 1e-15)
            };
            assert!(close(&ours, &plain)?);
            assert!(close(got.get(&rho).expect("of rho"), want.get(&rho).expect("of rho"))?);
            // One weight is one whatever c is: the elementary way has no gradient, this one a zero.
            let dc = got.get(&c).expect("of c");
            match want.get(&c) {
                Some(want) => assert!(close(dc, want)? && c.elem_count() > 1),
                None => assert_eq!(dc.to_vec1::<f64>()?, [0.0]),
            }
        }
        Ok(())
    }
}
