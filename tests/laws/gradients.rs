//! Gradients equal central differences with the noise held fixed.

use candle_core::Tensor;
use monteclora::adapter::{Adapter, Pass, Role};
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::dist::{Covariance, Estimator};
use monteclora::{KlEvaluation, Mixture, MonteCLoRA, MonteCLoRAConfig, Regularizer};

use crate::{assert_gradients, base, normals, shake, store, Result};

const PASSES: [Pass; 3] = [Pass::Mean, Pass::Train { draw: 3 }, Pass::Posterior { draw: 2 }];

/// Every combination of covariance, estimator and mixture, and PEFT's configuration.
fn configs() -> Vec<MonteCLoRAConfig> {
    let start =
        MonteCLoRAConfig { rank: 3, alpha: 5.0, num_components: 4, sample_scaler: 0.3, ..Default::default() };
    let mut configs = vec![MonteCLoRAConfig { rank: 3, sample_scaler: 0.3, ..MonteCLoRAConfig::peft() }];
    for covariance in [Covariance::Full, Covariance::Diagonal] {
        for estimator in [Estimator::Exact, Estimator::Exponential, Estimator::LogisticNormal] {
            for mixture in [Mixture::Collapsed, Mixture::Explicit, Mixture::Sparse] {
                configs.push(MonteCLoRAConfig { covariance, estimator, mixture, ..start.clone() });
            }
        }
    }
    configs
}

#[test]
fn those_of_a_draw_in_every_form() -> Result<()> {
    for config in configs() {
        let params = store(3);
        let layer = MonteCLoRA::new(&params, "layer", "default", (5, 4), &config)?;
        shake(&params)?;
        let weights =
            (normals("f", &[3, 3])?, normals("pi", &[config.num_components])?, normals("delta", &[3, 5])?);
        let loss = || -> Result<Tensor> {
            let draw = layer.draw(&Pass::Train { draw: 6 }.into())?.ok_or("no draw")?;
            let f = (draw.scale_tril * &weights.0)?.sum_all()?;
            let pi = (draw.weights * &weights.1)?.sum_all()?;
            Ok(((f + pi)? + (draw.delta * &weights.2)?.sum_all()?)?)
        };
        assert_gradients(&format!("{config:?}"), &params, &loss)?;
    }
    Ok(())
}

#[test]
fn those_of_the_whole_adapter_in_every_pass() -> Result<()> {
    for config in configs() {
        for (pass, dropout) in [(PASSES[0], 0.3), (PASSES[1], 0.0), (PASSES[1], 0.3), (PASSES[2], 0.3)] {
            let config = MonteCLoRAConfig { dropout, ..config.clone() };
            let (params, base) = (store(3), base(5, 4)?);
            let layer = MonteCLoRA::new(&params, "layer", "default", (5, 4), &config)?;
            shake(&params)?;
            let (xs, target) = (normals("xs", &[2, 3, 5])?, normals("target", &[2, 3, 4])?);
            let loss =
                || -> Result<Tensor> { Ok((layer.forward(&xs, &base, &pass.into())? * &target)?.sum_all()?) };
            assert_gradients(&format!("{pass:?} {config:?}"), &params, &loss)?;
            let grads = loss()?.backward()?;
            for (role, tensor) in layer.parameters() {
                let moves = grads.get(&tensor).map(|g| g.sqr()?.sum_all()?.to_scalar::<f64>()).transpose()?;
                // The mean is plain LoRA; a sparse mixture gives the concentration no gradient.
                let wanted = match role {
                    Role::A | Role::B => true,
                    Role::LogStd => pass != Pass::Mean,
                    _ => pass != Pass::Mean && config.mixture != Mixture::Sparse,
                };
                assert_eq!(moves.is_some_and(|g| g > 0.0), wanted, "{role:?} {pass:?} {config:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn those_of_lora() -> Result<()> {
    for dropout in [0.0, 0.4] {
        let (params, base) = (store(3), base(5, 4)?);
        let config = LoraConfig { rank: 3, alpha: 5.0, dropout, use_rslora: true, ..Default::default() };
        let layer = Lora::new(&params, "layer", "default", (5, 4), &config)?;
        shake(&params)?;
        let (xs, target) = (normals("xs", &[6, 5])?, normals("target", &[6, 4])?);
        let loss = || -> Result<Tensor> {
            Ok((layer.forward(&xs, &base, &PASSES[1].into())? * &target)?.sum_all()?)
        };
        assert_gradients("lora", &params, &loss)?;
    }
    Ok(())
}

#[test]
fn those_of_the_regulariser_in_every_mode() -> Result<()> {
    for mode in [KlEvaluation::Expected, KlEvaluation::Sampled] {
        for config in configs() {
            if config.validate().is_err()
                || config.compat != Default::default() && mode == KlEvaluation::Expected
            {
                continue;
            }
            let config = MonteCLoRAConfig {
                mode,
                kl_weight: 0.3,
                cooperative_weight: 0.7,
                dirichlet_prior: 0.6,
                ..config
            };
            let params = store(3);
            let layers = [("one", (5, 4)), ("two", (5, 4)), ("three", (7, 3))]
                .map(|(path, dims)| MonteCLoRA::new(&params, path, "default", dims, &config));
            let layers = layers.into_iter().collect::<monteclora::Result<Vec<_>>>()?;
            shake(&params)?;
            let regularizer = Regularizer::new(&config);
            let loss = || -> Result<Tensor> {
                let layers: Vec<_> = layers.iter().collect();
                Ok(regularizer.for_layers(&layers, PASSES[1])?.total)
            };
            assert_gradients(&format!("{mode:?} {config:?}"), &params, &loss)?;
        }
    }
    Ok(())
}
