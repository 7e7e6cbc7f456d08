#!/usr/bin/env python3
"""Makes the golden files of models whose experts choose and are taught a causal rule, in plain PyTorch.

    python make_golden_causal_experts.py --torch-lm FOLDER_OF_TORCH_LM

The MLP here is written anew, expert by expert and token by token: Zhou et al. 2022 (expert choice: the affinity is the
softmax over the experts, each takes its K best tokens of a sequence), and for each choice what Raposo et al. 2024,
section 3.5, say of a block: a binary cross-entropy that teaches the router's logit, or an MLP that reads the router's
input without its gradient, whether the token is among the K; in decoding, the token is taken when sigmoid > 0.5.
Attention, norms and the routed block are the reference's.
"""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from reference import (AFFINITY_MARGIN, EXPERTS, MARGIN, MOST_NOOPS, PREDICTOR_HIDDEN, Watch, build, case_tokens,
                       create, expert_parameters, make_double, numbers_of, put, put_causal, put_expert_attributes,
                       put_losses, put_pass, put_top_k, run, shared_parameters)

AUX = 0.3

# name: what differs from a model with 4 experts that take as many tokens as a dense MLP has; what is taught
CASES = {
    "moe_aux": ({}, {"aux": True}),
    "moe_predictor": ({"moe_capacity": 0.7, "n_kv_heads": 2}, {"predictor": True}),
    "mode_integrated_both": ({"noop_experts": MOST_NOOPS}, {"aux": True, "predictor": True}),
    "mode_staged": ({"mod_every": 2, "mod_capacity": 0.5, "gate": "sigmoid"}, {"aux": True, "predictor": True}),
    # Five tokens kept, so that each expert takes one.
    "mode_staged_raw": ({"mod_every": 2, "gate": "raw"}, {"aux": True}),
}


class CausalExpertChoice(nn.Module):
    """Each choice takes its K best tokens of a sequence (no-ops too, for nothing), and is taught to foretell them."""

    def __init__(self, c, predictor):
        super().__init__()
        self.E, self.choices, self.capacity = c.n_experts, c.n_experts + c.noop_experts, c.moe_capacity
        self.router = nn.Linear(c.d_model, self.choices, bias=False)
        self.w13 = nn.Parameter(torch.empty(self.E, c.d_model, 2 * c.d_ff))
        self.w2 = nn.Parameter(torch.empty(self.E, c.d_ff, c.d_model))
        if predictor:
            self.predictor = nn.Sequential(nn.Linear(c.d_model, PREDICTOR_HIDDEN), nn.SiLU(),
                                           nn.Linear(PREDICTOR_HIDDEN, self.choices))
        self.causal = False

    def expert(self, e, x):
        a, b = (x @ self.w13[e]).chunk(2, -1)
        return (F.silu(a) * b) @ self.w2[e]

    def choose(self, p):
        """taken [B, T, choices] of affinity p, likewise."""
        B, T, _ = p.shape
        k = max(1, int(self.capacity * T / self.E))
        taken = torch.zeros_like(p)
        for b in range(B):
            for e in range(self.choices):
                order = p[b, :, e].argsort(descending=True)
                gap = (p[b, order[k - 1], e] - p[b, order[k], e]).item()
                assert gap > AFFINITY_MARGIN, f"choice {e} has a near tie at its K-th token ({gap})"
                taken[b, order[:k], e] = 1.0
        return taken

    def forward(self, x):
        logits = self.router(x)
        p = logits.softmax(-1)
        predicted = self.predictor(x.detach()) if hasattr(self, "predictor") else None
        decides = logits if predicted is None else predicted
        if self.causal:
            assert decides.abs().min() > MARGIN, "a causal logit is near the threshold"
            taken = (decides > 0).to(x.dtype)
        else:
            taken = self.choose(p.detach())
            self.aux = F.binary_cross_entropy_with_logits(logits, taken)
            self.foretold = 0.0 if predicted is None else F.binary_cross_entropy_with_logits(predicted, taken)
        self.logits, self.p, self.predicted, self.taken = logits, p, predicted, taken
        y = torch.zeros_like(x)
        for b, t, e in taken[..., : self.E].nonzero().tolist():
            add = torch.zeros_like(x)
            add[b, t] = 1.0
            y = y + add * (p[b, t, e] * self.expert(e, x[b, t]))
        return y


def by_choice(x):
    """[B, T, choices] -> [choices, B*T]."""
    return x.detach().reshape(-1, x.shape[-1]).T.contiguous()


def put_choices(f, layer, m):
    put(f, f"experts/affinity/{layer}", by_choice(m.p))
    put(f, f"experts/scores/{layer}", by_choice(m.logits))
    if m.predicted is not None:
        put(f, f"experts/predicted/{layer}", by_choice(m.predicted))
    taken = by_choice(m.taken)
    put(f, f"experts/chosen/{layer}", numbers_of(taken > 0))
    rows = [np.flatnonzero(one.numpy()) for one in taken[: m.E]]
    put(f, f"experts/rows/{layer}", np.stack(rows).astype(np.int32))


def write_case(lm, folder, name, changes, taught, values, tokens, targets):
    aux, predictor = taught.get("aux", False), taught.get("predictor", False)
    config = {"n_experts": EXPERTS, "aux_weight": AUX if aux else 0.0, "predictor": predictor, **changes}
    model = build(lm, config, values, mlp=lambda c: CausalExpertChoice(c, predictor))
    moes = [block.mlp for block in model.blocks]
    with create(folder, name) as f, Watch(model) as watch:
        put_expert_attributes(f, model.c)
        f.attrs["predictor"] = int(predictor)
        f.attrs["foretold"] = 1
        model.train()
        objective = model(tokens, targets)
        expert_aux = sum(m.aux for m in moes) / len(moes)
        foretold = sum(m.foretold for m in moes) / len(moes)
        objective = objective + (AUX * expert_aux if aux else 0.0) + foretold
        objective.backward()
        put_pass(f, model, watch)
        for i, m in enumerate(moes):
            put_choices(f, i, m)
        inputs = watch.inputs[:]
        with torch.no_grad():
            model.eval()
            ce = model(tokens, targets).item()
            put(f, "logits", model(tokens))
            depth_aux, depth_predictor = put_top_k(f, lm, model, inputs, name)
            put_losses(f, objective=objective.item(), cross_entropy=ce, aux=depth_aux, predictor=depth_predictor,
                       expert_aux=expert_aux.item(), expert_predictor=float(foretold))
            watch.inputs.clear()
            for m in moes:
                m.causal = True
            put(f, "causal/logits", model(tokens, causal_routing=True))
            kept = put_causal(f, lm, model, watch.inputs, name)
            shares = []
            for i, m in enumerate(moes):
                taken = m.taken.reshape(-1, m.choices) > 0  # under a mask; of a routed block, all its rows
                if i in kept:
                    taken = taken[kept[i].reshape(-1)]
                put(f, f"causal/chosen/{i}", numbers_of(taken.T.contiguous()))
                shares.append(taken[:, : m.E].double().mean().item())
            assert all(0.1 < s < 0.9 for s in shares), f"{name}: experts take {shares}"
            print(f"{name}: experts take {shares}")


def write(lm, folder):
    values = {**shared_parameters(lm), **expert_parameters()}
    tokens, targets = case_tokens()
    make_double(lm)
    for name, (changes, taught) in CASES.items():
        write_case(lm, folder, name, changes, taught, values, tokens, targets)


if __name__ == "__main__":
    run(write, __doc__)
