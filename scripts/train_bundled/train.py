"""Train the bundled model and its adapters: python scripts/train_bundled/train.py --out DIR

Needs one CUDA GPU with bf16 (an H100 takes minutes). Everything is generated; seeds are fixed.
Writes DIR/tiny, DIR/adapters/{subtract,reverse} and DIR/report.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lora
import skills
import text
import torch
import torch.nn.functional as F
from dataset import SKILL_NAMES, Recipe, Rows, make_rows
from export import dequantized, read_model, write_model
from model import Params, Shape, fake_quantize, forward, init_params, reply_logits
from tokenizers import Tokenizer

BALANCE = 0.01  # weight of the loss that keeps every expert in use
QUANTIZE_FROM = 0.5  # share of the steps after which experts are rounded to MXFP4
Transform = Callable[[Params, float], Params]  # (trained parameters, progress) -> used ones


def rate(progress: float) -> float:
    """Learning rate as a share of its peak: 3 % warm-up, then a cosine to 1 %."""
    return min(progress / 0.03, 0.01 + 0.495 * (1 + math.cos(math.pi * progress)))


def fit(
    trained: Params,
    transform: Transform,
    shape: Shape,
    rows: Rows,
    *,
    steps: int,
    seconds: float = 0.0,
    batch: int,
    peak: float,
    decay: float,
    name: str,
) -> int:
    """Minimise cross-entropy on the replies, in place, in `steps` or about `seconds`."""
    matrices = [p for p in trained.values() if p.ndim > 1]
    vectors = [p for p in trained.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    cuda = rows.tokens.is_cuda
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=cuda)
    generator = torch.Generator().manual_seed(7)
    order, start = torch.randperm(len(rows), generator=generator), time.monotonic()
    step = 0
    while step < steps:
        if step == 50 and seconds:  # the first steps compile and allocate: time the next 50
            torch.cuda.synchronize()
            start = time.monotonic()
        if step == 100 and seconds:
            torch.cuda.synchronize()
            steps = int(seconds * 50 / (time.monotonic() - start))
        first = step * batch % (len(rows) - batch + 1)
        if first < batch:
            order = torch.randperm(len(rows), generator=generator)
        chosen = rows.take(order[first : first + batch].to(rows.tokens.device))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step / steps)
        params = transform(trained, step / steps)
        hidden, balance, _ = forward(params, shape, chosen)
        logits, targets, _ = reply_logits(params, hidden, chosen)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE * balance).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0, foreach=True)
        optimizer.step()
        step += 1
        if step % max(steps // 40, 1) == 0 or step == steps:
            spent = time.monotonic() - start
            print(
                f"{name} step {step}/{steps} loss {loss.item():.5f} balance {balance.item():.3f} "
                f"{spent:.0f}s",
                flush=True,
            )
    return steps


@torch.no_grad()
def exact_match(
    params: Params, shape: Shape, rows: Rows
) -> tuple[dict[str, str], list[list[float]]]:
    """Per skill, the share of replies whose every token is the likeliest; and expert shares.

    As a reply follows from its prompt alone, this is exact match under greedy decoding.
    """
    right: dict[str, list[int]] = {}
    shares = []
    for i in range(0, len(rows), 32):
        part = rows.take(slice(i, i + 32))
        hidden, _, share = forward(params, shape, part)
        shares.append(share)
        logits, targets, wanted = reply_logits(params, hidden, part)
        wrong = torch.zeros_like(wanted)
        wrong[wanted] = logits.argmax(-1) != targets
        example = (part.positions == 0).cumsum(1)[:, 1:]
        example = example + torch.arange(len(part), device=example.device)[:, None] * 1000
        failed = set(example[wrong].tolist())
        skill = part.skill[:, 1:].long()
        asked = torch.stack((example[wanted], skill[wanted]), dim=1).unique(dim=0)
        for key, number in asked.tolist():
            right.setdefault(SKILL_NAMES[number], []).append(int(key not in failed))
    table = {s: f"{sum(r) / len(r):.4f} of {len(r)}" for s, r in sorted(right.items())}
    return table, torch.stack(shares).mean(0).tolist()


def main() -> None:
    """Tokenizer, data, base, adapters, figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--device", default="cuda")
    options.add_argument("--base-steps", type=int, default=9000)
    options.add_argument("--base-seconds", type=float, default=0.0, help="in place of steps")
    options.add_argument("--adapter-steps", type=int, default=1500)
    options.add_argument("--base-rows", type=int, default=300_000)
    options.add_argument("--adapter-rows", type=int, default=24_000)
    options.add_argument("--check-rows", type=int, default=1024)
    options.add_argument("--peak", type=float, default=1e-3, help="learning rate of the base")
    options.add_argument("--resume", type=Path, help="a written model to train further")
    options.add_argument("--seed", type=int, default=1, help="of the base's examples")
    options.add_argument("--batch", type=int, default=64)
    args = options.parse_args()
    torch.manual_seed(0)
    start = time.monotonic()
    if args.resume:
        tokenizer = Tokenizer.from_file(str(args.resume / "tokenizer.json"))
    else:
        tokenizer = text.train_tokenizer(2048, seed=0)
    eos = [tokenizer.token_to_id(t) for t in ("<|return|>", "<|endoftext|>", "<|call|>")]
    shape = replace(Shape(), vocab_size=tokenizer.get_vocab_size(), eos=eos)
    recipe = Recipe(tokenizer.to_str(), skills.BASE, args.base_rows, args.seed, held_out=False)
    rows = make_rows(recipe, 64).to(args.device)
    check = make_rows(replace(recipe, num_rows=args.check_rows, seed=2, held_out=True), 16).to(
        args.device
    )
    print(
        f"{len(rows)} rows, vocabulary {shape.vocab_size}, {time.monotonic() - start:.0f}s",
        flush=True,
    )

    initial = read_model(args.resume) if args.resume else init_params(shape, 0)
    params = {n: p.to(args.device).requires_grad_() for n, p in initial.items()}
    report: dict[str, Any] = {"parameters": sum(p.numel() for p in params.values())}
    quantize_from = 0.0 if args.resume else QUANTIZE_FROM
    report["steps"] = fit(
        params, lambda p, progress: fake_quantize(p) if progress >= quantize_from else p,
        shape, rows, steps=args.base_steps, seconds=args.base_seconds, batch=args.batch,
        peak=args.peak, decay=0.05, name="base",
    )  # fmt: skip
    write_model(args.out / "tiny", shape, params, tokenizer)
    base = {n: p.to(args.device) for n, p in dequantized(params).items()}
    report["base"], report["expert_shares"] = exact_match(base, shape, check)
    report["base_seconds"] = round(time.monotonic() - start)
    print(json.dumps(report["base"]), flush=True)

    for number, (name, makers) in enumerate(skills.ADAPTERS.items()):
        start = time.monotonic()
        mixture = replace(recipe, makers=makers, num_rows=args.adapter_rows, seed=10 + number)
        rows = make_rows(mixture, 16).to(args.device)
        held_out = replace(mixture, num_rows=args.check_rows // 4, seed=20 + number, held_out=True)
        check = make_rows(held_out, 16).to(args.device)
        fresh = lora.init_adapter(base, number).items()
        adapter = {n: p.to(args.device).requires_grad_() for n, p in fresh}
        fit(
            adapter, lambda p, _: lora.merge(base, p), shape, rows,
            steps=args.adapter_steps, batch=args.batch, peak=2e-3, decay=0.0, name=name,
        )  # fmt: skip
        lora.save_adapter(args.out / "adapters" / name, adapter)
        stored = {n: p.detach().bfloat16().float() for n, p in adapter.items()}
        merged = {n: p.detach() for n, p in lora.merge(base, stored).items()}
        report[name], _ = exact_match(merged, shape, check)
        report[f"{name}_without"], _ = exact_match(base, shape, check)
        report[f"{name}_seconds"] = round(time.monotonic() - start)
        print(name, json.dumps(report[name]), json.dumps(report[f"{name}_without"]), flush=True)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
