//! AdamW, norms and clipping on a CUDA device against the host, for tensors with fewer elements than a block
//! has threads, and with more elements than a launch has.

use candle_core::{DType, Device, Tensor};

use crate::adapter::{Init, Params, Role};
use crate::error::Result;
use crate::noise::{Noise, Purpose};
use crate::ops::Tape;
use crate::optim::{clip_grad_norm, AdamW, AdamWConfig, Gradients};

const SIZES: [usize; 5] = [3, 257, 5_000, 70_001, 600_000];

fn params(device: &Device) -> Result<Params> {
    let params = Params::new(Noise::new(3), device);
    for (i, len) in SIZES.into_iter().enumerate() {
        params.create(&format!("w{i}"), Role::A, len, &Init::Normal(0.5))?;
    }
    Ok(params)
}

/// The gradients of step `step`: fixed random numbers, as the loss is a sum of products with them.
fn gradients(params: &Params, step: u64) -> Result<Gradients> {
    let mut loss = Tensor::zeros((), DType::F32, params.device())?;
    for (name, param) in params.all() {
        let mut weights = vec![0f32; param.var.elem_count()];
        Noise::new(step).stream(&name, Purpose::Init).fill_normal_f32(0, &mut weights);
        let weights = Tensor::from_vec(weights, param.var.shape(), params.device())?;
        loss = (loss + (param.var.as_tensor() * weights)?.sum_all()?)?;
    }
    let mut grads = Gradients::new();
    grads.backward(params, &loss, &Tape::default())?;
    Ok(grads)
}

#[test]
fn steps_on_a_device_are_those_on_the_host() -> Result<()> {
    let (host, device) = (params(&Device::Cpu)?, params(&crate::cuda_device(0)?)?);
    let both = [host, device];
    let [mut one, mut other] = both.each_ref().map(|params| AdamW::new(params, AdamWConfig::default()));
    for step in 0..3 {
        let mut norms = Vec::new();
        for (params, optimizer) in both.iter().zip([&mut one, &mut other]) {
            let mut grads = gradients(params, step)?;
            norms.push((grads.norm()?, clip_grad_norm(&mut grads, 2.0)?, grads.norm()?));
            let Ok(optimizer) = optimizer else { panic!("an optimiser") };
            optimizer.step(&grads, 1e-2)?;
        }
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a;
        let ((a, b, c), (d, e, f)) = (norms[0], norms[1]);
        assert!(close(a, d) && close(b, e) && close(c, f) && (c - 2.0).abs() < 1e-5, "{norms:?}");
    }
    for ((name, host), (_, device)) in both[0].all().into_iter().zip(both[1].all()) {
        // The clipping factors differ in their last bits, which changes the rounding of a few f32 values.
        let (host, device) = (host.var.to_vec1::<f32>()?, device.var.to_vec1::<f32>()?);
        let error = host.iter().zip(&device).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(error <= 1e-6, "{name}: {error}");
    }
    Ok(())
}
