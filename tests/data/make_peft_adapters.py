"""Adapters as Hugging Face PEFT writes them, for the toy models of transformers_golden.safetensors.

    python make_peft_adapters.py [--data FOLDER]     (default: this script's folder)

Reads what make_transformers_golden.py wrote to FOLDER. Writes under FOLDER/peft_adapters:
    roberta_monteclora/  MonteCLoRA on query, key, value of the toy RoBERTa: r 4, alpha 8, N 3
    bert_lora/           rank-stabilised LoRA on query, key, value of the toy BERT: r 4, alpha 6 (scale 6 / sqrt 4), but
                         value with r 2, alpha 10 (scale 10 / sqrt 2)
    roberta_lora/        LoRA on the query and value of the toy RoBERTa's second layer, selected by a regular expression
                         with look-ahead: r 4, alpha 7, in half precision
Each folder has adapter_config.json and adapter_model.safetensors (A, B, sampler, head). In addition, writes
expected.safetensors:
    NAME/logits                                   [3, 3] of each adapter on the golden file's inputs, in evaluation mode
                                                  (the mean A), after loading the folder back, computed in float64
    roberta/logits, bert/logits                   [3, 3] of the same models with the adapter switched off, that is with
                                                  the base and its own head: they equal the golden file's logits

All A, B, sampler parameters and heads are random. Needs torch, transformers, peft >= 0.20.
"""
import argparse
import os

import torch
from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = {
    "roberta": (RobertaConfig, RobertaForSequenceClassification, ["input_ids", "attention_mask"]),
    "bert": (BertConfig, BertForSequenceClassification, ["input_ids", "attention_mask", "token_type_ids"]),
}
SHARED = {"task_type": "SEQ_CLS", "r": 4, "lora_dropout": 0.1, "target_modules": ["query", "key", "value"]}
ADAPTERS = {
    "roberta_monteclora": (
        "roberta",
        LoraConfig(
            lora_alpha=8,
            monteclora_config=MontecloraConfig(
                num_samples=3, use_entropy=True, dirichlet_prior=1.0, sample_scaler=5e-3, kl_loss_weight=1e-5,
                buffer_size=15,
            ),
            **SHARED,
        ),
    ),
    "bert_lora": (
        "bert",
        LoraConfig(lora_alpha=6, use_rslora=True, rank_pattern={"value": 2}, alpha_pattern={"value": 10}, **SHARED),
    ),
    "roberta_lora": (
        "roberta",
        LoraConfig(lora_alpha=7, **{**SHARED, "target_modules": r".*layer\.1\.attention\.self\.(?!key|dropout)\w+"}),
    ),
}


def base(golden, data, family):
    config, model, _ = MODELS[family]
    config = config.from_json_file(f"{data}/toy_{family}_config.json")
    config._attn_implementation = "eager"
    model = model(config)
    prefix = f"{family}/"
    names = set(model.state_dict())
    model.load_state_dict({k[len(prefix) :]: v for k, v in golden.items() if k[len(prefix) :] in names
                           and k.startswith(prefix)}, strict=False)
    for name, p in model.named_parameters():
        assert torch.equal(p.data, golden[prefix + name]), name
    model.name_or_path = config.name_or_path = f"toy-{family}"
    return model


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    model.train()(input_ids=torch.tensor([[0, 5, 6]]))  # one draw changes the sampler's buffers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=HERE)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    golden = load_file(f"{data}/transformers_golden.safetensors")
    expected = {}
    for seed, (name, (family, config)) in enumerate(ADAPTERS.items()):
        folder = f"{data}/peft_adapters/{name}"
        torch.manual_seed(seed)
        model = get_peft_model(base(golden, data, family), config)
        randomise(model, 20 + seed)
        model.save_pretrained(folder)
        if name == "roberta_lora":
            weights = f"{folder}/adapter_model.safetensors"
            save_file({k: v.half() for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
        if os.path.exists(f"{folder}/README.md"):
            os.remove(f"{folder}/README.md")  # an empty model card
        loaded = PeftModel.from_pretrained(base(golden, data, family), folder).double().eval()
        inputs = {k: golden[f"{family}/{k}"] for k in MODELS[family][2]}
        with torch.no_grad():
            expected[f"{name}/logits"] = loaded(**inputs).logits.float()
            with loaded.disable_adapter():
                expected[f"{family}/logits"] = loaded(**inputs).logits.float()
        torch.testing.assert_close(expected[f"{family}/logits"], golden[f"{family}/logits"])
        assert (expected[f"{family}/logits"] - expected[f"{name}/logits"]).abs().max() > 0.1
    save_file(expected, f"{data}/peft_adapters/expected.safetensors")


if __name__ == "__main__":
    main()
