//! A draw on a CUDA device by our own kernels: two launches forward, two backward, nothing through the host.

use candle_core::{DType, Result, Tensor};

use crate::dist::wishart::check_draw;
use crate::dist::{Covariance, Estimator};
use crate::kernels::{address, alloc_uninit, count, device_of, grid, launch, tensor};
use crate::monteclora::noise::DrawSpec;
use crate::monteclora::options::{Compat, Mixture};
use crate::monteclora::posterior::Posterior;
use crate::ops::custom_vjp;

/// Elements of a tile, and its most columns: those of `draw.cu`.
const TILE: usize = 4096;
const TILE_COLUMNS: usize = 64;

/// Whether the kernels make this draw: the default ones, in single precision.
pub(super) fn serves(spec: &DrawSpec) -> bool {
    let config = &spec.config;
    let method = config.compat == Compat::None && config.estimator == Estimator::Exact;
    let (mixture, rank) = (config.mixture != Mixture::Explicit, (1..=TILE).contains(&config.rank));
    let device = spec.device.is_cuda() && spec.dtype == DType::F32;
    device && method && mixture && rank
}

/// `A + eps ||pi||_2 diag(exp rho) T Z` of draw number `draw`; of a sparse mixture without the norm.
///
/// # Shapes
/// - `a`: `(r, in_dim)`, `rho`: `(r)`, `c`: `(N)`, f32 on one CUDA device
/// - output: that of `a`
///
/// # Errors
/// If there is no such draw, a tensor is elsewhere or of another shape, or the device fails.
pub(super) fn perturbed(posterior: &Posterior, a: &Tensor, draw: u64, eps: f64) -> Result<Tensor> {
    let device = device_of(a)?.clone();
    let (rho, c) = (posterior.std_prior(), posterior.expert_weights_prior());
    let (spec, config) = (posterior.spec(), &posterior.spec().config);
    let (r, width, df) = (config.rank, spec.in_dim, config.degrees());
    check_draw(draw, r, df)?;
    if a.dims() != [r, width] || rho.dims() != [r] || c.dims() != [config.num_components] {
        candle_core::bail!("a draw ({r}, {width}): A {:?}, rho {:?}, c {:?}", a.dims(), rho.dims(), c.dims())
    }
    let components = if config.mixture == Mixture::Sparse { 0 } else { config.num_components };
    let [wishart, dirichlet, gaussian] = posterior.streams().keys();
    let (rank, n, columns) = (count(r)?, count(components)?, count(width)?);
    count(r * width)?;
    let tiles = count(width.div_ceil(TILE_COLUMNS.min(TILE / r)))?;
    let diagonal = u32::from(config.covariance == Covariance::Diagonal);

    let dense = [a.contiguous()?, rho.contiguous()?, c.contiguous()?];
    let [a_data, rho_data, c_data] = dense.each_ref().map(|tensor| address(&device, tensor, DType::F32));
    let (a_data, rho_data, c_data) = (a_data?, rho_data?, c_data?);
    let (mut tril, mut rows) = (alloc_uninit::<f32>(&device, r * r)?, alloc_uninit::<f32>(&device, r)?);
    // Without components there is nothing in them, but not every device allocates nothing.
    let some = components.max(1);
    let (mut pi, mut slopes) = (alloc_uninit::<f64>(&device, some)?, alloc_uninit::<f64>(&device, some)?);
    launch!(&device; grid(1); draw_scales(
        &rank, &n, &df, &diagonal, &eps, &wishart, &dirichlet, &draw, &rho_data, &c_data, &mut tril, &mut rows,
        &mut pi, &mut slopes
    ));
    let mut out = alloc_uninit::<f32>(&device, r * width)?;
    launch!(&device; grid(tiles); draw_perturb(
        &rank, &columns, &gaussian, &draw, &a_data, &tril, &rows, &mut out
    ));
    let out = tensor(out, (r, width), &device);
    custom_vjp("draw", [a, rho, c], out, move |call| {
        let grad_a = call.needs[0].then(|| call.grad.clone());
        if !call.needs[1] && !call.needs[2] {
            return Ok([grad_a, None, None]);
        }
        let grad = address(&device, &call.grad, DType::F32)?;
        let mut shares = alloc_uninit::<f64>(&device, tiles as usize * r)?;
        launch!(&device; grid(tiles); draw_along(
            &rank, &columns, &gaussian, &draw, &grad, &tril, &mut shares
        ));
        let rho_data = call.args[1].contiguous()?;
        let (rho, mut along) = (address(&device, &rho_data, DType::F32)?, alloc_uninit::<f64>(&device, r)?);
        let (mut drho, mut dc) = (alloc_uninit::<f32>(&device, r)?, alloc_uninit::<f32>(&device, some)?);
        launch!(&device; grid(1); draw_slopes(
            &rank, &n, &tiles, &eps, &rho, &shares, &pi, &slopes, &mut along, &mut drho, &mut dc
        ));
        let dc = (components > 0).then(|| tensor(dc, components, &device));
        Ok([grad_a, Some(tensor(drho, r, &device)), dc])
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::monteclora::buffer::SampleBuffer;
    use crate::monteclora::{MonteCLoRAConfig, NoiseStreams};
    use crate::noise::{Noise, Purpose};
    use crate::ops::OpPath;
    use crate::util::device::cuda_device;

    /// A + Delta of a draw, and the gradients of A, rho and c, zero where there is none.
    fn draw(device: &Device, path: OpPath, config: &MonteCLoRAConfig, width: usize) -> Result<[Vec<f32>; 4]> {
        let values = |which: u64, len: usize| {
            let mut xs = vec![0f32; len];
            Noise::new(4).stream("values", Purpose::Init).fill_normal_f32(which, &mut xs);
            Tensor::from_vec(xs, len, device)
        };
        let (r, n) = (config.rank, config.num_components);
        let a = Var::from_tensor(&values(0, r * width)?.reshape((r, width))?)?;
        let (rho, c) = (Var::from_tensor(&values(1, r)?)?, Var::from_tensor(&values(2, n)?)?);
        let spec = DrawSpec::new(config, width, DType::F32, device);
        let streams = NoiseStreams::new(Noise::new(7), "layer.default");
        let buffer = SampleBuffer::new(spec.clone(), streams.clone(), 0, None);
        let posterior = Posterior::new(&rho, &c, spec, streams).expect("a posterior");
        let y = crate::monteclora::draw::perturbed(&posterior, &a, 5, &buffer, config.sample_scaler, path)?;
        let weight = values(3, r * width)?.reshape((r, width))?;
        let grads = (&y * weight)?.sum_all()?.backward()?;
        let of = |var: &Var| match grads.get(var) {
            Some(grad) => grad.flatten_all()?.to_vec1(),
            None => Ok(vec![0.0; var.elem_count()]),
        };
        Ok([y.flatten_all()?.to_vec1()?, of(&a)?, of(&rho)?, of(&c)?])
    }

    #[test]
    fn the_kernels_draw_what_composed_operations_draw_here_and_on_the_host() -> Result<()> {
        let (host, device) = (Device::Cpu, cuda_device(0)?);
        for (rank, num_components, mixture, covariance, width) in [
            (8, 4, Mixture::Collapsed, Covariance::Full, 70),
            (8, 4, Mixture::Collapsed, Covariance::Diagonal, 768),
            (1, 1, Mixture::Collapsed, Covariance::Full, 3),
            (100, 300, Mixture::Collapsed, Covariance::Full, 130),
            (4, 6, Mixture::Sparse, Covariance::Full, 64),
        ] {
            let paper = MonteCLoRAConfig { sample_scaler: 0.4, ..MonteCLoRAConfig::paper() };
            let config = MonteCLoRAConfig { rank, num_components, mixture, covariance, ..paper };
            let kernels = draw(&device, OpPath::Fused, &config, width)?;
            for other in [
                draw(&device, OpPath::Composed, &config, width)?,
                draw(&host, OpPath::Fused, &config, width)?,
            ] {
                for (got, want) in kernels.iter().zip(&other) {
                    assert_eq!(got.len(), want.len(), "{rank} {mixture:?}");
                    let size = want.iter().fold(0f32, |m, x| m.max(x.abs()));
                    let error = got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(error <= 1e-5 * size, "{rank} {mixture:?}: {error} of {size}");
                }
            }
        }
        Ok(())
    }
}
