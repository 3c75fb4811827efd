"""Measures speed and memory of a training step of Hugging Face PEFT on a model's geometry with random weights.

    python peft_throughput.py --config roberta-base/config.json --batch 8 --length 128 --rank 8 \
        --targets query,key,value --method monteclora --steps 10 --threads 2
    python peft_throughput.py --config llama/config.json --targets all-linear
    python peft_throughput.py --config llama/config.json --targets all-linear --device cuda --dtype bf16 --autocast

The configuration's model_type selects the model: roberta and bert classify sequences with two labels and train their
head; llama is a causal language model with its loss on all tokens. The frozen weights have the dtype of --dtype,
whatever the configuration says. Adapters are in single precision, which is PEFT's own choice, and so is the trained
head under --autocast. --autocast is torch's mixed precision: products in bf16, losses in single precision. Weights are
created on the device.

A step is a forward pass with the regulariser, a backward pass with gradient clipping at norm 1, and AdamW with zeroing
the gradients, in training mode with the configuration's dropouts, on full rows of random tokens. The first `--warm-up`
steps are not counted. On a GPU, the script synchronises after each part.

Prints one JSON line: median, minimum and maximum step seconds, the medians of the three parts, tokens per second of the
median step, peak resident memory of the process in MB (ru_maxrss, which includes creating the model), on a GPU the peak
of the tensors' memory during the counted steps (max_memory_allocated), the seconds until the model was ready, and the
number of trainable parameters. On a busy machine set OMP_WAIT_POLICY=PASSIVE: otherwise idle OpenMP threads spin on the
cores that others wait for.

MonteCLoRA: N 4, eps 5e-3, prior 1, eta 1e-5, entropy on, buffer 15. Needs torch, transformers, peft >= 0.20.
"""
import argparse
import contextlib
import json
import resource
import statistics
import sys
import time

import torch
import transformers
from peft import LoraConfig, MontecloraConfig, get_peft_model
from peft import __version__ as peft_version
from transformers import (
    BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, RobertaConfig,
    RobertaForSequenceClassification,
)

FAMILIES = {
    "roberta": (RobertaConfig, RobertaForSequenceClassification, "SEQ_CLS"),
    "bert": (BertConfig, BertForSequenceClassification, "SEQ_CLS"),
    "llama": (LlamaConfig, LlamaForCausalLM, "CAUSAL_LM"),
}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def waited(device):
    """Waits until the device has finished all its work; returns the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def made_in(dtype, device):
    """Creates parameters in this dtype on this device within the `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build(args):
    with open(args.config, encoding="utf-8") as file:
        family = json.load(file).get("model_type", "roberta")
    if family not in FAMILIES:
        sys.exit(f"{args.config}: expected model_type {', '.join(FAMILIES)}, got {family}")
    config_class, model_class, task = FAMILIES[family]
    config = config_class.from_json_file(args.config)
    config.num_labels = 2
    config.num_hidden_layers = args.num_layers or config.num_hidden_layers
    config.use_cache = False  # no key-value cache in training
    if config.pad_token_id is None:
        config.pad_token_id = 1
    monteclora = MontecloraConfig(
        num_samples=args.samples, use_entropy=True, dirichlet_prior=1.0, sample_scaler=5e-3, kl_loss_weight=1e-5,
        buffer_size=args.buffer,
    )
    device = torch.device(args.device)
    with made_in(DTYPES[args.dtype], device):
        model = model_class(config)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type=task, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0,
            target_modules=args.targets if args.targets == "all-linear" else args.targets.split(","),
            monteclora_config=monteclora if args.method == "monteclora" else None,
        ),
    )
    if args.autocast:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return config, task, model.to(device).train()


def step(model, trainable, optimiser, args, ids, labels):
    """Runs one training step; returns the seconds of forward, backward and optimiser."""
    device = ids.device
    start = waited(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        if args.method == "monteclora":
            loss = loss + model.base_model._get_monteclora_loss()
    forward = waited(device)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    backward = waited(device)
    optimiser.step()
    optimiser.zero_grad()
    return forward - start, backward - forward, waited(device) - backward


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a config.json of RoBERTa, BERT or LLaMA")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="query,key,value", help="comma-separated names, or all-linear")
    parser.add_argument("--method", choices=["lora", "monteclora"], default="lora")
    parser.add_argument("--samples", type=int, default=4, help="MonteCLoRA's N")
    parser.add_argument("--buffer", type=int, default=15, help="the number of draws in MonteCLoRA's buffer")
    parser.add_argument("--num-layers", type=int, help="number of layers; default: as in the configuration")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="dtype of the frozen weights")
    parser.add_argument("--autocast", action="store_true", help="torch's mixed precision in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start = time.perf_counter()
    config, task, model = build(args)
    device = torch.device(args.device)
    ready = waited(device) - start
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=3e-4)
    spans = []
    for number in range(args.warm_up + args.steps):
        if device.type == "cuda" and number == args.warm_up:
            torch.cuda.reset_peak_memory_stats(device)
        ids = torch.randint(3, config.vocab_size, (args.batch, args.length)).to(device)
        labels = ids if task == "CAUSAL_LM" else torch.randint(0, 2, (args.batch,)).to(device)
        spans.append(step(model, trainable, optimiser, args, ids, labels))
    spans = spans[args.warm_up :]
    seconds = [sum(parts) for parts in spans]
    forward, backward, optimizer = map(statistics.median, zip(*spans))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    print(json.dumps({
        "method": args.method, "batch": args.batch, "length": args.length, "rank": args.rank,
        "targets": args.targets, "threads": args.threads, "steps": args.steps,
        "layers": config.num_hidden_layers, "hidden": config.hidden_size,
        "median_step_seconds": statistics.median(seconds),
        "min_step_seconds": min(seconds), "max_step_seconds": max(seconds),
        "forward_seconds_median": forward, "backward_seconds_median": backward, "optimizer_seconds_median": optimizer,
        "tokens_per_second": args.batch * args.length / statistics.median(seconds),
        "peak_rss_mb": peak * (1 if sys.platform == "darwin" else 1024) / 1e6,
        "peak_device_mb": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None,
        "ready_seconds": ready, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": args.dtype, "autocast": args.autocast, "attention": config._attn_implementation,
        "trainable": sum(p.numel() for p in trainable), "total": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft_version,
    }))


if __name__ == "__main__":
    main()
