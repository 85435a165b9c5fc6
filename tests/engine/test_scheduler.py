"""The order of work in a step."""

from array import array
from typing import Any

from headrace.engine.kv_cache import KVCache
from headrace.engine.messages import SamplingParams
from headrace.engine.request import Request
from headrace.engine.scheduler import MAX_SCORED_ROWS, Plan, Scheduler


def scheduler(pages: int = 100, max_num_seqs: int = 8, max_tokens: int = 16) -> Scheduler:
    return Scheduler(KVCache((0,), [pages], 4, True), max_num_seqs, max_tokens)


def add(
    scheduler: Scheduler, name: str, prompt_len: int, arrival: float | None = None, **params: Any
) -> Request:
    """A request whose tokens no other one has, after all others if its arrival is not given."""
    base = 10_000 * (1 + len(scheduler.waiting) + len(scheduler.running))
    arrival = float(base) if arrival is None else arrival
    request = Request(
        request_id=name,
        prompt_len=prompt_len,
        params=SamplingParams(max_tokens=100, **params),
        adapter=None,
        arrival=(arrival, 0),
        seed=0,
        token_ids=array("q", range(base, base + prompt_len)),
        limit=1000,
        prompt_logprobs=[None] if params else [],
    )
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run a step as the engine does, without a model."""
    plan: Plan = scheduler.schedule()
    for request, num_tokens in plan.items():
        sampled = request.samples_after(num_tokens)
        scheduler.cache.commit(request, num_tokens)
        if sampled:
            request.token_ids.append(7)
    scheduler.cache.check(scheduler.running)
    return {request.request_id: num_tokens for request, num_tokens in plan.items()}


def test_decode_rows_come_before_prefill_chunks() -> None:
    s = scheduler()
    add(s, "long", 40)
    add(s, "short", 3)
    assert step(s) == {"long": 16}
    assert step(s) == {"long": 16}
    assert step(s) == {"long": 8, "short": 3}
    add(s, "new", 40)
    assert step(s) == {"long": 1, "short": 1, "new": 14}
    assert list(step(s).items()) == [("long", 1), ("short", 1), ("new", 14)]


def test_running_requests_are_limited() -> None:
    s = scheduler(max_num_seqs=2)
    requests = [add(s, name, 2) for name in "abc"]
    assert step(s) == {"a": 2, "b": 2}
    assert step(s) == {"a": 1, "b": 1}
    s.remove(requests[0])
    assert step(s) == {"b": 1, "c": 2}


def test_the_latest_is_preempted_and_computes_its_tokens_again() -> None:
    s = scheduler(pages=6)
    add(s, "a", 7)
    late = add(s, "b", 7)
    assert step(s) == {"a": 7, "b": 7}
    # 2 pages each, 2 free: the third pages fit, the fourth of "a" takes all of "b"
    steps = [step(s) for _ in range(6)]
    assert steps[-1] == {"a": 1}
    assert s.num_preemptions == 1
    assert s.waiting == [late]
    assert late.num_computed == 0
    assert late.num_tokens == 13


def test_a_planned_decode_can_still_be_preempted() -> None:
    s = scheduler(pages=7, max_tokens=2)
    add(s, "late", 2)
    assert step(s) == {"late": 2}
    add(s, "early", 16, arrival=0.0)
    steps = []
    while not s.num_preemptions:
        steps.append(step(s))
    assert steps[0] == {"late": 1, "early": 1}
    assert steps[-1] == {"early": 1}, "the row of the preempted request must not run"
    assert [request.request_id for request in s.waiting] == ["late"]


def test_a_waiting_request_needs_room_for_all_of_its_tokens() -> None:
    s = scheduler(pages=8, max_tokens=8)
    first = add(s, "a", 8)
    add(s, "b", 28)
    assert step(s) == {"a": 8}
    assert step(s) == {"a": 1}, "7 pages and a spare one do not fit beside the first"
    s.remove(first)
    assert step(s) == {"b": 8}


def test_prompt_logprobs_bound_the_rows_of_logits() -> None:
    s = scheduler(pages=1000, max_tokens=2048)
    add(s, "a", 200, prompt_logprobs=0)
    add(s, "b", 200, prompt_logprobs=0)
    add(s, "c", 200)
    assert step(s) == {"a": 200, "b": MAX_SCORED_ROWS - 200, "c": 200}
