"""Prints the results of a run of .ci/gpu as Markdown: training steps of this crate and of PEFT, and each kernel's time.

    python gpu_tables.py FOLDER     FOLDER holds what the phases have written so far
"""
import collections
import csv
import json
import pathlib
import sys

MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
LAST = "adamw"  # the kernel that ends a step: one launch for all parameters


def rows(folder, name):
    """Returns the measurements of a phase: this crate's from NAME.json, PEFT's from the lines of NAME.jsonl.

    The list is empty if there is neither file, or if the file is cut off.
    """
    try:
        if (path := folder / f"{name}.json").exists():
            return json.loads(path.read_text())["rows"]
        if (path := folder / f"{name}.jsonl").exists():
            return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    except ValueError as error:
        print(f"\n{path.name}: {error}", file=sys.stderr)
    return []


def steps(folder):
    print("\n| run | method | step, ms | tokens/s | device, MB | resident, MB | ready, s |\n|---|---|---|---|---|---|---|")
    for name in ["encoder", "encoder-peft", "decoder", "decoder-peft", "quantized"]:
        for row in rows(folder, name):
            seconds = row.get("step_seconds_median") or row["median_step_seconds"]
            number = lambda key: f"{row[key]:.0f}" if row.get(key) else "-"
            method = row["method"] + (", autocast" if row.get("autocast") else "")
            print(f"| {name} | {method} | {1000 * seconds:.1f} | {row['tokens_per_second']:.0f} | {number('peak_device_mb')} "
                  f"| {number('peak_rss_mb')} | {row['ready_seconds']:.1f} |")


def profile(path):
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches = [
        (row["Kernel Name"], float(row["Metric Value"].replace(",", "")) * MICROSECONDS[row["Metric Unit"]])
        for row in csv.DictReader(lines) if row["Metric Name"] == "gpu__time_duration.sum"
    ]
    ends = [i for i, (name, _) in enumerate(launches) if name.startswith(LAST)]
    if len(ends) > 1:
        what, launches = "One step", launches[ends[-2] + 1 : ends[-1] + 1]
    else:
        what = f"No whole step ({len(ends)} launches of {LAST})"
    times = collections.defaultdict(list)
    for name, time in launches:
        times[name].append(time)
    total = sum(map(sum, times.values()))
    print(f"\n{what}: {len(launches)} launches, {total:.0f} us\n\n| launches | us | share | kernel |\n|---|---|---|---|")
    for name, of in sorted(times.items(), key=lambda item: -sum(item[1])):
        print(f"| {len(of)} | {sum(of):.0f} | {sum(of) / total:.1%} | `{name.replace('|', '/')[:120]}` |")


def main():
    folder = pathlib.Path(sys.argv[1])
    steps(folder)
    if (path := folder / "profile.csv").exists():
        profile(path)


if __name__ == "__main__":
    main()
