"""lm-eval's local-completions against the server, offline, on a task of a few lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from headrace.server.tokenizer import Tokenizer
from tests.server.live import MODEL_NAME, LiveServer

CHOICES = """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
target_delimiter: ""
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" fox", " brown dog"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs: {{until: [" "], max_gen_toks: 12, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = ["the quick brown", "jumps over", "naïve café"]


def evaluate(live: LiveServer, model_dir: Path, tmp_path: Path) -> dict[str, list[Any]]:
    """Run lm-eval; return each task's samples."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    (tmp_path / "choices.yaml").write_text(CHOICES.format(data=data))
    (tmp_path / "writing.yaml").write_text(WRITING.format(data=data))
    arguments = {
        "model": MODEL_NAME,
        "base_url": f"{live.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": model_dir,
        "tokenized_requests": False,
        "num_concurrent": 4,
        "max_length": 512,
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", ",".join(f"{k}={v}" for k, v in arguments.items())),
        *("--include_path", tmp_path, "--tasks", "choices,writing"),
        *("--output_path", tmp_path / "out", "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for task in ("choices", "writing"):
        [path] = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text().splitlines()]
    return samples


def test_lm_eval(
    live: LiveServer, model_dir: Path, tmp_path: Path, tokenizer: Tokenizer, http: httpx.Client
) -> None:
    samples = evaluate(live, model_dir, tmp_path)
    assert len(samples["choices"]) == len(samples["writing"]) == len(QUESTIONS)
    for sample in samples["choices"]:
        for choice, result in zip((" fox", " brown dog"), sample["filtered_resps"], strict=True):
            score = log_likelihood(http, tokenizer, sample["doc"]["question"], choice)
            assert float(result[0]) == pytest.approx(score, abs=1e-3)
    for sample in samples["writing"]:
        body = {"model": MODEL_NAME, "prompt": sample["doc"]["question"], "temperature": 0}
        body |= {"max_tokens": 12, "stop": [" "]}
        text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert sample["resps"][0][0] == text


def log_likelihood(http: httpx.Client, tokenizer: Tokenizer, context: str, choice: str) -> float:
    """Score the choice without echo: one step, made to choose it, for each of its tokens."""
    ids, start = tokenizer.encode(context + choice), len(tokenizer.encode(context))
    total = 0.0
    for end in range(start, len(ids)):
        body = {"model": MODEL_NAME, "prompt": ids[:end], "max_tokens": 1, "logprobs": 20}
        forced = {"logit_bias": {str(ids[end]): 100}, "temperature": 0}
        answer = http.post("/v1/completions", json=body | forced).json()["choices"][0]
        total += answer["logprobs"]["token_logprobs"][0]
    return total
