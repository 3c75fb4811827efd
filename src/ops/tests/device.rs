//! Every block on a CUDA device against the reference on the host in double precision. These tests need the device:
//! a build for it that finds none fails here.

use super::*;

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
    Ok(())
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
fn rows_on_a_device_go_where_they_go_on_the_host() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let (places, total) = (vec![0, 3, 4, 11], 12);
    let [here, there] = [&Device::Cpu, &device].map(|device| Rows::new(places.clone(), total, device));
    let (here, there) = (here?, there?);
    // Rows of whole words, and of an odd number of halves.
    for dim in [6, 301] {
        for dtype in [DType::F32, DType::BF16, DType::F64] {
            let xs = normal("rows", &[total, dim]).to_dtype(dtype)?;
            let taken = here.take(&xs, OpPath::Composed)?;
            let put = here.put(&taken, OpPath::Composed)?;
            let xs = xs.to_device(&device)?;
            for path in [OpPath::Fused, OpPath::Composed] {
                assert_eq!(flat(&there.take(&xs, path)?), flat(&taken), "{dim} {dtype:?} {path:?}");
                assert_eq!(
                    flat(&there.put(&there.take(&xs, path)?, path)?),
                    flat(&put),
                    "{dim} {dtype:?} {path:?}"
                );
            }
        }
    }
    Ok(())
}
