"""Computes IVON's algorithm 1 (Shen et al. 2024) in numpy on a quadratic loss, with fixed noise.

    python make_ivon_golden.py      # writes ivon_golden.json next to this script; needs only numpy; double precision

The loss is 1/2 theta^T Q theta - b^T theta. Each step averages over two micro-batches, which differ in b.
"""

import json
import pathlib

import numpy as np

ESS, H0, DELTA, BETA1, BETA2, CLIP, LR = 50.0, 0.3, 0.02, 0.9, 0.95, 0.8, 0.1
STEPS, MICRO, SIZE = 4, 2, 5

rng = np.random.default_rng(7)
root = rng.normal(size=(SIZE, SIZE))
q = root @ root.T / SIZE + 0.1 * np.eye(SIZE)
b = rng.normal(size=(MICRO, SIZE))
noise = rng.normal(size=(STEPS, MICRO, SIZE))
start = rng.normal(size=SIZE)

m, g, h = start.copy(), np.zeros(SIZE), np.full(SIZE, H0)
after = []
for t in range(1, STEPS + 1):
    sigma = 1 / np.sqrt(ESS * (h + DELTA))
    gradients, curvatures = [], []
    for z, target in zip(noise[t - 1], b):
        theta = m + sigma * z
        gradient = q @ theta - target
        gradients.append(gradient)
        curvatures.append(gradient * (theta - m) / sigma**2)
    g_hat, h_hat = np.mean(gradients, axis=0), np.mean(curvatures, axis=0)
    g = BETA1 * g + (1 - BETA1) * g_hat
    h = BETA2 * h + (1 - BETA2) * h_hat + 0.5 * (1 - BETA2) ** 2 * (h - h_hat) ** 2 / (h + DELTA)
    direction = (g / (1 - BETA1**t) + DELTA * m) / (h + DELTA)
    assert (np.abs(direction) > CLIP).any() and (np.abs(direction) < CLIP).any()
    m = m - LR * np.clip(direction, -CLIP, CLIP)
    after.append({"m": m.tolist(), "g": g.tolist(), "h": h.tolist()})

golden = {"q": q.tolist(), "b": b.tolist(), "noise": noise.tolist(), "start": start.tolist(), "after": after}
path = pathlib.Path(__file__).parent / "ivon_golden.json"
path.write_text(json.dumps(golden, indent=1) + "\n")
