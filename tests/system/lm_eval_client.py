"""lm-evaluation-harness's local-completions against a server of Fathom's: the perplexity of a text, as one JSON object.

Usage: lm_eval_client.py BASE_URL MODEL MAX_LENGTH TEXT.jsonl [PREFIX_TOKEN]

TEXT.jsonl holds {"text": ...} a line. PREFIX_TOKEN is the id in front of each text; without it, what the server's
/tokenizer_info says.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")  # nothing is fetched
import lm_eval  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402

base_url, model, max_length, texts = sys.argv[1:5]
task = ConfigurableTask(config={
    "task": "held_out",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": texts}},
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
})
arguments = {"model": model, "base_url": base_url + "/v1/completions", "max_length": int(max_length),
             "num_concurrent": 4, "batch_size": 2, "max_retries": 1}
if len(sys.argv) > 5:
    arguments["custom_prefix_token_id"] = int(sys.argv[5])
results = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=[task], bootstrap_iters=0,
                                  log_samples=False)
found = results["results"]["held_out"]
print(json.dumps({name.split(",")[0]: value for name, value in found.items() if isinstance(value, float)}))
