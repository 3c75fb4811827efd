//! Priors on many tensors and their gradients, in few launches.

use std::collections::BTreeMap;

use candle_core::cuda_backend::{cudarc::driver::CudaSlice, CudaDevice};
use candle_core::{bail, DType, Result, Tensor};

use super::launch::{
    address, alloc_uninit, count, device_of, empty, grid, last_word, launch, packed, slice_address,
};
use super::multi_tensor::rows;
use super::products::List;

/// `weight / 2 ||at - from||^2`, where a missing `from` is zero.
pub(crate) struct Distance {
    pub at: Tensor,
    pub from: Option<Tensor>,
    pub weight: f64,
}

/// `weight / 2 E||B (A + D)||^2`.
pub(crate) struct LowRankUpdate {
    /// `(r, in_dim)`.
    pub a: Tensor,
    /// `(out_dim, r)`.
    pub b: Tensor,
    pub weight: f64,
    /// The perturbation D, if there is one.
    pub spread: Option<Spread>,
}

/// Expected squared norms of the rows of a perturbation, `factor exp(2 rho_i) E||pi||^2`.
pub(crate) struct Spread {
    /// `(r)`.
    pub rho: Tensor,
    /// The logarithms of the concentration of pi, `(N)`; if `None`, pi is 1.
    pub c: Option<Tensor>,
    pub factor: f64,
}

/// A sum of energies, with what its gradients need.
pub(crate) struct Energy {
    distances: Vec<Distance>,
    updates: Vec<LowRankUpdate>,
    /// Both Gram matrices of each update, each [`aligned`]; then the gradients of each distance, and those of
    /// rho and c of each update.
    kept: Tensor,
}

/// The sum of the energies of tensors on one device, a scalar, and what its gradients need.
///
/// # Errors
/// If there is no tensor, a tensor is not contiguous, not f32 or on another device, shapes do not fit,
/// or the device fails.
pub(crate) fn energy(distances: Vec<Distance>, updates: Vec<LowRankUpdate>) -> Result<(Tensor, Energy)> {
    let of_updates = updates.iter().map(|update| &update.a);
    let Some(first) = distances.iter().map(|distance| &distance.at).chain(of_updates).next() else {
        bail!("energy: expected at least one tensor, got none")
    };
    let device = device_of(first)?.clone();
    let len = distances.iter().map(|distance| distance.at.elem_count()).sum::<usize>()
        + updates.iter().map(|update| update.vectors() + 2 * aligned(update.square())).sum::<usize>();
    let kept = empty(&device, &len.into(), DType::F32)?;
    let total = empty(&device, &().into(), DType::F32)?;
    let energy = Energy { distances, updates, kept };
    let parts = energy.parts(&energy.kept)?;
    let before = energy.measure_distances(&device, &parts, &total)?;
    if !energy.updates.is_empty() {
        energy.measure_updates(&device, &parts, before.as_ref(), &total)?;
    }
    Ok((total, energy))
}

/// The number of f32 elements from a matrix of `len` elements to the next one, so that each begins at a
/// multiple of 16 bytes, as cuBLAS requires for TF32.
fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

impl LowRankUpdate {
    fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// The number of elements of a Gram matrix.
    fn square(&self) -> usize {
        self.rank().pow(2)
    }

    /// The number of elements of rho and c.
    fn vectors(&self) -> usize {
        self.spread.as_ref().map_or(0, |spread| spread.rho.elem_count() + spread.components())
    }
}

impl Spread {
    fn components(&self) -> usize {
        self.c.as_ref().map_or(0, Tensor::elem_count)
    }
}

/// The parts of `Energy::kept`.
struct KeptParts {
    /// The gradient of each distance, with the shape of its tensor.
    distances: Vec<Tensor>,
    /// The gradients of rho and then c of each update; `None` without a perturbation.
    vectors: Vec<Option<Tensor>>,
    /// `A A^T` and `B^T B` of each update; later the matrices by which backward multiplies B and A.
    grams: Vec<[Tensor; 2]>,
}

