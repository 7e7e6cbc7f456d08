"""Trains the PyTorch peer on the batches, the initial weights and the learning rates of a Fathom run, and compares the
loss curves.

  fathom train configs/d6-dense.yaml --run-dir RUN --set train.steps=300 --set train.log_every=1 ...
  python3 bench/torch_curve.py RUN --peer DIR [--device cuda] [-o curve.json]

DIR holds the peer's torch_lm.py. Needs PyTorch, NumPy, h5py and PyYAML. The run must log every step. Initial weights
and the order of the data are pure functions of the seed (docs/formats.md): they are made here again, independently.
Prints one line of JSON: mean and largest difference of the losses, ours minus the peer's.
"""
import argparse, contextlib, json, math, pathlib, sys

import h5py
import numpy as np
import torch
import yaml

MASK = (1 << 64) - 1


def mix(x):  # SplitMix64's finaliser
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def permuted(index, n, key):  # train/data_loader.h
    half = 1
    while (1 << (2 * half)) < n:
        half += 1
    mask = (1 << half) - 1
    x = index
    while True:
        left, right = x >> half, x & mask
        for round_ in range(4):
            left, right = right, left ^ (mix((right + key + round_ * 0x9E3779B97F4A7C15) & MASK) & mask)
        x = (left << half) | right
        if x < n:
            return x


def stream_of(name):  # FNV-1a
    value = 14695981039346656037
    for byte in name.encode():
        value = ((value ^ byte) * 1099511628211) & MASK
    return value


def normal(n, seed, stream):  # Philox4x32-10, Box-Muller
    counter = np.arange((n + 1) // 2, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [counter & low, counter >> np.uint64(32), np.full_like(counter, stream & 0xFFFFFFFF), np.full_like(counter, stream >> 32)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    uniform = lambda lo, hi, offset: (((hi << np.uint64(32) | lo) >> np.uint64(11)).astype(np.float64) + offset) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform(c[0], c[1], 1.0))), 2 * math.pi * uniform(c[2], c[3], 0.0)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)[:n]


def peer_name(name):
    """Ours -> torch_lm.py's."""
    fixed = {"model.embed_tokens.weight": "emb.weight", "model.norm.weight": "nf", "lm_head.weight": "head.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    rest = {"input_layernorm.weight": "n1", "post_attention_layernorm.weight": "n2", "self_attn.qkv_proj.weight": "attn.wqkv.weight",
            "self_attn.o_proj.weight": "attn.wo.weight", "mlp.gate_up_proj.weight": "mlp.w13.weight", "mlp.down_proj.weight": "mlp.w2.weight",
            "router.weight": "w_r"}.get(rest, rest.replace("router_predictor", "predictor"))
    return f"blocks.{layer}.{rest}"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=pathlib.Path)
parser.add_argument("--peer", required=True)
parser.add_argument("--device", default="cuda")
parser.add_argument("--no-compile", action="store_true")
parser.add_argument("-o", "--out")
a = parser.parse_args()
sys.path.insert(0, a.peer)
import torch_lm  # noqa: E402

config = yaml.safe_load(open(a.run / "config.yaml"))
m, t, r, seed = config["model"], config["train"], config["routing"], config["seed"]
for numbers in (m, t, r):  # PyYAML takes 1e-08, which has no point, for text
    for key in ("eps", "norm_eps", "rope_theta", "weight_decay", "grad_clip", "capacity"):
        if key in numbers:
            numbers[key] = float(numbers[key])
t["betas"] = [float(x) for x in t["betas"]]
ours = [x for x in map(json.loads, open(a.run / "metrics.jsonl")) if "loss" in x and "lr" in x]
assert [x["step"] for x in ours] == list(range(1, len(ours) + 1)), "the run must log every step: train.log_every=1"

routed = r["kind"] == "mod"
c = torch_lm.Config(vocab_size=m["vocab_size"], d_model=m["width"], n_layers=m["depth"], n_heads=m["heads"], n_kv_heads=m["kv_heads"],
                    d_ff=m["ffn_hidden"], max_seq_len=m["max_seq_len"], rope_theta=m["rope_theta"], norm_eps=m["norm_eps"],
                    tie_embeddings=m["tie_embeddings"], mod_every=r["every"] if routed else 0, mod_capacity=r["capacity"], gate=r["gate"],
                    aux_weight=0.0, predictor=routed and r["causal"]["method"] in ("predictor", "both"))
