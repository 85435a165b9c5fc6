"""Exact match through a running server: python scripts/train_bundled/measure.py [--url URL]

Asks the held-out questions of src/headrace/data/eval over /v1/chat/completions, greedily, and
compares whole answers. To measure an adapter, merge it into the checkpoint (--merge), serve that.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import skills
import torch
from export import read_model

DATA = Path(__file__).parents[2] / "src/headrace/data"
SKILLS: dict[str, skills.Maker] = {
    "add": skills.addition,
    "copy": skills.copying,
    "recall": skills.recall,
    "spell": skills.spelling,
    "calculator": skills.calculation,
    "chat": skills.talk,
    "subtract": skills.subtraction,
    "reverse": skills.reversal,
}


def write_questions(folder: Path, count: int) -> None:
    """The held-out questions of every skill, as the API takes them, with the one right reply."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, maker) in enumerate(SKILLS.items()):
        rng, lines = random.Random(number), dict[str, None]()
        while len(lines) < count:
            example = skills.draw({maker: 1.0}, rng, held_out=True)
            request: dict[str, Any] = {"messages": example.messages}
            request["reasoning_effort"] = example.reasoning_effort
            if example.tools:
                request["tools"] = example.tools
            expected = {"call": example.call} if example.call else {"content": example.final}
            lines[json.dumps({"request": request, "expected": expected})] = None
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def merge(adapter: Path, out: Path) -> None:
    """Write the bundled model with an adapter merged by PEFT, its experts dense in bfloat16."""
    from peft import PeftModel
    from transformers import GptOssConfig, GptOssForCausalLM

    from headrace.files import read_json
    from headrace.models.weights import write_checkpoint

    config = read_json(DATA / "tiny/config.json")
    del config["quantization_config"]
    model = GptOssForCausalLM(GptOssConfig(**config))
    model.load_state_dict(read_model(DATA / "tiny"))
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    tensors = {n: t.detach().to(torch.bfloat16) for n, t in merged.state_dict().items()}
    write_checkpoint(out, config, tensors)
    for file in (DATA / "tiny").iterdir():
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            (out / file.name).write_bytes(file.read_bytes())


def is_right(client: httpx.Client, model: str, question: dict[str, Any]) -> bool:
    """Whether the server's whole answer, or the call's name and arguments, are as expected."""
    body = question["request"] | {"model": model, "temperature": 0, "max_tokens": 400}
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    message, expected = response.json()["choices"][0]["message"], question["expected"]
    if "call" in expected:
        calls = [call["function"] for call in message.get("tool_calls") or []]
        return calls == [{"name": "calculator", "arguments": expected["call"]}]
    return bool(message["content"] == expected["content"])


def main() -> None:
    """Print one line a skill."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--url", default="http://127.0.0.1:8000")
    options.add_argument("--skills", nargs="*", default=list(SKILLS))
    options.add_argument("--limit", type=int, default=200)
    options.add_argument("--merge", nargs=2, type=Path, metavar=("ADAPTER", "OUT"))
    options.add_argument("--write-questions", type=int, default=0, metavar="COUNT")
    args = options.parse_args()
    if args.write_questions:
        return write_questions(DATA / "eval", args.write_questions)
    if args.merge:
        return merge(*args.merge)
    with httpx.Client(base_url=args.url, timeout=600) as client, ThreadPoolExecutor(8) as pool:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for skill in args.skills:
            lines = (DATA / "eval" / f"{skill}.jsonl").read_text().splitlines()[: args.limit]
            questions = [json.loads(line) for line in lines]
            right = Counter(pool.map(partial(is_right, client, model), questions))
            print(f"{skill}: {right[True]} of {len(questions)} right", flush=True)
    return None


if __name__ == "__main__":
    main()
