"""What the scripts that make golden files share: the reference model, torch_lm.py, with Fathom's names, parameters and
layout, and what every file holds.

README.md says what the files hold and how they are compared. Everything is seeded: the same versions of PyTorch and
NumPy write the same numbers.
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
EXPERTS, MOST_NOOPS = 4, 3
PREDICTOR_HIDDEN = WIDTH // 4
MARGIN = 1e-4  # between the K-th and the next score, and between a causal logit and its threshold
AFFINITY_MARGIN = 1e-5  # between the last affinity that is taken and the next
LIBVER = ("v108", "v108")  # small, and read by every HDF5 since 1.8
GATES = {"raw": 0, "sigmoid": 1, "tanh": 2}
KINDS = {"moe": 2, "mode_staged": 3, "mode_integrated": 4}


def run(write, description):
    """Reads the command line, makes the reference a seeded fp64 one and calls write(reference, folder)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-lm", required=True, help="the folder that holds torch_lm.py")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    sys.path.insert(0, args.torch_lm)
    import torch_lm as lm

    torch.manual_seed(0)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    write(lm, args.out)


def make_double(lm):
    """Makes the reference a true fp64 one, for good: it asks for fp32 in .float() and in its rotary tables."""
    torch.Tensor.float = torch.Tensor.double

    def rope_tables(cfg, device):
        dh = cfg.d_model // cfg.n_heads
        inv = cfg.rope_theta ** (-torch.arange(0, dh, 2, device=device, dtype=torch.float64) / dh)
        angle = torch.arange(cfg.max_seq_len, device=device, dtype=torch.float64)[:, None] * inv
        return angle.cos(), angle.sin()

    lm.rope_tables = rope_tables


def our_name(name):
    """torch_lm's name of a parameter, or that of an MLP of these scripts -> Fathom's."""
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
        "mlp.router.weight": "mlp.router.weight",
        "mlp.w13": "mlp.experts.gate_up_proj.weight",
        "mlp.w2": "mlp.experts.down_proj.weight",
        "w_r": "router.weight",
    }
    ours = table.get(rest) or rest.replace("predictor.", "router_predictor.")
    return f"model.layers.{layer}.{ours}"


def our_layout(name, x):
    """The reference's experts are [E, in, out], Fathom's [E, out, in]; its MoD router is a vector, Fathom's a row."""
    if ".mlp.experts." in name:
        return x.transpose(1, 2)
    return x.reshape(1, -1) if name.endswith(".router.weight") and ".mlp." not in name else x


def make_config(lm, changes, seq=SEQ):
    base = dict(vocab_size=VOCAB, d_model=WIDTH, n_layers=DEPTH, n_heads=HEADS, n_kv_heads=HEADS, d_ff=FFN,
                max_seq_len=seq, mod_capacity=0.25, predictor=False)
    return lm.Config(**{**base, **changes})


def shared_parameters(lm):
    """fp32 values for every parameter of the largest model without experts; every case takes its own from these.

    They are larger than an initialisation would be, so that no term of the model is lost in rounding: unit variance is
    kept by each matrix, norms are spread about 1, router scores have a deviation of about 1.
    """
    model = lm.Transformer(make_config(lm, {"mod_every": 2, "aux_weight": 0.3, "predictor": True}))
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


def expert_parameters():
    """fp32 values, in Fathom's layout, of what models of experts have besides."""
    rng, predictors = np.random.default_rng(20260202), np.random.default_rng(20260303)
    values = {}
    choices = EXPERTS + MOST_NOOPS
    for layer in range(DEPTH):
        prefix = f"model.layers.{layer}.mlp."
        for name, shape in {
            "router.weight": (choices, WIDTH),
            "experts.gate_up_proj.weight": (EXPERTS, 2 * FFN, WIDTH),
            "experts.down_proj.weight": (EXPERTS, WIDTH, FFN),
        }.items():
            values[prefix + name] = rng.normal(0.0, 1.0 / math.sqrt(shape[-1]), shape).astype(np.float32)
        for name, shape in {
            "router_predictor.0.weight": (PREDICTOR_HIDDEN, WIDTH),
            "router_predictor.0.bias": (PREDICTOR_HIDDEN,),
            "router_predictor.2.weight": (choices, PREDICTOR_HIDDEN),
            "router_predictor.2.bias": (choices,),
        }.items():
            deviation = 0.2 if len(shape) == 1 else 1.0 / math.sqrt(shape[-1])
            values[prefix + name] = predictors.normal(0.0, deviation, shape).astype(np.float32)
    return values


def take(values, name, kv_heads):
    """The values of one parameter: with fewer key/value heads, the first ones of the keys and of the values."""
    x = values[name]
    if name.endswith("qkv_proj.weight"):
        d = WIDTH // HEADS
        q, k, v = np.split(x, [HEADS * d, 2 * HEADS * d])
        x = np.concatenate([q, k[: kv_heads * d], v[: kv_heads * d]])
    return x


