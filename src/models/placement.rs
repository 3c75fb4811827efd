//! Placement of a model's layers on devices, and the transfer of activations between them.
//!
//! A base that does not fit on one device is split over several: consecutive layers on each, in order. The
//! embedding and the head are on the first device, where batches arrive and the loss is computed; activations
//! pass once through all devices and back to the first. Each device works while the others wait, so this
//! saves memory, not time.

use std::fmt;
use std::sync::Arc;

use candle_core::{Device, DeviceLocation, Tensor};

use crate::error::{Error, Result};
use crate::ops;

/// The device of each layer of a model.
///
/// # Example
/// A model on two GPUs, with each adapter on the device of its layer:
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
/// Layers distributed by memory:
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

/// A device, and the end (exclusive) of its range of layers.
#[derive(Debug, Clone)]
struct Place {
    device: Device,
    end: usize,
}

/// Copies activations and their gradients from one place to another.
pub trait Transfer: fmt::Debug + Send + Sync {
    /// Returns a copy of `xs` at the target place of `crossing`, in memory that no other tensor shares. The
    /// copy is complete when this returns, so that the source may be dropped.
    ///
    /// # Errors
    /// If a device fails.
    fn carry(&self, xs: &Tensor, crossing: &Crossing) -> candle_core::Result<Tensor>;
}

/// The source and target of a transfer.
#[derive(Debug, Clone)]
pub struct Crossing {
    /// The index of the place where the tensor is.
    pub from: usize,
    /// The index of the place that it is copied to.
    pub to: usize,
    /// The device of the place [`Self::to`].
    pub device: Device,
    /// Whether the tensor is a gradient in the backward pass.
    pub is_gradient: bool,
}

/// The default transfer: copies between devices and waits for the copy to complete.
#[derive(Debug)]
struct Copies;

impl Transfer for Copies {
    fn carry(&self, xs: &Tensor, crossing: &Crossing) -> candle_core::Result<Tensor> {
        ops::copied(xs, &crossing.device)
    }
}

impl fmt::Display for Placement {
    /// Lists the layers of each device.
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
    /// Places the given number of layers on each device, in order.
    ///
    /// # Errors
    /// If there is no device, or they are neither all CUDA devices nor all the same other device.
    pub fn new(devices: &[(Device, usize)]) -> Result<Self> {
        let Some((first, _)) = devices.first() else {
            return Err(Error::config("device", "expected at least one device, got none"));
        };
        let fits = |device: &Device| match first {
            Device::Cuda(_) => device.is_cuda(),
            one => device.same_device(one),
        };
        if !devices.iter().all(|(device, _)| fits(device)) {
            let reason = "expected CUDA devices, or the same other device for all layers";
            return Err(Error::config("device", reason));
        }
        let mut end = 0;
        let places = devices.iter().map(|(device, layers)| {
            end += layers;
            Place { device: device.clone(), end }
        });
        Ok(Self { places: places.collect(), transfer: Arc::new(Copies) })
    }

    /// Distributes `layers` layers of equal size over devices in proportion to their free bytes. `ends` is
    /// the size, in layers, of the embedding and the head, which are on the first device as well.
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
        // The end of each share on a scale of `ends + layers`, whose first `ends` are embedding and head.
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

    /// Replaces the transfer between places: by one that counts in tests, or one over a custom link.
    pub fn with_transfer(self, transfer: Arc<dyn Transfer>) -> Self {
        Self { transfer, ..self }
    }

    /// The number of layers.
    pub fn len(&self) -> usize {
        self.places.last().map_or(0, |place| place.end)
    }

    /// Whether there are no layers.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of devices, including those without a layer.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// The range of layers at a place.
    pub fn layers(&self, place: usize) -> std::ops::Range<usize> {
        let end = |place: &Place| place.end;
        let start = place.checked_sub(1).and_then(|before| self.places.get(before)).map_or(0, end);
        start..self.places.get(place).map_or(start, end)
    }

    /// The device of the embedding and the head, where batches arrive.
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

    /// Copies `xs` from place `from` to place `to`, differentiably; returns `xs` itself if they are the same.
    ///
    /// # Errors
    /// As [`Transfer::carry`].
    pub(super) fn carry(&self, xs: &Tensor, from: usize, to: usize) -> candle_core::Result<Tensor> {
        if from == to {
            return Ok(xs.clone());
        }
        let way = |from, to, is_gradient| Crossing { from, to, device: self.device(to).clone(), is_gradient };
        let (there, back, transfer) = (way(from, to, false), way(to, from, true), self.transfer.clone());
        ops::carried(xs, |xs| self.transfer.carry(xs, &there), move |grad| transfer.carry(grad, &back))
    }
}
