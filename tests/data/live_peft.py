"""Checks folders that this crate wrote against transformers and PEFT, and trains the adapter one step in PEFT.

    python live_peft.py FOLDER        called by the crate's test if Python has torch, transformers and peft

FOLDER holds

    base/, merged/                Hugging Face models
    adapter/                      the adapter in PEFT's layout
    serving/, serving_folded/     optional: the adapter for servers, with rsLoRA's scale as it is or folded into B
    expected.safetensors          input_ids, attention_mask [b, t] and labels, i64; logits (with the adapter's mean)
                                  and base_logits, float32

Fails unless every tensor is loaded and all logits agree to 1e-4. Then trains one step in PEFT and writes back/, the
trained adapter, and back.safetensors: its `logits` and `loss`, the training loss of the step that would come next.
"""
import os
import sys
import warnings

import torch
from peft import PeftModel
from peft.tuners.lora.monteclora import MontecloraSampler
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification


def next_loss(adapted, inputs, labels):
    """Returns the training loss for a draw known to both sides: all normals are 0, the chi-squares 1, 1.1, 1.2 ..."""
    for module in adapted.modules():
        if isinstance(module, MontecloraSampler):
            rank, count = module.out_features, module.num_samples
            draw = {
                "z_mvn": torch.zeros(count, module.in_features, rank),
                "z_wishart": torch.diag(1 + torch.arange(rank) / 10),
                "z_dirichlet": torch.zeros(count),
            }
            module.sampler.get = lambda draw=draw: draw
    adapted.train()
    with torch.no_grad():
        return adapted(**inputs, labels=labels).loss + adapted.base_model._get_monteclora_loss()


def main(folder):
    torch.set_num_threads(1)
    expected = load_file(f"{folder}/expected.safetensors")
    inputs = {k: expected[k] for k in ("input_ids", "attention_mask")}
    architecture = AutoConfig.from_pretrained(f"{folder}/base").architectures[0]
    model = AutoModelForCausalLM if architecture.endswith("CausalLM") else AutoModelForSequenceClassification

    def compare(logits, key):
        real = inputs["attention_mask"].bool()
        got, want = (logits, expected[key]) if logits.dim() == 2 else (logits[real], expected[key][real])
        torch.testing.assert_close(got.float(), want, atol=1e-4, rtol=0)

    def load(name):
        loaded, info = model.from_pretrained(f"{folder}/{name}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        return loaded.eval()

    with torch.no_grad():
        compare(load("base")(**inputs).logits, "base_logits")
        compare(load("merged")(**inputs).logits, "logits")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(load("base"), f"{folder}/adapter", is_trainable=True)
        missing = [str(w.message) for w in caught if "missing" in str(w.message).lower()]
        assert not missing, missing
        compare(adapted.eval()(**inputs).logits, "logits")
        for serving in ("serving", "serving_folded"):
            if os.path.isdir(f"{folder}/{serving}"):
                served = PeftModel.from_pretrained(load("base"), f"{folder}/{serving}")
                compare(served.eval()(**inputs).logits, "logits")

    # Train one step in PEFT and save the adapter, which the crate then reads back.
    adapted.train()
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.05)
    adapted(**inputs).logits.square().mean().backward()
    optimizer.step()
    adapted.save_pretrained(f"{folder}/back")
    with torch.no_grad():
        back = {"logits": adapted.eval()(**inputs).logits.contiguous()}
    back["loss"] = next_loss(adapted, inputs, expected["labels"])
    save_file(back, f"{folder}/back.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