def load(model, values):
    """Sets every parameter: with fewer no-ops, to the first of the values of its choices."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            ours = our_name(name)
            x = torch.from_numpy(take(values, ours, model.c.n_kv_heads)).to(p.dtype)
            if ".mlp.router" in ours and x.shape[0] == EXPERTS + MOST_NOOPS:
                x = x[: p.shape[0]]
            p.copy_(our_layout(ours, x) if x.ndim == 3 else x.reshape(p.shape))


def build(lm, changes, values, seq=SEQ, dtype=torch.float64, mlp=None):
    """The model; `mlp`, a function of its config, makes the MLP of each block where it is not the reference's own."""
    torch.set_default_dtype(dtype)
    model = lm.Transformer(make_config(lm, changes, seq))
    if mlp is not None:
        for block in model.blocks:
            block.mlp = mlp(model.c)
    load(model, values)
    # The reference adds the routers' losses over its routed layers; Fathom takes their mean.
    routed = [b for b in model.blocks if isinstance(b, lm.MoDBlock)]
    for block in routed:
        block.register_forward_hook(lambda m, i, o: (o[0], None if o[1] is None else o[1] / len(routed)))
    return model


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


def create(folder, name):
    return h5py.File(folder / f"{name}.h5", "w", libver=LIBVER)


def numbers_of(mask):
    """Where the mask holds, counted through its elements, ascending: of a mask [B, T], rows b*T + t."""
    return np.flatnonzero(mask.reshape(-1).numpy()).astype(np.int32)


def put_attributes(f, config):
    f.attrs["kv_heads"] = config.n_kv_heads
    f.attrs["tied"] = int(config.tie_embeddings)
    f.attrs["routed"] = int(config.mod_every > 0)
    f.attrs["capacity"] = config.mod_capacity
    f.attrs["gate"] = GATES[config.gate]
    f.attrs["aux_weight"] = config.aux_weight
    f.attrs["predictor"] = int(bool(config.mod_every) and config.predictor)


def put_expert_attributes(f, config, **more):
    put_attributes(f, config)
    kind = "mode_staged" if config.mod_every else "mode_integrated" if config.noop_experts else "moe"
    attributes = {"kind": KINDS[kind], "experts": EXPERTS, "noop": config.noop_experts,
                  "capacity_factor": config.moe_capacity, **more}
    for key, value in attributes.items():
        f.attrs[key] = value


def put_pass(f, model, watch):
    """What a pass forward and backward left: the stream after each block, and the gradients."""
    put(f, "stream/0", watch.inputs[0])
    for i, x in enumerate(watch.outputs):
        put(f, f"stream/{i + 1}", x)
    put(f, "hidden", watch.hidden)
    for name, p in model.named_parameters():
        put(f, f"gradient/{our_name(name)}", our_layout(our_name(name), p.grad))


def routed_blocks(lm, model):
    return [(i, b) for i, b in enumerate(model.blocks) if isinstance(b, lm.MoDBlock)]


def put_top_k(f, lm, model, inputs, name):
    """What each routed block chose; the means over them of the router's and of the predictor's own loss."""
    routed, config = routed_blocks(lm, model), model.c
    k = max(1, int(config.mod_capacity * SEQ))
    aux = predictor = 0.0
    for i, block in routed:
        x = inputs[i]
        r = x @ block.w_r
        ordered = r.sort(-1, descending=True).values
        gap = (ordered[:, k - 1] - ordered[:, k]).min().item()
        assert gap > MARGIN, f"{name}: layer {i} has a near tie at the K-th score ({gap})"
        kept = torch.zeros_like(r).scatter(1, r.topk(k, -1).indices, 1.0)
        put(f, f"scores/{i}", r)
        put(f, f"indices/{i}", numbers_of(kept > 0))
        aux += F.binary_cross_entropy_with_logits(r, kept).item() / len(routed)
        if config.predictor:
            p = block.predictor(x).squeeze(-1)
            put(f, f"predicted/{i}", p)
            predictor += F.binary_cross_entropy_with_logits(p, kept).item() / len(routed)
    return aux, predictor


def put_causal(f, lm, model, inputs, name):
    """What each routed block keeps at threshold 0.5, `inputs` being of a causal pass. Returns {layer: mask [B, T]}."""
    kept = {}
    for i, block in routed_blocks(lm, model):
        x = inputs[i]
        logit = block.predictor(x).squeeze(-1) if model.c.predictor else x @ block.w_r
        assert logit.abs().min() > MARGIN, f"{name}: layer {i} has a causal logit near the threshold"
        keep = logit > 0
        assert keep.any() and not keep.all(), f"{name}: layer {i} keeps all or nothing"
        assert torch.isclose(keep.double().mean(), block.kept)
        put(f, f"causal/indices/{i}", numbers_of(keep))
        kept[i] = keep
    return kept


def put_losses(f, **losses):
    for key, value in losses.items():
        put(f, f"loss/{key}", np.float64(value))


def case_tokens():
    """Tokens and targets of the cases, [BATCH, SEQ] each."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, VOCAB, (BATCH, SEQ + 1))
    assert (text[:, 0] != text[:, 1]).all()  # an exact tie of their scores otherwise
    return torch.from_numpy(text[:, :-1]), torch.from_numpy(text[:, 1:])
