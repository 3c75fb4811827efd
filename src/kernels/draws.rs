//! Draws of several layers: two launches forward and one backward for any number of layers.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{bail, DType, Result, Tensor};

use super::launch::{address, alloc_uninit, count, device_of, empty, grid, launch, packed, slice_address};

/// The elements of a tile and its maximum number of columns, as in `draw.cu`.
const TILE: usize = 4096;
const TILE_COLUMNS: usize = 64;

/// The words of a row of the table, the struct `Draw` of `draw.cu`.
const WORDS: usize = 18;

/// A layer of a draw.
pub(crate) struct DrawnLayer<'a> {
    /// A, `(r, width)`.
    pub mean: &'a Tensor,
    /// `(r)`.
    pub rho: &'a Tensor,
    /// `(N)`; `None` if the draw has no norm of weights.
    pub c: Option<&'a Tensor>,
    /// The keys of the Wishart, Dirichlet and Gaussian streams.
    pub keys: [u64; 3],
    pub degrees: f64,
    pub eps: f64,
    pub diagonal: bool,
}

/// Whether the kernels support a layer of this rank.
pub(crate) fn supports(rank: usize) -> bool {
    (1..=TILE).contains(&rank)
}

/// A draw of some layers on their device, kept for its gradients.
pub(crate) struct Draws {
    draw: u64,
    table: CudaSlice<u64>,
    /// What the table's rows point to: intermediate results, and the parameters.
    _room: CudaSlice<f64>,
    _parameters: Vec<[Tensor; 3]>,
    sizes: Vec<Size>,
}

#[derive(Clone, Copy)]
struct Size {
    rank: usize,
    components: usize,
    width: usize,
    tiles: usize,
}

impl Size {
    fn of(layer: &DrawnLayer) -> Result<Self> {
        let (rank, width) = layer.mean.dims2()?;
        let (rho, c) = (layer.rho.dims(), layer.c.map(Tensor::dims));
        if rho != [rank] || c.is_some_and(|c| c.len() != 1) || !supports(rank) || width == 0 {
            bail!(
                "draw: A {:?}, rho {rho:?}, c {c:?} do not fit, or the rank is not 1 to {TILE}",
                [rank, width]
            );
        }
        count(rank * width)?;
        let tiles = width.div_ceil(TILE_COLUMNS.min(TILE / rank));
        Ok(Self { rank, components: c.map_or(0, |c| c[0]), width, tiles })
    }

    /// The words of each intermediate result: the shares, pi, its derivatives and the norm in f64, then T and
    /// the scales of its rows in f32, two per word.
    fn room(&self) -> [usize; 6] {
        let Self { rank, components, tiles, .. } = *self;
        [tiles * rank, components, components, 1, (rank * rank).div_ceil(2), rank.div_ceil(2)]
    }
}

