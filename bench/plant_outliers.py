#!/usr/bin/env python3
"""Plants outliers in an exported model (fp32) without changing what it computes.

Of each norm before a product a few channels' weights become K times as large, and the columns that read them K times as
small: what the products read then has elements that stand out, as that of large models does. With --hidden N the same of
N elements of each MLP's hidden width: rows of up_proj, and columns of down_proj. Needs numpy.

Usage: plant_outliers.py MODEL OUT [--channels 4] [--hidden 0] [--factor 30] [--seed 0]
"""
import argparse
import json
import pathlib
import shutil
import struct

import numpy as np

READERS = {
    "input_layernorm.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "post_attention_layernorm.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", type=pathlib.Path)
    ap.add_argument("out", type=pathlib.Path)
    ap.add_argument("--channels", type=int, default=4)
    ap.add_argument("--hidden", type=int, default=0)
    ap.add_argument("--factor", type=float, default=30)
    ap.add_argument("--seed", type=int, default=0)
    a = ap.parse_args()
    shutil.copytree(a.model, a.out)
    path = a.out / "model.safetensors"
    raw = path.read_bytes()
    begin = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:begin])
    data = bytearray(raw[begin:])

    def tensor(name):
        if header[name]["dtype"] != "F32":
            raise SystemExit(f"{name} is {header[name]['dtype']}: export the model with --precision fp32.")
        first, end = header[name]["data_offsets"]
        return np.frombuffer(data, np.float32, (end - first) // 4, first).reshape(header[name]["shape"])

    rng = np.random.default_rng(a.seed)
    layers = sorted({int(name.split(".")[2]) for name in header if name.startswith("model.layers.")})
    for layer in layers:
        for norm, readers in READERS.items():
            prefix = f"model.layers.{layer}."
            if prefix + readers[0] not in header:
                continue  # experts read it
            scale = tensor(prefix + norm)
            channels = rng.choice(scale.size, a.channels, replace=False)
            scale[channels] *= a.factor
            for reader in readers:
                tensor(prefix + reader)[:, channels] /= a.factor
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp."
        if a.hidden == 0 or prefix + "up_proj.weight" not in header:
            continue
        up, down = tensor(prefix + "up_proj.weight"), tensor(prefix + "down_proj.weight")
        channels = rng.choice(up.shape[0], a.hidden, replace=False)
        up[channels] *= a.factor
        down[:, channels] /= a.factor
    path.write_bytes(raw[:begin] + bytes(data))


if __name__ == "__main__":
    main()
