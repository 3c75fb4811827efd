//! Priors and the evidence bound over layers of several shapes, which are computed in groups: each is a sum
//! over the layers, and a shared width is shared by all of them.

use candle_core::Tensor;
use monteclora::adapter::{AdaptableLinear, Params, Pass, Prior, PriorForm, Role};
use monteclora::adapters::lora::prior_energy;
use monteclora::adapters::{Lora, LoraConfig};
use monteclora::dist::Estimator;
use monteclora::{EvidenceBound, Init, MonteCLoRA, MonteCLoRAConfig, Regularizer};

use crate::{base, shake, store, Model, Result};

const ROWS: usize = 7;
const SHAPES: [(usize, usize); 3] = [(5, 4), (5, 4), (7, 3)];

fn value(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_scalar()?)
}

fn layers(params: &Params, config: &MonteCLoRAConfig) -> Result<Vec<MonteCLoRA>> {
    let layer = |(i, dims)| Ok(MonteCLoRA::new(params, &format!("l{i}"), "default", dims, config)?);
    SHAPES.into_iter().enumerate().map(layer).collect()
}

#[test]
fn the_evidence_bound_is_the_sum_of_the_layers_divergences() -> Result<()> {
    let (std, temperature) = (0.7, 0.4);
    for latents in [false, true] {
        let evidence = Some(EvidenceBound { std, temperature, latents });
        let paper = MonteCLoRAConfig::paper();
        let config = MonteCLoRAConfig { rank: 3, evidence, estimator: Estimator::Exact, ..paper };
        let params = store(5);
        let layers = layers(&params, &config)?;
        shake(&params)?;
        let regularizer = Regularizer::new(&config).for_training(&params, ROWS)?;
        let terms = |layers: &[&MonteCLoRA]| regularizer.for_layers(layers, Pass::Mean);
        let kl_mean = |layers: &[&MonteCLoRA]| value(&terms(layers)?.kl_mean.ok_or("no bound")?);
        let all: Vec<&MonteCLoRA> = layers.iter().collect();
        let (mut of_mean, mut of_latents) = (0.0, 0.0);
        for layer in &all {
            let own = terms(&[layer])?;
            of_mean += kl_mean(&[layer])?;
            of_latents += value(&own.kl_wishart)? + value(&own.kl_dirichlet)?;
        }
        assert!((kl_mean(&all)? / of_mean - 1.0).abs() < 1e-12);
        let want = temperature / ROWS as f64 * (of_mean + if latents { of_latents } else { 0.0 });
        let got = value(&terms(&all)?.total)?;
        assert!((got / want - 1.0).abs() < 1e-12, "latents {latents}: {got} {want}");
    }
    Ok(())
}

#[test]
fn a_shared_width_is_shared_by_the_layers_of_all_shapes() -> Result<()> {
    for form in [PriorForm::Mean { std: 0.6 }, PriorForm::Update { std: 0.6 }] {
        let params = store(6);
        let head = params.create("head", Role::Head, (2, 5), &Init::Constant(0.25))?;
        let mut model = Model(Vec::new());
        let lora = LoraConfig { rank: 3, alpha: 5.0, ..LoraConfig::default() };
        for (i, (in_dim, out_dim)) in SHAPES.into_iter().enumerate() {
            let path = format!("lora{i}");
            let adapter = Lora::new(&params, &path, "default", (in_dim, out_dim), &lora)?;
            let mut linear = AdaptableLinear::new(path, base(in_dim, out_dim)?);
            linear.add("default", Box::new(adapter))?;
            model.0.push(linear);
        }
        let config = MonteCLoRAConfig { rank: 3, alpha: 5.0, ..MonteCLoRAConfig::paper() };
        let layers = layers(&params, &config)?;
        let start = head.copy()?;
        let prior = |shared| Prior { form, temperature: 0.3, shared, head_std: Some(0.8) };
        let starts = monteclora::adapter::PriorStart::new(&prior(false), &params)?;
        let of_config = |shared| MonteCLoRAConfig { prior: Some(prior(shared)), ..config.clone() };
        let regularizer = |shared| Regularizer::new(&of_config(shared)).for_training(&params, ROWS);
        let regularizers = [regularizer(false)?, regularizer(true)?];
        shake(&params)?;
        let of_head = 5.0 * value(&(&head - start)?.sqr()?.sum_all()?)? / (2.0 * 0.64);

        let of_lora = [false, true].map(|shared| prior_energy(&model, &prior(shared), Some(&starts)));
        let of_all: Vec<&MonteCLoRA> = layers.iter().collect();
        let of_monteclora =
            regularizers.map(|regularizer| Ok(regularizer.for_layers(&of_all, Pass::Mean)?.prior));
        let energies = |pair: [monteclora::Result<Option<Tensor>>; 2]| -> Result<[f64; 2]> {
            let [own, shared] = pair.map(|energy| value(&energy?.ok_or("no energy")?));
            Ok([own?, shared?])
        };
        for (what, [own, shared]) in [("LoRA", energies(of_lora)?), ("MonteCLoRA", energies(of_monteclora)?)]
        {
            let want = of_head + 3.0 * (own - of_head);
            assert!((shared / want - 1.0).abs() < 1e-12, "{what} {form:?}: {shared} {want}");
        }
        let [own, _] = energies([false, true].map(|s| prior_energy(&model, &prior(s), Some(&starts))))?;
        let mut want = of_head;
        for linear in &model.0 {
            let pair = linear.active_as::<Lora>().ok_or("no LoRA")?.low_rank();
            let of = match form {
                PriorForm::Mean { .. } => pair.a().clone(),
                _ => (pair.b().matmul(pair.a())? * pair.scale())?,
            };
            want += value(&of.sqr()?.sum_all()?)? / 0.72;
        }
        assert!((own / want - 1.0).abs() < 1e-12, "{form:?}: {own} {want}");
    }
    Ok(())
}
