use candle_core::{DType, Device};
use candle_nn::Linear;

use super::*;
use crate::adapter::{linears, visit_active, AdaptableLinear, Pass, ScalerFactors};
use crate::adapters::Blob;
use crate::monteclora::ScalerSchedule;
use crate::noise::Noise;
use crate::optim::Gradients;

struct One(AdaptableLinear);

impl AdaptableModel for One {
    linears!(0);
}

/// A layer with BLoB, and its parameters.
fn blob(config: &BlobConfig) -> Result<(One, Params)> {
    let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
    let base = Linear::new(Tensor::zeros((3, 4), DType::F64, &Device::Cpu)?, None);
    let mut layer = AdaptableLinear::new("proj", base);
    layer.add("default", Box::new(Blob::new(&params, "proj", "default", (4, 3), config)?))?;
    Ok((One(layer), params))
}

#[test]
fn after_a_step_blob_descends_its_divergence_at_that_steps_weight_and_rate() -> Result<()> {
    let config = BlobConfig { rank: 2, ..BlobConfig::default() };
    let ((model, params), (other, expected)) = (blob(&config)?, blob(&config)?);
    let hooks = MethodHooks::of_blob(&config);
    let (model, params, gradients) = (&model, &params, &Gradients::new());
    let step = |step| {
        hooks.after_step(&StepDone { model, params, gradients, step, total: 10, rows: 3, batch_size: 50 })
    };
    // 153 / 50 = 3 steps per cycle, with weights 2/15, 4/15 and 8/15; one warm-up step, then nine of decay.
    for (at, rate) in [(1, 0.0), (2, 4.0 / 15.0), (3, 8.0 / 15.0 * 8.0 / 9.0), (4, 2.0 / 15.0 * 7.0 / 9.0)] {
        step(at)?;
        visit_active(&other, |layer: &Blob| layer.descend(&expected, config.kl_lr * rate))?;
        for (name, values) in expected.snapshot()? {
            let got = params.snapshot()?[&name].flatten_all()?.to_vec1::<f64>()?;
            let off = got.iter().zip(values.flatten_all()?.to_vec1::<f64>()?).map(|(x, y)| (x - y).abs());
            assert!(off.fold(0.0, f64::max) < 1e-14, "{name} after step {at}");
        }
    }
    Ok(())
}

#[test]
fn a_schedule_of_eps_is_followed_step_by_step() -> Result<()> {
    let config =
        MonteCLoRAConfig { scaler_schedule: ScalerSchedule::Warmup(0.5), ..MonteCLoRAConfig::paper() };
    let params = Params::with_dtype(Noise::new(1), DType::F64, &Device::Cpu);
    let hooks = MethodHooks::of_monteclora(&config, &params)?;
    for (step, factor) in [(1, 0.5), (2, 1.0), (3, 1.0), (4, 1.0)] {
        hooks.before_step(step, 4)?;
        let cx = hooks.context(&Pass::Train { draw: 0 }.into())?;
        assert_eq!(cx.scaler_factors, ScalerFactors::new(factor, BTreeMap::new())?, "step {step}");
    }
    Ok(())
}
