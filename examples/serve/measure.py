"""Measures a running service under many requests: latency, throughput, and the memory of its process.

    python measure.py --requests 10000 --clients 1,2,4 [--pid PID] [--draws 0] [--transformers MODEL_DIR]

With --pid, reports the memory of that process, which should stay flat. With --transformers, Hugging Face transformers
answers the first 500 texts in this process, one after the other, for comparison. MODEL_DIR is a merged folder (the
library's `models::save::save_merged`).
"""

import argparse
import http.client
import json
import statistics
import threading
import time

WORDS = "a the film story of love war slow funny dull bright never always great poor acting and music ending".split()


def texts(count):
    """Returns texts of 3 to 30 words. The first 532 are distinct; then they repeat."""
    return [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + i * 13 % 28)) for i in range(count)]


def memory(pid):
    """Returns the anonymous memory of a process in MB, including swapped pages.

    VmRSS alone would miss a leak: leaked pages that are never read again can be swapped out.
    """
    with open(f"/proc/{pid}/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "VmSwap"))) / 1024


def summary(name, seconds, whole):
    ordered = sorted(seconds)
    at = lambda share: 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    print(f"{name}: {len(ordered) / whole:.0f} a second; median {1000 * statistics.median(ordered):.1f} ms, "
          f"95 % {at(0.95):.1f} ms, 99 % {at(0.99):.1f} ms", flush=True)


def ask(args, rows, clients):
    """Sends each client's share of the rows in its own thread; returns the answers in the order of the rows."""
    answers, seconds = [None] * len(rows), []

    def client(first):
        connection = http.client.HTTPConnection(args.address)
        for i in range(first, len(rows), clients):
            body = json.dumps({"texts": [rows[i]], "draws": args.draws})
            start = time.perf_counter()
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            response = connection.getresponse()
            answers[i] = response.read()
            seconds.append(time.perf_counter() - start)
            assert response.status == 200, answers[i]
            if args.pid and first == 0 and (i // clients) % max(1, len(rows) // clients // 5) == 0:
                print(f"  after {i}: {memory(args.pid):.1f} MB", flush=True)

    start = time.perf_counter()
    threads = [threading.Thread(target=client, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary(f"{clients} clients", seconds, time.perf_counter() - start)
    return answers


def transformers(folder, rows):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()
    seconds, probabilities, start = [], [], time.perf_counter()
    with torch.inference_mode():
        for row in rows:
            begin = time.perf_counter()
            logits = model(**tokenizer(row, truncation=True, max_length=128, return_tensors="pt")).logits
            probabilities.append(torch.softmax(logits, -1)[0].tolist())
            seconds.append(time.perf_counter() - begin)
    summary(f"transformers, {torch.get_num_threads()} threads", seconds, time.perf_counter() - start)
    return probabilities


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:3000")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", default="1,2,4")
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the process id of the service, to report its memory")
    parser.add_argument("--transformers", metavar="DIR")
    args = parser.parse_args()
    rows, first = texts(args.requests), None
    for clients in map(int, args.clients.split(",")):
        answers = ask(args, rows, clients)
        first = first or answers
        print(f"  the same answers: {answers == first}", flush=True)
    if args.transformers:
        theirs = transformers(args.transformers, rows[:500])
        ours = [list(json.loads(answer)["predictions"][0]["values"].values()) for answer in first[:500]]
        apart = max(abs(a - b) for one, other in zip(ours, theirs) for a, b in zip(one, other))
        print(f"  furthest apart: {apart:.1e}", flush=True)


if __name__ == "__main__":
    main()
