//! Every block on a CUDA device against the reference on the host in double precision. These tests need the device:
//! a build for it that finds none fails here.

use super::*;

mod budget;

#[test]
fn blocks_on_a_device_compute_what_the_reference_computes_on_the_host() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for case in cases() {
        compare_on(&device, &case, OpPath::Composed, DType::F64, 1e-10);
        compare_on(&device, &case, OpPath::Composed, DType::F32, 2e-5);
        compare_on(&device, &case, OpPath::Fused, DType::F32, 2e-5); // with our kernels
    }
    Ok(())
}

#[test]
fn blocks_on_a_device_run_in_half_width() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for case in cases() {
        compare_on(&device, &case, OpPath::Composed, DType::BF16, 0.06);
        compare_on(&device, &case, OpPath::Fused, DType::BF16, 0.06);
        compare_on(&device, &case, OpPath::Composed, DType::F16, 0.01);
    }
    half::compare_in_half_width(&device, OpPath::Composed, &cases())?;
    half::compare_in_half_width(&device, OpPath::Fused, &cases())
}

#[test]
fn dropout_on_a_device_hides_what_it_hides_on_the_host() -> Result<()> {
    let ones = Tensor::ones(10_000, DType::F32, &Device::Cpu)?;
    let (device, host) = (Device::new_cuda(0)?, Device::Cpu);
    let on = |device: &Device, path| -> Result<Vec<f64>> {
        let ones = ones.to_device(device)?;
        Ok(flat(&dropout(&ones, 0.25, &stream(), 3, path)?))
    };
    let want = on(&host, OpPath::Fused)?;
    assert!(on(&device, OpPath::Fused)? == want && on(&device, OpPath::Composed)? == want);
    Ok(())
}

#[test]
fn dropout_inside_an_adapted_layer_is_dropout_before_it() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let case = case(
        "adapted linear, dropout",
        &[(&[4, 5], true), (&[2, 5], true), (&[7, 2], true), (&[7, 5], false), (&[7], false)],
        |t, path| {
            let dropout = (0.3, &stream(), 9);
            adapted_linear_with_dropout(&t[0], &t[3], Some(&t[4]), dropout, &t[1], &t[2], 0.3, path)
        },
    );
    for path in [OpPath::Fused, OpPath::Composed] {
        compare_on(&device, &case, path, DType::F32, 2e-5);
        half::compare_in_half_width(&device, path, std::slice::from_ref(&case))?;
    }
    Ok(())
}

/// `(1 + 2^-12, 1)` is `(1, 1)` in bf16, whose product with `(1, -1)` is nothing.
#[test]
fn adapters_beside_a_half_width_base_are_not_rounded() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let tiny = 2f32.powi(-12);
    let half = |values: &[f32], shape: (usize, usize)| -> Result<Tensor> {
        Tensor::from_slice(values, shape, &device)?.to_dtype(DType::BF16)
    };
    let (signs, close) = ([1f32, -1.0], [1.0 + tiny, 1.0]);
    let a = Var::from_slice(&close, (1, 2), &device)?;
    let b = Var::from_slice(&close, (2, 1), &device)?;
    let x = Var::from_tensor(&half(&signs, (1, 2))?)?;
    let y = adapted_linear(&x, &half(&[0.0; 4], (2, 2))?, None, &a, &b, 1.0, OpPath::Fused)?;
    assert_eq!(flat(&y.to_device(&Device::Cpu)?), [f64::from(tiny); 2]);
    // The gradient of the output is (1, -1), too.
    let store = (y * half(&signs, (1, 2))?)?.sum_all()?.backward()?;
    let gradient =
        |var: &Var| Ok::<_, candle_core::Error>(flat(&store.get(var).unwrap().to_device(&Device::Cpu)?));
    assert_eq!(gradient(&x)?, [f64::from(tiny); 2]);
    assert_eq!(gradient(&a)?, [f64::from(tiny), -f64::from(tiny)]);
    assert_eq!(gradient(&b)?, [f64::from(tiny), -f64::from(tiny)]);
    Ok(())
}
