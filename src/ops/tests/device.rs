//! Every block on a CUDA device against plain operations on the host in double precision. These tests need the device:
//! a build for it that finds none fails here.

use super::*;

#[test]
fn blocks_on_a_device_compute_what_plain_operations_compute_on_the_host() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for case in cases() {
        compare_on(&device, &case, Lane::Composed, DType::F64, 1e-10);
        compare_on(&device, &case, Lane::Composed, DType::F32, 2e-5);
        compare_on(&device, &case, Lane::Fast, DType::F32, 2e-5); // with our kernels
    }
    Ok(())
}

#[test]
fn blocks_on_a_device_run_in_half_width() -> Result<()> {
    let device = Device::new_cuda(0)?;
    for case in cases() {
        compare_on(&device, &case, Lane::Composed, DType::BF16, 0.06);
        compare_on(&device, &case, Lane::Fast, DType::BF16, 0.06);
        compare_on(&device, &case, Lane::Composed, DType::F16, 0.01);
    }
    Ok(())
}

#[test]
fn dropout_on_a_device_hides_what_it_hides_on_the_host() -> Result<()> {
    let ones = Tensor::ones(10_000, DType::F32, &Device::Cpu)?;
    let (device, host) = (Device::new_cuda(0)?, Device::Cpu);
    let on = |device: &Device, lane| -> Result<Vec<f64>> {
        let ones = ones.to_device(device)?;
        Ok(flat(&with_lane(lane, || dropout(&ones, 0.25, &stream(), 3))?))
    };
    let want = on(&host, Lane::Fast)?;
    assert!(on(&device, Lane::Fast)? == want && on(&device, Lane::Composed)? == want);
    Ok(())
}
