//! On which devices the layers of a model lie, and how activations get from one to the next.
//!
//! A base that is larger than one device lies on several, some layers on each, in order. Embedding and head lie on the
//! first, where a batch comes in and its loss is computed; what is between goes once along all of them and back. Each
//! device works while the others wait: this buys memory, not time.

use std::fmt;
use std::sync::Arc;

use candle_core::{Device, DeviceLocation, Tensor};

use crate::error::{Error, Result};
use crate::ops;

/// On which device each layer of a model lies.
///
/// # Example
/// A model on two GPUs, and adapters that lie with their layers:
/// ```no_run
/// use candle_core::DType;
/// use monteclora::inject::{self, Targets};
/// use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
/// use monteclora::models::hub::ModelFiles;
/// use monteclora::{cuda_device, MonteCLoRAConfig, Noise, Params};
///
/// let (files, noise) = (ModelFiles::locate("DIR", None)?, Noise::new(0));
/// let config = DecoderConfig::from_files(&files)?;
/// let placement = config.place(&[cuda_device(0)?, cuda_device(1)?])?;
/// let weights = files.open_weights(DType::BF16, placement.first())?.placed(&placement);
/// let mut model = DecoderForCausalLM::load(weights, &config, noise)?;
/// let params = Params::new(noise, placement.first());
/// inject::monteclora(&mut model, &Targets::default(), &MonteCLoRAConfig::default(), &params)?;
/// # Ok::<(), monteclora::Error>(())
/// ```
///
/// How layers are shared out:
/// ```
/// use candle_core::Device;
/// use monteclora::models::Placement;
///
/// // Twelve layers and an embedding that is as large as four: the first place has fewer layers.
/// let devices = [(Device::Cpu, 24 << 30), (Device::Cpu, 24 << 30)];
/// let placement = Placement::by_memory(&devices, 12, 4.0)?;
/// assert_eq!((placement.layers(0), placement.layers(1)), (0..4, 4..12));
/// # Ok::<(), monteclora::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Placement {
    places: Vec<Place>,
    transfer: Arc<dyn Transfer>,
}

/// A device, and the layer after its last one.
#[derive(Debug, Clone)]
struct Place {
    device: Device,
    end: usize,
}

/// How activations, and their gradients, get from one place to another.
pub trait Transfer: fmt::Debug + Send + Sync {
    /// `xs` at the place that `crossing` leads to, in memory that nobody else holds: complete there when this returns, and
    /// free to be dropped where it was.
    ///
    /// # Errors
    /// If a device fails.
    fn carry(&self, xs: &Tensor, crossing: &Crossing) -> candle_core::Result<Tensor>;
}

/// One way between two places.
#[derive(Debug, Clone)]
pub struct Crossing {
    /// The number of the place where the tensor is.
    pub from: usize,
    /// The number of the place that it is copied to.
    pub to: usize,
    /// The device of the place [`Self::to`].
    pub device: Device,
    /// Whether the tensor is a gradient on its way back.
    pub is_gradient: bool,
}

/// Copies from device to device, and waits until the copy is made.
#[derive(Debug)]
struct Copies;

impl Transfer for Copies {
    fn carry(&self, xs: &Tensor, crossing: &Crossing) -> candle_core::Result<Tensor> {
        ops::copied(xs, &crossing.device)
    }
}

impl fmt::Display for Placement {
    /// Which layers lie on which device.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, place) in self.places.iter().enumerate() {
            let (layers, before) = (self.layers(i), if i == 0 { "" } else { ", " });
            match place.device.location() {
                DeviceLocation::Cuda { gpu_id } => write!(f, "{before}cuda:{gpu_id}: ")?,
                DeviceLocation::Metal { gpu_id } => write!(f, "{before}metal:{gpu_id}: ")?,
                DeviceLocation::Cpu => write!(f, "{before}cpu: ")?,
            }
            match layers.len() {
                0 => write!(f, "no layer")?,
                1 => write!(f, "layer {}", layers.start)?,
                _ => write!(f, "layers {} to {}", layers.start, layers.end - 1)?,
            }
            f.write_str(if i == 0 { ", embedding and head" } else { "" })?;
        }
        Ok(())
    }
}

