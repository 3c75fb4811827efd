//! Taps on whole models.

use super::*;

/// A whole model. RoBERTa's layers see packed tokens, and its last layer only the first token.
struct Whole(Box<dyn SequenceClassifier>);

impl Predictor for Whole {
    fn predict(&self, batch: &Batch, cx: &Context) -> candle_core::Result<Tensor> {
        self.0.logits(&batch.input_ids, &batch.token_type_ids, &batch.attention_mask, cx)
    }
}

#[test]
fn taps_give_the_jacobians_of_whole_models_on_padded_rows() -> Result<()> {
    let roberta = serde_json::json!({
        "model_type": "roberta", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 20,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
    });
    let llama = serde_json::json!({
        "model_type": "llama", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 20,
        "rms_norm_eps": 1e-5, "pad_token_id": 1,
    });
    // A and B of each linear layer, of which a LLaMA layer has seven. The two precisions take different paths
    // through the ops; each runs one backward pass per class.
    for (json, maps) in [(roberta, 24), (llama, 28)] {
        whole_jacobians(&json, maps, DType::F64, 1e-9)?;
        whole_jacobians(&json, maps, DType::F32, 1e-4)?;
    }
    Ok(())
}

fn whole_jacobians(json: &serde_json::Value, maps: usize, dtype: DType, tolerance: f64) -> Result<()> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), json.to_string()).unwrap();
    let config = SequenceConfig::from_file(file.path(), CLASSES)?;
    let params = Params::with_dtype(Noise::new(4), dtype, &Device::Cpu);
    let (base, head) = (params.var_builder(None, Role::Base), params.var_builder(None, Role::Head));
    let mut model = Whole(config.load(base, head, Noise::new(4))?);
    let targets = Targets { select: Select::AllLinear, ..Default::default() };
    let config = LoraConfig { rank: 2, alpha: 3.4, ..Default::default() };
    crate::inject::lora(model.0.as_mut(), &targets, &config, &params)?;
    for (name, param) in params.all() {
        let mut z = vec![0f64; param.var.elem_count()];
        Noise::new(9).stream(&name, Purpose::Init).fill_normal(0, &mut z);
        let z = Tensor::from_vec(z, param.var.shape(), &Device::Cpu)?;
        params.set(&name, &(param.var.as_detached_tensor() + (z * 0.3)?.to_dtype(dtype)?)?)?;
    }
    // 9 of the 15 tokens are real: a multiple of the number of rows, although rows differ in length.
    let rows: [(&[u32], u32); 3] = [(&[5, 6, 7, 8, 9], 0), (&[10, 11], 1), (&[12, 13], 2)];
    let all = Batch::collate(&encoded(&rows).iter().collect::<Vec<_>>(), 1, &Device::Cpu)?;
    let taps = Taps::install(model.0.as_mut())?;
    let record = taps.record(&model, &all, Maps::Both, Wanted::Jacobians)?;
    let named = taps.parameters(Maps::Both);
    taps.remove(model.0.as_mut())?;
    assert_eq!((named.len(), record.layers.len()), (maps, maps));
    for (n, row) in rows.iter().enumerate() {
        let outputs = model.predict(&batch(std::slice::from_ref(row))?, &Pass::Mean.into())?;
        for k in 0..CLASSES {
            let grads = outputs.narrow(1, k, 1)?.sum_all()?.backward()?;
            for ((name, _), layer) in named.iter().zip(&record.layers) {
                let expected = grads.get(&params.get(name).unwrap().var).unwrap().to_dtype(DType::F64)?;
                let gap = (layer.jacobian(k)?.get(n)? - &expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(gap < tolerance, "{name}, row {n}, class {k}: {gap}");
                let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(size > 1e-9, "{name}, row {n}: {size}");
            }
        }
    }
    assert_eq!(record.layers[0].tokens, 9.0);
    let last = LastLayer::of_head(&params)?;
    let bias = usize::from(params.get("score.weight").is_none());
    assert_eq!(last.record(&model, &all)?.layers[0].inputs.dims(), [3, 1, 8 + bias]);
    Ok(())
}
