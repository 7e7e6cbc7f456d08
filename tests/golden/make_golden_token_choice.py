#!/usr/bin/env python3
"""Makes the golden files of models whose tokens choose experts, from the papers' equations in plain PyTorch.

    python make_golden_token_choice.py --torch-lm FOLDER_OF_TORCH_LM

The reference has no token choice, so the MLP here is written anew, token by token: Fedus et al. 2021 (Switch
Transformer, top 1, capacity, equations 4 to 6), Lepikhin et al. 2020 (GShard, top 2 and its normalised gates) and Zoph
et al. 2022 (ST-MoE, the z-loss, equation 5). Attention, norms and the routed block are the reference's.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from reference import (AFFINITY_MARGIN, EXPERTS, MOST_NOOPS, Watch, build, case_tokens, create, expert_parameters,
                       make_double, put, put_expert_attributes, put_losses, put_pass, put_top_k, run,
                       shared_parameters)

BALANCE, Z = 0.3, 0.05

# name: what differs from the reference's model, and how tokens choose
CASES = {
    "token_top1": ({}, {"top_k": 1, "capacity_factor": 1.0}),
    "token_top2": ({"n_kv_heads": 2}, {"top_k": 2, "capacity_factor": 0.7}),
    "token_dropless": ({}, {"top_k": 2, "capacity_factor": 0.0}),
    "token_integrated": ({"noop_experts": MOST_NOOPS}, {"top_k": 2, "capacity_factor": 0.8}),
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
                    assert gap > AFFINITY_MARGIN, f"a token has a near tie of its choices ({gap})"
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


def write_case(lm, folder, name, changes, choice, values, tokens, targets):
    model = build(lm, {"n_experts": EXPERTS, **changes}, values, mlp=lambda c: TokenChoiceMoE(c, **choice))
    moes = [block.mlp for block in model.blocks]
    with create(folder, name) as f, Watch(model) as watch:
        put_expert_attributes(f, model.c, **choice, balance_weight=BALANCE, z_weight=Z)
        model.train()
        objective = model(tokens, targets)
        balance = sum(m.balance for m in moes) / len(moes)
        z = sum(m.z for m in moes) / len(moes)
        objective = objective + BALANCE * balance + Z * z
        objective.backward()
        put_pass(f, model, watch)
        for i, m in enumerate(moes):
            put(f, f"experts/affinity/{i}", m.affinity.reshape(-1, m.choices).T.contiguous())
            put(f, f"experts/rows/{i}", m.rows)
        dropped = sum(m.dropped for m in moes)
        assert (dropped > 0) == (choice["capacity_factor"] > 0), f"{name}: {dropped} choices were dropped"
        print(f"{name}: {dropped} choices dropped, balance {balance.item():.3f}, z {z.item():.3f}")
        inputs = watch.inputs[:]
        with torch.no_grad():
            model.eval()
            ce = model(tokens, targets).item()
            put(f, "logits", model(tokens))
            aux, predictor = put_top_k(f, lm, model, inputs, name)
            put_losses(f, objective=objective.item(), cross_entropy=ce, aux=aux, predictor=predictor,
                       balance=balance.item(), z=z.item())


def write(lm, folder):
    values = {**shared_parameters(lm), **expert_parameters()}
    tokens, targets = case_tokens()
    make_double(lm)
    for name, (changes, choice) in CASES.items():
        write_case(lm, folder, name, changes, choice, values, tokens, targets)


if __name__ == "__main__":
    run(write, __doc__)
