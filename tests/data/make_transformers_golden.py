"""Golden values of Hugging Face's RoBERTa and BERT on toy models.

    python make_transformers_golden.py [--out FOLDER]     (default: this script's folder)

Writes transformers_golden.safetensors, toy_roberta_config.json and toy_bert_config.json. Weights and inputs are
float32 (int64 for ids). Logits, loss and gradients are computed in float64 from exactly those weights, in eval mode (no
dropout), and rounded to float32 at the end. Keys (P = `roberta` or `bert`):

    P/<Hugging Face name>       every weight of P's ForSequenceClassification
    roberta/lm_head.*           the masked-LM head; its decoder is tied to the word embeddings
    P/input_ids                 [3, 12] i64, right-padded rows of 12, 7 and 4 tokens
    P/attention_mask            [3, 12] i64
    bert/token_type_ids         [3, 12] i64
    P/labels                    [3] i64
    P/logits                    [3, 3]
    roberta/mlm_logits          [3, 12, 100]; compare where the attention mask is 1
    roberta/loss                [1] mean cross-entropy of logits against labels
    roberta/grad.<name>         gradient of the loss with respect to <name>, for
                                roberta.encoder.layer.0.attention.self.query.weight and
                                roberta.embeddings.word_embeddings.weight

Needs torch, transformers, safetensors.
"""
import argparse
import json
import os

import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

HERE = os.path.dirname(os.path.abspath(__file__))
GRADIENTS = (
    "roberta.encoder.layer.0.attention.self.query.weight",
    "roberta.embeddings.word_embeddings.weight",
)
LENGTHS = (12, 7, 4)
SHARED = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "max_position_embeddings": 40,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}
ROBERTA = {
    "architectures": ["RobertaForSequenceClassification"],
    "model_type": "roberta",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "type_vocab_size": 1,
    **SHARED,
}
BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "pad_token_id": 0,
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    **SHARED,
}


def randomise(model, seed):
    """Makes every weight random: matrices and biases with std 0.2, layer-norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = 0.2 * torch.randn(p.shape, generator=generator)
            p.copy_(1 + value if name.endswith(("LayerNorm.weight", "layer_norm.weight")) else value)


def weights(model):
    return {name: p.detach().float().clone() for name, p in model.named_parameters()}


def batch(seed, pad, first):
    """Returns right-padded rows: no real token has the padding id, and each row begins with `first`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    ids = torch.full((len(LENGTHS), width), pad)
    mask = torch.zeros(len(LENGTHS), width, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        ids[row, :n] = torch.randint(3, 100, (n,), generator=generator)
        ids[row, 0] = first
        mask[row, :n] = 1
    return {"input_ids": ids, "attention_mask": mask}


def roberta(tensors):
    config = RobertaConfig(**ROBERTA)
    config._attn_implementation = "eager"
    model = RobertaForSequenceClassification(config)
    randomise(model, 1)
    masked = RobertaForMaskedLM(config)
    randomise(masked, 2)
    masked.roberta.load_state_dict(model.roberta.state_dict())
    masked.tie_weights()
    kept = weights(model)
    kept |= {k: v for k, v in weights(masked).items() if k.startswith("lm_head.") and ".decoder." not in k}
    inputs, labels = batch(3, pad=1, first=0), torch.tensor([2, 0, 1])

    model, masked = model.double().eval(), masked.double().eval()
    logits = model(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    parameters = dict(model.named_parameters())
    kept |= inputs
    kept |= {"labels": labels, "logits": logits, "loss": loss.reshape(1), "mlm_logits": masked(**inputs).logits}
    kept |= {f"grad.{name}": parameters[name].grad for name in GRADIENTS}
    tensors |= {f"roberta/{k}": v for k, v in kept.items()}


def bert(tensors):
    config = BertConfig(**BERT)
    config._attn_implementation = "eager"
    model = BertForSequenceClassification(config)
    randomise(model, 4)
    kept = weights(model)
    inputs = batch(5, pad=0, first=1)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    for row, n in enumerate(LENGTHS):
        inputs["token_type_ids"][row, n // 2 : n] = 1
    kept |= inputs
    kept |= {"labels": torch.tensor([0, 2, 1]), "logits": model.double().eval()(**inputs).logits}
    tensors |= {f"bert/{k}": v for k, v in kept.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=HERE)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    tensors = {}
    roberta(tensors)
    bert(tensors)
    tensors = {
        k: (v.detach().float() if v.is_floating_point() else v).contiguous() for k, v in sorted(tensors.items())
    }
    save_file(tensors, f"{out}/transformers_golden.safetensors")
    for name, config in (("roberta", ROBERTA), ("bert", BERT)):
        with open(f"{out}/toy_{name}_config.json", "w") as f:
            json.dump(config, f, indent=2, sort_keys=True)
            f.write("\n")


if __name__ == "__main__":
    main()
