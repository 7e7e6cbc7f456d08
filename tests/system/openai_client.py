"""OpenAI's own Python package against a server of Fathom's: one JSON object with what failed.

Usage: openai_client.py BASE_URL
"""

import json
import sys

import openai

failures = []
checks = 0


def check(holds, what):
    global checks
    checks += 1
    if not holds:
        failures.append(what)


client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0)
model = client.models.list().data[0].id
check(client.models.retrieve(model).id == model, "models.retrieve")

whole = client.completions.create(model=model, prompt="The ", max_tokens=12, temperature=0)
check(whole.choices[0].finish_reason == "length", "finish_reason")
check(whole.usage.completion_tokens == 12, "usage")
pieces = list(client.completions.create(model=model, prompt="The ", max_tokens=12, temperature=0, stream=True,
                                        stream_options={"include_usage": True}))
check("".join(p.choices[0].text for p in pieces if p.choices) == whole.choices[0].text, "stream")
check(pieces[-1].usage.completion_tokens == 12, "usage of a stream")
two = client.completions.create(model=model, prompt=["The ", "A "], max_tokens=4, n=2, seed=3)
check([c.index for c in two.choices] == [0, 1, 2, 3], "n and prompts")
scored = client.completions.create(model=model, prompt="The sea", max_tokens=0, echo=True, logprobs=1)
lists = scored.choices[0].logprobs
check(scored.choices[0].text == "The sea", "echo")
check(len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == 7,
      "logprobs")
check(lists.token_logprobs[0] is None and lists.token_logprobs[1] < 0, "token_logprobs")

messages = [{"role": "user", "content": "A"}]
chat = client.chat.completions.create(model=model, messages=messages, max_tokens=6, temperature=0, logprobs=True,
                                      top_logprobs=2)
check(chat.choices[0].message.role == "assistant", "chat")
check(len(chat.choices[0].logprobs.content[0].top_logprobs) == 2, "logprobs of a chat")
deltas = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=6, temperature=0,
                                        stream=True)
check("".join(d.choices[0].delta.content or "" for d in deltas) == chat.choices[0].message.content, "a chat's stream")

for expected, arguments in [(openai.BadRequestError, {"model": model, "max_tokens": -1}),
                            (openai.NotFoundError, {"model": "another"}),
                            (openai.BadRequestError, {"model": model, "suffix": "x"})]:
    try:
        client.completions.create(prompt="a", **arguments)
        check(False, f"{arguments} was taken")
    except expected as e:
        check(e.body["type"] == "invalid_request_error" and e.param is not None, f"the error of {arguments}")

print(json.dumps({"checks": checks, "failures": failures}))
