"""Writes a toy LLaMA with llama.cpp's own converter, and the logits of transformers for that file.

    python make_gguf_golden.py LLAMA_CPP        a checkout of llama.cpp, for its convert_hf_to_gguf.py

Writes gguf_golden.gguf (Q8_0, with stories260K's tokenizer) and gguf_golden.safetensors: input_ids [t] i64 and logits
[t, vocab] float32, computed from the quantised weights in the file. Needs torch, transformers, gguf and sentencepiece.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).parent
STORIES = HERE.parent.parent / "examples/assets/stories260k"


def main(llama_cpp):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name in ["tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(STORIES / name, folder)
        converter = pathlib.Path(llama_cpp) / "convert_hf_to_gguf.py"
        golden = HERE / "gguf_golden.gguf"
        subprocess.run([sys.executable, converter, folder, "--outtype", "q8_0", "--outfile", golden], check=True)
    theirs = AutoModelForCausalLM.from_pretrained(HERE, gguf_file=golden.name, dtype=torch.float32)
    # transformers ignores the file's rotary frequency factors: load its weights into `model`, which has them.
    model.load_state_dict(theirs.state_dict())
    model.eval()
    ids = torch.tensor([1, 403, 407, 261, 378, 432, 317, 286, 261, 376, 268, 414])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    save_file({"input_ids": ids, "logits": logits.contiguous()}, HERE / "gguf_golden.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
