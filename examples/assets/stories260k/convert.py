"""Converts llama2.c's stories260K to a Hugging Face model folder.

    python convert.py FOLDER_WITH_stories260K.bin [--out FOLDER]     (default: this script's folder)

Reads stories260K.bin (llama2.c's legacy layout, version 0) and tok512.bin (its SentencePiece tokens with scores).
Writes config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Needs numpy and safetensors.

llama2.c rotates adjacent pairs (x0, x1) and Hugging Face rotates halves (x_i, x_{i + dim / 2}), so the rows of every
head of wq and wk are reordered from pairs to halves. SentencePiece merges the neighbours whose union has the highest
score, while a byte-pair tokenizer tries its merges in the order of their list. The list therefore contains every split
of a token into two, from the highest score to the lowest.
"""
import argparse
import json
import os
import struct

import numpy as np
from safetensors.numpy import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


def read_model(path):
    with open(path, "rb") as f:
        dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("7i", f.read(28))
        assert vocab > 0, "a negative vocabulary means an untied classifier, which this model has not"
        kv = dim // heads * kv_heads

        def take(*shape):
            count = int(np.prod(shape))
            values = np.fromfile(f, dtype="<f4", count=count)
            assert values.size == count, "the file is too short"
            return values.reshape(shape)

        raw = {
            "embed": take(vocab, dim),
            "rms_att": take(layers, dim),
            "wq": take(layers, dim, dim),
            "wk": take(layers, kv, dim),
            "wv": take(layers, kv, dim),
            "wo": take(layers, dim, dim),
            "rms_ffn": take(layers, dim),
            "w1": take(layers, hidden, dim),
            "w2": take(layers, dim, hidden),
            "w3": take(layers, hidden, dim),
            "rms_final": take(dim),
        }
        take(length, dim // heads // 2), take(length, dim // heads // 2)  # cosines and sines
        assert not f.read(1), "the file is too long"

    def halves(w, n):
        return w.reshape(n, w.shape[0] // n // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)

    tensors = {"model.embed_tokens.weight": raw["embed"], "model.norm.weight": raw["rms_final"]}
    for i in range(layers):
        tensors |= {
            f"model.layers.{i}.{name}.weight": np.ascontiguousarray(value)
            for name, value in {
                "input_layernorm": raw["rms_att"][i],
                "self_attn.q_proj": halves(raw["wq"][i], heads),
                "self_attn.k_proj": halves(raw["wk"][i], kv_heads),
                "self_attn.v_proj": raw["wv"][i],
                "self_attn.o_proj": raw["wo"][i],
                "post_attention_layernorm": raw["rms_ffn"][i],
                "mlp.gate_proj": raw["w1"][i],
                "mlp.down_proj": raw["w2"][i],
                "mlp.up_proj": raw["w3"][i],
            }.items()
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": length,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": vocab,
    }
    return config, tensors


def read_tokens(path, count):
    tokens = []
    with open(path, "rb") as f:
        f.read(4)  # the length of the longest token
        for _ in range(count):
            score, length = struct.unpack("<fi", f.read(8))
            tokens.append((f.read(length).decode("utf-8"), score))
    return tokens


def tokenizer(tokens):
    names = [text.replace(" ", "\u2581") for text, _ in tokens]
    names[:3] = [UNK, BOS, EOS]  # llama2.c writes newlines around the last two
    scores = {name: score for name, (_, score) in zip(names, tokens)}
    ids = {name: i for i, name in enumerate(names)}
    assert len(ids) == len(names), "two tokens have the same text"
    byte = {f"<0x{b:02X}>" for b in range(256)}
    pieces = [name for name in names[3:] if name not in byte]
    merges = [
        (scores[name], -cut, [name[:cut], name[cut:]])
        for name in pieces
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids and not {name[:cut], name[cut:]} & byte
    ]
    merges.sort(key=lambda m: (m[0], m[1]), reverse=True)
    special = [
        {"id": ids[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for name in (UNK, BOS, EOS)
    ]
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": UNK, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": ids, "merges": [pair for _, _, pair in merges],
        },
    }


def write(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--out", default=HERE)
    args = parser.parse_args()
    config, tensors = read_model(os.path.join(args.source, "stories260K.bin"))
    tokens = read_tokens(os.path.join(args.source, "tok512.bin"), config["vocab_size"])
    os.makedirs(args.out, exist_ok=True)
    write(os.path.join(args.out, "config.json"), config)
    write(os.path.join(args.out, "tokenizer.json"), tokenizer(tokens))
    write(os.path.join(args.out, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": UNK,
        "model_max_length": config["max_position_embeddings"],
    })
    save_file(tensors, os.path.join(args.out, "model.safetensors"), metadata={"format": "pt"})
    parameters = sum(t.size for t in tensors.values())
    print(f"{len(tensors)} tensors, {parameters} parameters, {len(tokens)} tokens")


if __name__ == "__main__":
    main()
