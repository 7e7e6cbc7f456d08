#!/usr/bin/env python3
"""Makes the golden files of dense and Mixture-of-Depths models from the PyTorch reference model, torch_lm.py.

    python make_golden.py --torch-lm FOLDER_OF_TORCH_LM
"""
import math

import numpy as np
import torch

from reference import (VOCAB, Watch, build, case_tokens, create, make_double, put, put_attributes, put_causal,
                       put_losses, put_pass, put_top_k, routed_blocks, run, shared_parameters)

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


def write_case(lm, folder, name, changes, values, tokens, targets):
    model = build(lm, changes, values)
    config = model.c
    with create(folder, name) as f, Watch(model) as watch:
        put_attributes(f, config)
        model.train()
        objective = model(tokens, targets)
        objective.backward()
        put_pass(f, model, watch)
        inputs = watch.inputs[:]
        with torch.no_grad():
            model.eval()
            ce = model(tokens, targets).item()
            put(f, "logits", model(tokens))
            aux, predictor = put_top_k(f, lm, model, inputs, name)
            total = ce + config.aux_weight * aux + predictor
            assert abs(total - objective.item()) < 1e-12 * abs(total), (name, total, objective.item())
            put_losses(f, objective=objective.item(), cross_entropy=ce, aux=aux, predictor=predictor)
            if not routed_blocks(lm, model):
                return
            watch.inputs.clear()
            put(f, "causal/logits", model(tokens, causal_routing=True))
            put_causal(f, lm, model, watch.inputs, name)


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


def write_curves(lm, folder, values, data, rates):
    """In fp32 the reference runs as it is; then it is made an fp64 one, for good."""
    curves = {n: {"fp32": train_curve(lm, c, values, data, rates, torch.float32)} for n, c in CURVES.items()}
    make_double(lm)
    for name, changes in CURVES.items():
        curves[name]["fp64"] = train_curve(lm, changes, values, data, rates, torch.float64)
        with create(folder, name) as f:
            put_attributes(f, curves[name]["fp32"][0])
            for dtype, (_, losses, objectives) in curves[name].items():
                f.create_dataset(f"loss/{dtype}", data=losses, track_times=False)
                f.create_dataset(f"objective/{dtype}", data=objectives, track_times=False)
            drift = np.abs(curves[name]["fp32"][1] - curves[name]["fp64"][1]).max()
            assert drift < 1e-4, f"{name}: fp32 and fp64 disagree on which tokens are kept ({drift})"
            print(f"{name}: {losses[0]:.4f} -> {losses[-10:].mean():.4f}; fp32 and fp64 differ by {drift:.2e}")


def write(lm, folder):
    values = shared_parameters(lm)
    tokens, targets = case_tokens()
    data, rates = curve_tokens(), learning_rates()
    write_curves(lm, folder, values, data, rates)
    with create(folder, "shared") as f:
        for name, x in values.items():
            put(f, f"parameter/{name}", x.reshape(1, -1) if name.endswith("router.weight") else x)
        put(f, "tokens", tokens.numpy().astype(np.uint8))
        put(f, "targets", targets.numpy().astype(np.uint8))
        put(f, "curve/tokens", data)
        f.create_dataset("curve/learning_rate", data=rates, track_times=False)
    for name, changes in CASES.items():
        write_case(lm, folder, name, changes, values, tokens, targets)
        print(name)


if __name__ == "__main__":
    run(write, __doc__)
