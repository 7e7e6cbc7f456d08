#!/usr/bin/env python3
"""Computes an exported model, routed or not, in plain PyTorch: for those who want to check Fathom, or to port it.

    python scripts/reference_model.py MODEL 1,2,3            # the five most likely next tokens
    from reference_model import Model; Model("MODEL").logits([1, 2, 3])

MODEL is a folder of `fathom export`. Every token is routed by itself alone, as in decoding: what `fathom eval
--dump-logits` and `fathom generate` compute. It is written to be read, and recomputes everything for each call: no
cache, no batch. docs/formats.md has the names, docs/architecture.md and the papers there the ideas.
"""

import json
import math
import os
import struct
import sys

import torch
import torch.nn.functional as F

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def read_safetensors(path, dtype):
    """Every tensor of a file by name."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        flat = torch.frombuffer(data[begin:end], dtype=DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).to(dtype)
    return tensors


def scaled(frequencies, scaling):
    """Frequencies of a model whose context was made longer: divided, all of them or (llama3) those that turn slowly."""
    if not scaling:
        return frequencies
    longer = frequencies / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return longer
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * longer + kept * frequencies


class Model:
    def __init__(self, folder, dtype=torch.float32):
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            self.config = json.load(file)
        if self.config.get("quantization_config"):
            raise SystemExit(f"{folder} has weights of few bits or transforms what it computes: take the model before fathom quantize.")
        self.weights = read_safetensors(os.path.join(folder, "model.safetensors"), dtype)
        own = self.config["fathom"]
        self.routing = self.config.get("fathom_routing", {"kind": "none"})
        self.experts = self.routing.get("experts") if self.routing["kind"] in ("moe", "mode_staged", "mode_integrated") else None
        self.qk_norm = self.config["model_type"] == "qwen3" or own.get("qk_norm", False)
        causal = self.routing.get("causal", {})
        # A token goes where sigmoid(logit) is above the threshold.
        self.threshold = math.log(causal["threshold"] / (1 - causal["threshold"])) if causal else 0.0
        self.by_predictor = causal.get("method") in ("predictor", "both")
        if causal.get("method") == "none" and (self.routes_depth() or self.experts_choose()):
            raise ValueError("no causal rule was trained (routing.causal.method is none)")

    def routes_depth(self):
        return self.routing["kind"] in ("mod", "mode_staged")

    def experts_choose(self):
        return self.experts is not None and self.experts["choice"] == "expert"

    def is_routed(self, layer):
        first, every = self.routing.get("first", 0), self.routing.get("every", 1)
        return self.routes_depth() and layer >= first and (layer - first) % every == 0

    def weight(self, layer, name):
        return self.weights[f"model.layers.{layer}.{name}"]

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]) * weight

    def predictor(self, layer, x, prefix):
        """W2 silu(W1 x + b1) + b2: an MLP that foretells what top-k over the sequence would choose."""
        w = lambda name: self.weight(layer, f"{prefix}router_predictor.{name}")
        return F.silu(x @ w("0.weight").T + w("0.bias")) @ w("2.weight").T + w("2.bias")

    def attention(self, layer, x, positions):
        """x [n, width]: n tokens that stand at these positions and see those of them that are not behind them."""
        c, d = self.config, self.config["head_dim"]
        normed = self.norm(x, self.weight(layer, "input_layernorm.weight"))
        q, k, v = (
            (normed @ self.weight(layer, f"self_attn.{name}_proj.weight").T).view(len(x), -1, d) for name in "qkv"
        )
        if self.qk_norm:
            q = self.norm(q, self.weight(layer, "self_attn.q_norm.weight"))
            k = self.norm(k, self.weight(layer, "self_attn.k_norm.weight"))
        frequencies = scaled(c["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d), c.get("rope_scaling"))
        angles = torch.outer(positions.double(), frequencies)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)

        def rotate(t):
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        repeat = c["num_attention_heads"] // c["num_key_value_heads"]
        k, v = (t.repeat_interleave(repeat, 1) for t in (rotate(k), v))
        mixed = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (rotate(q), k, v)), is_causal=True)
        return mixed.transpose(0, 1).reshape(len(x), -1) @ self.weight(layer, "self_attn.o_proj.weight").T

    def mlp(self, layer, x):
        if self.experts is not None:
            return self.mlp_of_experts(layer, x)
        gate = F.silu(x @ self.weight(layer, "mlp.gate_proj.weight").T)
        return (gate * (x @ self.weight(layer, "mlp.up_proj.weight").T)) @ self.weight(layer, "mlp.down_proj.weight").T

    def mlp_of_experts(self, layer, x):
        """The sum over its experts of a token's affinity times what the expert makes of it. No-ops add nothing."""
        logits = x @ self.weight(layer, "mlp.router.weight").T
        affinity = logits.softmax(-1)
        if self.experts_choose():
            decides = self.predictor(layer, x, "mlp.") if self.by_predictor else logits
            shares = affinity * (decides > self.threshold)
        else:
            best = affinity.topk(self.experts["top_k"], -1)
            chosen = best.values if self.experts["top_k"] == 1 else best.values / best.values.sum(-1, keepdim=True)
            shares = torch.zeros_like(affinity).scatter(-1, best.indices, chosen)
        out = torch.zeros_like(x)
        for e in range(self.experts["count"]):
            rows = shares[:, e].nonzero()[:, 0]
            gate, up, down = (self.weight(layer, f"mlp.experts.{e}.{name}_proj.weight") for name in ("gate", "up", "down"))
            made = (F.silu(x[rows] @ gate.T) * (x[rows] @ up.T)) @ down.T
            out[rows] += shares[rows, e, None] * made
        return out

    def body(self, layer, x, positions):
        """What a block adds to its tokens."""
        a = self.attention(layer, x, positions)
        return a + self.mlp(layer, self.norm(x + a, self.weight(layer, "post_attention_layernorm.weight")))

    def block(self, layer, x):
        positions = torch.arange(len(x))
        if not self.is_routed(layer):
            return x + self.body(layer, x, positions)
        score = (x @ self.weight(layer, "router.weight").T)[:, 0]
        decides = self.predictor(layer, x, "")[:, 0] if self.by_predictor else score
        kept = (decides > self.threshold).nonzero()[:, 0]
        if len(kept) == 0:
            return x
        gate = {"raw": lambda r: r, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[self.routing["gate"]]
        out = x.clone()
        out[kept] += gate(score[kept])[:, None] * self.body(layer, x[kept], positions[kept])
        return out

    @torch.no_grad()
    def logits(self, ids):
        """[len(ids), vocabulary]"""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[torch.tensor(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            x = self.block(layer, x)
        head = embedding if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]
        return self.norm(x, self.weights["model.norm.weight"]) @ head.T


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    probabilities = Model(sys.argv[1]).logits([int(i) for i in sys.argv[2].split(",")])[-1].softmax(-1)
    best = probabilities.topk(5)
    for p, i in zip(best.values.tolist(), best.indices.tolist()):
        print(f"{i:8d}  {p:.4f}")


if __name__ == "__main__":
    main()
