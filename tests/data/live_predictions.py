"""Predicts the texts of a table in PEFT with an adapter of this crate, and compares with this crate's predictions.

    python live_predictions.py BASE ADAPTER TABLE.csv PREDICTED.csv MAX_LENGTH

The classes are the columns p_NAME of PREDICTED.csv. Fails if a label differs or a probability by 1e-4 or more.
"""

import csv
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, adapter, table, predicted, max_length = sys.argv[1:]
with open(table, newline="", encoding="utf-8") as file:
    texts = [row["text"].rstrip() for row in csv.DictReader(file)]
with open(predicted, newline="", encoding="utf-8") as file:
    ours = list(csv.DictReader(file))
names = [name.removeprefix("p_") for name in ours[0] if name.startswith("p_")]
assert len(ours) == len(texts), (len(ours), len(texts))

tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(names), dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
worst, differ = 0.0, 0
with torch.no_grad():
    for start in range(0, len(texts), 50):
        rows = slice(start, start + 50)
        batch = tokenizer(texts[rows], truncation=True, max_length=int(max_length), padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        theirs = model(**batch).logits.double().softmax(-1)
        for their, our in zip(theirs, ours[rows]):
            mine = torch.tensor([float(our[f"p_{name}"]) for name in names], dtype=torch.float64)
            worst = max(worst, (their - mine).abs().max().item())
            differ += names[their.argmax().item()] != our["label"]
print(f"{len(texts)} texts: {differ} labels differ, probabilities by {worst:.1e} at most")
assert differ == 0 and worst < 1e-4
