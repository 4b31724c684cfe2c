"""lm-eval's local-completions against a server, on two tiny tasks of our own: scored choices and generated text."""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

URL, TOKENIZER = sys.argv[1:]
DOCS = [
    {"question": "json.dumps returns a", "choices": [" str", " banana", " volcano"], "answer": 0},
    {"question": "math.gcd returns an", "choices": [" umbrella", " integer", " oyster"], "answer": 1},
    {"question": "os.path.join joins", "choices": [" cucumbers", " violins", " path components"], "answer": 2},
]
CHOICES = """
task: tandem_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WORDS = """
task: tandem_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""

with tempfile.TemporaryDirectory() as directory:
    data = Path(directory) / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    for name, text in (("choices", CHOICES), ("words", WORDS)):
        Path(directory, f"{name}.yaml").write_text(text.format(data=data))
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "pydoc-mini",
            "base_url": f"{URL}/v1/completions",
            "tokenizer": TOKENIZER,
            "tokenized_requests": True,
            "max_retries": 1,
            "max_length": 2048,
        },
        tasks=["tandem_choices", "tandem_words"],
        task_manager=TaskManager(include_path=directory, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
samples = results["samples"]
print(
    json.dumps(
        {
            "accuracy": results["results"]["tandem_choices"]["acc,none"],
            "scores": [[one[0] for one in sample["filtered_resps"]] for sample in samples["tandem_choices"]],
            "texts": [sample["filtered_resps"][0] for sample in samples["tandem_words"]],
        },
        default=float,
    )
)
