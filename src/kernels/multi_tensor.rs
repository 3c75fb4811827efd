//! One launch over many tensors, whose addresses and sizes go to the device as a table.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{bail, DType, Result, Tensor};

use super::launch::{
    address, alloc_uninit, count, device_of, empty, grid, last_word, launch, packed, THREADS,
};

/// The maximum number of blocks per tensor.
const BLOCKS: u32 = 128;

/// The maximum number of tensors per launch, which are rows of its grid.
const ROWS: usize = 65535;

/// One parameter's AdamW step. The first three tensors are changed in place.
pub(crate) struct AdamWUpdate {
    pub value: Tensor,
    pub first: Tensor,
    pub second: Tensor,
    pub grad: Tensor,
    /// The factor on the value for weight decay.
    pub keep: f32,
    /// The learning rate, divided by the bias correction of the first moment.
    pub rate: f32,
    /// The factor on the second moment for bias correction.
    pub inverse: f32,
}

/// Whether these kernels support a tensor: contiguous, in single precision, on a CUDA device.
pub(crate) fn supports(tensor: &Tensor) -> bool {
    tensor.device().is_cuda() && tensor.dtype() == DType::F32 && tensor.is_contiguous()
}

/// Makes all updates in one launch per device.
///
/// The tensors of an update have the same size and are on one device. Every gradient is first multiplied by
/// `factor`; `betas` are the decay rates of the moments.
///
/// # Errors
/// If a tensor is not supported ([`supports`]), the tensors of an update are on several devices,
/// or a device fails.
pub(crate) fn adamw(updates: &[AdamWUpdate], factor: f64, betas: [f64; 2], eps: f64) -> Result<()> {
    let [beta1, beta2] = betas.map(|beta| beta as f32);
    let [rest1, rest2] = betas.map(|beta| (1.0 - beta) as f32);
    let (factor, eps) = (factor as f32, eps as f32);
    for updates in launches(updates, |update| &update.value) {
        let (device, mut table) = (device_of(&updates[0].value)?, Vec::with_capacity(6 * updates.len()));
        for update in &updates {
            for tensor in [&update.value, &update.first, &update.second, &update.grad] {
                if !tensor.device().same_device(update.value.device()) {
                    let (one, other) = (update.value.device().location(), tensor.device().location());
                    bail!("a parameter {:?} on {one:?}, its gradient or moments on {other:?}", tensor.dims());
                }
                table.push(address(device, tensor, DType::F32)?);
            }
            let len = count(update.value.elem_count())?;
            table.push(packed(len, update.keep.to_bits()));
            table.push(packed(update.rate.to_bits(), update.inverse.to_bits()));
        }
        let config = rows(updates.iter().map(|update| &update.value))?;
        let table = device.clone_htod(&table)?;
        launch!(device; config; adamw(&table, &factor, &beta1, &rest1, &beta2, &rest2, &eps));
    }
    Ok(())
}

/// The sum of the squares of all elements of all tensors: one launch and one number copied to the host per
/// device. `None` if there is no tensor, or one is not supported ([`supports`]).
///
/// # Errors
/// If a device fails.
pub(crate) fn sum_of_squares(tensors: &[&Tensor]) -> Result<Option<f64>> {
    if tensors.is_empty() || !tensors.iter().all(|tensor| supports(tensor)) {
        return Ok(None);
    }
    let mut totals = Vec::new();
    for tensors in launches(tensors, |tensor| tensor) {
        let (device, mut table) = (device_of(tensors[0])?, Vec::with_capacity(2 * tensors.len() + 1));
        for tensor in &tensors {
            table.extend([address(device, tensor, DType::F32)?, tensor.elem_count() as u64]);
        }
        table.push(0); // the counter of blocks
        let config = rows(tensors.iter().copied().copied())?;
        let shares = config.grid_dim.0 as usize * tensors.len();
        let table = device.clone_htod(&table)?;
        let done = last_word(&table);
        let (mut sums, mut total) = (alloc_uninit::<f64>(device, shares)?, alloc_uninit::<f64>(device, 1)?);
        launch!(device; config; sums_of_squares(&table, &mut sums, &done, &mut total));
        totals.push((device, total));
    }
    // All devices are started before waiting for the first.
    let read = |(device, total): (&CudaDevice, _)| Ok(device.clone_dtoh(&total)?.into_iter().sum::<f64>());
    totals.into_iter().map(read).sum::<Result<f64>>().map(Some)
}

/// The tensors times `factor`, as new tensors, in one launch per device. `None` if a tensor is not
/// supported ([`supports`]).
///
/// # Errors
/// If a device fails.
pub(crate) fn scaled(tensors: &[&Tensor], factor: f64) -> Result<Option<Vec<Tensor>>> {
    if !tensors.iter().all(|tensor| supports(tensor)) {
        return Ok(None);
    }
    let factor = factor as f32;
    let mut scaled: Vec<Option<Tensor>> = vec![None; tensors.len()];
    let places: Vec<(usize, &Tensor)> = tensors.iter().copied().enumerate().collect();
    for places in launches(&places, |(_, tensor)| tensor) {
        let own: Vec<&Tensor> = places.iter().map(|(_, tensor)| *tensor).collect();
        let (device, room, mut table) = (device_of(own[0])?, Room::of(&own)?, Vec::new());
        for (tensor, to) in own.iter().zip(&room.parts) {
            table.extend([
                address(device, tensor, DType::F32)?,
                address(device, to, DType::F32)?,
                to.elem_count() as u64,
            ]);
        }
        let (config, table) = (rows(own.iter().copied())?, device.clone_htod(&table)?);
        launch!(device; config; scale_all(&table, &factor));
        places.iter().zip(room.parts).for_each(|((place, _), part)| scaled[*place] = Some(part));
    }
    Ok(Some(scaled.into_iter().flatten().collect()))
}

