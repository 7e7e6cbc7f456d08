"""Where the time of a training step goes: groups the kernels that libfathom_kernel_times.so recorded.

  python3 bench/kernel_table.py times.tsv [--steps 10] [--all]

A step ends with the last of its AdamW kernels; the last `--steps` steps count. Prints a table by group: milliseconds
a step, share, launches; then the idle time between kernels. `--all` lists every kernel.
"""
import argparse, re
from collections import defaultdict

GROUPS = [  # first match wins
    ("attention forward", r"(flash|attention|sdpa|fmha|mha).*(fwd|forward|fprop)|rows_forward"),
    ("attention backward", r"flash|attention|sdpa|fmha|mha|bprop|dot_do|dq"),
    ("GEMM", r"gemm|cutlass|nvjet|xmma|splitK|cublas|invariant_product"),
    ("norm", r"norm"),
    ("RoPE", r"rope"),
    ("SwiGLU", r"swiglu|silu"),
    ("cross-entropy", r"cross_entropy"),
    ("embedding", r"embedding|Radix|segment"),
    ("routing", r"top_k|select|gather|scatter|row_score|bce|routing"),
    ("optimizer", r"adamw|squares"),
    ("copies and fills", r"mem(cpy|set)|fill|copy|cast|add|accumulate|scale|sum"),
]


def group_of(name):
    for group, pattern in GROUPS:
        if re.search(pattern, name, re.I):
            return group
    return "other"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--all", action="store_true")
arguments = parser.parse_args()

rows = sorted((int(b), int(e), n) for b, e, n in (line.rstrip("\n").split("\t", 2) for line in open(arguments.file)))
updates = [i for i, (_, _, name) in enumerate(rows) if "adamw" in name]
ends = [i for k, i in enumerate(updates) if k + 1 == len(updates) or updates[k + 1] > i + 3]  # a few launches a step
if len(ends) <= arguments.steps:
    raise SystemExit(f"{arguments.file} holds {len(ends)} steps; --steps {arguments.steps} needs one more.")
window = rows[ends[-1 - arguments.steps] + 1: ends[-1] + 1]
start, stop = rows[ends[-1 - arguments.steps]][1], rows[ends[-1]][1]

totals, launches, kernels = defaultdict(int), defaultdict(int), defaultdict(lambda: [0, 0])
busy, reached = 0, start
for begin, end, name in window:
    totals[group_of(name)] += end - begin
    launches[group_of(name)] += 1
    kernels[name][0] += end - begin
    kernels[name][1] += 1
    busy += max(0, end - max(begin, reached))
    reached = max(reached, end)
step = (stop - start) / arguments.steps
print(f"{'group':<20} {'ms a step':>10} {'share':>7} {'launches':>9}")
for group, total in sorted(totals.items(), key=lambda item: -item[1]):
    print(f"{group:<20} {total / arguments.steps / 1e6:>10.3f} {total / (stop - start):>6.1%} {launches[group] / arguments.steps:>9.1f}")
print(f"{'idle':<20} {(stop - start - busy) / arguments.steps / 1e6:>10.3f} {1 - busy / (stop - start):>6.1%}")
print(f"{'step':<20} {step / 1e6:>10.3f}")
if arguments.all:
    print()
    for name, (total, count) in sorted(kernels.items(), key=lambda item: -item[1][0]):
        print(f"{total / arguments.steps / 1e3:>10.1f} us  {count / arguments.steps:>6.1f} x {total / count / 1e3:>9.1f} us  {name[:150]}")
