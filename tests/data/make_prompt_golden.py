"""PEFT's prompt tuning on the toy models of the other golden files, in float64.

    pip install torch transformers 'peft>=0.20'
    python tests/data/make_prompt_golden.py        # writes tests/data/prompt_golden.safetensors

Keys, for M in roberta, bert (classifiers) and toy_llama (language model):

    M/prompt     [3, 32] virtual tokens
    M/logits     [3, 3]; for toy_llama [3, 40, 100], without the virtual tokens
    M/loss       [1] for the labels of the other golden file
    M/grad       [3, 32] gradient of the loss with respect to the prompt
"""

import json

import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

DATA = "tests/data/"
TOKENS = 3
MODELS = {
    "roberta": ("transformers_golden", RobertaConfig, RobertaForSequenceClassification, "SEQ_CLS"),
    "bert": ("transformers_golden", BertConfig, BertForSequenceClassification, "SEQ_CLS"),
    "toy_llama": ("llama_golden", LlamaConfig, LlamaForCausalLM, "CAUSAL_LM"),
}
out = {}
for seed, (name, (file, config_class, model_class, task)) in enumerate(MODELS.items()):
    golden = {k.split("/", 1)[1]: v for k, v in load_file(f"{DATA}{file}.safetensors").items() if k.startswith(f"{name}/")}
    with open(f"{DATA}{name if name.startswith('toy') else f'toy_{name}'}_config.json") as f:
        config = config_class(**json.load(f))
    config._attn_implementation = "eager"
    model = model_class(config).double().eval()
    lacking = model.load_state_dict({k: v for k, v in golden.items() if k in model.state_dict()}, strict=False)
    assert not [key for key in lacking.missing_keys if "position_ids" not in key], lacking
    model = get_peft_model(model, PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS)).double().eval()
    (prompt,) = [p for n, p in model.named_parameters() if "prompt_encoder" in n]
    with torch.no_grad():
        prompt.copy_(0.2 * torch.randn(prompt.shape, generator=torch.Generator().manual_seed(seed)))
    inputs = {k: golden[k] for k in ("input_ids", "attention_mask", "token_type_ids", "labels") if k in golden}
    result = model(**inputs)
    result.loss.backward()
    logits = result.logits[:, TOKENS:] if task == "CAUSAL_LM" else result.logits
    out |= {f"{name}/prompt": prompt, f"{name}/logits": logits, f"{name}/loss": result.loss.reshape(1), f"{name}/grad": prompt.grad}
    print(name, result.loss.item())

save_file({k: v.detach().float().contiguous() for k, v in out.items()}, f"{DATA}prompt_golden.safetensors")
