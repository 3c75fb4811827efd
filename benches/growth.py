"""Measures how the cost of a training step grows along one axis at a time, from a common base point.

    python growth.py --throughput target/release/examples/throughput --config roberta-base/config.json

Runs the throughput example (build it first) with LoRA and MonteCLoRA at each point and prints a Markdown table: the
median step seconds of both, their ratio, and for each axis the exponent of a power law fitted to MonteCLoRA's step
seconds (least squares on logarithms). Needs only the standard library.
"""
import argparse
import json
import math
import subprocess
import tempfile

BASE = {"num-layers": 12, "rank": 8, "batch": 4, "length": 64, "num-components": 4}
AXES = {
    "num-layers": [1, 3, 6, 12, 24],
    "rank": [4, 16, 64, 256],
    "batch": [1, 2, 4, 8, 16],
    "length": [16, 64, 128, 256, 512],
    "num-components": [1, 4, 16, 64, 256],
}


def measure(args, point):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [args.throughput, "--config", args.config, "--steps", str(args.steps), "--no-memory"]
        command += ["--targets", args.targets, "--output", out.name]
        for name, value in point.items():
            command += [f"--{name}", str(value)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = json.load(open(out.name))["rows"]
    return {row["method"]: row["step_seconds_median"] for row in rows}


def exponent(xs, ys):
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--targets", default="default")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    print("| axis | value | LoRA, s | MonteCLoRA, s | ratio | exponent |\n|---|---|---|---|---|---|")
    for axis, values in AXES.items():
        steps = []
        for value in values:
            seconds = measure(args, {**BASE, axis: value})
            lora, ours = seconds["lora"], seconds["monteclora"]
            steps.append(ours)
            fitted = f"{exponent(values, steps):.2f}" if value == values[-1] else ""
            print(f"| {axis} | {value} | {lora:.4f} | {ours:.4f} | {ours / lora:.3f} | {fitted} |", flush=True)


if __name__ == "__main__":
    main()
