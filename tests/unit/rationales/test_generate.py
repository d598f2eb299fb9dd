"""Asking: what a key hangs on, what is asked again after a kill, and what a journal line gives back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from distill_llm.rationales.generate import Tally, completion_of, entry_of, needs_hint
from distill_llm.rationales.parse import Parsed
from distill_llm.tasks.shop import Shop
from distill_llm.teachers.base import Completion, Failure, Message, Request, TokenScores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from distill_llm.core.example import Example
    from distill_llm.rationales.generate import Asker


def _keys(asker: Asker, examples: Iterable[Example], split: str = "train") -> set[str]:
    return {request.key for example in examples for request in asker.requests(example, split)}


def test_one_request_an_example_and_sample(asker: Any, examples: Any) -> None:
    requests = [request for example in examples for request in asker().requests(example, "train")]
    assert [(request.example.id, request.sample) for request in requests] == [
        ("one", 0), ("one", 1), ("two", 0), ("two", 1), ("three", 0), ("three", 1),
    ]  # fmt: skip
    assert len({request.key for request in requests}) == 6
    assert (requests[2].prompt, requests[2].hinted, requests[2].split) == ("Q: 2\nA:", False, "train")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 18},
        {"prompt": {"template": "Think. {prompt}"}},
        {"prompt": {"style": "chat"}},
        {"prompt": {"style": "chat", "system": "Be brief."}},
        {"prompt": {"exemplars": "gsm8k"}},
        {"prompt": {"exemplars": "gsm8k", "num_exemplars": 1}},
        {"sampling": {"temperature": 0.8}},
        {"sampling": {"temperature": 0.7, "stop": ["\n"]}},
        {"sampling": {"temperature": 0.7, "top_p": 0.9}},
        {"sampling": {"temperature": 0.7, "max_new_tokens": 9}},
        {"sampling": {"temperature": 0.7, "top_logprobs": 2}},
    ],
    ids=str,
)
def test_a_key_changes_with_all_that_decides_the_completion(asker: Any, examples: Any, changes: dict[str, Any]) -> None:
    assert not _keys(asker(), examples) & _keys(asker(**changes), examples)


def test_a_key_changes_with_teacher_split_id_and_question(asker: Any, examples: Any, stub_teacher: Any) -> None:
    before = _keys(asker(), examples)
    assert not before & _keys(asker(stub_teacher(identity="big@2")), examples)
    assert not before & _keys(asker(), examples, "test")
    for change in ({"id": "new"}, {"prompt": "Q: other\nA:"}):
        assert not before & _keys(asker(), [replace(example, **change) for example in examples])


def test_a_key_does_not_change_with_rules_samples_budget_or_what_the_student_reads(asker: Any, examples: Any) -> None:
    changes: dict[str, Any] = {
        "samples": 3,
        "keep": [{"kind": "agrees_with_label"}],
        "hint_retry": {},
        "budget": {"max_requests": 5},
        "prices": {"input_per_million": 1},
        "allow_missing": 0.1,
    }
    others = [replace(example, input="read otherwise", label="7", rationale="r") for example in examples]
    assert _keys(asker(), examples) < _keys(asker(**changes), others)


def test_greedy_text_does_not_depend_on_the_seed(asker: Any, examples: Any) -> None:
    greedy = {"sampling": {"temperature": 0}, "samples": 1}
    assert _keys(asker(seed=1, **greedy), examples) == _keys(asker(seed=2, **greedy), examples)


def test_a_hint_tells_the_gold_label_in_the_frame_of_the_prompt(asker: Any, examples: Any) -> None:
    hinting = asker(hint_retry={"samples": 2})
    plain, hinted = hinting.requests(examples[0], "train"), hinting.hinted(examples[0], "train")
    assert [(request.prompt, request.hinted, request.sample) for request in hinted] == [
        ("Q: 1\n(Hint: The answer is 2.)\nA:", True, sample) for sample in (0, 1)
    ]
    assert len({request.key for request in (*plain, *hinted)}) == 4
    chat = asker(hint_retry={}, prompt={"style": "chat"}).hinted(examples[0], "train")
    assert [request.prompt for request in chat] == [(Message("user", "1\n(Hint: The answer is 2.)"),)]
    own = asker(hint_retry={"template": "Why is it so? {answer} Question: {question}"}).hinted(examples[0], "train")
    assert own[0].prompt == "Q: Why is it so? The answer is 2. Question: 1\nA:"
    assert own[0].key != hinted[0].key


def test_a_hint_for_a_bare_prompt_stands_behind_it(asker: Any) -> None:
    hinting = asker(hint_retry={})
    hinting.task = Shop(products=20, train_size=1)
    example = hinting.task.load(0).train[0]
    (request,) = hinting.hinted(example, "train")
    assert request.prompt == f"{example.prompt}\n(Hint: so {example.label})"


def test_without_a_label_or_the_wish_there_is_no_hint(asker: Any, examples: Any) -> None:
    assert asker(hint_retry={}).hinted(examples[2], "train") == []
    assert asker().hinted(examples[0], "train") == []


def test_a_hint_is_needed_where_no_completion_is_right(examples: Any, task: Any) -> None:
    one, _, unlabelled = examples
    assert needs_hint([Parsed("r", "3"), Parsed("r", None)], one, task)
    assert needs_hint([], one, task)
    assert not needs_hint([Parsed("r", "3"), Parsed("r", " 2")], one, task)
    assert not needs_hint([Parsed("r", None)], unlabelled, task)


def test_a_killed_run_asks_for_nothing_twice(asker: Any, answer_all: Any, stub_teacher: Any) -> None:
    killed, second, third = stub_teacher(dies_after=4), stub_teacher(), stub_teacher()
    with pytest.raises(KeyboardInterrupt):
        answer_all(asker(killed))
    _, whole = answer_all(asker(second))
    _, again = answer_all(asker(third))
    assert (len(killed.asked), len(second.asked), third.asked) == (4, 2, [])
    assert not set(killed.keys) & set(second.keys)
    assert again == whole
    assert len(whole) == 6
    for request in (*killed.asked, *second.asked):
        text = f"Chain of {request.example.id}, {request.sample}. The answer is {request.sample}."
        assert whole[request.key] == Completion(text, 5, 7)


class _StopsAfter:
    """A user's Ctrl-C once so many answers are there."""

    def __init__(self, number: int):
        self._number = number

    def advance(self, name: str, done: float, total: float, note: str = "") -> None:
        if done == self._number:
            self._number = -1
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        pass


