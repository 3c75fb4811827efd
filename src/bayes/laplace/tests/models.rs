//! Taps on whole models.

use super::*;

/// A whole model. RoBERTa's layers see packed tokens, and its last layer only the first token. DeBERTa's
/// projections to queries and keys also see the relative positions, which no row has for itself.
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
    let deberta = serde_json::json!({
        "model_type": "deberta-v2", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 20,
        "type_vocab_size": 0, "layer_norm_eps": 1e-7, "pad_token_id": 1, "relative_attention": true,
        "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": true,
        "pos_att_type": ["p2c", "c2p"], "position_biased_input": false, "pooler_hidden_act": "gelu",
    });
    // A and B of each linear layer, of which a LLaMA layer has seven, and the parts of the batch. The two
    // precisions take different paths through the ops; each runs one backward pass per class.
    for (json, maps, parts) in [(roberta, 24, 1), (llama, 28, 1), (deberta, 24, 3)] {
        whole_jacobians(&json, maps, parts, DType::F64, 1e-9)?;
        whole_jacobians(&json, maps, parts, DType::F32, 1e-4)?;
    }
    Ok(())
}

fn whole_jacobians(
    json: &serde_json::Value,
    maps: usize,
    parts: usize,
    dtype: DType,
    tolerance: f64,
) -> Result<()> {
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
    let named = taps.parameters(Maps::Both);
    let record = |part: &Batch| taps.record(&model, part, Maps::Both, Wanted::Jacobians);
    let mut records = Vec::new();
    each_part(std::slice::from_ref(&all), record, |part, record| {
        records.push((part.rows.clone(), record));
        Ok(())
    })?;
    taps.remove(model.0.as_mut())?;
    assert_eq!((named.len(), records.len()), (maps, parts));
    let of_rows = records
        .iter()
        .flat_map(|(rows, record)| rows.iter().enumerate().map(move |(place, row)| (*row, place, record)));
    let mut compared = 0;
    for (n, place, record) in of_rows {
        assert_eq!(record.layers.len(), maps);
        let outputs = model.predict(&batch(&rows[n..=n])?, &Pass::Mean.into())?;
        let of_pass = outputs.to_dtype(DType::F64)?.to_vec2::<f64>()?.remove(0);
        let gap = of_pass.iter().zip(&record.logits[place]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(gap < tolerance, "row {n}: {gap}");
        for k in 0..CLASSES {
            let grads = outputs.narrow(1, k, 1)?.sum_all()?.backward()?;
            for ((name, _), layer) in named.iter().zip(&record.layers) {
                let expected = grads.get(&params.get(name).unwrap().var).unwrap().to_dtype(DType::F64)?;
                let got = layer.jacobian(k)?.get(place)?;
                let gap = (got - &expected)?.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(gap < tolerance, "{name}, row {n}, class {k}: {gap}");
                let size = expected.abs()?.max_all()?.to_scalar::<f64>()?;
                assert!(size > 1e-9, "{name}, row {n}: {size}");
                compared += 1;
            }
        }
    }
    assert_eq!(compared, rows.len() * CLASSES * maps);
    if parts == 1 {
        assert_eq!(records[0].1.layers[0].tokens, 9.0);
    }
    let last = LastLayer::of_head(&params)?;
    let bias = usize::from(params.get("score.weight").is_none());
    assert_eq!(last.record(&model, &all)?.layers[0].inputs.dims(), [3, 1, 8 + bias]);
    Ok(())
}
