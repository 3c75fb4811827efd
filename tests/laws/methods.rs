//! DoRA, IA3, AdaLoRA and LoRA+ against Hugging Face PEFT (`tests/data/make_adapters_golden.py`), the
//! bottleneck adapter against its formula: outputs, gradients, updates, counts.

use std::collections::HashMap;

use candle_core::{safetensors, DType, Device, Tensor};
use candle_nn::{Linear, Module};
use monteclora::adapter::{AdaptableLinear, AdaptableModel, Adapter, BaseLinear, Params, Pass, Role};
use monteclora::adapters::adalora::orthogonal_penalty;
use monteclora::adapters::{
    AdaLora, AdaLoraConfig, Bottleneck, BottleneckConfig, Dora, Ia3, Lora, LoraConfig, RankAllocator, Scaled,
};
use monteclora::ops::OpPath;
use monteclora::optim::{AdamW, AdamWConfig};

use crate::{assert_close, assert_gradients, base, normals, shake, store, Model, Result};

const TRAIN: Pass = Pass::Train { draw: 0 };

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn read() -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/adapters_golden.safetensors");
        Ok(Self(safetensors::load(path, &Device::Cpu)?))
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).ok_or_else(|| format!("the golden file has no {name}").into())
    }

    fn base(&self) -> Result<BaseLinear> {
        Ok(Linear::new(self.get("weight")?.clone(), Some(self.get("bias")?.clone())).into())
    }

    /// The loss of the golden gradients.
    fn loss(&self, adapter: &dyn Adapter) -> Result<Tensor> {
        let ys = adapter.forward(self.get("xs")?, &self.base()?, &TRAIN.into())?;
        Ok((ys * self.get("up")?)?.sum_all()?)
    }

    /// Sets the parameters to the golden ones and checks output, gradients and merged weight.
    fn check(&self, label: &str, adapter: &dyn Adapter, params: &Params) -> Result<()> {
        for (name, _) in params.all() {
            let part = name.rsplit('.').next().unwrap_or(&name);
            params.set(&name, self.get(&format!("{label}.{part}"))?)?;
        }
        let (xs, base) = (self.get("xs")?, self.base()?);
        let want = self.get(&format!("{label}.ys"))?;
        for pass in [TRAIN, Pass::Mean] {
            assert_close(label, &adapter.forward(xs, &base, &pass.into())?, want, 1e-12)?;
        }
        let grads = self.loss(adapter)?.backward()?;
        for (name, param) in params.all() {
            let part = name.rsplit('.').next().unwrap_or(&name);
            let got = grads.get(&param.var).ok_or(format!("no gradient of {name}"))?;
            assert_close(&name, got, self.get(&format!("{label}.{part}.grad"))?, 1e-12)?;
        }
        if let Some(delta) = adapter.delta(&base, &Pass::Mean.into())? {
            let merged = Linear::new((base.dequantize()?.weight() + delta)?, base.bias().cloned());
            assert_close("merged", &merged.forward(xs)?, want, 1e-12)?;
        }
        Ok(())
    }
}

#[test]
fn dora_is_pefts() -> Result<()> {
    let (golden, params) = (Golden::read()?, store(1));
    let config = LoraConfig { rank: 3, alpha: 5.0, ..Default::default() };
    let dora = Dora::new(&params, "proj", "default", &golden.base()?, &config)?;
    assert_eq!(params.trainable_count(), 3 * (6 + 4) + 4);
    assert_close("start", dora.magnitude(), golden.get("dora.start")?, 1e-12)?;
    let unchanged = golden.base()?.forward(golden.get("xs")?)?;
    assert_close(
        "base",
        &dora.forward(golden.get("xs")?, &golden.base()?, &TRAIN.into())?,
        &unchanged,
        1e-12,
    )?;
    golden.check("dora", &dora, &params)
}

#[test]
fn under_dropout_dora_changes_the_magnitude_of_what_was_dropped() -> Result<()> {
    let (base, xs) = (base(6, 4)?, normals("xs", &[7, 6])?);
    let config = LoraConfig { rank: 2, alpha: 3.0, dropout: 0.5, ..Default::default() };
    let params = store(3);
    let dora = Dora::new(&params, "proj", "default", &base, &config)?;
    shake(&params)?;
    // PEFT's formula, W x + b + (m/n - 1) W d + (m/n) s B A d, with the input d after dropout.
    let (a, b) = (dora.low_rank().a(), dora.low_rank().b());
    let weight = base.dequantize()?.weight().clone();
    let moved = (&weight + (b.matmul(a)? * 1.5)?)?;
    let ratio = (dora.magnitude() / moved.sqr()?.sum(1)?.sqrt()?)?;
    let got = dora.forward(&xs, &base, &TRAIN.into())?;
    let kept = xs.apply(&base)?;
    // (got - kept) is linear in d: d -> d (diag(m/n) W' - W)^T; each element of d is that of 2 x, or 0.
    let map = (moved.broadcast_mul(&ratio.unsqueeze(1)?)? - weight)?;
    let stream = params.noise().stream("proj.default", monteclora::noise::Purpose::Dropout);
    let dropped = monteclora::ops::dropout(&xs, 0.5, &stream, 0, OpPath::Fused)?;
    assert_close("dropout", &(got - kept)?, &dropped.matmul(&map.t()?)?, 1e-11)?;
    let mean = dora.forward(&xs, &base, &Pass::Mean.into())?;
    assert_close("mean", &(mean - xs.apply(&base)?)?, &xs.matmul(&map.t()?)?, 1e-11)
}

