"""What llama.cpp makes of GGUF files that this crate wrote.

    python live_llama_cpp.py FOLDER        the crate's test calls it where Python has llama-cpp-python

FOLDER holds expected.json: `text` and `pieces`, the ids that the crate's tokenizer cuts it into (the beginning's token
first), `ids`, and `files`, a list of {"model", "lora" (or null), "tolerance", "logits"}, where model and lora are GGUF
files in FOLDER and logits [t, vocab] those of `ids`. Exits with 0 where llama.cpp loads every file, cuts the text alike and
has all logits within the tolerance; prints the largest difference of each.
"""
import json
import sys

import numpy as np
from llama_cpp import Llama


def main(folder):
    with open(f"{folder}/expected.json") as file:
        expected = json.load(file)
    failed = False
    for case in expected["files"]:
        lora = case["lora"] and f"{folder}/{case['lora']}"
        # Keys and values in single precision: in half, its default, they alone would differ by 1e-2.
        options = {"type_k": 0, "type_v": 0, "n_ctx": 256, "n_threads": 1, "logits_all": True, "verbose": False}
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
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
