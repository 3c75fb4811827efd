//! One launch over many tensors, whose addresses and sizes go to the device as a table.

use candle_core::{DType, Result, Tensor};

use super::launch::{address, alloc_uninit, count, device_of, grid, launch, THREADS};

/// The most blocks of a tensor.
const BLOCKS: u32 = 128;

/// One parameter's step of AdamW; its first three tensors are changed in place.
pub(crate) struct Update {
    pub value: Tensor,
    pub first: Tensor,
    pub second: Tensor,
    pub grad: Tensor,
    /// What is left of the value after its decay.
    pub keep: f32,
    /// The learning rate, corrected for the first mean's start at zero.
    pub rate: f32,
    /// What corrects the second mean.
    pub inverse: f32,
}

/// Whether these kernels take a tensor: contiguous, in single precision, on a CUDA device.
pub(crate) fn supports(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
}

/// Makes all updates, whose tensors are on one device and of one size each; `betas` are the decays of the means.
///
/// # Errors
/// If a tensor is not one that [`takes`] takes, or the device fails.
pub(crate) fn adamw(updates: &[Update], betas: [f64; 2], eps: f64) -> Result<()> {
    let Some(device) = updates.first().map(|update| device_of(&update.value)).transpose()? else {
        return Ok(());
    };
    let (mut table, mut longest) = (Vec::with_capacity(6 * updates.len()), 0);
    for update in updates {
        let len = count(update.value.elem_count())?;
        longest = longest.max(len);
        for tensor in [&update.value, &update.first, &update.second, &update.grad] {
            table.push(address(device, tensor, DType::F32)?);
        }
        let pair = |low: u32, high: f32| u64::from(low) | u64::from(high.to_bits()) << 32;
        table.extend([pair(len, update.keep), pair(update.rate.to_bits(), update.inverse)]);
    }
    let table = device.clone_htod(&table)?;
    let [beta1, beta2] = betas.map(|beta| beta as f32);
    let [rest1, rest2] = betas.map(|beta| (1.0 - beta) as f32);
    let (eps, mut config) = (eps as f32, grid(blocks(longest)));
    config.grid_dim.1 = count(updates.len())?;
    launch!(device; config; adamw(&table, &beta1, &rest1, &beta2, &rest2, &eps));
    Ok(())
}

/// The sum of the squares of all elements of all tensors: one copy to the host. None where there is a tensor that
/// [`takes`] does not take.
///
/// # Errors
/// If the device fails.
pub(crate) fn sum_of_squares(tensors: &[&Tensor]) -> Result<Option<f64>> {
    let Some(first) = tensors.first().filter(|_| tensors.iter().all(|tensor| supports(tensor))) else {
        return Ok(None);
    };
    let (device, mut table, mut longest) = (device_of(first)?, Vec::with_capacity(2 * tensors.len()), 0);
    for tensor in tensors {
        longest = longest.max(count(tensor.elem_count())?);
        table.extend([address(device, tensor, DType::F32)?, tensor.elem_count() as u64]);
    }
    let (table, blocks) = (device.clone_htod(&table)?, blocks(longest));
    let mut sums = alloc_uninit::<f64>(device, tensors.len() * blocks as usize)?;
    let mut config = grid(blocks);
    config.grid_dim.1 = count(tensors.len())?;
    launch!(device; config; sums_of_squares(&table, &mut sums));
    Ok(Some(device.clone_dtoh(&sums)?.into_iter().sum()))
}

/// Some sixteen elements a thread.
fn blocks(longest: u32) -> u32 {
    longest.div_ceil(16 * THREADS).clamp(1, BLOCKS)
}