#[test]
fn ia3_is_pefts() -> Result<()> {
    let golden = Golden::read()?;
    for (label, scaled, count) in [("ia3", Scaled::Output, 4), ("ia3_input", Scaled::Input, 6)] {
        let params = store(1);
        let ia3 = Ia3::new(&params, "proj", "default", golden.base()?.dims()?, scaled)?;
        assert_eq!(params.trainable_count(), count);
        assert_eq!(
            ia3.delta(&golden.base()?, &Pass::Mean.into())?.is_none(),
            scaled == Scaled::Output,
            "a bias is scaled"
        );
        golden.check(label, &ia3, &params)?;
    }
    Ok(())
}

#[test]
fn loraplus_takes_pefts_steps() -> Result<()> {
    let (golden, params) = (Golden::read()?, store(1));
    let config = LoraConfig { rank: 3, alpha: 5.0, ..Default::default() };
    let lora = Lora::new(&params, "proj", "default", (6, 4), &config)?;
    for part in ["a", "b"] {
        params.set(&format!("proj.default.{part}"), golden.get(&format!("plus.{part}"))?)?;
    }
    let config = AdamWConfig { weight_decay: 0.1, lr_ratios: vec![(Role::B, 16.0)], ..Default::default() };
    let mut optimizer = AdamW::new(&params, AdamWConfig { lr: 1e-2, ..config })?;
    for _ in 0..3 {
        optimizer.backward_step(&golden.loss(&lora)?)?;
    }
    let pair = lora.low_rank();
    assert_close("a", pair.a(), golden.get("plus.after.a")?, 1e-9)?;
    assert_close("b", pair.b(), golden.get("plus.after.b")?, 1e-9)
}