class _PaidFor:
    """Has four requests under way; interrupted, it sends no more, but hands out what is paid for."""

    identity = "big@1"

    def __init__(self) -> None:
        self.sent: list[str] = []

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        under_way: list[Request] = []
        try:
            for request in requests:
                self.sent.append(request.key)
                under_way.append(request)
                if len(under_way) == 4:
                    yield under_way.pop(0), Completion("The answer is 1.")
        except KeyboardInterrupt:
            yield from ((request, Completion("The answer is 1.")) for request in under_way)
            raise


def test_an_interrupt_keeps_what_is_under_way(asker: Any, answer_all: Any, stub_teacher: Any) -> None:
    stopped, second = _PaidFor(), stub_teacher()
    with pytest.raises(KeyboardInterrupt):
        answer_all(asker(stopped), progress=_StopsAfter(1))
    _, found = answer_all(asker(second))
    assert (len(stopped.sent), len(second.asked), len(found)) == (4, 2, 6)
    assert not set(stopped.sent) & set(second.keys)


def test_an_interrupt_ends_a_teacher_that_does_not_look_at_it(asker: Any, answer_all: Any, stub_teacher: Any) -> None:
    stopped, second = stub_teacher(), stub_teacher()
    with pytest.raises(KeyboardInterrupt):
        answer_all(asker(stopped), progress=_StopsAfter(2))
    answer_all(asker(second))
    assert (len(stopped.asked), len(second.asked)) == (2, 4)


def test_a_torn_answer_is_asked_for_again_and_only_that(
    asker: Any, answer_all: Any, stub_teacher: Any, tmp_path: Path
) -> None:
    first, second, path = stub_teacher(), stub_teacher(), tmp_path / "journal.jsonl"
    answer_all(asker(first))
    path.write_bytes(path.read_bytes()[:-9])
    answer_all(asker(second))
    assert second.keys == first.keys[-1:]


def test_an_answer_is_in_the_journal_before_the_next_is_asked_for(
    asker: Any, answer_all: Any, stub_teacher: Any, tmp_path: Path
) -> None:
    lines: list[int] = []

    def answer(request: Request) -> str:
        path = tmp_path / "journal.jsonl"
        lines.append(path.read_bytes().count(b"\n"))
        return "The answer is 1."

    answer_all(asker(stub_teacher(answer)))
    assert lines == [0, 1, 2, 3, 4, 5]