impl Placement {
    /// Some layers on each device, in order.
    ///
    /// # Errors
    /// If there is no device, or they are neither all CUDA devices nor all one other.
    pub fn new(devices: &[(Device, usize)]) -> Result<Self> {
        let Some((first, _)) = devices.first() else {
            return Err(Error::config("device", "a placement has at least one device"));
        };
        let fits = |device: &Device| match first {
            Device::Cuda(_) => device.is_cuda(),
            one => device.same_device(one),
        };
        if !devices.iter().all(|(device, _)| fits(device)) {
            let reason = "layers lie on CUDA devices, or all on the CPU or on one other device";
            return Err(Error::config("device", reason));
        }
        let mut end = 0;
        let places = devices.iter().map(|(device, layers)| {
            end += layers;
            Place { device: device.clone(), end }
        });
        Ok(Self { places: places.collect(), transfer: Arc::new(Copies) })
    }

    /// `layers` layers of one size on devices with so many free bytes each, in proportion. `ends` is how many layers
    /// what lies on the first device beside them, embedding and head, is as large as.
    ///
    /// # Errors
    /// As [`Self::new`]; if no device has any memory, or `ends` is negative or not finite.
    pub fn by_memory(devices: &[(Device, u64)], layers: usize, ends: f64) -> Result<Self> {
        let total: f64 = devices.iter().map(|(_, free)| *free as f64).sum();
        if !devices.is_empty() && total <= 0.0 {
            return Err(Error::config("device", "none of the devices has free memory"));
        }
        if !(ends >= 0.0 && ends.is_finite()) {
            return Err(Error::config("ends", format!("expected a number of layers, got {ends}")));
        }
        // Where each device's share ends, counted in layers, of which the first ones are not layers.
        let (mut free, mut first, last) = (0.0, 0, devices.len());
        let counted = (1..).zip(devices).map(|(number, (device, own))| {
            free += *own as f64;
            let share = free / total * (layers as f64 + ends) - ends;
            let end =
                if number == last { layers } else { (share.round().max(0.0) as usize).clamp(first, layers) };
            let count = end - first;
            first = end;
            (device.clone(), count)
        });
        Self::new(&counted.collect::<Vec<_>>())
    }

    /// The same with another way between its places: a test's, which counts, or one over a link of one's own.
    pub fn with_transfer(self, transfer: Arc<dyn Transfer>) -> Self {
        Self { transfer, ..self }
    }

    /// How many layers it places.
    pub fn len(&self) -> usize {
        self.places.last().map_or(0, |place| place.end)
    }

    /// Whether it places no layer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many devices there are, those without a layer too.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// The layers of a place.
    pub fn layers(&self, place: usize) -> std::ops::Range<usize> {
        let end = |place: &Place| place.end;
        let start = place.checked_sub(1).and_then(|before| self.places.get(before)).map_or(0, end);
        start..self.places.get(place).map_or(start, end)
    }

    /// The device of embedding and head, where batches come in.
    pub fn first(&self) -> &Device {
        &self.places[0].device
    }

    /// The device of a place.
    ///
    /// # Panics
    /// If there is no such place.
    pub fn device(&self, place: usize) -> &Device {
        &self.places[place].device
    }

    /// The place of a layer.
    pub fn place_of(&self, layer: usize) -> usize {
        self.places.iter().position(|place| layer < place.end).unwrap_or(self.places.len() - 1)
    }

    /// `xs` of place `from` at place `to`, differentiable; itself where the two are one.
    ///
    /// # Errors
    /// As the transfer.
    pub(super) fn carry(&self, xs: &Tensor, from: usize, to: usize) -> candle_core::Result<Tensor> {
        if from == to {
            return Ok(xs.clone());
        }
        let way = |from, to, is_gradient| Crossing { from, to, device: self.device(to).clone(), is_gradient };
        let (there, back, transfer) = (way(from, to, false), way(to, from, true), self.transfer.clone());
        ops::carried(xs, |xs| self.transfer.carry(xs, &there), move |grad| transfer.carry(grad, &back))
    }
}
