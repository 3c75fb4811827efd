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
    half::compare_in_half_width(&device, OpPath::Composed)?;
    half::compare_in_half_width(&device, OpPath::Fused)
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
