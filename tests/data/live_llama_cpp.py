"""Compares llama.cpp with this crate on GGUF files that this crate wrote.

    python live_llama_cpp.py FOLDER        called by the crate's test if Python has llama-cpp-python and gguf

FOLDER holds expected.json:

    text, pieces    a text, and its ids by the crate's tokenizer (the beginning-of-sequence token first)
    ids             the input ids of the logits below
    files           a list of {"model", "lora" (or null), "tolerance", "logits", "numbers" (optional)}

`model` and `lora` are GGUF files in FOLDER, and `logits` [t, vocab] are the crate's logits for `ids`. `numbers` maps
names of the model's tensors to .npy files with the values that the crate reads from them.

Prints the largest difference in the logits of each file. Exits with 0 if llama.cpp loads every file, tokenizes the text
to the same ids and has all logits within the tolerance, and llama.cpp's own reader (gguf) gives the same numbers to
the bit.
"""
import json
import sys

import numpy as np
from gguf import GGUFReader, dequantize
from llama_cpp import Llama


def differing(folder, case):
    """Yields the tensors of a case whose numbers differ from those of llama.cpp's reader."""
    theirs = {tensor.name: tensor for tensor in GGUFReader(f"{folder}/{case['model']}").tensors}
    for name, file in case.get("numbers", {}).items():
        expected = dequantize(theirs[name].data, theirs[name].tensor_type)
        if not np.array_equal(np.load(f"{folder}/{file}"), expected):
            yield name


def main(folder):
    with open(f"{folder}/expected.json") as file:
        expected = json.load(file)
    failed = False
    for case in expected["files"]:
        lora = case["lora"] and f"{folder}/{case['lora']}"
        # The KV cache is in single precision: half precision, the default, alone causes differences of 1e-2.
        options = {"type_k": 0, "type_v": 0, "n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False}
        # Keep the file's YaRN settings: the binding would override them with its defaults.
        options |= {"yarn_beta_fast": -1.0, "yarn_beta_slow": -1.0, "yarn_attn_factor": -1.0}
        model = Llama(f"{folder}/{case['model']}", lora_path=lora, **options)
        pieces = model.tokenize(expected["text"].encode(), add_bos=True, special=False)
        if pieces != expected["pieces"]:
            print(f"{case['model']}: expected the pieces {expected['pieces']}, got {pieces}")
            failed = True
        model.eval(expected["ids"])
        got = np.array(model.scores[: len(expected["ids"])])
        difference = np.abs(got - np.array(case["logits"], dtype=np.float32)).max()
        print(f"{case['model']} + {case['lora']}: largest difference {difference:.2e}, logits to {np.abs(got).max():.1f}")
        failed |= not difference <= case["tolerance"]
        for name in differing(folder, case):
            print(f"{case['model']}: other numbers in {name}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