model = torch_lm.Transformer(c)
assert not routed or r["causal"]["method"] in ("predictor", "none"), "the peer's auxiliary loss is a sum over layers, ours a mean"
with h5py.File(sorted((a.run / "checkpoints").glob("*.h5"))[-1]) as file:
    names = []
    file["parameters"].visititems(lambda n, d: names.append((n, d.shape)) if isinstance(d, h5py.Dataset) else None)
parameters = dict(model.named_parameters())
for name, shape in names:
    p = parameters.pop(peer_name(name))
    if "norm" in name:
        value = np.ones(shape)
    elif name.endswith("bias"):
        value = np.zeros(shape)
    else:
        std = 0.02 / math.sqrt(2 * m["depth"]) if "o_proj" in name or "down_proj" in name else 0.02
        value = normal(int(np.prod(shape)), seed, stream_of(name)) * std
    p.data.copy_(torch.from_numpy(value.astype(np.float32)).view(p.shape))
assert not parameters, list(parameters)
model = model.to(a.device)
model._rope(a.device)

with h5py.File(config["data"]["train"]) as store:
    tokens = store["tokens"][:].astype(np.int64)
seq, batch = t["seq_len"], t["batch_tokens"] // t["seq_len"]
sequences = (len(tokens) - 1) // seq
order = []
for i in range(len(ours) * batch):
    key = mix((seed * 0x9E3779B97F4A7C15 + i // sequences + 1) & MASK)
    order.append(permuted(i % sequences, sequences, key))

predictor = [p for n, p in model.named_parameters() if "predictor" in n]
mine = {id(p) for p in predictor}
vectors = [p for n, p in model.named_parameters() if p.dim() == 1 and id(p) not in mine]
matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and id(p) not in mine]
groups = [{"params": matrices, "weight_decay": t["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
if predictor:
    groups.append({"params": predictor, "weight_decay": 0.0})
optimizer = torch.optim.AdamW(groups, lr=1.0, betas=tuple(t["betas"]), eps=t["eps"], fused=a.device == "cuda")
bf16 = t["precision"] == "bf16"


def loss_of(x, y):
    with torch.autocast(a.device, torch.bfloat16) if bf16 else contextlib.nullcontext():
        return model(x, y)


train_loss = loss_of if a.no_compile else torch.compile(loss_of)
micro = t["micro_batch"] or batch
theirs = []
for step, ours_at in enumerate(ours):
    windows = order[step * batch: (step + 1) * batch]
    rows = torch.from_numpy(np.stack([tokens[w * seq: w * seq + seq + 1] for w in windows])).to(a.device)
    total = 0.0
    for part in rows.split(micro):
        if routed:  # the peer returns the sum with the predictor's losses: the cross-entropy alone is compared
            model.eval()
            with torch.no_grad():
                total += loss_of(part[:, :-1], part[:, 1:]).item() * len(part) / batch
            model.train()
        loss = train_loss(part[:, :-1], part[:, 1:])
        (loss * len(part) / batch).backward()
        if not routed:
            total += loss.item() * len(part) / batch
    if t["grad_clip"] > 0:
        torch.nn.utils.clip_grad_norm_(matrices + vectors, t["grad_clip"])
        if predictor:
            torch.nn.utils.clip_grad_norm_(predictor, t["grad_clip"])
    for group in optimizer.param_groups:
        group["lr"] = ours_at["lr"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    theirs.append(total)

difference = np.array([x["loss"] for x in ours]) - np.array(theirs)
if a.out:
    json.dump({"ours": [x["loss"] for x in ours], "peer": theirs}, open(a.out, "w"))
print(json.dumps({"steps": len(ours), "mean_difference": float(difference.mean()), "mean_absolute": float(np.abs(difference).mean()),
                  "largest": float(np.abs(difference).max()), "mean_last_50": float(difference[-50:].mean()),
                  "final_ours": ours[-1]["loss"], "final_peer": theirs[-1], "precision": t["precision"], "routed": routed,
                  "torch": torch.__version__}))