#[test]
fn adalora_moves_its_budget_as_pefts_does() -> Result<()> {
    let (golden, params) = (Golden::read()?, store(1));
    let second = Linear::new(golden.get("second")?.clone(), None);
    let mut model = Model(vec![
        AdaptableLinear::new("first.proj", golden.base()?),
        AdaptableLinear::new("second", second),
    ]);
    let config = AdaLoraConfig {
        init_rank: 4,
        target_rank: 2,
        alpha: 5.0,
        warmup_share: 0.2,
        final_share: 0.3,
        ..Default::default()
    };
    model.visit_linears_mut(&mut |layer| {
        let adapter = AdaLora::new(&params, layer.path(), "default", layer.dims()?, &config)?;
        layer.add("default", Box::new(adapter))
    })?;
    assert_eq!(params.trainable_count(), 4 * (6 + 4 + 1) + 4 * (4 + 5 + 1));
    let trained = params.all();
    for (name, _) in &trained {
        params.set(name, golden.get(&format!("adalora.start.{name}"))?)?;
    }
    let mut allocator = RankAllocator::new(&model, &config)?;
    let total = 10;
    for step in 1..=total {
        let hidden = model.0[0].forward(golden.get("xs")?, &TRAIN.into())?.tanh()?;
        let error = (model.0[1].forward(&hidden, &TRAIN.into())? - golden.get("target")?)?;
        let (loss, penalty) =
            (error.sqr()?.mean_all()?, orthogonal_penalty(&model)?.ok_or("no AdaLoRA layer")?);
        let grads = (&loss + (&penalty * 0.5)?)?.backward()?;
        if step == 1 {
            assert_close("loss", &loss.reshape(1)?, golden.get("adalora.loss")?, 1e-12)?;
            assert_close("penalty", &penalty.reshape(1)?, golden.get("adalora.penalty")?, 1e-12)?;
        }
        for (name, param) in &trained {
            let grad = grads.get(&param.var).ok_or(format!("no gradient of {name}"))?;
            if step == 1 {
                assert_close(name, grad, golden.get(&format!("adalora.grad.{name}"))?, 1e-11)?;
            }
            params.set(name, &(param.var.as_detached_tensor() - (grad * 0.05)?)?)?;
        }
        let gradient = |name: &str| params.get(name).and_then(|param| grads.get(&param.var).cloned());
        allocator.after_step(&params, &gradient, step, total)?;
        let values: Vec<Tensor> = trained
            .iter()
            .filter(|(_, param)| param.role == Role::SingularValues)
            .map(|(_, param)| param.var.as_detached_tensor())
            .collect();
        let values = Tensor::cat(&values, 0)?;
        assert_close("values", &values, golden.get(&format!("adalora.values.{step}"))?, 1e-11)?;
    }
    assert_eq!(
        [2, 3, 6, 7, 8].map(|step| allocator.budget(step, total)),
        [(8, false), (6, true), (4, true), (4, true), (4, true)]
    );
    // At an orthonormal factor the gradient of its penalty is zero, as with torch.linalg.norm.
    for (name, param) in trained.iter().filter(|(_, param)| matches!(param.role, Role::A | Role::B)) {
        let (rows, columns) = param.var.dims2()?;
        let ones = (0..rows * columns).map(|at| f64::from(u8::from(at / columns == at % columns)));
        params.set(name, &Tensor::from_iter(ones, &Device::Cpu)?.reshape((rows, columns))?)?;
    }
    let grads = orthogonal_penalty(&model)?.ok_or("no AdaLoRA layer")?.backward()?;
    for (name, param) in trained.iter().filter(|(_, param)| matches!(param.role, Role::A | Role::B)) {
        let largest = grads.get(&param.var).ok_or("no gradient")?.abs()?.max_all()?.to_scalar::<f64>()?;
        assert_eq!(largest, 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn a_bottleneck_is_its_formula() -> Result<()> {
    let (base, xs, params) = (base(6, 4)?, normals("xs", &[2, 5, 6])?, store(5));
    let adapter = Bottleneck::new(&params, "proj", "default", base.dims()?, &BottleneckConfig { width: 3 })?;
    assert_eq!(params.trainable_count(), 2 * 3 * 4 + 3 + 4);
    // Close to the identity at the start.
    assert_close("start", &adapter.forward(&xs, &base, &TRAIN.into())?, &xs.apply(&base)?, 1e-3)?;
    shake(&params)?;
    let part = |name: &str| -> Result<Tensor> {
        let param = params.get(&format!("proj.default.{name}")).ok_or("no such parameter")?;
        Ok(param.var.as_detached_tensor())
    };
    let h = xs.apply(&base)?;
    let inner = h.flatten_to(1)?.matmul(&part("down")?.t()?)?.broadcast_add(&part("down_bias")?)?;
    let change = inner.gelu_erf()?.matmul(&part("up")?.t()?)?.broadcast_add(&part("up_bias")?)?;
    let want = (&h + change.reshape(h.dims())?)?;
    assert_close("output", &adapter.forward(&xs, &base, &TRAIN.into())?, &want, 1e-12)?;
    assert_gradients("bottleneck", &params, &|| {
        Ok(adapter.forward(&xs, &base, &TRAIN.into())?.sqr()?.sum_all()?)
    })?;
    assert!(
        Bottleneck::new(&params, "other", "default", base.dims()?, &BottleneckConfig { width: 0 }).is_err()
    );
    assert!(adapter.delta(&base, &Pass::Mean.into())?.is_none());
    Ok(())
}

#[test]
fn adapters_on_a_half_width_base_compute_in_single_precision() -> Result<()> {
    let (wide, xs) = (base(6, 4)?, normals("xs", &[5, 6])?);
    let half = |t: &Tensor| t.to_dtype(DType::BF16);
    let weight = half(wide.dequantize()?.weight())?;
    let narrow = BaseLinear::new(weight, wide.bias().map(half).transpose()?);
    let params = Params::new(monteclora::noise::Noise::new(1), &Device::Cpu);
    let config = LoraConfig { rank: 2, ..Default::default() };
    let adapters: [Box<dyn Adapter>; 4] = [
        Box::new(Dora::new(&params, "dora", "default", &narrow, &config)?),
        Box::new(AdaLora::new(
            &params,
            "adalora",
            "default",
            narrow.dims()?,
            &AdaLoraConfig { init_rank: 3, target_rank: 2, ..Default::default() },
        )?),
        Box::new(Ia3::new(&params, "ia3", "default", narrow.dims()?, Scaled::Output)?),
        Box::new(Bottleneck::new(
            &params,
            "bottleneck",
            "default",
            narrow.dims()?,
            &BottleneckConfig { width: 2 },
        )?),
    ];
    for adapter in &adapters {
        let ys = adapter.forward(&half(&xs)?, &narrow, &TRAIN.into())?;
        assert_eq!(ys.dtype(), DType::BF16);
        assert!(adapter.parameters().iter().all(|(_, tensor)| tensor.dtype() == DType::F32));
        assert_close("half", &ys, &xs.apply(&wide)?, 2e-2)?;
    }
    Ok(())
}