/// Concatenates the elements of all tensors in one launch. `None` if there is no tensor, one is not supported
/// ([`supports`]), or they do not fit into one launch, such as those of several devices.
///
/// # Errors
/// If the device fails.
pub(crate) fn joined(tensors: &[&Tensor]) -> Result<Option<Tensor>> {
    let together = launches(tensors, |tensor| tensor).len() == 1;
    if !together || !tensors.iter().all(|tensor| supports(tensor)) {
        return Ok(None);
    }
    let (device, room, mut table) = (device_of(tensors[0])?, Room::of(tensors)?, Vec::new());
    for (tensor, to) in tensors.iter().zip(&room.parts) {
        table.extend([
            address(device, tensor, DType::F32)?,
            address(device, to, DType::F32)?,
            to.elem_count() as u64,
        ]);
    }
    let (config, table, one) = (rows(tensors.iter().copied())?, device.clone_htod(&table)?, 1f32);
    launch!(device; config; scale_all(&table, &one));
    Ok(Some(room.all))
}

/// The sums of pairs of tensors, in one launch per device if all tensors are supported ([`supports`]),
/// otherwise by candle.
///
/// # Errors
/// If the shapes or devices of a pair differ, or a device fails.
pub(crate) fn sums(pairs: &[(Tensor, Tensor)]) -> Result<Vec<Tensor>> {
    let fits = |(a, b): &(Tensor, Tensor)| {
        supports(a) && supports(b) && a.dims() == b.dims() && a.device().same_device(b.device())
    };
    if !pairs.iter().all(fits) {
        return pairs.iter().map(|(a, b)| a + b).collect();
    }
    let mut summed: Vec<Option<Tensor>> = vec![None; pairs.len()];
    let places: Vec<_> = pairs.iter().enumerate().collect();
    for places in launches(&places, |(_, (a, _))| a) {
        let own: Vec<&Tensor> = places.iter().map(|(_, (a, _))| a).collect();
        let (device, room, mut table) = (device_of(own[0])?, Room::of(&own)?, Vec::new());
        for ((_, (a, b)), to) in places.iter().zip(&room.parts) {
            table.extend([
                address(device, a, DType::F32)?,
                address(device, b, DType::F32)?,
                address(device, to, DType::F32)?,
            ]);
            table.push(to.elem_count() as u64);
        }
        let (config, table) = (rows(own.iter().copied())?, device.clone_htod(&table)?);
        launch!(device; config; sum_all(&table));
        places.iter().zip(room.parts).for_each(|((place, _), part)| summed[*place] = Some(part));
    }
    Ok(summed.into_iter().flatten().collect())
}

/// One new tensor, and views of its parts with the shapes of given tensors.
struct Room {
    all: Tensor,
    parts: Vec<Tensor>,
}

impl Room {
    fn of(tensors: &[&Tensor]) -> Result<Self> {
        let whole: usize = tensors.iter().map(|tensor| tensor.elem_count()).sum();
        let all = empty(device_of(tensors[0])?, &whole.into(), DType::F32)?;
        let (mut from, mut parts) = (0, Vec::with_capacity(tensors.len()));
        for tensor in tensors {
            parts.push(all.narrow(0, from, tensor.elem_count())?.reshape(tensor.shape())?);
            from += tensor.elem_count();
        }
        Ok(Self { all, parts })
    }
}

/// Groups items into launches, in order: the tensors of a group are on one device, and at most [`ROWS`].
fn launches<'a, T>(items: &'a [T], of: impl Fn(&'a T) -> &'a Tensor) -> Vec<Vec<&'a T>> {
    let mut lists: Vec<Vec<&T>> = Vec::new();
    for item in items {
        let device = of(item).device();
        let fits = |list: &&mut Vec<&'a T>| list.len() < ROWS && of(list[0]).device().same_device(device);
        match lists.iter_mut().rev().find(fits) {
            Some(list) => list.push(item),
            None => lists.push(vec![item]),
        }
    }
    lists
}

/// A row of blocks for each tensor, with about sixteen elements per thread for the longest.
pub(super) fn rows<'a>(tensors: impl ExactSizeIterator<Item = &'a Tensor>) -> Result<LaunchConfig> {
    let rows = count(tensors.len())?;
    let longest = tensors.map(Tensor::elem_count).max().unwrap_or(0);
    let mut config = grid(count(longest)?.div_ceil(16 * THREADS).clamp(1, BLOCKS));
    config.grid_dim.1 = rows;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_launch_has_one_device_and_no_more_rows_than_a_grid() -> Result<()> {
        let tensor = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
        let many = vec![&tensor; 2 * ROWS + 3];
        let lists: Vec<usize> = launches(&many, |tensor| tensor).iter().map(Vec::len).collect();
        assert_eq!(lists, [ROWS, ROWS, 3]);
        assert!(launches(&many[..0], |tensor| tensor).is_empty());
        Ok(())
    }
}
