"""Holds a dense export against Hugging Face transformers: tests/system/export_test.cpp runs it.

Usage: python check_export.py MODEL IDS LOGITS TEXTS
MODEL is the exported folder, IDS a prompt as token ids, comma-separated, LOGITS the .h5 of `fathom eval --dump-logits`,
TEXTS a JSON list of {"text": ..., "ids": [...]}.
Prints one JSON object: the class that loaded, the largest difference of the logits relative to the largest logit, the
ids of 200 greedy tokens, and whether the tokenizer gives the ids of all texts, and the texts back.
"""

import json
import sys

import h5py
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def main():
    folder, ids, logits, texts = sys.argv[1:]
    ids = [int(i) for i in ids.split(",")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(texts, encoding="utf-8") as file:
        texts = json.load(file)
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
        "same_ids": all(tokenizer(t["text"])["input_ids"] == t["ids"] for t in texts),
        "texts_come_back": all(tokenizer.decode(t["ids"]) == t["text"] for t in texts),
    }))


if __name__ == "__main__":
    main()
