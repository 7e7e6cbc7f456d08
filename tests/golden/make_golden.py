#!/usr/bin/env python3
"""Makes the golden files of this folder from the PyTorch reference model, torch_lm.py.

    python make_golden.py --torch-lm FOLDER_OF_TORCH_LM

README.md says what the files hold and how they are compared. Everything is seeded: the same versions of
PyTorch and NumPy write the same numbers.
"""
import argparse
import math
import pathlib
import sys

import h5py
import numpy as np
import torch
import torch.nn.functional as F

VOCAB, WIDTH, DEPTH, HEADS, FFN = 41, 32, 4, 4, 24
BATCH, SEQ = 3, 20
MARGIN = 1e-4  # between the K-th and the next score, and between a causal logit and its threshold
LIBVER = ("v108", "v108")  # small, and read by every HDF5 since 1.8
GATES = {"raw": 0, "sigmoid": 1, "tanh": 2}

# name: what differs from a dense model with as many key/value heads as query heads and an own head
CASES = {
    "dense": {},
    "dense_gqa": {"n_kv_heads": 2},
    "dense_tied": {"tie_embeddings": True},
    "mod_raw_aux": {"mod_every": 2, "gate": "raw", "aux_weight": 0.3},
    "mod_sigmoid_aux": {"mod_every": 2, "gate": "sigmoid", "aux_weight": 0.3},
    # 0.13 * 20 = 2.6: K is rounded down.
    "mod_tanh_aux": {"mod_every": 2, "gate": "tanh", "aux_weight": 0.3, "mod_capacity": 0.13},
    "mod_raw_predictor": {"mod_every": 2, "gate": "raw", "predictor": True},
    "mod_sigmoid_both": {"mod_every": 2, "gate": "sigmoid", "aux_weight": 0.3, "predictor": True},
    "mod_raw_both_gqa": {"mod_every": 2, "gate": "raw", "aux_weight": 0.3, "predictor": True, "n_kv_heads": 2},
}

STEPS, CURVE_BATCH, CURVE_SEQ = 200, 4, 16
BETAS, EPS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 1e-8, 0.1, 1.0
CURVES = {
    "curve_dense": {},
    "curve_mod": {"mod_every": 2, "gate": "sigmoid", "aux_weight": 0.1, "predictor": True},
}


def our_name(name):
    """torch_lm's name of a parameter -> Fathom's."""
    whole = {"emb.weight": "model.embed_tokens.weight", "nf": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in whole:
        return whole[name]
    _, layer, rest = name.split(".", 2)
    table = {
        "n1": "input_layernorm.weight",
        "n2": "post_attention_layernorm.weight",
        "attn.wqkv.weight": "self_attn.qkv_proj.weight",
        "attn.wo.weight": "self_attn.o_proj.weight",
        "mlp.w13.weight": "mlp.gate_up_proj.weight",
        "mlp.w2.weight": "mlp.down_proj.weight",
        "w_r": "router.weight",
    }
    ours = table.get(rest) or rest.replace("predictor.", "router_predictor.")
    return f"model.layers.{layer}.{ours}"


def make_config(lm, changes, seq):
    base = dict(vocab_size=VOCAB, d_model=WIDTH, n_layers=DEPTH, n_heads=HEADS, n_kv_heads=HEADS, d_ff=FFN,
                max_seq_len=seq, mod_capacity=0.25, predictor=False)
    return lm.Config(**{**base, **changes})


def shared_parameters(lm):
    """fp32 values for every parameter of the largest model; every case takes its own from these.

    They are larger than an initialisation would be, so that no term of the model is lost in rounding: unit
    variance is kept by each matrix, norms are spread about 1, router scores have a deviation of about 1.
    """
    model = lm.Transformer(make_config(lm, {"mod_every": 2, "aux_weight": 0.3, "predictor": True}, SEQ))
    rng = np.random.default_rng(20260101)
    values = {}
    for name, p in model.named_parameters():
        ours = our_name(name)
        if ours == "model.embed_tokens.weight":
            x = rng.normal(0.0, 1.0, p.shape)
        elif ours.endswith("norm.weight"):
            x = rng.uniform(0.6, 1.4, p.shape)
        elif ours.endswith("bias"):
            x = rng.normal(0.0, 0.2, p.shape)
        else:
            x = rng.normal(0.0, 1.0 / math.sqrt(p.shape[-1]), p.shape)
        values[ours] = x.astype(np.float32)
    return values


def take(values, name, model_config):
    """The values of one parameter: with fewer key/value heads, the first ones of the keys and of the values."""
    x = values[name]
    if name.endswith("qkv_proj.weight"):
        d = WIDTH // HEADS
        q, k, v = np.split(x, [HEADS * d, 2 * HEADS * d])
        g = model_config.n_kv_heads * d
        x = np.concatenate([q, k[:g], v[:g]])
    return x


def build(lm, changes, values, seq, dtype):
    config = make_config(lm, changes, seq)
    torch.set_default_dtype(dtype)
    model = lm.Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(take(values, our_name(name), config)).to(dtype).reshape(p.shape))
    # The reference adds the routers' losses over its routed layers; Fathom takes their mean.
    routed = [b for b in model.blocks if isinstance(b, lm.MoDBlock)]
    for block in routed:
        block.register_forward_hook(lambda m, i, o: (o[0], None if o[1] is None else o[1] / len(routed)))
    return model


