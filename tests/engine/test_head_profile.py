import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lserve.engine.errors import FormatMismatchError, SettingsError
from lserve.engine.head_profile import HeadProfile

PROFILE = HeadProfile(
    model_fingerprint="abc",
    sink_size=128,
    local_window=256,
    streaming=((False, True, False), (True, True, False)),
    scores=((0.9, 0.1, 0.75), (0.25, 0.0, 1.5)),
    evidence=(("calibration", "essays"), ("recall", 0.96), ("tokens", 6000), ("gated", True)),
    measures=(("text_loss", ((0.5, -0.01, 0.0), (0.0, 0.0, 1.0))),),
    gate=((("num_streaming", 3), ("loss_rise", 0.002)), (("num_streaming", 4), ("loss_rise", 0.01))),
)


def test_a_saved_profile_loads_unchanged(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "heads.json")
    assert HeadProfile.load(tmp_path / "heads.json") == PROFILE


def test_the_file_is_readable_json_with_one_line_a_layer(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "heads.json")
    text = (tmp_path / "heads.json").read_text()
    assert '    "RSR",\n    "SSR"\n' in text
    assert json.loads(text)["lserve_head_profile"] == 1


@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.tuples(*[st.booleans()] * width), min_size=1, max_size=6).map(tuple)
    ),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_every_shape_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, streaming: tuple[tuple[bool, ...], ...], sink: int, window: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "heads.json"
    profile = HeadProfile("", sink * 64, window * 64, streaming)
    profile.save(path)
    assert HeadProfile.load(path) == profile


def test_none_has_retrieval_heads_only_and_fits_every_model_of_its_shape() -> None:
    profile = HeadProfile.none(3, 2)
    assert profile.streaming == ((False, False),) * 3
    assert profile.num_streaming_heads == 0
    profile.check("any", 3, 2)


def test_another_models_profile_is_refused() -> None:
    PROFILE.check("abc", 2, 3)
    with pytest.raises(FormatMismatchError, match="made for model abc, this model is xyz"):
        PROFILE.check("xyz", 2, 3)
    with pytest.raises(FormatMismatchError, match="2 layers of 3 KV heads, the model 30 of 3"):
        PROFILE.check("abc", 30, 3)


def test_the_digest_names_what_changes_attention_and_nothing_else() -> None:
    bare = replace(PROFILE, scores=None, evidence=(), measures=(), gate=(), model_fingerprint="")
    assert bare.digest == PROFILE.digest
    others = {
        replace(PROFILE, sink_size=64).digest,
        replace(PROFILE, local_window=128).digest,
        replace(PROFILE, streaming=((False, True, False), (True, False, False))).digest,
        HeadProfile("", 128, 256, ((False, True), (False, True), (True, False))).digest,
        PROFILE.digest,
    }
    assert len(others) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lserve_head_profile": 2}, "lserve_head_profile must be 1, got 2"),
        ({"window": 3}, "unknown field 'window'"),
        ({"sink_size": 100}, "sink_size must be a positive multiple of 64, got 100"),
        ({"sink_size": True}, "sink_size must be a positive multiple of 64, got True"),
        ({"local_window": "256"}, "local_window must be of type int, got '256'"),
        ({"heads": ["RSR", "SS"]}, r"same number of KV heads, got \[3, 2\]"),
        ({"heads": []}, r"same number of KV heads, got \[\]"),
        ({"heads": ["RSR", "RXR"]}, r"heads\[1\] must be a string of R and S, got 'RXR'"),
        ({"heads": ["RSR", 7]}, r"heads\[1\] must be a string of R and S, got 7"),
        ({"scores": [[1, 2, 3]]}, r"one number per head, \[3, 3\], got \[3\]"),
        ({"scores": [[1, 2, 3], [1, 2, "x"]]}, "scores must be a list of lists of numbers"),
        ({"scores": [[1, 2, 3], [1, 2, float("nan")]]}, "scores must be finite"),
        ({"evidence": {"a": [1]}}, "evidence must map names"),
        ({"measures": [1]}, "measures must map names"),
        ({"measures": {"text_loss": [[1, 2], [3, 4]]}}, r"text_loss must have one number per head, \[3, 3\]"),
        ({"measures": {"text_loss": [[1, 2, 3], [1, 2, "x"]]}}, "text_loss must be a list of lists"),
        ({"gate": {"a": 1}}, "gate must be a list"),
        ({"gate": [{"loss_rise": None}]}, r"gate\[0\] must map names"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SettingsError, match=message) as error:
        HeadProfile.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_what_is_no_profile_is_a_settings_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heads.json").write_bytes(content)
    with pytest.raises(SettingsError):
        HeadProfile.load(tmp_path / "heads.json")


def test_a_missing_file_is_a_settings_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        HeadProfile.load(tmp_path / "absent.json")
