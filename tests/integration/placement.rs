//! Compares a model whose layers lie in several places with the same model in one place.

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use monteclora::adapter::{AdaptableModel, Pass};
use monteclora::data::batch::Batcher;
use monteclora::inject::Targets;
use monteclora::models::causal::CausalLm;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::generate::{generate, GenerateConfig, PosteriorWeights};
use monteclora::models::{Crossing, Placement, Transfer, Weights};
use monteclora::train::{fit, held_out_loss, CausalTuning, Method, MethodInit, TrainConfig};
use monteclora::{Noise, Params};

use crate::causal;
use crate::decoders::{Golden, FAMILIES};
use crate::support::checkpoints::Log;
use crate::support::decoders::{frozen_at, toy_json};
use crate::support::{vb, Outcome};

/// A transfer: from which place to which, whether it is a gradient, and the shape of the tensor.
type Way = (usize, usize, bool, Vec<usize>);

/// Copies tensors, and records each transfer.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<Way>>);

impl Transfer for Recorder {
    fn carry(&self, xs: &Tensor, crossing: &Crossing) -> candle_core::Result<Tensor> {
        let Crossing { from, to, is_gradient, .. } = *crossing;
        self.0.lock().expect("no panic").push((from, to, is_gradient, xs.dims().to_vec()));
        xs.copy()
    }
}

impl Recorder {
    /// The transfers since the last call.
    fn take(&self) -> Vec<Way> {
        std::mem::take(&mut *self.0.lock().expect("no panic"))
    }
}

/// A placement on the host with these numbers of layers per place, and its recorder.
fn places(counts: &[usize]) -> Outcome<(Placement, Arc<Recorder>)> {
    let devices: Vec<_> = counts.iter().map(|count| (Device::Cpu, *count)).collect();
    let recorder = Arc::new(Recorder::default());
    Ok((Placement::new(&devices)?.with_transfer(recorder.clone()), recorder))
}

fn toy(layers: usize) -> Outcome<DecoderConfig> {
    let mut json = toy_json(false);
    json["num_hidden_layers"] = layers.into();
    Ok(DecoderConfig { attention_dropout: 0.0, ..DecoderConfig::from_value(json)? })
}

#[test]
fn every_family_says_in_two_places_what_it_says_in_one() -> Outcome {
    for family in FAMILIES {
        let golden = Golden::open(family)?;
        let (ids, mask) = golden.inputs("left_")?;
        let layers = golden.config.layers.len();
        // Between layers are only the real tokens.
        let real = mask.flatten_all()?.to_vec1::<u8>()?.iter().filter(|real| **real != 0).count();
        assert!(real < ids.elem_count());
        let say = |weights: Weights| -> Outcome<Vec<Vec<Vec<f32>>>> {
            let model = DecoderForCausalLM::load(weights, &golden.config, Noise::new(0))?;
            Ok(model.logits(&ids, &mask, &Pass::Mean.into())?.to_vec3()?)
        };
        let one = say(vb(&golden.tensors, DType::F32).into())?;
        for first in 0..=layers {
            let (placement, recorder) = places(&[first, layers - first])?;
            let two = say(Weights::from(vb(&golden.tensors, DType::F32)).placed(&placement))?;
            assert_eq!(one, two, "{family}, {first} layers in the first place");
            // One transfer there and one back, or none if all layers lie in the first place.
            let dims = vec![real, golden.config.hidden_size];
            let ways = [(0, 1, false, dims.clone()), (1, 0, false, dims)];
            assert_eq!(recorder.take(), ways[..if first == layers { 0 } else { 2 }]);
        }
    }
    Ok(())
}

/// The results of training, and generated texts.
pub struct Run {
    /// The loss of every step, and last that of unseen text.
    pub losses: Vec<f64>,
    params: Params,
    pub said: Vec<Vec<u32>>,
}

/// Trains the toy model with its layers in these places, measures it and generates texts.
pub fn run(placement: &Placement, method: &Method, targets: &Targets, checkpoint: bool) -> Outcome<Run> {
    let (seen, unseen) = (causal::rows(30), &causal::rows(40)[30..]);
    let (mut model, params) = frozen_at(placement, &toy(placement.len())?, DType::F32)?;
    model.set_checkpoint_layers(checkpoint);
    let hooks = MethodInit::Fresh(method.clone(), targets.clone()).inject(&mut model, &params)?;
    model.visit_linears(&mut |layer| {
        for tensor in layer.parameters() {
            assert!(tensor.device().same_device(layer.base().device()), "{}", layer.path());
        }
        Ok(())
    })?;
    let batcher = Batcher::new(6, false, Noise::new(3))?;
    let objective = CausalTuning::new(&model, hooks, &seen, batcher, 0);
    let config = TrainConfig { epochs: 2, lr: 1e-2, keep_best: false, ..TrainConfig::default() };
    let mut log = Log::default();
    fit(&objective, &params, &config, &mut log)?;
    let mut losses: Vec<f64> = log.0.iter().map(|record| record.loss).collect();
    losses.push(held_out_loss(&model, unseen, 4, &[Pass::Mean, Pass::Posterior { draw: 1 }])?);
    // Two lengths, so that prompts are padded on the left; generation uses caches.
    let prompts = [vec![1, 41, 5, 6], vec![1, 42, 7]];
    let config =
        GenerateConfig { max_new_tokens: 6, weights: PosteriorWeights::Average(2), ..Default::default() };
    Ok(Run { losses, params, said: generate(&model, &prompts, &config, &mut |_, _| true)? })
}

