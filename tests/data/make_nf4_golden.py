"""Matrices in bitsandbytes' NF4 with their saved quantisation states, and the values that bitsandbytes dequantises.

    pip install torch bitsandbytes safetensors numpy
    python tests/data/make_nf4_golden.py

The scales of `plain` are float32; those of `doubled` are quantised once more, in more than one block of 256. The script
checks bitsandbytes' values against the formula of `src/models/hub/bitsandbytes.rs` in numpy.
"""

import json
from pathlib import Path

import numpy
import torch
from bitsandbytes import functional
from safetensors.torch import save_file


def by_formula(codes, state):
    part = {name: tensor.numpy() for name, tensor in state.items()}
    told = json.loads(bytes(part["quant_state.bitsandbytes__nf4"].tolist()))
    scales = part["absmax"]
    if "nested_absmax" in part:
        outer = part["nested_absmax"].repeat(told["nested_blocksize"])[: len(scales)]
        scales = part["nested_quant_map"][scales] * outer + numpy.float32(told["nested_offset"])
    codes = codes.numpy().ravel()
    pairs = numpy.stack([codes >> 4, codes & 15], axis=1).ravel()
    return (part["quant_map"][pairs] * scales.repeat(told["blocksize"])).reshape(told["shape"])


def main():
    torch.manual_seed(20)
    tensors = {}
    for name, shape, doubled in [("plain", (8, 128), False), ("doubled", (96, 192), True)]:
        weight = torch.randn(shape) * torch.rand(shape[0], 1)
        codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=doubled)
        packed = state.as_dict(packed=True)
        want = functional.dequantize_4bit(codes, state)
        error = abs(by_formula(codes, packed) - want.numpy()).max()
        print(f"{name}: bitsandbytes and the formula differ by at most {error:.1e}")
        assert error < 1e-6
        tensors[f"{name}.weight"] = codes
        tensors |= {f"{name}.weight.{part}": tensor for part, tensor in packed.items()}
        tensors[f"{name}.dequantized"] = want
    path = Path(__file__).with_name("nf4_golden.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