/// Updates of one shape, in their order, with their Gram matrices or what replaced them.
#[derive(Default)]
struct SameShape<'a> {
    /// r, in_dim, out_dim.
    dims: [usize; 3],
    a: Vec<&'a Tensor>,
    b: Vec<&'a Tensor>,
    inner: Vec<&'a Tensor>,
    outer: Vec<&'a Tensor>,
}

impl Energy {
    fn parts(&self, all: &Tensor) -> Result<KeptParts> {
        let mut at = 0;
        let mut next = |len: usize| {
            at += len;
            all.narrow(0, at - len, len)
        };
        let mut gram = |update: &LowRankUpdate| {
            let len = update.square();
            next(aligned(len))?.narrow(0, 0, len)?.reshape((update.rank(), ()))
        };
        let grams = self.updates.iter().map(|update| Ok([gram(update)?, gram(update)?]));
        let grams = grams.collect::<Result<_>>()?;
        let distances = self
            .distances
            .iter()
            .map(|distance| next(distance.at.elem_count())?.reshape(distance.at.shape()));
        let distances = distances.collect::<Result<_>>()?;
        let vectors = self.updates.iter().map(|update| match update.vectors() {
            0 => Ok(None),
            len => next(len).map(Some),
        });
        let vectors = vectors.collect::<Result<_>>()?;
        Ok(KeptParts { distances, vectors, grams })
    }

    /// Computes the gradients of the distances, and their sum on the device; `None` without distances.
    fn measure_distances(
        &self,
        device: &CudaDevice,
        parts: &KeptParts,
        total: &Tensor,
    ) -> Result<Option<CudaSlice<f64>>> {
        if self.distances.is_empty() {
            return Ok(None);
        }
        let mut table = Vec::with_capacity(5 * self.distances.len() + 1);
        for (distance, slopes) in self.distances.iter().zip(&parts.distances) {
            let Distance { at, from, weight } = distance;
            if from.as_ref().is_some_and(|from| from.dims() != at.dims()) {
                bail!("the distance of {:?} from {:?}", at.dims(), from.as_ref().map(Tensor::dims));
            }
            let from = from.as_ref().map_or(Ok(0), |from| address(device, from, DType::F32))?;
            let len = count(at.elem_count())?.into();
            table.extend([address(device, at, DType::F32)?, from, address(device, slopes, DType::F32)?]);
            table.extend([len, weight.to_bits()]);
        }
        table.push(0); // the counter of blocks
        let config = rows(self.distances.iter().map(|distance| &distance.at))?;
        let table = device.clone_htod(&table)?;
        let done = last_word(&table);
        let mut sums = alloc_uninit::<f64>(device, config.grid_dim.0 as usize * self.distances.len())?;
        let (mut sum, total) = (alloc_uninit::<f64>(device, 1)?, address(device, total, DType::F32)?);
        launch!(device; config; squared_distances(&table, &mut sums, &done, &mut sum, &total));
        Ok(Some(sum))
    }

    /// Computes the Gram matrices and replaces them by the matrices that backward multiplies by; computes the
    /// gradients of rho and c, and the total including the sum `before`.
    fn measure_updates(
        &self,
        device: &CudaDevice,
        parts: &KeptParts,
        before: Option<&CudaSlice<f64>>,
        total: &Tensor,
    ) -> Result<()> {
        for SameShape { dims: [rank, in_dim, out_dim], a, b, inner, outer } in self.groups(parts) {
            let mut list = List::new(device);
            let (a, b) = (list.operand(&a)?, list.operand(&b)?);
            let (inner, outer) = (list.operand(&inner)?, list.operand(&outer)?);
            let products = list.fill()?;
            products.multiply([rank, rank, in_dim], a, a.t(), inner)?;
            products.multiply([rank, rank, out_dim], b.t(), b, outer)?;
        }
        let mut table = Vec::with_capacity(8 * self.updates.len() + 1);
        for ((update, vectors), [inner, outer]) in self.updates.iter().zip(&parts.vectors).zip(&parts.grams) {
            let of = |tensor: Option<&Tensor>| tensor.map_or(Ok(0), |t| address(device, t, DType::F32));
            let spread = update.spread.as_ref();
            let (rho, c) = (spread.map(|spread| &spread.rho), spread.and_then(|spread| spread.c.as_ref()));
            if rho.is_some_and(|rho| rho.dims() != [update.rank()]) {
                bail!("a perturbation of {:?} for a rank of {}", rho.map(Tensor::dims), update.rank());
            }
            let components = count(spread.map_or(0, Spread::components))?;
            table.extend([of(Some(inner))?, of(Some(outer))?, of(rho)?, of(c)?, of(vectors.as_ref())?]);
            table.extend([update.weight.to_bits(), spread.map_or(0.0, |spread| spread.factor).to_bits()]);
            table.push(packed(count(update.rank())?, components));
        }
        table.push(0); // the counter of blocks
        let table = device.clone_htod(&table)?;
        let done = last_word(&table);
        let mut terms = alloc_uninit::<f64>(device, self.updates.len())?;
        let (before, total) = (before.map_or(0, slice_address), address(device, total, DType::F32)?);
        let blocks = grid(count(self.updates.len())?);
        launch!(device; blocks; update_energies(&table, &mut terms, &done, &before, &total));
        Ok(())
    }

