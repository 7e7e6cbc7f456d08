"""Holds a dense export against Hugging Face transformers: tests/system/export_test.cpp runs it.

Usage: python check_export.py MODEL IDS LOGITS
MODEL is the exported folder, IDS a prompt as token ids, comma-separated, LOGITS the .h5 of `fathom eval --dump-logits`.
Prints one JSON object: the class that loaded, the largest difference of the logits relative to the largest logit, the
ids of 200 greedy tokens, and whether the tokenizer gives text as bytes back.
"""

import json
import sys

import h5py
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The sea, caf\u00e9\n\tand 12 ships \u2014 ok?"


def main():
    folder, ids, logits = sys.argv[1:]
    ids = [int(i) for i in ids.split(",")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
        tokens = list(ids)
        for _ in range(200):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    ours = torch.from_numpy(h5py.File(logits)["logits"][:])
    print(json.dumps({
        "class": type(model).__name__,
        "difference": float((theirs - ours).abs().max() / theirs.abs().max()),
        "greedy": tokens[len(ids):],
        "ids_are_bytes": tokenizer(TEXT)["input_ids"] == list(TEXT.encode()),
        "text_comes_back": tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT,
    }))


if __name__ == "__main__":
    main()
