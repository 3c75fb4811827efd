//! Tests of every block on a CUDA device against the reference on the host in double precision. They need a
//! device: a build with the feature `cuda` fails here without one.

use super::*;
use crate::util::device::cuda_device;

mod budget;

#[test]
fn blocks_on_a_device_compute_what_the_reference_computes_on_the_host() -> Result<()> {
    let device = cuda_device(0)?;
    for case in cases() {
        compare_on(&device, &case, OpPath::Composed, DType::F64, 1e-10);
        compare_on(&device, &case, OpPath::Composed, DType::F32, 2e-5);
        compare_on(&device, &case, OpPath::Fused, DType::F32, 2e-5); // with custom kernels
    }
    Ok(())
}

#[test]
fn blocks_on_a_device_run_in_half_width() -> Result<()> {
    let device = cuda_device(0)?;
    for case in cases() {
        compare_on(&device, &case, OpPath::Composed, DType::BF16, 0.06);
        compare_on(&device, &case, OpPath::Fused, DType::BF16, 0.06);
        compare_on(&device, &case, OpPath::Composed, DType::F16, 0.01);
    }
    half::compare_in_half_width(&device, OpPath::Composed, &cases())?;
    half::compare_in_half_width(&device, OpPath::Fused, &cases())
}

#[test]
fn a_norm_on_a_device_takes_tensors_of_that_device_alone() -> Result<()> {
    let device = cuda_device(0)?;
    let xs = Tensor::arange(0f32, 900., &Device::Cpu)?.reshape((3, 300))?.sin()?;
    let norm = |xs: &Tensor, weight: &Tensor| rms_norm(xs, weight, 1e-5, OpPath::Fused);
    let (there, weight) = (xs.to_device(&device)?, xs.get(1)?);
    let (got, want) = (norm(&there, &weight.to_device(&device)?)?, norm(&xs, &weight)?);
    for (got, want) in flat(&got).iter().zip(flat(&want)) {
        assert!((got - want).abs() < 1e-5, "{got} {want}");
    }
    // Another stream of the same GPU is refused like another GPU: nothing orders its writes before our reads.
    let others = [Some(Device::new_cuda_with_stream(0)?), cuda_device(1).ok()];
    for other in others.into_iter().flatten() {
        let error = norm(&there, &weight.to_device(&other)?).unwrap_err().to_string();
        let stream = error.contains("belongs to another stream") && error.contains("`cuda_device`");
        assert!(stream || error.contains("gpu_id: 1") && error.contains("was given a tensor"), "{error}");
    }
    Ok(())
}

#[test]
fn kernels_over_several_tensors_take_those_of_one_device_alone() -> Result<()> {
    let (device, other) = (cuda_device(0)?, Device::new_cuda_with_stream(0)?);
    let there = Tensor::ones((1, 5, 8), DType::F32, &device)?;
    let elsewhere = there.to_device(&Device::Cpu)?.to_device(&other)?;
    let attend = |k: &Tensor, padding: Option<Tensor>| {
        let mask = Mask { padding, ..Mask::default() };
        attention(&there, k, &there, 1, 1, 0.3, &mask, None, OpPath::Fused)
    };
    let padding = Tensor::ones((1, 5), DType::U8, &other)?;
    let rows = Rows::new(vec![1, 3], 5, &other)?;
    let results = [attend(&elsewhere, None), attend(&there, Some(padding)), rows.take(&there, OpPath::Fused)];
    for result in results {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("belongs to another stream"), "{error}");
    }
    Ok(())
}

#[test]
fn what_goes_to_another_stream_of_a_device_is_written_before_and_its_gradient_comes_back() -> Result<()> {
    let (device, other) = (cuda_device(0)?, Device::new_cuda_with_stream(0)?);
    let xs = Var::from_tensor(&Tensor::arange(0f32, 5000., &device)?)?;
    let there = carry(&(xs.as_tensor() * 2.0)?, &other)?;
    assert!(there.device().same_device(&other));
    let want: Vec<f64> = (0..5000).map(|i| 2.0 * f64::from(i)).collect();
    assert_eq!(flat(&there.to_device(&Device::Cpu)?), want);
    let grads = there.sqr()?.sum_all()?.backward()?;
    let grad = grads.get(&xs).expect("a gradient");
    assert!(grad.device().same_device(&device));
    assert_eq!(flat(&grad.to_device(&Device::Cpu)?), want.iter().map(|x| 4.0 * x).collect::<Vec<f64>>());
    Ok(())
}

#[test]
fn scores_that_nothing_can_count_are_refused() -> Result<()> {
    let xs = Tensor::ones((1, 1 << 16, 1), DType::F32, &cuda_device(0)?)?;
    let error = attention(&xs, &xs, &xs, 1, 1, 1.0, &Mask::default(), None, OpPath::Fused).unwrap_err();
    assert!(error.to_string().contains("65536 x 65536 scores"), "{error}");
    Ok(())
}

#[test]
fn dropout_on_a_device_hides_what_it_hides_on_the_host() -> Result<()> {
    let ones = Tensor::ones(10_000, DType::F32, &Device::Cpu)?;
    let (device, host) = (cuda_device(0)?, Device::Cpu);
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
    let device = cuda_device(0)?;
    let (places, total) = (vec![0, 3, 4, 11], 12);
    let [here, there] = [&Device::Cpu, &device].map(|device| Rows::new(places.clone(), total, device));
    let (here, there) = (here?, there?);
    // Rows of whole 32-bit words, and of an odd number of 16-bit halves.
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

#[test]
fn dropout_inside_an_adapted_layer_is_dropout_before_it() -> Result<()> {
    let device = cuda_device(0)?;
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

/// In bf16, `(1 + 2^-12, 1)` is rounded to `(1, 1)`, whose product with `(1, -1)` is 0.
#[test]
fn adapters_beside_a_half_width_base_are_not_rounded() -> Result<()> {
    let device = cuda_device(0)?;
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
    // The gradient of the output is (1, -1) as well.
    let store = (y * half(&signs, (1, 2))?)?.sum_all()?.backward()?;
    let gradient =
        |var: &Var| Ok::<_, candle_core::Error>(flat(&store.get(var).unwrap().to_device(&Device::Cpu)?));
    assert_eq!(gradient(&x)?, [f64::from(tiny); 2]);
    assert_eq!(gradient(&a)?, [f64::from(tiny), -f64::from(tiny)]);
    assert_eq!(gradient(&b)?, [f64::from(tiny), -f64::from(tiny)]);
    Ok(())
}