def make_double(lm):
    """Makes the reference a true fp64 one: it asks for fp32 in .float() and in its rotary tables."""
    torch.Tensor.float = torch.Tensor.double

    def rope_tables(cfg, device):
        dh = cfg.d_model // cfg.n_heads
        inv = cfg.rope_theta ** (-torch.arange(0, dh, 2, device=device, dtype=torch.float64) / dh)
        angle = torch.arange(cfg.max_seq_len, device=device, dtype=torch.float64)[:, None] * inv
        return angle.cos(), angle.sin()

    lm.rope_tables = rope_tables


class Watch:
    """Keeps the input and output of each block, and the input of the head."""

    def __init__(self, model):
        self.inputs, self.outputs, self.hidden = [], [], None
        self.hooks = [b.register_forward_hook(self.block) for b in model.blocks]
        self.hooks.append(model.head.register_forward_pre_hook(self.head))

    def block(self, module, inputs, output):
        self.inputs.append(inputs[0].detach())
        self.outputs.append(output[0].detach())

    def head(self, module, inputs):
        self.hidden = inputs[0].detach()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for h in self.hooks:
            h.remove()


def put(group, name, x):
    x = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    if x.dtype == np.float64 and x.ndim > 0:
        x = x.astype(np.float32)  # rounded once, by at most 6e-8 of each number; scalars stay fp64
    group.create_dataset(name, data=x, track_times=False)


def row_numbers(mask):
    """Rows b*T + t where mask [B, T] holds, ascending."""
    return np.flatnonzero(mask.reshape(-1).numpy()).astype(np.int32)


def attributes(f, config):
    f.attrs["kv_heads"] = config.n_kv_heads
    f.attrs["tied"] = int(config.tie_embeddings)
    f.attrs["routed"] = int(config.mod_every > 0)
    f.attrs["capacity"] = config.mod_capacity
    f.attrs["gate"] = GATES[config.gate]
    f.attrs["aux_weight"] = config.aux_weight
    f.attrs["predictor"] = int(bool(config.mod_every) and config.predictor)


def write_case(lm, folder, name, changes, values, tokens, targets):
    model = build(lm, changes, values, SEQ, torch.float64)
    config = model.c
    routed = [(i, b) for i, b in enumerate(model.blocks) if isinstance(b, lm.MoDBlock)]
    k = max(1, int(config.mod_capacity * SEQ))
    with h5py.File(folder / f"{name}.h5", "w", libver=LIBVER) as f, Watch(model) as watch:
        attributes(f, config)
        model.train()
        objective = model(tokens, targets)
        objective.backward()
        put(f, "stream/0", watch.inputs[0])
        for i, x in enumerate(watch.outputs):
            put(f, f"stream/{i + 1}", x)
        put(f, "hidden", watch.hidden)
        for name_, p in model.named_parameters():
            put(f, f"gradient/{our_name(name_)}", p.grad.reshape(1, -1) if name_.endswith("w_r") else p.grad)

        inputs = watch.inputs[:]
        with torch.no_grad():
            model.eval()
            ce = model(tokens, targets).item()
            put(f, "logits", model(tokens))
            aux = predictor = 0.0
            for i, block in routed:
                x = inputs[i]
                r = x @ block.w_r
                ordered = r.sort(-1, descending=True).values
                gap = (ordered[:, k - 1] - ordered[:, k]).min().item()
                assert gap > MARGIN, f"{name}: layer {i} has a near tie at the K-th score ({gap})"
                kept = torch.zeros_like(r).scatter(1, r.topk(k, -1).indices, 1.0)
                put(f, f"scores/{i}", r)
                put(f, f"indices/{i}", row_numbers(kept > 0))
                aux += F.binary_cross_entropy_with_logits(r, kept).item() / len(routed)
                if config.predictor:
                    p = block.predictor(x).squeeze(-1)
                    put(f, f"predicted/{i}", p)
                    predictor += F.binary_cross_entropy_with_logits(p, kept).item() / len(routed)
            total = ce + (config.aux_weight * aux if routed else 0.0) + predictor
            assert abs(total - objective.item()) < 1e-12 * abs(total), (name, total, objective.item())
            parts = {"objective": objective.item(), "cross_entropy": ce, "aux": aux, "predictor": predictor}
            for key, value in parts.items():
                put(f, f"loss/{key}", np.float64(value))

            if not routed:
                return
            watch.inputs.clear()
            put(f, "causal/logits", model(tokens, causal_routing=True))
            for i, block in routed:
                x = watch.inputs[i]
                logit = block.predictor(x).squeeze(-1) if config.predictor else x @ block.w_r
                assert logit.abs().min() > MARGIN, f"{name}: layer {i} has a causal logit near the threshold"
                keep = logit > 0
                assert keep.any() and not keep.all(), f"{name}: layer {i} keeps all or nothing"
                assert torch.isclose(keep.double().mean(), block.kept)
                put(f, f"causal/indices/{i}", row_numbers(keep))