/// `A + eps ||pi||_2 diag(exp rho) T Z` for draw number `draw` of each layer, untracked, and what
/// their gradients need.
///
/// # Errors
/// If there is no layer, a tensor is not f32 on the device of the first one, shapes do not fit,
/// or the device fails.
pub(crate) fn perturb(layers: &[DrawnLayer], draw: u64) -> Result<(Arc<Draws>, Vec<Tensor>)> {
    let Some(first) = layers.first() else { bail!("draw: expected at least one layer, got none") };
    let device = device_of(first.mean)?;
    let sizes = layers.iter().map(Size::of).collect::<Result<Vec<_>>>()?;
    let words = sizes.iter().flat_map(Size::room).sum();
    let room = alloc_uninit::<f64>(device, words)?;
    let (mut next, mut table) = (slice_address(&room), Vec::with_capacity(WORDS * layers.len()));
    let (mut outs, mut parameters) = (Vec::new(), Vec::new());
    for (layer, size) in layers.iter().zip(&sizes) {
        let dense =
            [layer.mean.contiguous()?, layer.rho.contiguous()?, layer.c.unwrap_or(layer.rho).contiguous()?];
        if let Some(other) = dense.iter().find(|tensor| !tensor.device().same_device(first.mean.device())) {
            let (one, other) = (first.mean.device().location(), other.device().location());
            bail!("draw: expected all layers on one device, got {one:?} and {other:?}");
        }
        let out = empty(device, layer.mean.shape(), DType::F32)?;
        let [shares, pi, slopes, norm, tril, rows] = size.room().map(|words| {
            let at = next;
            next += 8 * words as u64;
            at
        });
        let [mean, rho, c] = dense.each_ref().map(|tensor| address(device, tensor, DType::F32));
        table.extend([
            mean?,
            rho?,
            c?,
            address(device, &out, DType::F32)?,
            tril,
            rows,
            pi,
            slopes,
            norm,
            shares,
        ]);
        table.extend(layer.keys);
        table.extend([layer.degrees.to_bits(), layer.eps.to_bits()]);
        let pair = |low: usize, high: usize| -> Result<u64> { Ok(packed(count(low)?, count(high)?)) };
        table.extend([pair(size.rank, size.components)?, pair(size.width, layer.diagonal.into())?, 0]);
        outs.push(out);
        parameters.push(dense);
    }
    let table = device.clone_htod(&table)?;
    let (blocks, most) = (rows(layers.len())?, sizes.iter().map(|size| size.tiles).max().unwrap_or(0));
    launch!(device; grid(blocks); draw_scales(&table, &draw));
    let mut config = grid(count(most)?);
    config.grid_dim.1 = blocks;
    launch!(device; config; draw_perturb(&table, &draw));
    Ok((Arc::new(Draws { draw, table, _room: room, _parameters: parameters, sizes }), outs))
}

/// The rows of blocks of a launch, one for each layer.
fn rows(layers: usize) -> Result<u32> {
    match u32::try_from(layers) {
        Ok(layers @ ..=65535) => Ok(layers),
        _ => bail!("up to 65535 layers draw together, got {layers}"),
    }
}

/// The gradients of a layer's rho `(r)` and c `(N)`.
pub(crate) type Slopes = (Tensor, Option<Tensor>);

impl Draws {
    /// The gradients of rho and c of some layers, each `asked` for by its index and the contiguous
    /// gradient of its output.
    ///
    /// # Errors
    /// If a gradient is not of its output's shape, dtype and device, or the device fails.
    pub fn slopes(&self, asked: &[(usize, Tensor)]) -> Result<Vec<Slopes>> {
        let Some((_, first)) = asked.first() else { return Ok(Vec::new()) };
        let device = device_of(first)?;
        let lens = asked.iter().map(|(which, _)| self.sizes[*which].rank + self.sizes[*which].components);
        let all = empty(device, &lens.sum::<usize>().into(), DType::F32)?;
        let (mut table, mut made) = (Vec::with_capacity(4 * asked.len()), Vec::with_capacity(asked.len()));
        let (mut at, mut most) = (0, 0);
        for (which, grad) in asked {
            let Size { rank, components, width, tiles } = self.sizes[*which];
            if grad.dims() != [rank, width] || !grad.device().same_device(first.device()) {
                let place = grad.device().location();
                bail!("the gradient {:?} on {place:?} of a draw of A {:?}", grad.dims(), [rank, width]);
            }
            let drho = all.narrow(0, at, rank)?;
            let dc = (components > 0).then(|| all.narrow(0, at + rank, components)).transpose()?;
            let c_at = dc.as_ref().map(|dc| address(device, dc, DType::F32)).transpose()?.unwrap_or(0);
            table.extend([
                address(device, grad, DType::F32)?,
                address(device, &drho, DType::F32)?,
                c_at,
                *which as u64,
            ]);
            made.push((drho, dc));
            (at, most) = (at + rank + components, most.max(tiles));
        }
        let table = device.clone_htod(&table)?;
        let mut config = grid(count(most)?);
        config.grid_dim.1 = rows(asked.len())?;
        launch!(device; config; draw_slopes(&self.table, &table, &self.draw));
        Ok(made)
    }
}
