#!/usr/bin/env python3
"""Makes the golden files of models whose tokens choose experts, from the papers' equations in plain PyTorch.

    python make_golden_token_choice.py --torch-lm FOLDER_OF_TORCH_LM

The reference has no token choice, so the MLP here is written anew, token by token: Fedus et al. 2021 (Switch
Transformer, top 1, capacity, equations 4 to 6), Lepikhin et al. 2020 (GShard, top 2 and its normalised gates) and Zoph
et al. 2022 (ST-MoE, the z-loss, equation 5). Attention, norms and the routed block are the reference's. Parameters are
those of make_golden_experts.py.
"""
import argparse
import pathlib
import sys

import h5py
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import make_golden as base
import make_golden_experts as experts

MARGIN = 1e-5  # between the last affinity that a token chooses and the next
BALANCE, Z = 0.3, 0.05

# name: what differs from the reference's model, and how tokens choose
CASES = {
    "token_top1": ({}, {"top_k": 1, "capacity_factor": 1.0}),
    "token_top2": ({"n_kv_heads": 2}, {"top_k": 2, "capacity_factor": 0.7}),
    "token_dropless": ({}, {"top_k": 2, "capacity_factor": 0.0}),
    "token_integrated": ({"noop_experts": experts.MOST_NOOPS}, {"top_k": 2, "capacity_factor": 0.8}),
    "token_staged": (
        {"mod_every": 2, "mod_capacity": 0.5, "gate": "sigmoid", "aux_weight": 0.3, "predictor": True},
        {"top_k": 1, "capacity_factor": 1.0},
    ),
}


class TokenChoiceMoE(nn.Module):
    """Every token goes to the top_k of its choices; an expert takes those that come first, up to its room."""

    def __init__(self, c, top_k, capacity_factor):
        super().__init__()
        self.E, self.choices, self.top_k, self.capacity_factor = (
            c.n_experts, c.n_experts + c.noop_experts, top_k, capacity_factor)
        self.router = nn.Linear(c.d_model, self.choices, bias=False)
        self.w13 = nn.Parameter(torch.empty(self.E, c.d_model, 2 * c.d_ff))
        self.w2 = nn.Parameter(torch.empty(self.E, c.d_ff, c.d_model))

    def expert(self, e, x):
        a, b = (x @ self.w13[e]).chunk(2, -1)
        return (F.silu(a) * b) @ self.w2[e]

    def forward(self, x):
        B, T, _ = x.shape
        room = T if self.capacity_factor == 0 else min(T, max(1, int(self.capacity_factor * self.top_k * T / self.E)))
        logits = self.router(x)
        p = logits.softmax(-1)                                             # [B, T, choices]
        y = [[torch.zeros_like(x[b, t]) for t in range(T)] for b in range(B)]
        rows = np.full((self.E, B, room), -1, np.int32)
        balance, self.dropped = [], 0
        for b in range(B):
            filled, chosen = [0] * self.E, [0] * self.choices
            for t in range(T):
                order = p[b, t].argsort(descending=True).tolist()
                if self.top_k < self.choices:
                    gap = (p[b, t, order[self.top_k - 1]] - p[b, t, order[self.top_k]]).item()
                    assert gap > MARGIN, f"a token has a near tie of its choices ({gap})"
                picked = order[: self.top_k]
                total = sum(p[b, t, e] for e in picked)
                for e in sorted(picked):
                    chosen[e] += 1
                    if e >= self.E:
                        continue
                    if filled[e] == room:
                        self.dropped += 1
                        continue
                    rows[e, b, filled[e]] = b * T + t
                    filled[e] += 1
                    gate = p[b, t, e] if self.top_k == 1 else p[b, t, e] / total
                    y[b][t] = y[b][t] + gate * self.expert(e, x[b, t])
            # f_e: the share of the sequence's choices; P_e: the mean affinity (Fedus et al., equations 4 to 6)
            f = torch.tensor(chosen, dtype=p.dtype) / (T * self.top_k)
            balance.append(self.choices * (f * p[b].mean(0)).sum())
        self.rows, self.affinity = rows, p.detach()
        self.balance = torch.stack(balance).mean()
        self.z = (logits.logsumexp(-1) ** 2).mean()                        # Zoph et al., equation 5
        return torch.stack([torch.stack(row) for row in y])


