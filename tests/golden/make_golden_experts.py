#!/usr/bin/env python3
"""Makes the golden files of expert models (MoE, staged and integrated MoDE) from the reference, torch_lm.py.

    python make_golden_experts.py --torch-lm FOLDER_OF_TORCH_LM

The other files are make_golden.py's, whose parameters these models share where they have the same ones.
"""
import argparse
import math
import pathlib
import sys

import h5py
import numpy as np
import torch
import torch.nn.functional as F

import make_golden as base

EXPERTS, MOST_NOOPS = 4, 3
MARGIN = 1e-5  # between an expert's K-th affinity and the next
KINDS = {"moe": 2, "mode_staged": 3, "mode_integrated": 4}

# name: what differs from a model with 4 experts that take as many tokens as a dense MLP has
CASES = {
    "moe": {},
    # 0.7 * 20 / 4 = 3.5: K is rounded down, and some tokens have no expert.
    "moe_few": {"moe_capacity": 0.7, "n_kv_heads": 2},
    "moe_many": {"moe_capacity": 2.0, "tie_embeddings": True},
    "mode_integrated": {"noop_experts": MOST_NOOPS},
    "mode_staged": {"mod_every": 2, "mod_capacity": 0.5, "gate": "sigmoid", "aux_weight": 0.3, "predictor": True},
    # Five tokens kept, so that each expert takes one.
    "mode_staged_raw": {"mod_every": 2, "gate": "raw", "aux_weight": 0.3},
}


def our_name(name):
    layer = name.split(".")[1] if name.startswith("blocks.") else None
    table = {
        "mlp.router.weight": "mlp.router.weight",
        "mlp.w13": "mlp.experts.gate_up_proj.weight",
        "mlp.w2": "mlp.experts.down_proj.weight",
    }
    rest = name.split(".", 2)[2] if layer is not None else None
    return f"model.layers.{layer}.{table[rest]}" if rest in table else base.our_name(name)


def ours(name, x):
    """The reference's experts are [E, in, out], Fathom's [E, out, in]; its MoD router is a vector, Fathom's a row."""
    if ".mlp.experts." in name:
        return x.transpose(1, 2)
    return x.reshape(1, -1) if name.endswith(".router.weight") and ".mlp." not in name else x


def expert_parameters():
    """fp32 values, in Fathom's layout, of what the models have that make_golden's do not."""
    rng = np.random.default_rng(20260202)
    values = {}
    for layer in range(base.DEPTH):
        prefix = f"model.layers.{layer}.mlp."
        for name, shape in {
            "router.weight": (EXPERTS + MOST_NOOPS, base.WIDTH),
            "experts.gate_up_proj.weight": (EXPERTS, 2 * base.FFN, base.WIDTH),
            "experts.down_proj.weight": (EXPERTS, base.WIDTH, base.FFN),
        }.items():
            values[prefix + name] = rng.normal(0.0, 1.0 / math.sqrt(shape[-1]), shape).astype(np.float32)
    return values


def build(lm, changes, values):
    config = base.make_config(lm, {"n_experts": EXPERTS, "moe_capacity": 1.0, **changes}, base.SEQ)
    torch.set_default_dtype(torch.float64)
    model = lm.Transformer(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mine = our_name(name)
            x = torch.from_numpy(base.take(values, mine, config)).double()
            if mine.endswith("mlp.router.weight"):
                x = x[: p.shape[0]]
            p.copy_(ours(mine, x) if x.ndim == 3 else x.reshape(p.shape))
    routed = [b for b in model.blocks if isinstance(b, lm.MoDBlock)]
    for block in routed:  # Fathom takes the mean over routed layers
        block.register_forward_hook(lambda m, i, o: (o[0], None if o[1] is None else o[1] / len(routed)))
    return model


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
            assert gap > MARGIN, f"layer {layer}: expert {e} has a near tie at its K-th token ({gap})"
        taken = p[..., e].topk(k, -1).indices.sort(-1).values + seq * torch.arange(batch)[:, None]
        rows.append(taken.reshape(-1))
    base.put(f, f"experts/affinity/{layer}", p.reshape(batch * seq, -1).T.contiguous())
    base.put(f, f"experts/rows/{layer}", torch.stack(rows).numpy().astype(np.int32))


def write_case(lm, folder, name, changes, values, tokens, targets):
    model = build(lm, changes, values)
    config = model.c
    routed = [(i, b) for i, b in enumerate(model.blocks) if isinstance(b, lm.MoDBlock)]
    seen = {}
    for i, block in enumerate(model.blocks):
        block.mlp.register_forward_hook(lambda m, x, y, i=i: seen.__setitem__(i, x[0].detach()))
    kind = "mode_staged" if routed else "mode_integrated" if config.noop_experts else "moe"
    with h5py.File(folder / f"{name}.h5", "w", libver=base.LIBVER) as f, base.Watch(model) as watch:
        base.attributes(f, config)
        f.attrs["kind"] = KINDS[kind]
        f.attrs["experts"] = EXPERTS
        f.attrs["noop"] = config.noop_experts
        f.attrs["capacity_factor"] = config.moe_capacity
        model.train()
        objective = model(tokens, targets)
        objective.backward()
        base.put(f, "stream/0", watch.inputs[0])
        for i, x in enumerate(watch.outputs):
            base.put(f, f"stream/{i + 1}", x)
        base.put(f, "hidden", watch.hidden)
        for theirs, p in model.named_parameters():
            base.put(f, f"gradient/{our_name(theirs)}", ours(our_name(theirs), p.grad))

        inputs = watch.inputs[:]
        with torch.no_grad():
            for i, block in enumerate(model.blocks):
                put_choice(f, i, block.mlp, seen[i])
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
                if config.predictor:
                    p = block.predictor(inputs[i]).squeeze(-1)
                    base.put(f, f"predicted/{i}", p)
                    predictor += F.binary_cross_entropy_with_logits(p, kept).item() / len(routed)
            total = ce + (config.aux_weight * aux if routed else 0.0) + predictor
            assert abs(total - objective.item()) < 1e-12 * abs(total), (name, total, objective.item())
            parts = {"objective": objective.item(), "cross_entropy": ce, "aux": aux, "predictor": predictor}
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
    own = expert_parameters()
    values = {**base.shared_parameters(lm), **own}
    tokens, targets = base.case_tokens()
    base.make_double(lm)
    with h5py.File(args.out / "shared_experts.h5", "w", libver=base.LIBVER) as f:
        for name, x in own.items():
            base.put(f, f"parameter/{name}", x)
    for name, changes in CASES.items():
        write_case(lm, args.out, name, changes, values, tokens, targets)
        print(name)


if __name__ == "__main__":
    main()
