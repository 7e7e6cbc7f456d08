#!/usr/bin/env python3
"""Trains one config twice over many steps, once whole and once stopped by SIGTERM and resumed, and compares the two.

    python scripts/endurance.py configs/d2-mod.yaml --fathom build/cuda/fathom --device cuda --steps 20000 --every 500 --out DIR

Every `--every` steps there is an evaluation and a checkpoint. With `deterministic: true` the two have to be equal to the bit:
every logged loss, every evaluation, every tensor of the last checkpoint. And memory has to be flat: over the second half of
the steps what is held grows by less than 1 % (evaluations under the causal rule keep now more tokens, now fewer, and a size
not seen before is a block more); of a GPU that nobody else uses, what the driver says is taken too.
The text is synthetic unless --train and --valid name token stores. Exit status: 0 all holds, 1 something does not.
Needs h5py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy

FLAT = ("memory_held_bytes", "device_used_bytes")
# Of a record, what depends on when it was made and by which process.
CLOCKS = {"seconds", "tokens_per_s", "flops_per_s", "mfu", "time", "memory_bytes", *FLAT}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--fathom", default="build/cuda/fathom")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--stops", type=int, default=3, help="how often the second training is stopped and resumed")
    parser.add_argument("--train", help="a token store of bytes")
    parser.add_argument("--valid", help="another one")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as fathom train takes it")
    parser.add_argument("--out", required=True, help="a folder for the two runs, which must not have them yet")
    return parser.parse_args()


def records(run):
    """The complete lines of a run's metrics.jsonl."""
    path = os.path.join(run, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def last_step(run):
    return max((record["step"] for record in records(run) if "loss" in record), default=0)


def train(command, run, stop_behind=None):
    """One call of `fathom train`; sends SIGTERM once a step behind `stop_behind` is logged. Ends with what was printed if it failed."""
    with open(run + ".log", "a") as log:
        process = subprocess.Popen(command + ["--run-dir", run], stdout=log, stderr=subprocess.STDOUT)
        stopped = False
        while process.poll() is None:
            time.sleep(0.05)
            if stop_behind is not None and not stopped and last_step(run) >= stop_behind:
                process.send_signal(signal.SIGTERM)
                stopped = True
    if process.returncode != 0:
        with open(run + ".log") as log:
            sys.exit(f"{' '.join(command)} --run-dir {run} ended with {process.returncode}:\n{log.read()[-2000:]}")


def comparable(record):
    return {key: value for key, value in record.items() if key not in CLOCKS}


def differing_records(whole, other):
    """Steps and evaluations that the two runs do not both have, alike."""
    kept = [[comparable(r) for r in records(run) if "event" not in r] for run in (whole, other)]
    if len(kept[0]) != len(kept[1]):
        return [f"{len(kept[0])} records and {len(kept[1])}"], len(kept[0])
    return [f"step {a['step']}" for a, b in zip(*kept) if a != b], len(kept[0])


def newest(run):
    folder = os.path.join(run, "checkpoints")
    return os.path.join(folder, max(os.listdir(folder)))


def differing_tensors(whole, other):
    """Tensors of the last checkpoints whose bytes differ, and how many there are."""
    first, second = (h5py.File(newest(run)) for run in (whole, other))
    names = []
    first.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and item.dtype.kind == "f" else None)
    differing = [name for name in names if name not in second or not numpy.array_equal(bytes_of(first[name]), bytes_of(second[name]))]
    return differing, len(names)


def bytes_of(dataset):
    return numpy.frombuffer(dataset[()].tobytes(), dtype=numpy.uint8)


def flat(run, steps):
    """Prints what was taken at a tenth, at half and at the end; whether it stays the same from half to the end."""
    logged = [record for record in records(run) if "loss" in record]
    held = True
    for key in FLAT:
        values = [(record["step"], record[key]) for record in logged if key in record and record["step"] >= steps // 10]
        if not values:
            continue
        half = next(i for i, (step, _) in enumerate(values) if step >= steps // 2)
        print(f"  {key}: " + ", ".join(f"{value:.0f} at step {step}" for step, value in (values[0], values[half], values[-1])))
        held = held and max(value for _, value in values[half:]) < 1.01 * values[half][1]
    return held


def main():
    a = arguments()
    os.makedirs(a.out, exist_ok=True)
    whole, stopped = (os.path.join(a.out, name) for name in ("whole", "stopped"))
    if os.path.exists(whole) or os.path.exists(stopped):
        sys.exit(f"{a.out} has runs already: name another folder.")
    if not a.train:
        text, a.train, a.valid = (os.path.join(a.out, name) for name in ("text.jsonl", "text.h5", "text.valid.h5"))
        subprocess.run([a.fathom, "data", "synthetic", "-o", text, "--bytes", "4000000"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([a.fathom, "data", "prepare", text, "--valid-fraction", "0.1", "-o", a.train], check=True, stdout=subprocess.DEVNULL)
    settings = [f"data.train={a.train}", f"data.valid={a.valid}", "data.tokenizer=", "model.vocab_size=0", "train.target_flops=null",
                f"train.steps={a.steps}", f"train.eval_every={a.every}", f"train.checkpoint_every={a.every}", "deterministic=true", *a.set]
    command = [a.fathom, "train", a.config, "--device", a.device] + [part for setting in settings for part in ("--set", setting)]

    begin = time.time()
    train(command, whole)
    print(f"whole: {last_step(whole)} steps in {time.time() - begin:.0f} s")
    begin = time.time()
    # Not at multiples of --every: a stop there would find its checkpoint just written.
    for stop in range(a.stops):
        train(command, stopped, stop_behind=a.steps * (stop + 1) // (a.stops + 1) + a.every // 3)
    train(command, stopped)
    resumes = sum(record.get("event") == "resume" for record in records(stopped))
    print(f"stopped by SIGTERM and resumed {resumes} times: {last_step(stopped)} steps in {time.time() - begin:.0f} s")

    lines, of_lines = differing_records(whole, stopped)
    tensors, of_tensors = differing_tensors(whole, stopped)
    print(f"steps and evaluations that differ: {len(lines)} of {of_lines} {lines[:5] or ''}")
    print(f"tensors of the last checkpoint that differ: {len(tensors)} of {of_tensors} {tensors[:5] or ''}")
    print("memory, whole:")
    holds = [flat(whole, a.steps), resumes == a.stops, last_step(whole) == a.steps, of_tensors > 0, not lines, not tensors]
    print("all holds" if all(holds) else "FAILS")
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
