#!/usr/bin/env python3
"""Training speed beside PyTorch, in one run: `fathom bench train` and a PyTorch peer in turn.

  python3 bench/compare_train.py --peer PATH/torch_train_bench.py [--device cpu] [--rounds 3] [--out FILE.jsonl]
  python3 bench/compare_train.py --peer PATH/torch_train_bench.py --device cuda --rounds 1

The peer is not part of this repository: --peer names it. It is a script with the flags --device --preset --variant --batch --seq --vocab --steps that prints one line of JSON with
"ms", "tok_s", "gflops" and "peak_memory_gb". The two take turns, ours before and after the peer, so that a drift of the
machine's speed meets both; the table gives each side's median, the range of ours and the ratios of the medians, with one digit
more than the limits that they are held against.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys

# Sequences, their length and the vocabulary, by device and preset.
SHAPES = {"cpu": {"d2": (8, 256, 4096), "d4": (8, 256, 4096)},
          "cuda": {"d6": (64, 1024, 32768), "d12": (32, 2048, 32768), "d24": (16, 2048, 32768), "d1b": (8, 2048, 32768)}}
CASES = {"cpu": "d2:dense,d4:dense,d4:mod", "cuda": "d12:dense,d12:mod,d24:dense,d1b:dense"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def last_json(command):
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peer", required=True)
    ap.add_argument("--device", default="cpu", choices=SHAPES)
    ap.add_argument("--fathom", help="default: build/DEVICE/fathom")
    ap.add_argument("--python", default=sys.executable)
    ap.add_argument("--cases", help="preset:variant, with commas between; default: " + str(CASES))
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--steps", type=int, default=15)
    ap.add_argument("--out")
    a = ap.parse_args()
    fathom = a.fathom or os.path.join(ROOT, "build", a.device, "fathom")
    out = open(a.out, "w") if a.out else None
    medians = {}
    for case in (a.cases or CASES[a.device]).split(","):
        preset, variant = case.split(":")
        batch, seq, vocab = map(str, SHAPES[a.device][preset])
        flags = ["--device", a.device, "--preset", preset, "--variant", variant, "--batch", batch, "--seq", seq, "--vocab", vocab,
                 "--steps", str(a.steps)]
        rows = {"ours": [], "peer": []}
        for _ in range(a.rounds):
            for side in ("ours", "peer", "ours"):
                command = [fathom, "bench", "train", "--json"] if side == "ours" else [a.python, a.peer]
                rows[side].append(last_json(command + flags))
                if out:
                    out.write(json.dumps({"side": side, **rows[side][-1]}) + "\n")
                    out.flush()
        medians[case] = {side: {k: statistics.median(r[k] for r in rs) for k in ("ms", "tok_s", "gflops", "peak_memory_gb")}
                         for side, rs in rows.items()}
        medians[case]["range"] = [f(r["tok_s"] for r in rows["ours"]) for f in (min, max)]
        medians[case]["share"] = statistics.median(r["share_of_ceiling"] for r in rows["ours"])
        medians[case]["flops"] = rows["ours"][-1]["flops_per_step"]
    print("| case | Fathom tok/s (GFLOP/s, share of its own product) | Fathom, least to most | peer tok/s (GFLOP/s) | ratio "
          "| memory GiB, ours / peer |")
    print("| --- | --- | --- | --- | --- | --- |")
    for case, m in medians.items():
        o, p = m["ours"], m["peer"]
        least, most = m["range"]
        print(f"| {case.replace(':', ' ')} | {o['tok_s']:.0f} ({o['gflops']:.0f}, {100 * m['share']:.0f} %) | {least:.0f} to {most:.0f} "
              f"| {p['tok_s']:.0f} ({p['gflops']:.0f}) | {o['tok_s'] / p['tok_s']:.3f} | {o['peak_memory_gb']:.2f} / "
              f"{p['peak_memory_gb']:.2f} = {o['peak_memory_gb'] / p['peak_memory_gb']:.3f} |")
    for preset in {case.split(":")[0] for case in medians}:
        dense, mod = medians.get(f"{preset}:dense"), medians.get(f"{preset}:mod")
        if dense and mod:
            time = dense["ours"]["ms"] / mod["ours"]["ms"]
            flops = dense["flops"] / mod["flops"]
            print(f"\n{preset}: t_dense / t_MoD = {time:.3f}; FLOPs_dense / FLOPs_MoD = {flops:.3f}; saving realised: {time / flops:.3f}")


if __name__ == "__main__":
    main()
