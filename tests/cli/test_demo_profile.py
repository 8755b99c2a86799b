"""The demo model's head profile, which ships: it fits the model, its evidence holds, and long facts are still found."""

from pathlib import Path

import pytest

from lserve.cli.local_settings import DEMO_PROFILE, local_settings
from lserve.cli.profile_texts import make_texts
from lserve.engine.checkpoint import fingerprint
from lserve.engine.config import EngineConfig
from lserve.engine.head_profile import HeadProfile
from lserve.engine.loading import load
from lserve.engine.profile_gate import Gate, within
from lserve.engine.whole_sequence import Reach
from lserve.quality.text import load_text

PROFILE = HeadProfile.load(DEMO_PROFILE)


def test_it_was_made_for_the_demo_model_and_is_served_with_it(demo_directory: Path) -> None:
    PROFILE.check(fingerprint(str(demo_directory)), 30, 3)
    assert local_settings(None, None, []).sparsity.head_profile == str(DEMO_PROFILE)
    assert local_settings(None, None, ["sparsity.head_profile=null"]).sparsity.head_profile is None
    assert local_settings(None, str(demo_directory), []).sparsity.head_profile is None


def test_its_evidence_is_within_what_it_allows() -> None:
    evidence = dict(PROFILE.evidence)
    assert (PROFILE.sink_size, PROFILE.local_window) == (128, 256)
    assert PROFILE.num_streaming_heads >= 0.3 * 90
    assert evidence["loss_rise"] <= evidence["max_loss"] == 0.003 and evidence["right"] >= evidence["right_dense"]
    assert evidence["engine_loss_rise"] <= 0.003 and evidence["engine_right"] >= evidence["engine_right_dense"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_document_that_it_never_saw_lose_little(demo_directory: Path) -> None:
    loaded = load(EngineConfig(str(demo_directory)))
    texts = make_texts(loaded.tokenizer, load_text(), "", 1100, 1, seed=7)
    gate = Gate(loaded.model, texts.documents[:1], Reach(PROFILE.sink_size, PROFILE.local_window))
    measured = gate.measure(PROFILE.streaming)
    assert measured.right >= 2
    assert within(measured, 0.006)
