"""Golden values of Hugging Face's LLaMA on toy models, without and with PEFT's adapters.

    python make_llama_golden.py [--out FOLDER]     (default: this script's folder)

Writes llama_golden.safetensors, and for each model M below M_config.json and, under peft_adapters/, M_lora and
M_monteclora with their adapter_config.json and adapter_model.safetensors. Weights and inputs are float32 (int64 for
ids). All else is computed in float64 from exactly those weights, in eval mode, and rounded to float32 at the end.

    toy_llama    LLaMA 2: RoPE without scaling; untied LM head
    toy_llama3   LLaMA 3: RoPE with llama3 scaling, original length 16, maximum length 64; tied LM head; the
                 configuration in the layout of transformers 5

Keys, for each M:

    M/<Hugging Face name>      every weight of LlamaForCausalLM, and score.weight of the classifier
    M/input_ids, M/attention_mask                [3, 40] i64, right-padded rows of 40, 23 and 5 tokens
    M/left_input_ids, M/left_attention_mask      the same rows, left-padded; their logits are computed row by
                               row, with each token's column as its position
    M/logits, M/left_logits    [3, 40, 100]; compare where the attention mask is 1
    M/labels                   [3, 40] i64, -100 on padding and on the first three tokens
    M/loss                     [1] LlamaForCausalLM's loss for these labels
    M/grad.<name>              gradient of the loss with respect to <name>, for
                               model.layers.0.self_attn.k_proj.weight and model.embed_tokens.weight
    M/cls_logits               [3, 3] of LlamaForSequenceClassification
    M/lora_logits, M/monteclora_logits           [3, 40, 100] with the adapter (the mean A)

The LoRA adapter selects its layers with a regular expression and has rank and alpha patterns. Needs torch,
transformers, safetensors, peft >= 0.20.
"""
import argparse
import json
import os

import torch
from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (40, 23, 5)
GRADIENTS = ("model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight")
SHARED = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
    "max_position_embeddings": 64, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2},
}
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "toy_llama": {"rope_theta": 10000.0, "tie_word_embeddings": False, **SHARED},
    "toy_llama3": {"rope_parameters": {"rope_theta": 500.0, **SCALING}, "tie_word_embeddings": True, **SHARED},
}
ADAPTERS = {
    "lora": LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.1,
        target_modules=r".*\.(self_attn\.[qkvo]_proj|mlp\.(?!gate)\w+_proj)", rank_pattern={"v_proj": 2},
        alpha_pattern={"1.self_attn.q_proj": 9},
    ),
    "monteclora": LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"],
        monteclora_config=MontecloraConfig(
            num_samples=3, use_entropy=True, dirichlet_prior=1.0, sample_scaler=5e-3, kl_loss_weight=1e-5,
            buffer_size=15,
        ),
    ),
}


def randomise(parameters, seed, std):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in parameters:
            value = std * torch.randn(p.shape, generator=generator)
            p.copy_(1 + value if name.endswith("norm.weight") else value)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    right, left = torch.zeros(2, len(LENGTHS), width, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        tokens = torch.randint(3, 100, (n,), generator=generator)
        tokens[0] = 1
        right[row, :n] = tokens
        left[row, width - n :] = tokens
    return right, left


def base(name):
    config = LlamaConfig(**MODELS[name])
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    randomise(model.named_parameters(), 1 + len(name), 0.2)
    model.name_or_path = config.name_or_path = name
    return model


def left_logits(model, ids, mask):
    """Computes each row without its padding.

    The queries at padding see no key, for which transformers' eager attention returns NaN.
    """
    logits = torch.zeros(*ids.shape, model.config.vocab_size, dtype=torch.float64)
    for row, n in enumerate(LENGTHS):
        positions = torch.arange(ids.shape[1])[None, -n:]
        alone = model(input_ids=ids[row : row + 1, -n:], attention_mask=mask[row : row + 1, -n:], position_ids=positions)
        logits[row, -n:] = alone.logits[0]
    return logits


def golden(name, out, tensors):
    model = base(name)
    kept = {k: p.detach().clone() for k, p in model.named_parameters()}
    right, left = batch(7)
    right_mask, left_mask = (right > 0).long(), (left > 0).long()
    classifier = LlamaForSequenceClassification(model.config)
    randomise(classifier.named_parameters(), 9, 0.2)
    classifier.model.load_state_dict(model.model.state_dict())
    kept["score.weight"] = classifier.score.weight.detach().clone()
    labels = torch.where(right > 0, right, -100)
    labels[:, :3] = -100

    double = base(name).double().eval()
    output = double(input_ids=right, attention_mask=right_mask, labels=labels)
    output.loss.backward()
    parameters = dict(double.named_parameters())
    kept |= {
        "input_ids": right, "attention_mask": right_mask, "left_input_ids": left, "left_attention_mask": left_mask,
        "logits": output.logits, "labels": labels, "loss": output.loss.reshape(1),
        "left_logits": left_logits(double, left, left_mask),
        "cls_logits": classifier.double().eval()(input_ids=right, attention_mask=right_mask).logits,
    }
    kept |= {f"grad.{k}": parameters[k].grad for k in GRADIENTS}
    for seed, (kind, config) in enumerate(ADAPTERS.items()):
        folder = f"{out}/peft_adapters/{name}_{kind}"
        torch.manual_seed(seed)
        adapted = get_peft_model(base(name), config)
        randomise(((k, p) for k, p in adapted.named_parameters() if p.requires_grad), 20 + seed, 0.3)
        adapted.train()(input_ids=right[:1])  # one draw changes the sampler's buffers
        adapted.save_pretrained(folder)
        if os.path.exists(f"{folder}/README.md"):
            os.remove(f"{folder}/README.md")  # an empty model card
        loaded = PeftModel.from_pretrained(base(name), folder).double().eval()
        with torch.no_grad():
            kept[f"{kind}_logits"] = loaded(input_ids=right, attention_mask=right_mask).logits
        assert (kept[f"{kind}_logits"] - kept["logits"]).abs().max() > 0.1
    integers = ("input_ids", "mask", "labels")
    cast = lambda k, v: v if k.endswith(integers) else v.detach().float()
    tensors |= {f"{name}/{k}": cast(k, v).contiguous() for k, v in kept.items()}
    with open(f"{out}/{name}_config.json", "w") as f:
        json.dump({"model_type": "llama", **MODELS[name]}, f, indent=2)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tensors = {}
    for name in MODELS:
        golden(name, out, tensors)
    save_file(tensors, f"{out}/llama_golden.safetensors")


if __name__ == "__main__":
    main()