#[test]
fn training_in_three_places_is_training_in_one() -> Outcome {
    let all = Targets::parse("all-linear")?;
    for (method, checkpoint) in causal::methods().iter().flat_map(|m| [(m, false), (m, true)]) {
        let (placement, recorder) = places(&[1, 0, 2])?;
        let (one, three) =
            (run(&places(&[3])?.0, method, &all, checkpoint)?, run(&placement, method, &all, checkpoint)?);
        assert_eq!((one.losses, one.said), (three.losses, three.said), "{}", method.name());
        for ((name, one), (_, three)) in one.params.all().into_iter().zip(three.params.all()) {
            let flat = |param: monteclora::adapter::Param| param.var.flatten_all()?.to_vec1::<f32>();
            assert_eq!(flat(one)?, flat(three)?, "{name}");
        }
        // In a training step: activations there and back, then gradients in the reverse order. A place
        // without layers is skipped.
        let ways: Vec<_> =
            recorder.take().into_iter().take(4).map(|(from, to, is, _)| (from, to, is)).collect();
        assert_eq!(ways, [(0, 2, false), (2, 0, false), (0, 2, true), (2, 0, true)]);
    }
    Ok(())
}

#[test]
fn no_gradient_goes_where_nothing_is_trained() -> Outcome {
    let (placement, recorder) = places(&[2, 1])?;
    let late = Targets { layers_to_transform: Some(vec![2]), ..Targets::default() };
    let [lora, _] = causal::methods();
    run(&placement, &lora, &late, false)?;
    let ways: Vec<_> = recorder.take().into_iter().take(5).map(|(from, to, is, _)| (from, to, is)).collect();
    assert_eq!(ways[..3], [(0, 1, false), (1, 0, false), (0, 1, true)]);
    assert_eq!(ways[3..], [(0, 1, false), (1, 0, false)], "the next step");
    Ok(())
}

#[test]
fn a_placement_that_fits_no_model_is_refused() -> Outcome {
    let (placement, _) = places(&[1, 1])?;
    let params = Params::new(Noise::new(1), &Device::Cpu);
    let load = |layers| -> Outcome<DecoderForCausalLM> {
        let vb = params.var_builder(None, monteclora::adapter::Role::Base);
        Ok(DecoderForCausalLM::load(Weights::from(vb).placed(&placement), &toy(layers)?, Noise::new(0))?)
    };
    assert!(load(2).is_ok());
    let error = load(3).unwrap_err().to_string();
    assert!(error.contains("2 layers are placed, the model has 3"), "{error}");
    assert!(Placement::new(&[]).is_err() && toy(2)?.place(&[]).is_err());
    assert!(Placement::by_memory(&[(Device::Cpu, 0)], 2, 0.0).is_err());
    assert!(Placement::by_memory(&[(Device::Cpu, 1)], 2, f64::NAN).is_err());
    Ok(())
}

#[test]
fn layers_lie_by_the_memory_that_is_free() -> Outcome {
    let counts = |free: &[u64], layers: usize, ends: f64| -> Outcome<Vec<usize>> {
        let devices: Vec<_> = free.iter().map(|free| (Device::Cpu, *free)).collect();
        let placement = Placement::by_memory(&devices, layers, ends)?;
        Ok((0..placement.places()).map(|place| placement.layers(place).len()).collect())
    };
    assert_eq!(counts(&[1, 1, 2], 16, 0.0)?, [4, 4, 8]);
    // Tables as large as eight layers fill the first device and are more than it has.
    assert_eq!(counts(&[1, 1, 1], 16, 8.0)?, [0, 8, 8]);
    assert_eq!(counts(&[1, 1, 1], 4, 8.0)?, [0, 0, 4]);
    assert_eq!(counts(&[0, 5], 3, 0.0)?, [0, 3]);
    // Rounding loses no layer.
    for layers in 0..40 {
        assert_eq!(counts(&[3, 1, 7, 2, 5], layers, 1.3)?.iter().sum::<usize>(), layers);
    }
    // The host's memory is not queried: equal shares of layers and tables.
    let config = toy(8)?;
    let placement = config.place(&[Device::Cpu, Device::Cpu])?;
    assert_eq!((placement.layers(0), placement.layers(1)), (0..4, 4..8));
    assert_eq!(placement.to_string(), "cpu: layers 0 to 3, embedding and head, cpu: layers 4 to 7");
    Ok(())
}