def test_a_failure_is_asked_again_by_the_next_run_alone(asker: Any, answer_all: Any, stub_teacher: Any) -> None:
    broken = stub_teacher(lambda request: Failure("gone", retries=2) if request.example.id == "two" else "fine")
    turn, found = answer_all(asker(broken))
    assert len(broken.asked) == 6
    assert set(turn.failures.values()) == {"gone"}
    assert (len(turn.failures), len(found)) == (2, 4)
    mended = stub_teacher()
    turn, found = answer_all(asker(mended))
    assert [request.example.id for request in mended.asked] == ["two", "two"]
    assert (turn.failures, len(found)) == ({}, 6)


def test_a_closed_budget_ends_the_round_and_what_came_back_stays(
    asker: Any, answer_all: Any, stub_teacher: Any
) -> None:
    teacher = stub_teacher()
    turn, found = answer_all(asker(teacher, budget={"max_requests": 4}))
    assert (len(teacher.asked), len(found), turn.done) == (4, 4, 4)
    assert turn.closed == "budget.max_requests: 4"


def test_a_budget_is_used_up_although_many_are_under_way(asker: Any, answer_all: Any, stub_teacher: Any) -> None:
    """What is set aside closes the gate early; it opens again once the answers turn out to be shorter."""
    teacher = stub_teacher()
    longer = {"template": "{prompt}" + " " * 20}  # 22 tokens are set aside for each, of which 12 are used
    turn, found = answer_all(asker(teacher, prompt=longer, budget={"max_tokens": 4 * 12 + 22}))
    assert (len(found), turn.closed) == (5, "budget.max_tokens: 70")


def _scores(number: int) -> TokenScores:
    return TokenScores(
        tokens=tuple(range(number)),
        logprobs=tuple(-0.5 * i - 0.0000004 for i in range(number)),
        top_tokens=tuple((i, "a piece") for i in range(number)),
        top_logprobs=tuple((-0.25, float("-inf")) for _ in range(number)),
    )


@pytest.mark.parametrize(
    "completion",
    [
        Completion("text é\n"),
        Completion("", 5, 7, cut=True, retries=3),
        Completion("scored", 5, 2, scores=_scores(2)),
        Completion("nothing was written", scores=_scores(0)),
    ],
    ids=["plain", "cut", "scored", "no token"],
)
def test_a_journal_line_gives_the_completion_back(asker: Any, examples: Any, completion: Completion) -> None:
    (request, _) = asker().requests(examples[0], "train")
    read = completion_of(json.loads(json.dumps(entry_of(request, completion))))
    if completion.scores is not None:
        assert read.scores is not None
        assert read.scores.logprobs == pytest.approx(completion.scores.logprobs, abs=1e-6)
        assert replace(read.scores, logprobs=()) == replace(completion.scores, logprobs=())
    assert replace(read, scores=None) == replace(completion, scores=None)


def test_a_plain_line_says_no_more_than_it_must(asker: Any, examples: Any) -> None:
    plain, hinted = asker(hint_retry={}), asker(hint_retry={}).hinted(examples[0], "train")[0]
    assert set(entry_of(plain.requests(examples[0], "train")[0], Completion("x"))) == {
        "key", "split", "example", "sample", "text", "tokens_in", "tokens_out",
    }  # fmt: skip
    assert entry_of(hinted, Completion("x", cut=True))["hinted"] is True


def test_the_bar_says_how_many_are_read_and_right(examples: Any, task: Any) -> None:
    tally = Tally()
    assert tally.note() == ""
    tally.count(Parsed("r", "2"), examples[0], task)
    tally.count(Parsed("r", None), examples[1], task)
    tally.count(Parsed("r", "9"), examples[2], task)
    assert tally.note() == "67% parsed, 50% right"
    unlabelled = Tally()
    unlabelled.count(Parsed("r", "9"), examples[2], task)
    assert unlabelled.note() == "100% parsed"


def test_the_bar_says_how_far_the_samples_of_an_example_agree(
    examples: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = examples
    tally = Tally(samples=3)
    for example, label in ((three, "9"), (one, "2"), (three, "9"), (one, "7"), (three, None)):
        tally.count(Parsed("r", label), example, task)
    assert tally.note() == "80% parsed, 50% right, 67% agreed"  # of one example whose three are there: 9, 9 and none
    tally.count(Parsed("r", "8"), one, task)  # 2, 7, 8
    assert tally.note().endswith("50% agreed")
    monkeypatch.setattr("distill_llm.rationales.generate._WAITING_EXAMPLES", 1)
    for example in (one, two, three):  # of each another sample was in the journal: they wait for what never comes
        tally.count(Parsed("r", "1"), example, task)
    assert list(tally.waiting) == [three.id]
