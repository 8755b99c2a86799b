"""What counts as a right reply."""

import pytest

from lserve.quality.cases import Case, contains, score


@pytest.mark.parametrize(
    ("reply", "answer", "found"),
    [
        ("The code is 90417.", "90417", True),
        ("The code is 90,417.", "90417", True),
        ("The code is 190417.", "90417", False),
        ("The code is 904171.", "90417", False),
        ("MARMALADE!", "marmalade", True),
        ("marmalades", "marmalade", False),
        ("It is the\n  slice with", "the slice with", True),
        ("", "x", False),
        ("costs 3.50 (about)", "3.50", True),
        ("1,2,3", "123", False),
    ],
)
def test_an_answer_is_found_as_whole_words(reply: str, answer: str, found: bool) -> None:
    assert contains(reply, answer) is found


def test_a_case_with_several_answers_scores_the_share_that_is_named() -> None:
    case = Case("1", "multi-value", "Which?", ("anchor", "violin"))
    assert [score(case, reply) for reply in ("Anchor and violin", "a violin", "nothing")] == [1.0, 0.5, 0.0]
