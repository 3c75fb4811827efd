"""Baseline: Hugging Face PEFT (LoRA, MonteCLoRA) on a GLUE pair task with a BERT encoder.

    python peft_glue_baseline.py --task RTE --data GLUE/RTE --model MINILM_FOLDER \
        --method monteclora --seeds 1,2,3 --out figures.jsonl

`--data` is a folder in the official GLUE layout (train.tsv, dev.tsv), `--model` a local folder with config.json,
model.safetensors and tokenizer.json. Appends one JSON line per seed to `--out`: the scores on the dev set after the
last epoch.

Settings: r 8, alpha 16 on query, key, value, no adapter dropout (the encoder's own dropouts are on), 3 epochs, lr
1e-3, batch 32, max length 128, AdamW with weight decay 0.01 on every trainable tensor, linear schedule with 6 %
warm-up, clipping at 1. MonteCLoRA: N 4, eps 5e-3, prior 1, eta 1e-5, entropy on, buffer 15; its loss is added to
the task's loss as in `peft.helpers.MontecloraTrainerMixin`. The classification head is trained in full.

Needs torch, transformers and peft >= 0.20.
"""
import argparse
import json
import math
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

EPOCHS, BATCH, MAX_LENGTH, LR = 3, 32, 128, 1e-3


def read(path, task):
    """Returns rows (first, second, label): columns are split only at tabs, quotes are plain text, a BOM is dropped."""
    with open(path, encoding="utf-8-sig") as f:
        header, *rows = [line.rstrip("\n").rstrip("\r").split("\t") for line in f]
    if task == "RTE":
        first, second, label = (header.index(c) for c in ("sentence1", "sentence2", "label"))
        return [(r[first], r[second], 0 if r[label] == "entailment" else 1) for r in rows]
    return [(r[3], r[4], int(r[0])) for r in rows]


def load_tokenizer(folder):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json",
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def encode(tokenizer, rows):
    return tokenizer(
        [r[0] for r in rows], [r[1] for r in rows],
        truncation="longest_first", max_length=MAX_LENGTH, padding="longest",
        return_tensors="pt", return_token_type_ids=True,
    )


def adapt(base, method):
    extra = {}
    if method == "monteclora":
        from peft.tuners.lora.config import MontecloraConfig

        extra["monteclora_config"] = MontecloraConfig(
            num_samples=4, use_entropy=True, dirichlet_prior=1.0, sample_scaler=5e-3, kl_loss_weight=1e-5,
            buffer_size=15,
        )
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "key", "value"], **extra
    )
    return get_peft_model(base, config)


def scores(log_probs, labels):
    predicted = log_probs.argmax(-1)
    tp, tn, fp, fn = (
        ((predicted == p) & (labels == y)).sum().item() for p, y in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    mcc_below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        "accuracy": (predicted == labels).double().mean().item(),
        "f1": 2 * tp / max(1, 2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / mcc_below if mcc_below else 0.0,
        "nll": -log_probs[torch.arange(len(labels)), labels].mean().item(),
    }


def train_and_score(seed, args, train, dev, tokenizer):
    torch.manual_seed(seed)
    np.random.seed(seed)
    base = BertForSequenceClassification.from_pretrained(args.model, num_labels=2)
    model = adapt(base, args.method)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.01)
    total = math.ceil(len(train) / BATCH) * EPOCHS
    warm_up = math.ceil(total * 0.06)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: s / max(1, warm_up) if s < warm_up else max(0, (total - s) / max(1, total - warm_up)),
    )
    start, steps = time.time(), []
    for _ in range(EPOCHS):
        model.train()
        order = np.random.permutation(len(train))
        for i in range(0, len(train), BATCH):
            step = time.time()
            rows = [train[j] for j in order[i : i + BATCH]]
            loss = model(**encode(tokenizer, rows), labels=torch.tensor([r[2] for r in rows])).loss
            if args.method == "monteclora":
                loss = loss + model.base_model._get_monteclora_loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            steps.append(time.time() - step)
    model.eval()
    with torch.no_grad():
        log_probs = torch.cat([
            torch.log_softmax(model(**encode(tokenizer, dev[i : i + 64])).logits.double(), -1)
            for i in range(0, len(dev), 64)
        ])
    return {
        "task": args.task, "method": args.method, "seed": seed,
        **scores(log_probs, torch.tensor([r[2] for r in dev])),
        "trainable": sum(p.numel() for p in trainable),
        "seconds": time.time() - start, "median_step_seconds": float(np.median(steps)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["RTE", "MRPC"], required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=["lora", "monteclora"], required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=0, help="first rows of the training set to use, for a trial run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, dev = (read(f"{args.data}/{split}.tsv", args.task) for split in ("train", "dev"))
    train = train[: args.limit or None]
    tokenizer = load_tokenizer(args.model)
    for seed in map(int, args.seeds.split(",")):
        line = json.dumps(train_and_score(seed, args, train, dev, tokenizer))
        print(line, flush=True)
        with open(args.out, "a") as f:
            f.write(line + "\n")


if __name__ == "__main__":
    main()
