//! The expected regulariser of many layers, and its gradients, in one launch.

use candle_core::{bail, DType, Result, Tensor};

use super::launch::{address, alloc_uninit, count, device_of, empty, grid, last_word, launch, packed};

/// The parameters of a layer and the constants of its divergences.
pub(crate) struct LatentParameters<'a> {
    /// `(r)`.
    pub rho: &'a Tensor,
    /// `(N)`.
    pub c: &'a Tensor,
    pub degrees: f64,
    /// b of the symmetric prior Dir(b, .., b).
    pub prior: f64,
    pub diagonal: bool,
}

/// The results of a launch.
pub(crate) struct Divergences {
    /// The means over layers of KL_N, KL_W, KL_D and L_C, `(4)`.
    pub means: Tensor,
    /// `kl (KL_N + KL_W + KL_D) + cooperative L_C` of these means, a scalar.
    pub total: Tensor,
    /// The gradients of the total with respect to rho `(r)` and then c `(N)` of each layer,
    /// one after the other.
    pub slopes: Tensor,
}

/// The divergences of some layers, and their total with the weights `kl` and `cooperative`.
///
/// # Errors
/// If there is no layer, a tensor is not a contiguous f32 vector on the device of the first one,
/// or the device fails.
pub(crate) fn divergences(layers: &[LatentParameters], kl: f64, cooperative: f64) -> Result<Divergences> {
    let Some(first) = layers.first() else { bail!("divergences: expected at least one layer, got none") };
    let device = device_of(first.rho)?;
    let sizes = layers.iter().map(|layer| Ok((layer.rho.dims1()?, layer.c.dims1()?)));
    let sizes = sizes.collect::<Result<Vec<_>>>()?;
    let slopes = empty(device, &sizes.iter().map(|(r, n)| r + n).sum::<usize>().into(), DType::F32)?;
    let (mut at, mut table) =
        (address(device, &slopes, DType::F32)?, Vec::with_capacity(7 * layers.len() + 1));
    for (layer, &(r, n)) in layers.iter().zip(&sizes) {
        let pair = |low: usize, high: usize| -> Result<u64> { Ok(packed(count(low)?, count(high)?)) };
        table.extend([address(device, layer.rho, DType::F32)?, address(device, layer.c, DType::F32)?, at]);
        table.extend([layer.degrees.to_bits(), layer.prior.to_bits()]);
        table.extend([pair(r, n)?, layer.diagonal.into()]);
        at += 4 * (r + n) as u64;
    }
    table.push(0); // the counter of blocks
    let table = device.clone_htod(&table)?;
    let done = last_word(&table);
    let (means, total) = (empty(device, &4.into(), DType::F32)?, empty(device, &().into(), DType::F32)?);
    let mut terms = alloc_uninit::<f64>(device, 4 * layers.len())?;
    let (to_means, to_total) = (address(device, &means, DType::F32)?, address(device, &total, DType::F32)?);
    launch!(device; grid(count(layers.len())?); divergences(
        &table, &kl, &cooperative, &mut terms, &done, &to_means, &to_total
    ));
    Ok(Divergences { means, total, slopes })
}
