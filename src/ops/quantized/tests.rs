use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};

use super::{quantized_linear, QuantizedWeight, Weight};
use crate::noise::{Noise, Purpose};
use crate::ops::{self, OpPath};

const PATHS: [OpPath; 3] = [OpPath::Fused, OpPath::Composed, OpPath::Reference];

fn normal(name: &str, shape: &[usize]) -> Result<Tensor> {
    let mut z = vec![0f32; shape.iter().product()];
    Noise::new(5).stream(name, Purpose::Init).fill_normal_f32(0, &mut z);
    Tensor::from_vec(z, shape, &Device::Cpu)
}

fn quantized(shape: (usize, usize), kind: GgmlDType) -> Result<QuantizedWeight> {
    let blocks = QTensor::quantize(&normal("w", &[shape.0, shape.1])?, kind)?;
    QuantizedWeight::new(Arc::new(blocks), DType::F32)
}

fn largest(a: &Tensor, b: &Tensor) -> Result<f32> {
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

#[test]
fn many_rows_and_their_gradient_are_those_of_the_dequantised_layer() -> Result<()> {
    let bias = normal("b", &[40])?;
    let grad = normal("g", &[2, 50, 40])?;
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let weight = quantized((40, 256), kind)?;
        for path in PATHS {
            let (xs, ys) = (
                Var::from_tensor(&normal("x", &[2, 50, 256])?)?,
                Var::from_tensor(&normal("x", &[2, 50, 256])?)?,
            );
            let got = quantized_linear(xs.as_tensor(), &weight, Some(&bias), path)?;
            let want = ops::linear(ys.as_tensor(), &weight.dequantize()?, Some(&bias), OpPath::Reference)?;
            assert!(largest(&got, &want)? < 1e-4, "{kind:?} {path:?}");
            let of = |y: Tensor, x: &Var| -> Result<Tensor> {
                Ok((y * &grad)?.sum_all()?.backward()?.get(x).expect("a gradient").clone())
            };
            assert!(largest(&of(got, &xs)?, &of(want, &ys)?)? < 1e-4, "{kind:?} {path:?}");
        }
    }
    Ok(())
}

#[test]
fn rows_of_a_table_are_those_of_the_dequantised_one() -> Result<()> {
    let weight = quantized((40, 64), GgmlDType::Q8_0)?;
    let ids = Tensor::new(&[[3u32, 39], [0, 3]], &Device::Cpu)?;
    let got = Weight::from(weight.clone()).lookup(&ids, OpPath::Fused)?;
    let want = ops::embedding(&ids, &weight.dequantize()?, OpPath::Fused)?;
    assert_eq!((got.dims(), largest(&got, &want)?), (&[2, 2, 64][..], 0.0));
    let outside = Tensor::new(&[40u32], &Device::Cpu)?;
    assert!(Weight::from(weight).lookup(&outside, OpPath::Fused).is_err());
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_error() -> Result<()> {
    let weight = quantized((40, 64), GgmlDType::Q8_0)?;
    for (xs, bias) in [(vec![3, 32], 40), (vec![64], 40), (vec![3, 64], 64)] {
        let error =
            quantized_linear(&normal("x", &xs)?, &weight, Some(&normal("b", &[bias])?), OpPath::Fused);
        let error = error.expect_err("an error").to_string();
        assert!(error.contains("does not fit a weight (out, in) of (40, 64)"), "{error}");
    }
    Ok(())
}
