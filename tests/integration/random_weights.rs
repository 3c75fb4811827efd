//! The weights of the throughput example: made when they are asked for, one set for all methods.

use candle_core::{DType, Device};
use candle_nn::Init;
use monteclora::adapter::AdaptableModel;
use monteclora::models::decoder::DecoderForCausalLM;
use monteclora::Noise;

use crate::llama::toy_config;
use crate::support::Outcome;

#[path = "../../examples/common/random_weights.rs"]
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
            ids.push(layer.base().dense().map(|dense| dense.weight().id()));
            Ok(())
        })?;
        weights.push(ids);
    }
    assert!(!weights[0].is_empty() && weights[0] == weights[1]);
    assert!(base.contains_tensor("model.norm.weight"));
    // As its layer asked for it: a standard deviation, here of 0.5, and the same whoever asks first.
    let init = Init::Randn { mean: 0.0, stdev: 0.5 };
    let wide = made::random_weights(DType::F32, &Device::Cpu);
    let drawn = wide.get_with_hints((64, 64), "x", init)?.flatten_all()?.to_vec1::<f32>()?;
    let square = drawn.iter().map(|x| f64::from(x * x)).sum::<f64>() / drawn.len() as f64;
    assert!((square / 0.25 - 1.0).abs() < 5.0 * (2.0 / drawn.len() as f64).sqrt(), "{square}");
    assert!(wide.get_with_hints((2, 2), "x", init).is_err(), "of another shape");
    Ok(())
}
