"""Makes bpe.json: small byte-level BPE tokenizers, as Hugging Face tokenizers trains and writes them, and the ids that it
gives for texts. tests/io/bpe_tokenizer_test.cpp reads it.

Usage: python make_bpe.py > bpe.json (pip install tokenizers; made with 0.23)
The text that is trained on is made here. The patterns are those of GPT-2, Llama 3 and Qwen3.
"""

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# What patterns and alphabets disagree on: white space of all sorts, marks, letters beyond Latin, numbers, contractions.
PARTS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\v", "\x85", "\xa0", "\u1680", "\u180e", "\u2028", "\u200b", "\u3000",
         "\x1c", "\0", "'s", "'S", "'LL", "'ve", "'\u017f", "\u2019t", "it's", "12345", "7", "\u0663\u0664", "\u2167", "\xbd", "\xb2", "caf\u00e9",
         "stra\u00dfe", "\u0395\u03bb\u03bb\u03ac\u03b4\u03b1", "\u041c\u043e\u0441\u043a\u0432\u0430", "\u65e5\u672c\u8a9e", "\U0001F600",
         "\U0001F468\u200d\U0001F469", "e\u0301", "\u0e44\u0e17\u0e22", "...", "?!", "((", "))\n", "-", "_", "\u2014", "<|end_of_text|>",
         "<|endoftext|>", "<tool>", "<tool>s", "<|", "|>", "\ufeff", "\ufffd", "\u00c4", "\u01c5", "\u02b0", "\u0300", "\uffff", "\U0010ffff"]


def words(random, count):
    stems = ["mara", "hull", "sea", "ship", "wind", "lantern", "harbour", "river", "stone", "letter"]
    ends = ["", "s", "ing", "ed", "ly", "'s", "'ll", " 12", " 1984", ".", ",", "!\n", "\n\n", ": caf\u00e9", " \u2014"]
    return " ".join(random.choice([str, str.title, str.upper])(random.choice(stems)) + random.choice(ends) for _ in range(count))


def texts(seed, count):
    source = random.Random(seed)
    made = ["", " ", "a", " a", "\n", "'s", "  \n  x", "<|endoftext|>", "a<tool>b <tools>", "\u1e69\u0323 x"]
    while len(made) < count:
        made.append("".join(source.choice(PARTS) if source.random() < 0.6 else words(source, 3)
                            for _ in range(source.randrange(1, 9))))
    return made


def trained(pre_tokenizer, end, normalizer=None, special=(), merges=160, word=None):
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    source = random.Random(7)
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator([words(source, 40) + source.choice(PARTS) for _ in range(200)], trainer)
    if word is not None:
        data = json.loads(tokenizer.to_str())
        data["model"]["vocab"][word] = len(data["model"]["vocab"])
        data["model"]["ignore_merges"] = True
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.add_special_tokens([end, *special])
    return tokenizer


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizers():
    gpt2 = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), "<|endoftext|>")
    gpt2.post_processor = processors.ByteLevel(trim_offsets=False)
    yield "gpt2", gpt2
    yield "prefix_space", trained(pre_tokenizers.ByteLevel(add_prefix_space=True), "<|endoftext|>", merges=60)
    yield "digits", trained(pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), "</s>", merges=60)
    # No merge leads to the word: ignore_merges finds it, and merges do not.
    llama3 = trained(split(LLAMA3), "<|end_of_text|>", special=["<|begin_of_text|>"], word="zqzqzq")
    begin = llama3.token_to_id("<|begin_of_text|>")
    llama3.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                                      special_tokens=[("<|begin_of_text|>", begin)])])
    yield "llama3", llama3
    qwen = trained(split(QWEN), "<|endoftext|>", normalizer=normalizers.NFC())
    qwen.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>s", normalized=True)])
    yield "qwen", qwen


def is_nfc(text):
    return normalizers.NFC().normalize_str(text) == text


def main():
    cases = []
    for seed, (name, tokenizer) in enumerate(tokenizers()):
        data = json.loads(tokenizer.to_str())
        if name == "gpt2":  # as it was published: merges as texts, and without the model's type
            del data["model"]["type"]
            data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
        some = [t for t in texts(seed, 60) if is_nfc(t) or name != "qwen"] + ["zqzqzq zqzqzq", "xyz zqzqzq"]
        cases.append({"name": name, "tokenizer": data, "texts": [
            {"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in some]})
    print(json.dumps(cases, separators=(",", ":")))


if __name__ == "__main__":
    main()
