"""What one request owes and says."""

from headrace.engine.messages import TokenLogprobs
from headrace.engine.request import Request, new_request
from tests.engine.toy_model import VOCAB, add_request


def made(prompt_len: int, **params: int) -> Request:
    return new_request(add_request("a", [1] * prompt_len, **params), 0, 0, VOCAB, 100)


def test_scoring_goes_on_after_a_preemption() -> None:
    request = made(10, prompt_logprobs=0)
    assert list(request.unscored_positions(4)) == [0, 1, 2, 3]
    request.prompt_logprobs += [TokenLogprobs([1], [0.0], 1)] * 4
    request.num_computed = 4
    assert list(request.unscored_positions(6)) == [4, 5, 6, 7, 8]
    request.num_computed = 0  # preempted: rows 0..3 are computed again, but not scored
    assert list(request.unscored_positions(6)) == [4, 5]
    request.prompt_logprobs += [TokenLogprobs([1], [0.0], 1)] * 5
    assert not request.owes_prompt_logprobs
    assert list(request.unscored_positions(10)) == []


def test_the_row_of_the_newest_token_samples() -> None:
    request = made(10)
    assert not request.samples_after(9)
    assert request.samples_after(10)
    request.num_computed = 9
    assert request.samples_after(1)
    assert not made(10, max_tokens=0, prompt_logprobs=0).samples_after(10)


def test_news_that_is_told_once() -> None:
    request = made(2, prompt_logprobs=0)
    request.prompt_logprobs.append(TokenLogprobs([1], [0.0], 1))
    request.queued_s, request.num_cached = 1.5, 0
    first, second = request.output([3]), request.output([4])
    assert (first.prompt_logprobs, first.queued_s) == (request.prompt_logprobs, 1.5)
    assert (second.prompt_logprobs, second.queued_s) == (None, 0.0)
