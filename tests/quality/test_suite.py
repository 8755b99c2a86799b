"""The suite over real engines: arms that share weights and pages, prefixes that are reused, runs that go on."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lserve.engine.config import EngineConfig
from lserve.engine.errors import SettingsError
from lserve.engine.request import AttentionOptions
from lserve.quality import heat_map
from lserve.quality.arms import Arm, open_arms
from lserve.quality.asker import Reply
from lserve.quality.cases import Case, Document
from lserve.quality.engine_asker import EngineAsker
from lserve.quality.suite import Design, Result, State, run_suite
from lserve.quality.text import load_text

DESIGN = Design(lengths=(700, 1500), layouts=(("words", "pairs"), ("people",)), documents=1, questions=3)
TEXT = load_text()[:200_000]


@pytest.fixture(scope="module")
def askers(tiny_config: Callable[..., EngineConfig]) -> list[EngineAsker]:
    """Dense, and two selection rules over the same pages; streaming heads with pages of their own."""
    arms = [
        Arm("dense", tiny_config(), AttentionOptions(dense=True)),
        Arm("sparse", tiny_config()),
        Arm("rule", tiny_config(rule="min_max")),
        Arm("profile", tiny_config(profile=True)),
    ]
    return open_arms(arms, 1600)


def run(askers: list[EngineAsker], state: State | None = None) -> list[Result]:
    done: list[None] = []
    results = run_suite(DESIGN, askers, TEXT, state or State(None, {}), pytest.fail, lambda: done.append(None))
    assert len(done) == DESIGN.num_documents * len(askers)
    return results


@pytest.fixture(scope="module")
def whole(askers: list[EngineAsker], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Result], Path]:
    """The results of one whole run, and its state file."""
    path = tmp_path_factory.mktemp("suite") / "state"
    return run(askers, State(path, {"run": 1})), path


def test_arms_share_what_they_can(askers: list[EngineAsker]) -> None:
    dense, sparse, rule, profile = askers
    assert dense.engine is sparse.engine is rule.engine
    assert profile.engine is not dense.engine
    assert profile.engine.runner.model is dense.engine.runner.model


def test_every_arm_answers_every_case(askers: list[EngineAsker], whole: tuple[list[Result], Path]) -> None:
    results = whole[0]
    cases = {(r.document_id, r.case_id) for r in results}
    assert len(cases) == 2 * (3 + 3 + 3) and len(results) == len(cases) * len(askers)
    assert all(r.error is None and 0 <= r.score <= 1 for r in results)


def test_only_the_question_is_computed(askers: list[EngineAsker]) -> None:
    seen: dict[str, list[Reply]] = {}

    class Watched(EngineAsker):
        def answer(self, prompts: Any, max_tokens: Any) -> list[Reply]:
            replies = super().answer(prompts, max_tokens)
            seen.setdefault(self.name, []).extend(replies)
            return replies

    dense, profile = askers[0].engine, askers[3].engine
    run_suite(
        Design((1500,), (("single",),), 1, 3, seed=7),
        [Watched("dense", dense, AttentionOptions(dense=True)), Watched("profile", profile)],
        TEXT,
        State(None, {}),
        pytest.fail,
        lambda: None,
    )
    for prime, *asked in seen.values():
        assert prime.num_tokens == 1
        assert all(prime.prompt_tokens - reply.cached_tokens <= 128 for reply in asked) and len(asked) == 3
        assert all(reply.times_s == tuple(sorted(reply.times_s)) and reply.ttft_s > 0 for reply in asked)


def test_an_interrupted_run_goes_on_where_it_was(
    askers: list[EngineAsker], whole: tuple[list[Result], Path], tmp_path: Path
) -> None:
    results, path = whole
    lines = path.read_text().splitlines(keepends=True)
    part = tmp_path / "part"
    part.write_text("".join(lines[:-3]) + lines[-3][: len(lines[-3]) // 2])  # killed while it wrote
    assert run(askers, State(part, {"run": 1})) == results
    keys = [json.loads(line)[0] for line in part.read_text().splitlines()[1:]]
    assert sorted(keys) == sorted(json.loads(line)[0] for line in lines[1:])
    assert State(part, {"run": 1}).seconds > 0


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    State(tmp_path / "state", {"seed": 1})
    with pytest.raises(SettingsError, match=r"state belongs to another run: seed was 1, is 2"):
        State(tmp_path / "state", {"seed": 2})
    (tmp_path / "torn").write_text("what is this\n")
    with pytest.raises(SettingsError, match="not a state file"):
        State(tmp_path / "torn", {})


def test_a_document_that_is_too_long_is_left_out_for_all(askers: list[EngineAsker]) -> None:
    told: list[str] = []
    design = Design((700, 3000), (("words",),), 1, 2)
    results = run_suite(design, askers, TEXT, State(None, {}), told.append, lambda: None)
    assert {r.length for r in results} == {700} and len(results) == 2 * len(askers)
    assert len(told) == len(askers) and all("3000 tokens is left out" in text for text in told)


@pytest.mark.parametrize(("found", "asked"), [("0" * 10, 1), ("0110110000", 3), ("1111111000", 4)])
def test_what_dense_finds_less_than_half_of_is_not_asked_on(found: str, asked: int) -> None:
    """Clearly less after one document of ten questions, less at all after three."""
    design = Design((700,), (("numbers",),), documents=4, questions=10)
    results = run_suite(design, [Scripted(found)], TEXT, State(None, {}), pytest.fail, lambda: None)
    assert len({r.document_id for r in results}) == asked


class Scripted:
    """An asker that answers right where a digit is 1."""

    name = "dense"

    def __init__(self, right: str) -> None:
        self.right = right

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, num_tokens: int) -> str:
        return " ".join(text.split()[:num_tokens])

    def overhang(self, text: str) -> int:
        return 0

    def prime(self, document: Document) -> Reply:
        return Reply("", document.length)

    def ask(self, document: Document, cases: Sequence[Case]) -> list[Reply]:
        return [
            Reply(case.answers[0] if right == "1" else "", 0) for case, right in zip(cases, self.right, strict=True)
        ]

    def close(self) -> None:
        pass


def test_the_heat_map_shows_each_arm_by_depth_and_length(whole: tuple[list[Result], Path], tmp_path: Path) -> None:
    results = whole[0]
    wanted = heat_map.columns(results, ("words", "people"))
    assert wanted == [("words", 700), ("words", 1500), ("people", 700), ("people", 1500)]
    assert [len(line) for line in heat_map.grid(results, "dense", wanted)] == [4] * heat_map.DEPTH_BINS
    assert heat_map.draw(tmp_path / "map.png", results, ("dense", "sparse"), ("words",), "title")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not heat_map.draw(tmp_path / "no.png", results, ("dense",), ("common words",), "title")
