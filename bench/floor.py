#!/usr/bin/env python3
"""The floor of a training step in bf16, term by term, from the rates that this GPU reached in `fathom bench`.

  fathom bench copy --json --device cuda > rates.jsonl
  fathom bench gemm --json --device cuda >> rates.jsonl
  fathom bench attention --json --device cuda >> rates.jsonl
  python3 bench/floor.py rates.jsonl --preset d12 [--variant mod] [--ms MEASURED]

Products and attention at their measured rates; everything else at the copy's, each tensor read once and written once by
the op that needs it, nothing kept in caches between ops. A step of one micro-batch, whose products overwrite the gradients:
  products  that end a residual branch read its base as well: at the rate of forward_onto_base; wgrad at that of
            wgrad_overwrite, but for the head's chunks after the first
  forward   2 x (norm: 2 D), RoPE in place: 4 (H + 2G) d / 3, SwiGLU: 4 F (gate and up read, gate and the product written)
            a routed block's attention has no base: its second norm adds and writes the sum, 4 D
  backward  2 x (norm: 4 D), RoPE the same, SwiGLU 5 F
  head      logits written, read, their gradient written, and read by two products (those are in the products' rate)
  AdamW     master, m, v read and written, gradient read, working copy written: 30 bytes a parameter; norm: 4
What a step does beyond this, or slower, is the distance to the floor.
"""
import argparse, json, sys

PRESETS = {"d12": (768, 12, 2048, 32, 64), "d24": (1024, 24, 2816, 16, 64), "d1b": (2048, 20, 5632, 8, 128)}

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument("rates")
ap.add_argument("--preset", default="d12", choices=PRESETS)
ap.add_argument("--variant", default="dense", choices=["dense", "mod"])
ap.add_argument("--seq", type=int, default=2048)
ap.add_argument("--vocab", type=int, default=32768)
ap.add_argument("--ms", type=float, help="a measured step")
a = ap.parse_args()
lines = [json.loads(x) for x in open(a.rates) if x.startswith("{")]
width, depth, hidden, batch, head_dim = PRESETS[a.preset]
rows, kept = batch * a.seq, batch * a.seq // 8
routed = depth // 2 if a.variant == "mod" else 0


def rate(what):
    for x in lines:
        if x.get("what") == what:
            return x["tflops"] * 1e12
    sys.exit(f"{a.rates} has no line of '{what}': it was made by an older fathom bench, or in part.")


copy = max(x["gb_per_s"] for x in lines if x["bench"] == "copy") * 1e9
terms = {}


def add(name, seconds):
    terms[name] = terms.get(name, 0.0) + seconds


shapes = {"qkv": (width, 3 * width), "out": (width, width), "gate_up": (width, 2 * hidden), "down": (hidden, width)}
every, some = (depth - routed) * rows, routed * kept  # tokens of all blocks that compute every one, and of routed ones
tokens = every + some
for name, (i, o) in shapes.items():
    flops = 2.0 * i * o
    onto_base = {"out": every, "down": tokens}.get(name, 0)
    if onto_base:
        add("products of the blocks", flops * onto_base / rate(f"{a.preset}_{name} forward_onto_base"))
    if onto_base < tokens:
        add("products of the blocks", flops * (tokens - onto_base) / rate(f"{a.preset}_{name} forward"))
    for direction in ("dgrad", "wgrad_overwrite"):
        add("products of the blocks", flops * tokens / rate(f"{a.preset}_{name} {direction}"))
head = 2.0 * rows * width * a.vocab
first = min(1.0, 8192 / rows)  # a chunk of the head's rows
for direction, share in (("forward", 1.0), ("dgrad", 1.0), ("wgrad_overwrite", first), ("wgrad", 1.0 - first)):
    if share:
        add("products of the head", head * share / rate(f"{a.preset}_head {direction}"))
for blocks, seq in ((depth - routed, a.seq), (routed, a.seq // 8)):
    pairs = batch * seq * seq * width * blocks
    for direction, products in (("forward", 2), ("backward", 5)):
        if blocks:
            add(f"attention {direction}", products * pairs / rate(f"attention T {seq} d {head_dim} {direction}"))
add("norms", (tokens * (2 + 2 + 4 + 4) + some * 2) * width * 2 / copy)
add("RoPE", tokens * 2 * 4 * width * 2 / copy)
add("SwiGLU", tokens * (4 + 5) * hidden * 2 / copy)
add("cross-entropy", rows * a.vocab * 2 * 2 / copy)
if routed:  # score, gather, scatter forward; scatter, gather and the predictor's products backward
    add("routing", routed * (rows * (1 + 2 + 1) + kept * (2 + 3 + 3 + 3)) * width * 2 / copy)
parameters = depth * (4 * width * width + 3 * width * hidden) + 2 * a.vocab * width
add("optimizer", parameters * 38 / copy)
total = sum(terms.values())
for name, seconds in terms.items():
    print(f"{name:<26}{seconds * 1e3:9.2f} ms {seconds / total:7.1%}")
print(f"{'floor':<26}{total * 1e3:9.2f} ms   {rows / total:,.0f} tok/s")
if a.ms:
    print(f"{'measured':<26}{a.ms:9.2f} ms   {rows / a.ms * 1e3:,.0f} tok/s, {total * 1e3 / a.ms:.1%} of the floor's speed")
