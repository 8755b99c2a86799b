"""Documents: of the right length, with every answer in them, the same for the same seed."""

import re

import pytest

from lserve.engine.errors import SettingsError
from lserve.quality.cases import Document
from lserve.quality.registry import LAYOUTS, TASKS, layouts
from lserve.quality.tasks import MAX_QUESTIONS, RESERVED_TOKENS, build_document
from lserve.quality.text import insert, load_text, passage


class Words:
    """Measures text in words."""

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, num_tokens: int) -> str:
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        return text[: ends[num_tokens - 1]] if 0 < num_tokens <= len(ends) else text if num_tokens else ""

    def overhang(self, text: str) -> int:
        return 0


def document(task: str, questions: int = 10, number: int = 0, length: int = 2500) -> Document:
    return build_document(f"{task}-{number}", length, [TASKS[task]], questions, load_text(), (number, 10), Words())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_asks_for_what_the_document_says(task: str) -> None:
    made = document(task)
    assert len(made.cases) == 10
    assert len({case.case_id for case in made.cases}) == len({case.question for case in made.cases}) == 10
    for case in made.cases:
        assert case.task == task and case.question and case.answers
        assert all(answer.casefold() in " ".join(made.text.split()).casefold() for answer in case.answers)
        assert case.depth is None or 0 <= case.depth <= 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("questions", [1, MAX_QUESTIONS])
def test_few_and_many_questions(task: str, questions: int) -> None:
    assert len(document(task, questions).cases) == questions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_have_the_length_that_they_were_made_for(layout: tuple[str, ...]) -> None:
    plans = [TASKS[task] for task in layout]
    made = build_document("d", 2500, plans, 10, load_text(), (3, 10), Words())
    assert 2500 - RESERVED_TOKENS - 10 <= Words().count(made.text) <= 2500 - RESERVED_TOKENS
    assert len(made.cases) == 10 * len(layout)
    assert len({(case.question, case.answers) for case in made.cases}) == len({case.question for case in made.cases})


def test_the_seed_decides_everything() -> None:
    assert document("single") == document("single")
    assert document("single", number=1).cases != document("single").cases


def test_facts_stand_at_the_depth_that_their_case_says() -> None:
    for case in document("numbers").cases:
        text = document("numbers").text
        assert abs(text.index(case.answers[0]) / len(text) - (case.depth or 0)) < 0.06


def test_insertion_keeps_the_text_and_the_order() -> None:
    text = "One is here. Two is here.\n\nThree is here. Four is here."
    assert insert(text, []) == text
    made = insert(text, [(1.0, "LAST"), (0.0, "FIRST"), (0.5, "MIDDLE")])
    assert made.split("\n\n")[0] == "FIRST" and made.split("\n\n")[-1] == "LAST"
    assert made.index("Two is here.") < made.index("MIDDLE") < made.index("Three is here.")
    assert [word for word in made.split() if not word.isupper()] == text.split()


def test_text_that_is_too_short_is_repeated() -> None:
    made = passage("some words of text " * 20, 1, 2, 500, Words().cut)
    assert Words().count(made) == 500


def test_every_task_is_in_one_layout() -> None:
    assert sorted(task for layout in LAYOUTS for task in layout) == sorted(TASKS)
    assert layouts(["quote", "pairs", "single"]) == (("single",), ("pairs", "quote"))
    with pytest.raises(SettingsError, match="unknown task 'nedles'"):
        layouts(["nedles"])
