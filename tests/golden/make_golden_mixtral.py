#!/usr/bin/env python3
"""Makes the golden file of a token-choice model from Mixtral as Hugging Face `transformers` has it.

    python make_golden_mixtral.py --torch-lm FOLDER_OF_TORCH_LM

MixtralSparseMoeBlock is top 2 of a softmax, renormalised, without a limit (Jiang et al. 2024, arXiv 2401.04088): what
Fathom's `experts.choice: token` with `top_k: 2` and `capacity_factor: 0` is. The whole model around it is Fathom's
too, so logits, the stream after each block and every gradient are Mixtral's own. torch_lm.py is asked for the shapes of
the shared parameters only.
"""
import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from reference import (AFFINITY_MARGIN, BATCH, DEPTH, EXPERTS, FFN, HEADS, SEQ, VOCAB, WIDTH, case_tokens, create,
                       expert_parameters, make_config, put, put_expert_attributes, put_losses, run, shared_parameters,
                       take)

KV_HEADS, TOP_K = 2, 2


def make_double():
    """Makes transformers a true fp64 reference: it asks for fp32 in softmax, norms and rotary tables."""
    torch.Tensor.float = torch.Tensor.double
    torch.float = torch.float32 = torch.float64
    torch.set_default_dtype(torch.float64)


def parts(layer):
    """Fathom's name of each parameter of a block -> Mixtral's, one after the other along the first dimension."""
    attention = f"model.layers.{layer}.self_attn."
    return {
        attention + "qkv_proj.weight": [attention + x + "_proj.weight" for x in "qkv"],
        attention + "o_proj.weight": [attention + "o_proj.weight"],
        **{f"model.layers.{layer}.{n}.weight": [f"model.layers.{layer}.{n}.weight"]
           for n in ("input_layernorm", "post_attention_layernorm")},
        f"model.layers.{layer}.mlp.router.weight": [f"model.layers.{layer}.mlp.gate.weight"],
        **{f"model.layers.{layer}.mlp.experts.{n}.weight": [f"model.layers.{layer}.mlp.experts.{n}"]
           for n in ("gate_up_proj", "down_proj")},
    }


def names():
    whole = {n: [n] for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(DEPTH):
        whole.update(parts(layer))
    return whole


def build(values):
    config = MixtralConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=DEPTH,
                           num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=SEQ,
                           rms_norm_eps=1e-5, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
                           sliding_window=None, rope_theta=10000.0, router_jitter_noise=0.0,
                           attn_implementation="eager", experts_implementation="eager", use_cache=False)
    model = MixtralForCausalLM(config).double()
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for ours, mine in names().items():
            x = torch.from_numpy(take(values, ours, KV_HEADS)).double()
            if ours.endswith("mlp.router.weight"):
                x = x[:EXPERTS]
            sizes = [theirs[n].shape[0] for n in mine]
            for n, part in zip(mine, x.split(sizes)):
                theirs.pop(n).copy_(part)
    assert not theirs, f"Mixtral has parameters that Fathom has not: {list(theirs)}"
    return model


def put_choices(f, layer, logits, chosen):
    """What a router says, and the slots of each expert, one for each token of each sequence; returns its losses."""
    p = logits.softmax(-1)
    ordered = p.sort(-1, descending=True).values
    gap = (ordered[:, TOP_K - 1] - ordered[:, TOP_K]).min().item()
    assert gap > AFFINITY_MARGIN, f"layer {layer}: a token has a near tie of its choices ({gap})"
    rows = np.full((EXPERTS, BATCH, SEQ), -1, np.int32)
    balance = 0.0
    for b in range(BATCH):
        of_sequence = slice(b * SEQ, (b + 1) * SEQ)
        share = torch.zeros(EXPERTS)
        for e in range(EXPERTS):
            taken = (chosen[of_sequence] == e).any(-1).nonzero()[:, 0]
            rows[e, b, : len(taken)] = taken.numpy() + b * SEQ
            share[e] = len(taken) / (SEQ * TOP_K)
        balance += EXPERTS * (share * p[of_sequence].mean(0)).sum().item() / BATCH
    put(f, f"experts/affinity/{layer}", p.T.contiguous())
    put(f, f"experts/rows/{layer}", rows)
    return balance, (logits.logsumexp(-1) ** 2).mean().item()


def write(lm, folder):
    values = {**shared_parameters(lm), **expert_parameters()}
    tokens, targets = case_tokens()
    make_double()
    model = build(values)
    stream, routers, hidden = [], [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda m, x: stream.append(x[0].detach()))
        layer.mlp.gate.register_forward_hook(lambda m, x, y: routers.append((y[0].detach(), y[2])))
    model.model.norm.register_forward_pre_hook(lambda m, x: stream.append(x[0].detach()))
    model.lm_head.register_forward_pre_hook(lambda m, x: hidden.append(x[0].detach()))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
    loss.backward()
    assert logits.dtype == torch.float64 and all(x.dtype == torch.float64 for x in stream)
    with create(folder, "token_mixtral") as f:
        put_expert_attributes(f, make_config(lm, {"n_kv_heads": KV_HEADS, "n_experts": EXPERTS}), top_k=TOP_K,
                              balance_weight=0.0, z_weight=0.0)
        f.attrs["capacity_factor"] = 0.0
        for i, x in enumerate(stream):
            put(f, f"stream/{i}", x)
        put(f, "hidden", hidden[0])
        put(f, "logits", logits)
        theirs = dict(model.named_parameters())
        for ours, mine in names().items():
            put(f, f"gradient/{ours}", torch.cat([theirs[n].grad for n in mine]))
        losses = [put_choices(f, i, *router) for i, router in enumerate(routers)]
        balance, z = np.mean(losses, axis=0)
        put_losses(f, objective=loss.item(), cross_entropy=loss.item(), aux=0.0, predictor=0.0, balance=balance, z=z)
    print(f"token_mixtral: loss {loss.item():.4f}")


if __name__ == "__main__":
    run(write, __doc__)
