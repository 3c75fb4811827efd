//! Puts a precomputed result into candle's graph, with a custom backward.
//!
//! Candle only accepts custom ops that compute their result when applied. Ours return a result computed
//! beforehand. So an op here consists of a computation on detached tensors, which records no graph and keeps
//! nothing, and a closure for the gradient, the same on every device and for every dtype.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::{BackendDevice, BackendStorage};
#[cfg(any(test, feature = "cuda"))]
use candle_core::op::BackpropOp;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, InplaceOp1, Layout, MetalStorage,
    Result, Shape, Storage, Tensor,
};

use super::collect::collect;

/// The arguments of a backward closure, all detached, so that its arithmetic records no graph.
pub(crate) struct Call<const N: usize> {
    /// The arguments of the forward pass.
    pub args: [Tensor; N],
    /// Which arguments need a gradient. Candle asks for all of them; computing only these saves work.
    pub needs: [bool; N],
    /// The result of the forward pass.
    pub result: Tensor,
    /// The gradient of the result, contiguous.
    pub grad: Tensor,
}

type Gradients<const N: usize> = Result<[Option<Tensor>; N]>;
type Backward<const N: usize> = Box<dyn Fn(Call<N>) -> Gradients<N> + Send + Sync>;

/// Returns `result` as a function of `args` that is differentiated by `backward`.
///
/// `result` must be freshly computed and not shared: its storage moves into the graph. `backward` must
/// capture neither a tracked tensor, which would silently get no gradient, nor the result, which would
/// keep the graph alive for ever. Without a tracked argument, `backward` is dropped, and everything that
/// it captured with it.
pub(crate) fn custom_vjp<'a, const N: usize>(
    name: &'static str,
    args: [&'a Tensor; N],
    result: Tensor,
    backward: impl Fn(Call<N>) -> Gradients<N> + Send + Sync + 'static,
) -> Result<Tensor>
where
    [&'a Tensor; N]: Apply<N>,
{
    if !args.iter().any(|arg| arg.track_op()) {
        return Ok(result);
    }
    let shape = result.shape().clone();
    let storage = take_storage(result, &args)?;
    args.apply(CustomVjp { name, result: Mutex::new(Some((storage, shape))), backward: Box::new(backward) })
}

/// Turns `result`, which must be freshly computed and not shared, into a leaf of candle's graph
/// that gets a gradient.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn leaf(result: Tensor) -> Result<Tensor> {
    let shape = result.shape().clone();
    Ok(Tensor::from_storage(take_storage(result, &[])?, shape, BackpropOp::none(), true))
}

/// State that forward saves for backward. The first backward takes it and frees it; a second
/// one recomputes it.
pub(super) struct Saved<T>(Mutex<Option<T>>);

impl<T> Saved<T> {
    pub fn new(value: T) -> Self {
        Self(Mutex::new(Some(value)))
    }

    pub fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Takes the storage of `result`, without a copy if it is contiguous from its start and not
/// shared with an argument.
fn take_storage(result: Tensor, args: &[&Tensor]) -> Result<Storage> {
    let shared = |arg: &&Tensor| {
        let (ours, theirs) = (result.storage_and_layout().0, arg.storage_and_layout().0);
        std::ptr::eq::<Storage>(&*ours, &*theirs)
    };
    let whole = result.is_contiguous() && result.layout().start_offset() == 0;
    let result = if whole && !args.iter().any(shared) { result } else { result.force_contiguous()? };
    let taken = Take(Mutex::new(None));
    result.inplace_op1(&taken)?;
    match taken.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(storage) => Ok(storage),
        None => bail!("the storage of a result was not taken"),
    }
}

/// An in-place op that takes the storage out of a tensor that is not read again.
struct Take(Mutex<Option<Storage>>);

impl Take {
    fn replace<S>(&self, storage: &mut S, wrap: impl Fn(S) -> Storage) -> Result<()>
    where
        S: BackendStorage,
        S::Device: BackendDevice<Storage = S>,
    {
        #[allow(unsafe_code)] // never read, so it need not be initialised
        let placeholder = unsafe { storage.device().alloc_uninit(&Shape::from(1), DType::U8) }?;
        let taken = std::mem::replace(storage, placeholder);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(wrap(taken));
        Ok(())
    }
}

impl InplaceOp1 for Take {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.replace(storage, Storage::Cpu)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        self.replace(storage, Storage::Cuda)
    }

    fn metal_fwd(&self, storage: &mut MetalStorage, _: &Layout) -> Result<()> {
        self.replace(storage, Storage::Metal)
    }
}

/// A node in candle's graph.
pub(crate) struct CustomVjp<const N: usize> {
    name: &'static str,
    result: Mutex<Option<(Storage, Shape)>>,
    backward: Backward<N>,
}

impl<const N: usize> CustomVjp<N> {
    fn hand_over(&self) -> Result<(Storage, Shape)> {
        match self.result.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(result) => Ok(result),
            None => bail!("{}: the result was handed over before", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            (other, _) => bail!("{}: arguments on the cpu, result on {:?}", self.name, other.device()),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            (other, _) => bail!("{}: arguments on cuda, result on {:?}", self.name, other.device()),
        }
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            (other, _) => bail!("{}: arguments on metal, result on {:?}", self.name, other.device()),
        }
    }

    fn gradients(&self, args: [&Tensor; N], result: &Tensor, grad: &Tensor) -> Gradients<N> {
        let needs = args.map(Tensor::track_op);
        let call = Call {
            args: args.map(Tensor::detach),
            needs,
            result: result.detach(),
            grad: grad.detach().contiguous()?,
        };
        let mut gradients = (self.backward)(call)?;
        for ((gradient, arg), needed) in gradients.iter_mut().zip(args).zip(needs) {
            *gradient = match gradient.take() {
                Some(gradient) if needed => {
                    if gradient.dims() != arg.dims() {
                        bail!("{}: gradient {:?} of {:?}", self.name, gradient.dims(), arg.dims());
                    }
                    collect(arg, gradient.to_dtype(arg.dtype())?)
                }
                _ => None,
            };
        }
        Ok(gradients)
    }
}

/// Applies a node to its arguments; candle has one trait per number of arguments.
pub(crate) trait Apply<const N: usize> {
    fn apply(self, op: CustomVjp<N>) -> Result<Tensor>;
}

impl Apply<1> for [&Tensor; 1] {
    fn apply(self, op: CustomVjp<1>) -> Result<Tensor> {
        self[0].apply_op1(op)
    }
}

impl Apply<2> for [&Tensor; 2] {
    fn apply(self, op: CustomVjp<2>) -> Result<Tensor> {
        self[0].apply_op2(self[1], op)
    }
}

impl Apply<3> for [&Tensor; 3] {
    fn apply(self, op: CustomVjp<3>) -> Result<Tensor> {
        self[0].apply_op3(self[1], self[2], op)
    }
}

impl CustomOp1 for CustomVjp<1> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, arg: &Tensor, res: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [g] = self.gradients([arg], res, grad)?;
        Ok(g)
    }
}

impl CustomOp2 for CustomVjp<2> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], res, grad)?;
        Ok((da, db))
    }
}

impl CustomOp3 for CustomVjp<3> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    #[allow(clippy::type_complexity)]
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], res, grad)?;
        Ok((da, db, dc))
    }
}
