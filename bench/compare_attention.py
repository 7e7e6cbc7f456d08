#!/usr/bin/env python3
"""Causal attention beside PyTorch's cuDNN and FlashAttention-2, in one run on one GPU.

  python3 bench/compare_attention.py [--batch 32] [--heads 12] [--seq 2048,256] [--head-dim 64,128] [--out FILE.jsonl]

Ours is `fathom bench attention --device cuda`: packed queries, keys and values in bf16, as the model holds them. The peers get the
same layout (views of one packed tensor) and are charged the time of their kernels alone, so that Python's launches cost nothing.
TFLOP/s count half of the square, two products forward and five backward.
"""
import argparse
import json
import os
import subprocess
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PEERS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}
SETS = 4  # of tensors, used in turn, so that none waits in the L2 cache
ROUNDS = 8  # over the sets


def kernel_seconds(calls):
    """Seconds that the GPU computed for one of the calls: the sum of its kernels, without the gaps between them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(ROUNDS):
            for call in calls:
                call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / (ROUNDS * len(calls))


def peer(backend, batch, seq, heads, head_dim):
    """TFLOP/s forward and backward, or None where the backend refuses the shape."""
    product = batch * heads * seq * seq * head_dim
    attend = lambda qkv: torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    packed = [random(batch, seq, 3, heads, head_dim).unbind(2) for _ in range(SETS)]
    sets = [[x.transpose(1, 2).detach().requires_grad_() for x in qkv] for qkv in packed]
    grads = [random(batch, seq, heads, head_dim).transpose(1, 2) for _ in range(SETS)]
    try:
        with sdpa_kernel(backend):
            with torch.no_grad():
                forward = kernel_seconds([lambda qkv=qkv: attend(qkv) for qkv in sets])
            outs = [attend(qkv) for qkv in sets]
            backward = kernel_seconds([lambda out=out, qkv=qkv, grad=grad: torch.autograd.grad(out, qkv, grad, retain_graph=True)
                                       for out, qkv, grad in zip(outs, sets, grads)])
    except RuntimeError as e:
        print(f"{backend}: {str(e).splitlines()[0]}", file=sys.stderr)
        return None
    return {"forward": 2 * product / forward / 1e12, "backward": 5 * product / backward / 1e12}


def ours(fathom, batch, seq, heads, head_dim):
    command = [fathom, "bench", "attention", "--device", "cuda", "--json", "--batch", str(batch), "--seq", str(seq), "--heads", str(heads),
               "--head-dim", str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line["direction"]: line["tflops"] for line in lines}


def main():
    numbers = lambda text: [int(x) for x in text.split(",")]
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--batch", type=int, default=32)
    ap.add_argument("--heads", type=int, default=12)
    ap.add_argument("--seq", type=numbers, default=[2048, 256])
    ap.add_argument("--head-dim", type=numbers, default=[64, 128])
    ap.add_argument("--fathom", default=os.path.join(ROOT, "build", "cuda", "fathom"))
    ap.add_argument("--out")
    a = ap.parse_args()
    out = open(a.out, "w") if a.out else None
    print("| T | head | direction | Fathom TFLOP/s | " + " | ".join(PEERS) + " |\n|" + " --- |" * (4 + len(PEERS)))
    for seq in a.seq:
        for head_dim in a.head_dim:
            shape = (a.batch, seq, a.heads, head_dim)
            rates = {"Fathom": ours(a.fathom, *shape), **{name: peer(backend, *shape) for name, backend in PEERS.items()}}
            for direction in ("forward", "backward"):
                cells = [f"{r[direction]:.0f}" if r else "refuses" for r in rates.values()]
                print(f"| {seq} | {head_dim} | {direction} | " + " | ".join(cells) + " |", flush=True)
            if out:
                out.write(json.dumps({"batch": a.batch, "seq": seq, "heads": a.heads, "head_dim": head_dim, **rates}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
