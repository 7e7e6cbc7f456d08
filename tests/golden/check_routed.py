"""Holds exported models against scripts/reference_model.py: tests/system/export_test.cpp runs it.

Usage: python check_routed.py IDS (MODEL LOGITS)...
IDS is a prompt as token ids, comma-separated; of each exported folder LOGITS is the .h5 of `fathom eval --dump-logits`.
Prints a JSON list: of each, the largest difference of the logits relative to the largest logit.
"""

import json
import os
import sys

import h5py
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../scripts"))
from reference_model import Model  # noqa: E402


def main():
    ids = [int(i) for i in sys.argv[1].split(",")]
    differences = []
    for folder, logits in zip(sys.argv[2::2], sys.argv[3::2]):
        theirs = Model(folder).logits(ids)
        ours = torch.from_numpy(h5py.File(logits)["logits"][:])
        differences.append(float((theirs - ours).abs().max() / theirs.abs().max()))
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