def build(lm, changes, choice, values):
    model = experts.build(lm, changes, values)
    for block in model.blocks:
        own = TokenChoiceMoE(model.c, **choice)
        own.load_state_dict(block.mlp.state_dict())
        block.mlp = own
    return model


def write_case(lm, folder, name, changes, choice, values, tokens, targets):
    model = build(lm, changes, choice, values)
    config = model.c
    moes = [block.mlp for block in model.blocks]
    routed = [(i, b) for i, b in enumerate(model.blocks) if isinstance(b, lm.MoDBlock)]
    kind = "mode_staged" if routed else "mode_integrated" if config.noop_experts else "moe"
    with h5py.File(folder / f"{name}.h5", "w", libver=base.LIBVER) as f, base.Watch(model) as watch:
        base.attributes(f, config)
        attributes = {"kind": experts.KINDS[kind], "experts": experts.EXPERTS, "noop": config.noop_experts,
                      "capacity_factor": choice["capacity_factor"], "top_k": choice["top_k"],
                      "balance_weight": BALANCE, "z_weight": Z}
        for key, value in attributes.items():
            f.attrs[key] = value
        model.train()
        objective = model(tokens, targets)
        balance = sum(m.balance for m in moes) / len(moes)
        z = sum(m.z for m in moes) / len(moes)
        objective = objective + BALANCE * balance + Z * z
        objective.backward()
        base.put(f, "stream/0", watch.inputs[0])
        for i, x in enumerate(watch.outputs):
            base.put(f, f"stream/{i + 1}", x)
        base.put(f, "hidden", watch.hidden)
        for theirs, p in model.named_parameters():
            mine = experts.our_name(theirs)
            base.put(f, f"gradient/{mine}", experts.ours(mine, p.grad))
        for i, m in enumerate(moes):
            base.put(f, f"experts/affinity/{i}", m.affinity.reshape(-1, m.choices).T.contiguous())
            base.put(f, f"experts/rows/{i}", m.rows)
        dropped = sum(m.dropped for m in moes)
        assert (dropped > 0) == (choice["capacity_factor"] > 0), f"{name}: {dropped} choices were dropped"
        print(f"{name}: {dropped} choices dropped, balance {balance.item():.3f}, z {z.item():.3f}")

        inputs = watch.inputs[:]
        with torch.no_grad():
            model.eval()
            ce = model(tokens, targets).item()
            base.put(f, "logits", model(tokens))
            aux = predictor = 0.0
            k = max(1, int(config.mod_capacity * base.SEQ))
            for i, block in routed:
                r = inputs[i] @ block.w_r
                ordered = r.sort(-1, descending=True).values
                assert (ordered[:, k - 1] - ordered[:, k]).min().item() > base.MARGIN, f"{name}: layer {i}"
                kept = torch.zeros_like(r).scatter(1, r.topk(k, -1).indices, 1.0)
                base.put(f, f"scores/{i}", r)
                base.put(f, f"indices/{i}", base.row_numbers(kept > 0))
                aux += F.binary_cross_entropy_with_logits(r, kept).item() / len(routed)
                p = block.predictor(inputs[i]).squeeze(-1)
                base.put(f, f"predicted/{i}", p)
                predictor += F.binary_cross_entropy_with_logits(p, kept).item() / len(routed)
            parts = {"objective": objective.item(), "cross_entropy": ce, "aux": aux, "predictor": predictor,
                     "balance": balance.item(), "z": z.item()}
            for key, value in parts.items():
                base.put(f, f"loss/{key}", np.float64(value))


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
    values = {**base.shared_parameters(lm), **experts.expert_parameters()}
    tokens, targets = base.case_tokens()
    base.make_double(lm)
    for name, (changes, choice) in CASES.items():
        write_case(lm, args.out, name, changes, choice, values, tokens, targets)


if __name__ == "__main__":
    main()
