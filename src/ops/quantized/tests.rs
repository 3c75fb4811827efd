use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Result, Tensor, Var};

use super::linear::quantized_linear_by_blocks;
use super::{quantized_linear, QuantizedWeight, Weight};
use crate::noise::{Noise, Purpose};
use crate::ops::{self, OpPath};

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

/// The output of `f`, and the gradient of x for a loss that weights the output by `grad`.
fn step(xs: &Tensor, grad: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<[Tensor; 2]> {
    let xs = Var::from_tensor(xs)?;
    let y = f(xs.as_tensor())?;
    let gradient = (&y * grad)?.sum_all()?.backward()?.get(&xs).expect("a gradient").clone();
    Ok([y.detach(), gradient])
}

#[test]
fn many_rows_and_their_gradient_are_those_of_the_dequantised_layer() -> Result<()> {
    let bias = normal("b", &[40])?;
    let grad = normal("g", &[2, 50, 40])?;
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let weight = quantized((40, 256), kind)?;
        let xs = normal("x", &[2, 50, 256])?;
        let dense = |xs: &Tensor| ops::linear(xs, &weight.dequantize()?, Some(&bias), OpPath::Reference);
        let want = step(&xs, &grad, dense)?;
        for path in OpPath::ALL {
            let got = step(&xs, &grad, |xs| quantized_linear(xs, &weight, Some(&bias), path))?;
            for (got, want) in got.iter().zip(&want) {
                assert!(largest(got, want)? < 1e-4, "{kind:?} {path:?}");
            }
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
#[test]
fn blocks_on_a_device_are_those_on_the_host() -> Result<()> {
    use candle_core::quantized::QStorage;
    use GgmlDType::*;

    let (device, cpu) = (crate::util::device::cuda_device(0)?, Device::Cpu);
    let (bias, xs, grad) = (normal("b", &[40])?, normal("x", &[2, 50, 256])?, normal("g", &[2, 50, 40])?);
    let ids = Tensor::new(&[39u32, 0, 7, 7], &cpu)?;
    for kind in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K, Q6K] {
        let here = QTensor::quantize(&normal("w", &[40, 256])?, kind)?;
        let there = QTensor::new(QStorage::from_data(here.data()?, &device, kind)?, (40, 256))?;
        let here = QuantizedWeight::new(Arc::new(here), DType::F32)?;
        let there = QuantizedWeight::new(Arc::new(there), DType::F32)?;
        let rows = there.take(&ids.to_device(&device)?)?.to_device(&cpu)?;
        assert!(largest(&rows, &here.take(&ids)?)? < 1e-5, "{kind:?}");
        let layer = |xs: &Tensor| quantized_linear(xs, &here, Some(&bias), OpPath::Composed);
        let want = step(&xs, &grad, layer)?;
        let (xs, grad, bias) = (xs.to_device(&device)?, grad.to_device(&device)?, bias.to_device(&device)?);
        for path in [OpPath::Fused, OpPath::Composed] {
            let got = step(&xs, &grad, |xs| quantized_linear(xs, &there, Some(&bias), path))?;
            for (got, want) in got.iter().zip(&want) {
                assert!(largest(&got.to_device(&cpu)?, want)? < 1e-4, "{kind:?} {path:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_weight_of_several_blocks_is_one_weight() -> Result<()> {
    let weight = quantized((4200, 256), GgmlDType::Q4_0)?;
    assert_eq!(weight.blocks().collect::<Vec<_>>(), [(0, 4096), (4096, 104)]);
    let (xs, grad) = (normal("x", &[11, 256])?, normal("g", &[11, 4200])?);
    let want = step(&xs, &grad, |xs| ops::linear(xs, &weight.dequantize()?, None, OpPath::Reference))?;
    for path in OpPath::ALL {
        let got = step(&xs, &grad, |xs| quantized_linear(xs, &weight, None, path))?;
        assert!(largest(&got[0], &want[0])? < 1e-3 && largest(&got[1], &want[1])? < 1e-3, "{path:?}");
    }
    Ok(())
}

/// Candle's kernels round the inputs as well; the error is measured relative to the output's size.
#[test]
fn few_rows_that_nothing_differentiates_are_near_the_dequantised_layer() -> Result<()> {
    let (bias, size) = (normal("b", &[64])?, |t: &Tensor| t.sqr()?.mean_all()?.to_scalar::<f32>());
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let weight = quantized((64, 512), kind)?;
        for n in [1, 8] {
            let xs = normal("x", &[1, n, 512])?;
            let want = ops::linear(&xs, &weight.dequantize()?, Some(&bias), OpPath::Reference)?;
            for path in [OpPath::Fused, OpPath::Composed] {
                let got = quantized_linear(&xs, &weight, Some(&bias), path)?;
                let error = (size(&(&got - &want)?)? / size(&want)?).sqrt();
                assert!(error > 0.0 && error < 0.012, "{kind:?} {path:?}: {error}");
            }
            // With a tracked x nothing is rounded, so that the gradient belongs to the output.
            let xs = Var::from_tensor(&xs)?;
            let got = quantized_linear(xs.as_tensor(), &weight, Some(&bias), OpPath::Fused)?;
            assert!(largest(&got.detach(), &want)? < 1e-4, "{kind:?}");
            // The function for training steps does not round either.
            let got =
                quantized_linear_by_blocks(&xs.as_detached_tensor(), &weight, Some(&bias), OpPath::Fused)?;
            assert!(largest(&got, &want)? < 1e-4, "{kind:?}");
        }
    }
    Ok(())
}

/// Half-precision activations, with a weight of many blocks.
#[test]
fn a_half_width_gradient_is_rounded_once() -> Result<()> {
    let weight = quantized((32768, 256), GgmlDType::Q8_0)?;
    assert!(weight.blocks().count() >= 8);
    let grad = normal("g", &[3, 32768])?.to_dtype(DType::BF16)?;
    let want = grad
        .to_dtype(DType::F64)?
        .matmul(&weight.dequantize()?.to_dtype(DType::BF16)?.to_dtype(DType::F64)?)?;
    let xs = Var::from_tensor(&normal("x", &[3, 256])?.to_dtype(DType::BF16)?)?;
    let y = quantized_linear(xs.as_tensor(), &weight, None, OpPath::Fused)?;
    let got = (y * &grad)?.sum_all()?.backward()?.get(&xs).expect("a gradient").to_dtype(DType::F64)?;
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>();
    let error = largest(&(got - &want)?)? / largest(&want)?;
    assert!(error < 2f64.powi(-8), "{error}");
    Ok(())
}

#[test]
fn the_loss_over_a_quantised_head_is_that_over_the_dequantised_one() -> Result<()> {
    let weight = quantized((70, 64), GgmlDType::Q8_0)?;
    let (xs, labels) = (normal("x", &[300, 64])?, (0..300).map(|i| if i % 7 == 0 { -100 } else { i % 70 }));
    let labels = Tensor::from_iter(labels.map(i64::from), &Device::Cpu)?;
    let loss = |weight: Weight, path| {
        let one = Tensor::ones((), DType::F32, &Device::Cpu)?;
        step(&xs, &one, |xs| ops::linear_cross_entropy(xs, &weight, &labels, -100, path))
    };
    let want = loss(weight.dequantize()?.into(), OpPath::Reference)?;
    for path in OpPath::ALL {
        let got = loss(weight.clone().into(), path)?;
        assert!((got[0].to_scalar::<f32>()? - want[0].to_scalar::<f32>()?).abs() < 1e-4, "{path:?}");
        assert!(largest(&got[1], &want[1])? < 1e-6, "{path:?}");
    }
    Ok(())
}

/// 2 x 8 numbers in blocks of 4, computed by hand.
#[test]
fn nf4_is_a_code_times_the_scale_of_its_block() -> Result<()> {
    let values: [f32; 16] = std::array::from_fn(|code| code as f32 - 7.0);
    let packed = Tensor::new(&[[0x0fu8, 0x12, 0x77, 0x8a], [0xf0, 0x00, 0x65, 0x43]], &Device::Cpu)?;
    let scales = Tensor::new(&[[1f32, 10.0], [2.0, 0.5]], &Device::Cpu)?;
    let weight = QuantizedWeight::nf4(packed.clone(), scales.clone(), values, DType::F32)?;
    let want =
        [[-7f32, 8.0, -6.0, -5.0, 0.0, 0.0, 10.0, 30.0], [16.0, -14.0, -14.0, -14.0, -0.5, -1.0, -1.5, -2.0]];
    assert_eq!(weight.dequantize()?.to_vec2::<f32>()?, want);
    let rows = weight.take(&Tensor::new(&[1u32, 0, 1], &Device::Cpu)?)?;
    assert_eq!(rows.to_vec2::<f32>()?, [want[1], want[0], want[1]]);
    assert_eq!((weight.kind(), weight.bytes()), ("nf4".to_string(), 8 + 16 + 64));
    let one =
        quantized_linear(&Tensor::ones((1, 8), DType::F32, &Device::Cpu)?, &weight, None, OpPath::Fused)?;
    assert_eq!(one.to_vec2::<f32>()?, [want.map(|row| row.iter().sum::<f32>())]);
    // Scales for a different number of rows; a byte that spans two blocks.
    for wrong in [scales.narrow(0, 0, 1)?, Tensor::ones((2, 8), DType::F32, &Device::Cpu)?] {
        assert!(QuantizedWeight::nf4(packed.clone(), wrong, values, DType::F32).is_err());
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
