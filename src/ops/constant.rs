//! Arithmetic with constants: noise, priors, masks.
//!
//! Candle differentiates both sides of a sum, product or matrix product, tracked or not, and keeps the
//! gradient of the constant although it is not used. Here the constant gets none.

use candle_core::{Result, Tensor};

use super::custom_vjp::custom_vjp;

/// `xs + constant`; shapes broadcast.
///
/// # Errors
/// If the shapes do not fit.
pub fn add_constant(xs: &Tensor, constant: &Tensor) -> Result<Tensor> {
    if constant.track_op() {
        return xs.broadcast_add(constant);
    }
    let result = xs.detach().broadcast_add(constant)?;
    custom_vjp("add-constant", [xs], result, |call| Ok([Some(sum_to(call.grad, &call.args[0])?)]))
}

/// `xs * constant`, elementwise; shapes broadcast.
///
/// # Errors
/// If the shapes do not fit.
pub fn mul_constant(xs: &Tensor, constant: &Tensor) -> Result<Tensor> {
    if constant.track_op() {
        return xs.broadcast_mul(constant);
    }
    let result = xs.detach().broadcast_mul(constant)?;
    let constant = constant.clone();
    custom_vjp("mul-constant", [xs], result, move |call| {
        Ok([Some(sum_to(call.grad.broadcast_mul(&constant)?, &call.args[0])?)])
    })
}

/// `factor * xs`, whose gradient for `factor = 0` is zero. Candle's own product returns no
/// gradient in this case.
///
/// # Errors
/// If candle fails.
pub fn scale(xs: &Tensor, factor: f64) -> Result<Tensor> {
    let result = (xs.detach() * factor)?;
    custom_vjp("scale", [xs], result, move |call| Ok([Some((call.grad * factor)?)]))
}

/// The matrix product of `xs` (n, k) with a constant (k, m).
///
/// # Errors
/// If the shapes do not fit.
pub fn matmul_constant(xs: &Tensor, constant: &Tensor) -> Result<Tensor> {
    if constant.track_op() {
        return xs.matmul(constant);
    }
    let result = xs.detach().matmul(constant)?;
    let constant = constant.clone();
    custom_vjp("matmul-constant", [xs], result, move |call| Ok([Some(call.grad.matmul(&constant.t()?)?)]))
}

/// Sums a gradient over the dimensions in which `like` was broadcast.
fn sum_to(grad: Tensor, like: &Tensor) -> Result<Tensor> {
    let mut grad = grad;
    let extra = grad.rank() - like.rank();
    for _ in 0..extra {
        grad = grad.sum(0)?;
    }
    for (dim, size) in like.dims().iter().enumerate() {
        if *size == 1 && grad.dim(dim)? != 1 {
            grad = grad.sum_keepdim(dim)?;
        }
    }
    Ok(grad)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    /// Compares value and gradient of `ours` with candle's `reference`, which also computes the
    /// constant's gradient.
    fn compare(
        shapes: [&[usize]; 2],
        ours: fn(&Tensor, &Tensor) -> Result<Tensor>,
        reference: fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let ramp = |shape: &[usize], scale: f64| -> Result<Tensor> {
            let n: usize = shape.iter().product();
            let values: Vec<f64> = (0..n).map(|i| scale * (i as f64 - 1.7)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let xs = Var::from_tensor(&ramp(shapes[0], 0.3)?)?;
        let constant = ramp(shapes[1], -0.7)?;
        let run = |f: fn(&Tensor, &Tensor) -> Result<Tensor>| -> Result<(Vec<f64>, Vec<f64>, usize)> {
            let ys = f(xs.as_tensor(), &constant)?;
            let grads = ys.sqr()?.sum_all()?.backward()?;
            let grad = grads.get(&xs).expect("a gradient").flatten_all()?.to_vec1()?;
            Ok((ys.flatten_all()?.to_vec1()?, grad, grads.get_ids().count()))
        };
        let ((y, dx, kept), (reference_y, reference_dx, candle_keeps)) = (run(ours)?, run(reference)?);
        assert_eq!((kept, candle_keeps), (1, 2));
        assert_eq!(y, reference_y);
        for (ours, reference) in dx.iter().zip(&reference_dx) {
            assert!((ours - reference).abs() < 1e-12, "{ours} {reference}");
        }
        Ok(())
    }

    #[test]
    fn a_factor_of_zero_gives_a_gradient_of_zero() -> Result<()> {
        let xs = Var::new(&[1.5, -2.0], &Device::Cpu)?;
        for factor in [0.0, -0.7] {
            let ys = scale(&xs, factor)?;
            assert_eq!(ys.to_vec1::<f64>()?, [1.5 * factor, -2.0 * factor]);
            let grads = ys.sqr()?.sum_all()?.backward()?;
            let want = [1.5, -2.0].map(|x| 2.0 * factor * factor * x);
            let got = grads.get(&xs).expect("a gradient").to_vec1::<f64>()?;
            assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-15), "{got:?} {want:?}");
        }
        // If this fails, candle has changed, and `scale` is no longer needed.
        assert!((xs.as_tensor() * 0.0)?.sum_all()?.backward()?.get(&xs).is_none());
        Ok(())
    }

    #[test]
    fn only_the_variable_gets_a_gradient_and_it_is_candle_s() -> Result<()> {
        for shapes in [[&[3, 4][..], &[3, 4][..]], [&[3, 1], &[3, 4]], [&[4], &[3, 4]], [&[3, 4], &[4]]] {
            compare(shapes, add_constant, |a, b| a.broadcast_add(b))?;
            compare(shapes, mul_constant, |a, b| a.broadcast_mul(b))?;
        }
        compare([&[2, 3], &[3, 5]], matmul_constant, |a, b| a.matmul(b))
    }
}