def case_tokens():
    """Tokens and targets of the cases, [BATCH, SEQ] each."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, VOCAB, (BATCH, SEQ + 1))
    assert (text[:, 0] != text[:, 1]).all()  # an exact tie of their scores otherwise
    return torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:])


def curve_tokens():
    """Sequences that a model can learn: each token follows from the two before it, but for one in eight."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, VOCAB, (STEPS, CURVE_BATCH, CURVE_SEQ + 1))
    # A sequence that begins with one token twice has two equal rows, and so an exact tie of their scores.
    x[..., 1] = np.where(x[..., 1] == x[..., 0], (x[..., 1] + 1) % VOCAB, x[..., 1])
    noise = rng.random(x.shape) < 0.125
    for t in range(2, CURVE_SEQ + 1):
        follows = (3 * x[..., t - 1] + x[..., t - 2] // 8 + 5) % VOCAB
        x[..., t] = np.where(noise[..., t], x[..., t], follows)
    return x.astype(np.uint8)


def learning_rates():
    """Ten steps of warm-up to 2e-3, then a cosine down to a tenth."""
    rates = []
    for step in range(STEPS):
        warm = min(1.0, (step + 1) / 10)
        rates.append(2e-3 * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / STEPS))))
    return np.array(rates)


def train_curve(lm, changes, values, data, rates, dtype):
    """Cross-entropy before each update, of PyTorch's AdamW with Fathom's groups."""
    model = build(lm, changes, values, CURVE_SEQ, dtype)
    model.train()
    decayed, undecayed, predictor = [], [], []
    for name, p in model.named_parameters():
        (predictor if ".predictor." in name else decayed if p.ndim > 1 else undecayed).append(p)
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": undecayed, "weight_decay": 0.0}]
    if predictor:
        groups.append({"params": predictor, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS)
    losses, objectives = [], []
    for step in range(STEPS):
        batch = torch.from_numpy(data[step].astype(np.int64))
        tokens, targets = batch[:, :-1], batch[:, 1:]
        with torch.no_grad():
            model.eval()
            losses.append(model(tokens, targets).item())
            model.train()
        optimizer.zero_grad()
        objective = model(tokens, targets)
        objective.backward()
        objectives.append(objective.item())
        torch.nn.utils.clip_grad_norm_(decayed + undecayed, CLIP)
        if predictor:
            torch.nn.utils.clip_grad_norm_(predictor, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
    return model.c, np.array(losses), np.array(objectives)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-lm", required=True, help="the folder that holds torch_lm.py")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    sys.path.insert(0, args.torch_lm)
    import torch_lm as lm

    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    values = shared_parameters(lm)
    tokens, targets = case_tokens()

    # The curves first: in fp32 the reference runs as it is; make_double() cannot be undone.
    data, rates = curve_tokens(), learning_rates()
    curves = {n: {"fp32": train_curve(lm, c, values, data, rates, torch.float32)} for n, c in CURVES.items()}
    make_double(lm)
    for name, changes in CURVES.items():
        curves[name]["fp64"] = train_curve(lm, changes, values, data, rates, torch.float64)
        with h5py.File(args.out / f"{name}.h5", "w", libver=LIBVER) as f:
            attributes(f, curves[name]["fp32"][0])
            for dtype, (_, losses, objectives) in curves[name].items():
                f.create_dataset(f"loss/{dtype}", data=losses, track_times=False)
                f.create_dataset(f"objective/{dtype}", data=objectives, track_times=False)
            drift = np.abs(curves[name]["fp32"][1] - curves[name]["fp64"][1]).max()
            assert drift < 1e-4, f"{name}: fp32 and fp64 disagree on which tokens are kept ({drift})"
            print(f"{name}: {losses[0]:.4f} -> {losses[-10:].mean():.4f}; fp32 and fp64 differ by {drift:.2e}")

    with h5py.File(args.out / "shared.h5", "w", libver=LIBVER) as f:
        for name, x in values.items():
            put(f, f"parameter/{name}", x.reshape(1, -1) if name.endswith("router.weight") else x)
        put(f, "tokens", tokens.numpy().astype(np.uint8))
        put(f, "targets", targets.numpy().astype(np.uint8))
        put(f, "curve/tokens", data)
        f.create_dataset("curve/learning_rate", data=rates, track_times=False)
    for name, changes in CASES.items():
        write_case(lm, args.out, name, changes, values, tokens, targets)
        print(name)


if __name__ == "__main__":
    main()
