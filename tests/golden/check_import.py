"""Holds what `fathom import` makes of models against Hugging Face transformers: tests/system/import_test.cpp runs it.

Usage: python check_import.py FATHOM FOLDER
FATHOM is the program, FOLDER an empty folder to work in. Random small models are made there as transformers saves them, with
tokenizers of make_bpe.py.
Prints one JSON object: of each model what `fathom import --json` said, the largest difference of the logits relative to the
largest logit, whether the tokenizers give the same ids, and the ids of greedy text on both sides.
"""

import json
import os
import subprocess
import sys

import h5py
import torch
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)

import make_bpe

SIZE = {"vocab_size": 432, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1}

# name: class, tokenizer, what else its config says, the type that it is saved in, the bytes of a file of weights
CASES = {
    "llama": (LlamaForCausalLM, "llama3", {"rms_norm_eps": 1e-5}, torch.float32, "5GB"),
    "llama_tied": (LlamaForCausalLM, "llama3", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
                   torch.bfloat16, "100KB"),
    "llama_half": (LlamaForCausalLM, "gpt2", {"num_key_value_heads": 4}, torch.float16, "60KB"),
    "llama3": (LlamaForCausalLM, "llama3", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}, torch.float32, "5GB"),
    "llama_linear": (LlamaForCausalLM, "gpt2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
                     torch.float32, "5GB"),
    "qwen3": (Qwen3ForCausalLM, "qwen", {"rms_norm_eps": 1e-6}, torch.bfloat16, "5GB"),
    "qwen3_wide_tied": (Qwen3ForCausalLM, "qwen", {"head_dim": 24, "tie_word_embeddings": True}, torch.float32, "5GB"),
    "llama_wide": (LlamaForCausalLM, "gpt2", {"head_dim": 20}, torch.float32, "5GB"),
    "qwen3_tied": (Qwen3ForCausalLM, "qwen", {"tie_word_embeddings": True}, torch.float32, "100KB"),
}


class Fathom:
    def __init__(self, program):
        self.program = program

    def __call__(self, *arguments):
        done = subprocess.run([self.program, *arguments, "--json", "--threads", "1", "--device", "cpu"], capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"fathom {' '.join(arguments)}: {done.stderr}")
        return json.loads(done.stdout)


def create(folder, case, tokenizer):
    model_class, _, more, dtype, shard = case
    end = next(t for t in ("<|end_of_text|>", "<|endoftext|>") if tokenizer.token_to_id(t) is not None)
    # Two ends, as models that were trained to answer have them: a list.
    ends = [tokenizer.token_to_id(end), tokenizer.token_to_id("z")]
    config = model_class.config_class(**{**SIZE, **more}, bos_token_id=None, eos_token_id=ends)
    model = model_class(config)
    for name, parameter in model.named_parameters():  # norms of one would hide a norm that is left out
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)


def held(fathom, folder, seed):
    """What comes of the model in `folder`, made Fathom's in `folder`-fathom."""
    ours = folder + "-fathom"
    said = fathom("import", folder, "-o", ours)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = [t for t in make_bpe.texts(seed, 40) if t and "\0" not in t and make_bpe.is_nfc(t)]
    path = os.path.join(ours, "tokenizer.json")
    same_ids = all(fathom("tokenizer", "inspect", path, f"--text={t}")["ids"] ==
                   tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)
    prompt = "Mara's lantern: the sea, 1984 "
    ids = tokenizer(prompt)["input_ids"]
    # So many that the slow wavelengths turn as well.
    long = [(7 * i * i + 3 * i + seed) % SIZE["vocab_size"] for i in range(200)]
    logits = folder + ".h5"
    fathom("eval", ours, "--dump-logits", logits, "--prompt-ids", ",".join(map(str, long)))
    with torch.no_grad():
        theirs = model(torch.tensor([long])).logits[0]
        greedy = list(ids)
        for _ in range(12):
            token = int(model(torch.tensor([greedy])).logits[0, -1, :len(tokenizer)].argmax())
            if token in model.generation_config.eos_token_id:
                break
            greedy.append(token)
    with h5py.File(logits) as file:
        difference = float((theirs - torch.from_numpy(file["logits"][:])).abs().max() / theirs.abs().max())
    generated = fathom("generate", ours, "-p", prompt, "-n", "12", "--temperature", "0")
    return {"import": said, "difference": difference, "texts": len(texts), "same_ids": same_ids,
            "prompt_tokens": [len(ids), generated["prompt_tokens"]], "greedy": [greedy[len(ids):], generated["tokens"]]}


def main():
    program, folder = sys.argv[1:]
    fathom = Fathom(program)
    tokenizers = dict(make_bpe.tokenizers())
    result = {}
    for seed, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        path = os.path.join(folder, name)
        create(path, case, tokenizers[case[1]])
        result[name] = held(fathom, path, seed)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
