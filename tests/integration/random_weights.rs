//! The random weights of the throughput example: made at their first use, one set for all methods.

use candle_core::{DType, Device};
use candle_nn::Init;
use monteclora::adapter::AdaptableModel;
use monteclora::models::decoder::{DecoderConfig, DecoderForCausalLM};
use monteclora::models::Quantization;
use monteclora::Noise;

use crate::support::decoders::{toy_config, toy_json};
use crate::support::Outcome;

#[path = "../../examples/throughput/random_weights.rs"]
mod made;

#[test]
fn models_on_random_weights_share_them() -> Outcome {
    let base = made::random_weights(DType::BF16, &Device::Cpu);
    assert!(!base.contains_tensor("model.norm.weight"), "nothing is made before it is asked for");
    let config = toy_config(false)?;
    let load = || DecoderForCausalLM::load(base.clone(), &config, Noise::new(0));
    let mut weights = Vec::new();
    for model in [load()?, load()?] {
        let mut ids = Vec::new();
        model.visit_linears(&mut |layer| {
            ids.push(layer.base().dense().map(|weight| weight.id()));
            Ok(())
        })?;
        weights.push(ids);
    }
    assert!(!weights[0].is_empty() && weights[0] == weights[1]);
    assert!(base.contains_tensor("model.norm.weight"));
    // A weight has the standard deviation that its layer asks for, here 0.5, whichever layer asks first.
    let init = Init::Randn { mean: 0.0, stdev: 0.5 };
    let wide = made::random_weights(DType::F32, &Device::Cpu);
    let drawn = wide.get_with_hints((64, 64), "x", init)?.flatten_all()?.to_vec1::<f32>()?;
    let square = drawn.iter().map(|x| f64::from(x * x)).sum::<f64>() / drawn.len() as f64;
    assert!((square / 0.25 - 1.0).abs() < 5.0 * (2.0 / drawn.len() as f64).sqrt(), "{square}");
    assert!(wide.get_with_hints((2, 2), "x", init).is_err(), "of another shape");
    Ok(())
}

/// Embedding and tied head in Q6K, layers in Q4K: one set of blocks for all methods, a third of bf16's size.
#[test]
fn a_base_in_four_bits_is_shared_and_small() -> Outcome {
    let mut json = toy_json(true);
    for (key, value) in [("vocab_size", 3000), ("hidden_size", 256), ("intermediate_size", 1024)] {
        json[key] = value.into();
    }
    let config = DecoderConfig::from_value(json)?;
    let bytes = |kind: Option<Quantization>| -> Outcome<usize> {
        let base = made::base(DType::BF16, kind, &Device::Cpu);
        let mut sums = Vec::new();
        for _ in 0..2 {
            let mut model = DecoderForCausalLM::load(base.clone(), &config, Noise::new(0))?;
            let mut sum = model.embedding_mut().ok_or("no embedding")?.words().bytes();
            model.visit_linears(&mut |layer| {
                sum += layer.base().bytes();
                Ok(())
            })?;
            sums.push(sum);
        }
        assert_eq!(sums[0], sums[1]);
        Ok(sums[0])
    };
    let (half, four) = (bytes(None)?, bytes(Some("q4k".parse()?))?);
    assert!((four as f64) < 0.35 * half as f64, "{four} of {half} bytes");
    Ok(())
}
