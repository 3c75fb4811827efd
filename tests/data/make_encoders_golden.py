"""Golden values for DistilBERT, ELECTRA, DeBERTa-v3 and ModernBERT on toy models.

    python make_encoders_golden.py [--out FOLDER]     (default: this script's folder)

Writes encoders_golden.safetensors and, as transformers writes them,
toy_{distilbert,electra,deberta,modernbert}_config.json. Weights and inputs are float32 (int64 for ids). Logits, losses
and gradients are computed in float64 from exactly those weights, in eval mode (no dropout), and rounded to float32 at
the end. Keys (P = one of the four):

    P/<Hugging Face name>       every weight of P's ForSequenceClassification
    P/input_ids                 [3, 17] i64, right-padded rows of 17, 9 and 4 tokens
    P/attention_mask            [3, 17] i64
    electra/token_type_ids      [3, 17] i64
    P/labels                    [3] i64
    P/logits                    [3, 3]
    P/loss                      [1] mean cross-entropy of logits against labels
    P/grad.<name>               gradient of the loss with respect to <name>, for some weights
    deberta/buckets             [2047] i64: bucket of each distance from -1023 to 1023; 256 buckets for 512 positions
    modernbert/logits.mean      logits with classifier_pooling = mean
    modernbert/logits.local     logits of the first three of its four layers alone; the third has a window

The sizes exercise both mechanisms: rows of 17 tokens exceed ModernBERT's windows of 4 tokens each way, and DeBERTa's
buckets are logarithmic from distance 4 on.

Needs torch, transformers, safetensors.
"""
import argparse
import json
import os

import torch
from safetensors.torch import save_file
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

HERE = os.path.dirname(os.path.abspath(__file__))
LENGTHS = (17, 9, 4)
LABELS = {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
BERT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    **LABELS,
}
DISTILBERT = {
    "vocab_size": 60,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 40,
    **LABELS,
}
# The settings of microsoft/deberta-v3-base, with smaller sizes.
DEBERTA = {
    **BERT,
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "layer_norm_eps": 1e-7,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pooler_dropout": 0,
    "pooler_hidden_act": "gelu",
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 8,
    "relative_attention": True,
    "share_att_key": True,
    "type_vocab_size": 0,
}
MODERNBERT = {
    **BERT,
    "num_hidden_layers": 4,
    "global_attn_every_n_layers": 3,
    "local_attention": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}


def randomise(model, seed):
    """Makes every weight random: matrices and biases with std 0.3, norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = 0.3 * torch.randn(p.shape, generator=generator)
            norm = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + value if norm else value)


def batch(seed):
    """Returns right-padded rows in which no real token has the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        ids[row, :n] = torch.randint(3, 60, (n,), generator=generator)
        ids[row, 0] = 1
        mask[row, :n] = 1
    return {"input_ids": ids, "attention_mask": mask}


def golden(tensors, family, kind, config, gradients, extra=None):
    """Adds the tensors of one family; returns the model in double precision and its inputs."""
    seed = sum(map(ord, family))
    # Eager attention gives NaN for padding that sees no token in its window; later layers spread it to the whole row.
    config._attn_implementation = "sdpa" if family == "modernbert" else "eager"
    model = kind(config)
    randomise(model, seed)
    kept = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    inputs, labels = batch(seed + 1) | (extra or {}), torch.tensor([2, 0, 1])
    model = model.double().eval()
    logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    parameters = dict(model.named_parameters())
    kept |= inputs | {"labels": labels, "logits": logits, "loss": loss.reshape(1)}
    kept |= {f"grad.{name}": parameters[name].grad for name in gradients}
    tensors |= {f"{family}/{k}": v for k, v in kept.items()}
    return model, inputs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tensors = {}
    configs = {
        "distilbert": DistilBertConfig(**DISTILBERT),
        "electra": ElectraConfig(**BERT, embedding_size=16),
        "deberta": DebertaV2Config(**DEBERTA),
        "modernbert": ModernBertConfig(**MODERNBERT),
    }
    golden(
        tensors,
        "distilbert",
        DistilBertForSequenceClassification,
        configs["distilbert"],
        ["distilbert.embeddings.word_embeddings.weight", "distilbert.transformer.layer.0.attention.q_lin.weight"],
    )
    types = torch.tensor([[int(5 < column < 9) for column in range(max(LENGTHS))] for _ in LENGTHS])
    golden(
        tensors,
        "electra",
        ElectraForSequenceClassification,
        configs["electra"],
        ["electra.embeddings.word_embeddings.weight", "electra.embeddings_project.weight"],
        {"token_type_ids": types},
    )
    golden(
        tensors,
        "deberta",
        DebertaV2ForSequenceClassification,
        configs["deberta"],
        [
            "deberta.embeddings.word_embeddings.weight",
            "deberta.encoder.rel_embeddings.weight",
            "deberta.encoder.LayerNorm.weight",
            "deberta.encoder.layer.0.attention.self.query_proj.weight",
            "deberta.encoder.layer.1.attention.self.key_proj.bias",
        ],
    )
    tensors["deberta/buckets"] = make_log_bucket_position(torch.arange(-1023, 1024), 256, 512).long()
    modern, inputs = golden(
        tensors,
        "modernbert",
        ModernBertForSequenceClassification,
        configs["modernbert"],
        [
            "model.embeddings.tok_embeddings.weight",
            "model.layers.1.attn.Wqkv.weight",
            "model.layers.2.mlp.Wi.weight",
            "model.final_norm.weight",
        ],
    )
    with torch.no_grad():
        modern.config.classifier_pooling = "mean"
        tensors["modernbert/logits.mean"] = modern(**inputs).logits
        modern.config.classifier_pooling = "cls"
        last = modern.model.layers.pop(3)
        tensors["modernbert/logits.local"] = modern(**inputs).logits
        modern.model.layers.append(last)
    tensors = {
        k: (v.detach().float() if v.is_floating_point() else v).contiguous() for k, v in sorted(tensors.items())
    }
    save_file(tensors, f"{out}/encoders_golden.safetensors")
    for name, config in configs.items():
        whole = json.loads(config.to_json_string())
        whole["architectures"] = [f"{type(config).__name__.removesuffix('Config')}ForSequenceClassification"]
        with open(f"{out}/toy_{name}_config.json", "w") as f:
            json.dump(whole, f, indent=2, sort_keys=True)
            f.write("\n")


if __name__ == "__main__":
    main()
