"""The user's questions: the file, the places that answer them, and the prompts around these."""

from pathlib import Path

import pytest
from poc_documents import prose
from stub_settings import StubAsker

from lserve.engine.errors import SettingsError
from lserve.poc.position import position
from lserve.poc.questions import Places, Question, question_documents, read_questions
from lserve.poc.readers import SourceDocument
from lserve.quality.cases import score


def read(path: Path) -> tuple[list[Question], list[str]]:
    told: list[str] = []
    return read_questions(path, told.append), told


def test_a_file_of_questions(tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text('question, expected answer\nWho pays?, The owner\n\n"When, and where?", "Monday, Oslo"\n')
    questions, told = read(path)
    assert questions == [Question("Who pays?", "The owner"), Question("When, and where?", "Monday, Oslo")]
    assert told == []


def test_bad_lines_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_text("Who pays?, The owner\nno answer here\na, b, c\n" + "x" * 10_000_000 + ", y\nWhere?, Oslo\n")
    questions, told = read(path)
    assert [question.answer for question in questions] == ["The owner", "Oslo"]
    assert told == [
        "q.csv, line 2: left out, it is not `question, expected answer`: 'no answer here'",
        "q.csv, line 3: left out, it is not `question, expected answer`: 'a, b, c'",
        "q.csv, line 4: left out, 10,000,003 characters are more than 4,000",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"nothing useful\n", "no line of"), (b"\xff\xfe\xfa", "are not UTF-8"), (None, "cannot read questions from")],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "q.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        read(path)


def places() -> Places:
    texts = [prose("Oslo", 60), "The mayor of Bergen is called Solveig. " + prose("Bergen", 60), prose("Lisbon", 60)]
    texts[2] += " Solveig sells fish in Lisbon, near the tower."
    return Places([SourceDocument(f"{n}.txt", "text", text) for n, text in enumerate(texts)])


def test_a_question_is_put_to_the_place_that_answers_it() -> None:
    where = places()
    assert where.text.startswith(
        "The mayor of Bergen is called", where.find(Question("Who is mayor of Bergen?", "Solveig")) - 30
    )
    fish = where.find(Question("Who sells fish near the tower?", "Solveig"))
    assert where.text[fish:].startswith("Solveig sells fish")
    somewhere = where.find(Question("What about Lisbon?", "an answer that stands nowhere"))
    assert "Lisbon" in where.text[somewhere - 1500 : somewhere + 1500]


@pytest.mark.parametrize("length", [500, 1_500, 100_000])
def test_prompts_hold_the_places_of_their_questions(length: int) -> None:
    where, asker = places(), StubAsker("Full")
    questions = [Question("Who is mayor of Bergen?", "Solveig"), Question("Who sells fish?", "Solveig")]
    questions += [Question("What is old in Oslo?", "harbour")]
    documents = question_documents(questions, where, length, asker)
    assert sorted(case.case_id for d in documents for case in d.cases) == ["yours-0", "yours-1", "yours-2"]
    for document in documents:
        assert asker.count(document.text) <= length
        for case in document.cases:
            assert case.answers[0] in document.text and 0 <= (case.depth or 0) <= 1
            assert score(case, f"I think {case.answers[0]}.") == 1.0


def test_position_questions_ask_for_the_first_and_the_last() -> None:
    import random

    planted = position(random.Random(1), "", 4)
    for case in planted.cases:
        name = case.question.split()[0]
        notes = [text for _, text in sorted(planted.items) if f"by {name}:" in text]
        assert len(notes) == 3
        wanted = notes[0] if "first" in case.question else notes[-1]
        assert case.answers[0] in wanted
