"""Golden values of Hugging Face's decoders other than LLaMA, on toy models where every setting has an effect.

    python make_decoders_golden.py [--out FOLDER]     (default: this script's folder)

Writes, for each family F below, decoders/F.safetensors and decoders/F.json (its config.json). Weights and inputs are
float32 (int64 for ids). All else is computed in float64 from exactly those weights, in eval mode with eager attention,
and rounded to float32 at the end.

    qwen2         biases on q, k, v; a window in the last layer; YaRN
    qwen3         norms on q and k; heads wider than hidden_size / num_attention_heads; tied embeddings
    mistral       a window in each layer; a head width set by head_dim; linear RoPE scaling
    smollm3       every second layer without positions; biases everywhere; tied embeddings
    phi3          fused projections; positions on half of each head; LongRoPE, whose original length
                  of 16 lies within the rows; a window
    gemma2        caps on scores and logits; norms before and after each block; a window in every other layer; a head
                  width set by head_dim; biases
    gemma3_text   norms on q and k; a window with its own positions in two of three layers; linear RoPE scaling in the
                  other

Keys: every weight under its Hugging Face name, score.weight of the classifier, and

    input_ids, attention_mask             [3, 24] i64, right-padded rows of 24, 13 and 4 tokens
    left_input_ids, left_attention_mask   the same rows, left-padded; a token's position is its column
    logits, left_logits                   [3, 24, vocab]; compare where the attention mask is 1
    short_logits                          [1, 6, vocab] for the first row's first six tokens alone
    labels, loss                          [3, 24] i64, -100 on padding and the first two tokens, and [1]
    grad.<name>                           gradient of the loss with respect to one weight of each kind of block
    cls_logits                            [3, 3] of the classifier

Needs torch, transformers >= 5, safetensors.
"""
import argparse
import json
import os

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (24, 13, 4)
VOCAB = 40
SHARED = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "attention_dropout": 0.0, "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 5, "rope_theta": 100.0}
MODELS = {
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 3.0,
                            "original_max_position_embeddings": 16},
    },
    "qwen3": {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "tie_word_embeddings": True},
    "mistral": {
        "head_dim": 10, "sliding_window": 5,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5},
    },
    "smollm3": {
        "no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "attention_bias": True, "mlp_bias": True,
    },
    "phi3": {
        "hidden_size": 32, "sliding_window": 9, "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.5,
                            "short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]},
    },
    "gemma2": {
        **GEMMA, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, "attention_bias": True,
    },
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
}
GRADIENTS = (
    "embed_tokens.weight", "norm.weight", "layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_norm.weight",
    "layers.1.self_attn.k_proj.weight", "layers.0.self_attn.qkv_proj.weight", "layers.1.mlp.gate_proj.weight",
    "layers.1.mlp.gate_up_proj.weight", "layers.1.mlp.down_proj.bias",
    "layers.0.post_attention_layernorm.weight",
    "layers.2.post_feedforward_layernorm.weight",
)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    offset = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Wide enough that scores and logits reach the caps.
            value = torch.randn(p.shape, generator=generator) * (0.4 if p.dim() == 2 else 0.3)
            p.copy_(offset + value if name.endswith("norm.weight") else value)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    right, left = torch.zeros(2, len(LENGTHS), width, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        tokens = torch.randint(3, VOCAB, (n,), generator=generator)
        tokens[0] = 1
        right[row, :n] = tokens
        left[row, width - n :] = tokens
    return right, left


def softmax(xs, dim=-1, dtype=None):
    """Computes the softmax in the scores' own dtype.

    The models compute it in single precision, where the mask's float64 value overflows. Rows that see no key, which
    padding with a window has, would become NaN.
    """
    return torch.softmax(xs, dim)


def golden(family, out):
    torch.manual_seed(0)
    written = {"model_type": family, **SHARED, **MODELS[family]}
    config = AutoConfig.for_model(**written)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    randomise(model, 1 + len(family))
    kept = {k: p.detach().clone() for k, p in model.named_parameters()}
    classifier = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float()
    randomise(classifier, 9)
    classifier.model.load_state_dict(model.model.state_dict())
    kept["score.weight"] = classifier.score.weight.detach().clone()
    right, left = batch(7)
    mask = (right > 0).long()
    labels = torch.where(right > 0, right, -100)
    labels[:, :2] = -100
    kept |= {"input_ids": right, "attention_mask": mask, "labels": labels,
             "left_input_ids": left, "left_attention_mask": (left > 0).long()}

    model, classifier = model.double().eval(), classifier.double().eval()
    # The inverse frequencies are computed in single precision, the precision in which models are trained.
    result = model(input_ids=right, attention_mask=mask, labels=labels)
    result.loss.backward()
    named = dict(model.model.named_parameters())
    made = {f"grad.model.{name}": named[name].grad for name in GRADIENTS if name in named}
    with torch.no_grad():
        made |= {"logits": result.logits, "loss": result.loss.reshape(1), "left_logits": model(input_ids=left, attention_mask=(left > 0).long()).logits,
                
                 "short_logits": model(input_ids=right[:1, :6]).logits,
                 "cls_logits": classifier(input_ids=right, attention_mask=mask).logits}
    kept |= {k: v.detach().float() for k, v in made.items()}
    os.makedirs(f"{out}/decoders", exist_ok=True)
    save_file({k: v.contiguous() for k, v in kept.items()}, f"{out}/decoders/{family}.safetensors")
    with open(f"{out}/decoders/{family}.json", "w") as file:
        json.dump(json.loads(config.to_json_string()), file, indent=1, sort_keys=True)
        file.write("\n")
    largest = made["logits"].abs().max().item()
    print(family, "largest logit", round(largest, 3), "transformers", transformers.__version__)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.nn.functional.softmax = softmax
    for family in MODELS:
        golden(family, arguments.out)
