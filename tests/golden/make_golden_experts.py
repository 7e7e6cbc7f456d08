#!/usr/bin/env python3
"""Makes the golden files of models whose experts choose (MoE, integrated MoDE), without a causal rule, from the
reference, torch_lm.py.

    python make_golden_experts.py --torch-lm FOLDER_OF_TORCH_LM
"""
import numpy as np
import torch

from reference import (AFFINITY_MARGIN, EXPERTS, MOST_NOOPS, Watch, build, case_tokens, create, expert_parameters,
                       make_double, put, put_expert_attributes, put_losses, put_pass, run, shared_parameters)

# name: what differs from a model with 4 experts that take as many tokens as a dense MLP has
CASES = {
    "moe": {},
    # 0.7 * 20 / 4 = 3.5: K is rounded down, and some tokens have no expert.
    "moe_few": {"moe_capacity": 0.7, "n_kv_heads": 2},
    "moe_many": {"moe_capacity": 2.0, "tie_embeddings": True},
    "mode_integrated": {"noop_experts": MOST_NOOPS},
}


def put_choice(f, layer, moe, x):
    """The affinity, transposed, and the rows of each expert: sequence after sequence, in the order of the tokens."""
    batch, seq, _ = x.shape
    p = moe.router(x).softmax(-1)
    k = max(1, int(moe.c.moe_capacity * seq / moe.E))
    rows = []
    for e in range(moe.E):
        ordered = p[..., e].sort(-1, descending=True).values
        if k < seq:
            gap = (ordered[:, k - 1] - ordered[:, k]).min().item()
            assert gap > AFFINITY_MARGIN, f"layer {layer}: expert {e} has a near tie at its K-th token ({gap})"
        taken = p[..., e].topk(k, -1).indices.sort(-1).values + seq * torch.arange(batch)[:, None]
        rows.append(taken.reshape(-1))
    put(f, f"experts/affinity/{layer}", p.reshape(batch * seq, -1).T.contiguous())
    put(f, f"experts/rows/{layer}", torch.stack(rows).numpy().astype(np.int32))


def write_case(lm, folder, name, changes, values, tokens, targets):
    model = build(lm, {"n_experts": EXPERTS, "moe_capacity": 1.0, **changes}, values)
    seen = {}
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(i, x[0].detach()))
    with create(folder, name) as f, Watch(model) as watch:
        put_expert_attributes(f, model.c)
        model.train()
        objective = model(tokens, targets)
        objective.backward()
        put_pass(f, model, watch)
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                put_choice(f, i, block.mlp, seen[i])
            put(f, "logits", model(tokens))
            put_losses(f, objective=objective.item(), cross_entropy=objective.item(), aux=0.0, predictor=0.0)


def write(lm, folder):
    own = expert_parameters()
    values = {**shared_parameters(lm), **own}
    tokens, targets = case_tokens()
    make_double(lm)
    with create(folder, "shared_experts") as f:
        for name, x in own.items():
            put(f, f"parameter/{name}", x)
    for name, changes in CASES.items():
        write_case(lm, folder, name, changes, values, tokens, targets)
        print(name)


if __name__ == "__main__":
    run(write, __doc__)