    /// The updates, grouped by shape.
    fn groups<'a>(&'a self, parts: &'a KeptParts) -> impl Iterator<Item = SameShape<'a>> {
        let mut groups: BTreeMap<[usize; 3], SameShape> = BTreeMap::new();
        for (update, [inner, outer]) in self.updates.iter().zip(&parts.grams) {
            let dims = [update.rank(), update.a.dims()[1], update.b.dims()[0]];
            let group = groups.entry(dims).or_insert_with(|| SameShape { dims, ..SameShape::default() });
            group.a.push(&update.a);
            group.b.push(&update.b);
            group.inner.push(inner);
            group.outer.push(outer);
        }
        groups.into_values()
    }

    /// Each tensor that the energy depends on, with its gradient, where the gradient of the total
    /// is `grad`, a scalar.
    ///
    /// # Errors
    /// If the device fails.
    pub fn gradients(self, grad: &Tensor) -> Result<Vec<(Tensor, Tensor)>> {
        let parts = self.parts(&self.kept.broadcast_mul(grad)?)?;
        let mut all: Vec<(Tensor, Tensor)> = Vec::new();
        for (update, vectors) in self.updates.iter().zip(&parts.vectors) {
            if let (Some(Spread { rho, c, .. }), Some(vectors)) = (&update.spread, vectors) {
                all.push((rho.clone(), vectors.narrow(0, 0, update.rank())?));
                let components = vectors.dim(0)? - update.rank();
                if let Some(c) = c {
                    all.push((c.clone(), vectors.narrow(0, update.rank(), components)?));
                }
            }
        }
        for group in self.groups(&parts) {
            all.extend(group.gradients()?);
        }
        all.extend(self.distances.into_iter().map(|distance| distance.at).zip(parts.distances));
        Ok(all)
    }
}

impl SameShape<'_> {
    /// The gradients of A and B: `dA = (w B^T B) A`, `dB = B (w (A A^T + diag v))`.
    fn gradients(self) -> Result<Vec<(Tensor, Tensor)>> {
        let Self { dims: [rank, in_dim, out_dim], a, b, inner, outer } = self;
        let device = device_of(a[0])?;
        let each = |rows: usize, columns: usize| -> Result<Vec<Tensor>> {
            let (len, apart) = (rows * columns, aligned(rows * columns));
            let all = empty(device, &(a.len() * apart).into(), DType::F32)?;
            (0..a.len()).map(|i| all.narrow(0, i * apart, len)?.reshape((rows, columns))).collect()
        };
        let (das, dbs) = (each(rank, in_dim)?, each(out_dim, rank)?);
        let mut list = List::new(device);
        let (left, right) = (list.operand(&a)?, list.operand(&b)?);
        let (inner, outer) = (list.operand(&inner)?, list.operand(&outer)?);
        let (da, db) = (list.operand(&das)?, list.operand(&dbs)?);
        let products = list.fill()?;
        products.multiply([rank, in_dim, rank], outer, left, da)?;
        products.multiply([out_dim, rank, rank], right, inner, db)?;
        let pairs = a.into_iter().cloned().zip(das).chain(b.into_iter().cloned().zip(dbs));
        Ok(pairs.collect())
    }
}
