"""Writes classifiers for RTE and MNLI with their labels in every order, and the labels that transformers predicts.

    python live_labels.py FOLDER        called by the crate's test if Python has torch and transformers

Each FOLDER/CASE gets config.json, model.safetensors and expected.json, which holds `task` (rte or mnli), `input_ids`
and the `labels` that transformers predicts, named by the checkpoint's own id2label. The models are RoBERTa, BERT and
LLaMA with random weights.
"""
import itertools
import json
import sys

import torch
from transformers import (BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification,
                          RobertaConfig, RobertaForSequenceClassification)

TASKS = {"rte": ["entailment", "not_entailment"], "mnli": ["entailment", "neutral", "contradiction"]}
SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=40, initializer_range=0.5)
MODELS = {
    "roberta": (RobertaConfig, RobertaForSequenceClassification, dict(type_vocab_size=1, pad_token_id=1)),
    "bert": (BertConfig, BertForSequenceClassification, dict(pad_token_id=0)),
    "llama": (LlamaConfig, LlamaForSequenceClassification, dict(pad_token_id=0)),
}


def main(folder):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    ids = torch.randint(4, 60, (24, 9))
    for (name, (config, model, own)), (task, labels) in itertools.product(MODELS.items(), TASKS.items()):
        for number, order in enumerate(itertools.permutations(labels)):
            spelt = [str.upper, str.title, lambda label: label.replace("_", "-")][number % 3]
            named = dict(enumerate(map(spelt, order)))
            head = model(config(**SIZES, **own, id2label=named, label2id={v: k for k, v in named.items()})).eval()
            with torch.no_grad():
                predicted = head(input_ids=ids).logits.argmax(-1).tolist()
            case = f"{folder}/{name}-{task}-{number}"
            head.save_pretrained(case)
            with open(f"{case}/expected.json", "w") as file:
                json.dump(dict(task=task, input_ids=ids.tolist(), labels=[named[i] for i in predicted]), file)


main(sys.argv[1])
