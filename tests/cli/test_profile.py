"""`lserve profile`, over a tiny random model with the demo model's tokenizer: the file, its evidence, and going on."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from lserve.cli import profile_search, profile_texts
from lserve.cli.main import main
from lserve.cli.profile_state import ProfileState
from lserve.engine.checkpoint import fingerprint
from lserve.engine.errors import SettingsError
from lserve.engine.head_profile import HeadProfile
from lserve.engine.profile import ANSWER_ALLOWANCE, HeadMeasures, HeadScorer
from lserve.engine.profile_gate import Measurement
from lserve.engine.tokenizer import Tokenizer
from lserve.quality.text import load_text

SMALL = ["--length", "800", "--texts", "4", "--sink", "64", "--window", "64"]
WHOLE = ["--optimize", "--max-loss", "90%"]
LENGTH = 2400


@pytest.fixture(scope="module")
def tiny_directory(demo_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 3 layers of 2 KV heads, which speaks the demo model's tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    for file in demo_directory.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(str(demo_directory))


def test_a_profile_is_written_with_its_evidence_and_picture(
    tiny_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "heads.json"
    assert main(["profile", "--model", str(tiny_directory), *SMALL, "--max-loss", "1%", "--output", str(output)]) == 0
    profile = HeadProfile.load(output)
    profile.check(fingerprint(str(tiny_directory)), 3, 2)
    assert (profile.sink_size, profile.local_window) == (64, 64)
    assert [name for name, _ in profile.measures] == [
        "text_divergence",
        "answer_divergence",
        "text_loss",
        "answer_loss",
        "output_change",
        "fact_mass",
    ]
    evidence = dict(profile.evidence)
    assert evidence["loss_rise"] <= evidence["max_loss"] == 0.01
    assert evidence["engine_loss_rise"] == pytest.approx(evidence["loss_rise"], abs=0.002)
    assert dict(profile.gate[0])["num_streaming"] == 0
    chosen = [dict(row) for row in profile.gate if dict(row)["num_streaming"] == profile.num_streaming_heads]
    assert [row["loss_rise"] for row in chosen] == [evidence["loss_rise"]]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.png"]
    assert re.search(r"\d of 6 KV heads stream", capsys.readouterr().out)


def test_an_interrupted_run_goes_on_and_ends_the_same(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def profiled(name: str) -> HeadProfile:
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        assert main(["profile", "--model", str(tiny_directory), *SMALL, *WHOLE]) == 0
        return HeadProfile.load(Path("head-profile.json"))

    monkeypatch.setattr(profile_search, "OPTIMIZER_STEPS", 3)
    whole = profiled("whole")
    assert dict(whole.measures)["optimized_gate"]
    measured = 0
    next_layer = profile_search.HeadScorer.next_layer

    def interrupted(self: object, heads: list[int]) -> dict[int, HeadMeasures]:
        nonlocal measured
        if measured == 4:
            measured += 1
            raise KeyboardInterrupt
        measured += 1
        return next_layer(self, heads)

    monkeypatch.setattr(profile_search.HeadScorer, "next_layer", interrupted)
    (tmp_path / "parts").mkdir()
    monkeypatch.chdir(tmp_path / "parts")
    assert main(["profile", "--model", str(tiny_directory), *SMALL, *WHOLE]) == 130
    assert os.listdir() == ["head-profile.partial"]
    again = profiled("parts")
    assert measured == 5 + 8, "of twelve layers four were known"
    assert (again.streaming, again.scores, again.measures, again.gate) == (
        whole.streaming,
        whole.scores,
        whole.measures,
        whole.gate,
    )


def test_heads_that_cost_too_much_over_their_texts_are_measured_no_further(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def next_layer(self: HeadScorer, heads: list[int]) -> dict[int, HeadMeasures]:
        """Head 0 costs too much in the first text, head 1 only in the mean of two."""
        costs = (0.6, 0.45 if len(asked) < 3 else 0.65)
        asked.append(heads)
        self.skip()
        return {head: HeadMeasures(0, costs[head] * ANSWER_ALLOWANCE, 0, 0, 0, 0) for head in heads}

    monkeypatch.setattr(HeadScorer, "next_layer", next_layer)
    output = str(tmp_path / "heads.json")
    assert main(["profile", "--model", str(tiny_directory), *SMALL, "--output", output]) == 0
    assert asked == [[0, 1]] * 3 + [[1]] * 3


def test_a_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    path, measures = tmp_path / "state", {1: HeadMeasures(1, 2, 3, 4, 5, 6)}
    measurement = Measurement(3, 0.1, 0.01, 4, 5, 1, 0, 0.5, 0.1)
    state = ProfileState(path, "a")
    state.add_layer(0, 1, measures)
    state.set_gates([[0.5]])
    state.add_measurement("digest", measurement)
    again = ProfileState(path, "a")
    assert (again.measures, again.gates, again.measured) == ({(0, 1): measures}, [[0.5]], {"digest": measurement})
    other = ProfileState(path, "b")
    assert (other.measures, other.gates, other.measured) == ({}, None, {})
    path.write_text("broken")
    assert ProfileState(path, "a").measures == {}


def test_texts_do_not_overlap_and_follow_from_the_seed(tokenizer: Tokenizer) -> None:
    source = "\n".join(f"Line {number} of a long text says something." for number in range(4000))
    texts = profile_texts.make_texts(tokenizer, source, "", LENGTH, 4, 1)
    assert texts == profile_texts.make_texts(tokenizer, source, "", LENGTH, 4, 1)
    assert texts != profile_texts.make_texts(tokenizer, source, "", LENGTH, 4, 2)
    decoded = [tokenizer.decode(text.token_ids) for text in (*texts.calibration, *texts.documents)]
    lines = [set(re.findall(r"Line (\d+) of a long text says something", text)) for text in decoded]
    assert len(lines) == 7 and all(len(found) > 40 for found in lines)
    assert all(not mine & theirs for i, mine in enumerate(lines) for theirs in lines[:i])
    assert all(LENGTH * 0.8 < len(document.token_ids) <= LENGTH for document in texts.documents)


@pytest.mark.parametrize("template", ["its own", "one that strips", None])
def test_answers_are_told_where_they_are_said_to_be(template: str | None, demo_directory: Path) -> None:
    from transformers import AutoTokenizer

    checkpoint = AutoTokenizer.from_pretrained(demo_directory)
    if template == "one that strips":  # as Llama 3's does
        checkpoint.chat_template = checkpoint.chat_template.replace("message['content']", "message['content'] | trim")
        assert "trim" in checkpoint.chat_template
    elif template is None:
        checkpoint.chat_template = None
    tokenizer = Tokenizer(checkpoint)
    for text in profile_texts.make_texts(tokenizer, load_text(), "", LENGTH, 4, 1).calibration:
        assert 0 <= text.running.start < text.running.stop < text.answers[0]
        assert (checkpoint.convert_tokens_to_ids("<|im_start|>") in text.token_ids) == bool(template)
        for answer, mention in zip(text.answers, text.mentions, strict=True):
            told = tokenizer.decode(text.token_ids[mention.start : mention.stop])
            assert "Remember it." in told
            assert tokenizer.decode(text.token_ids[answer : answer + 1]).strip() in told
    for document in profile_texts.make_texts(tokenizer, load_text(), "", LENGTH, 4, 1).documents:
        text = tokenizer.decode(document.token_ids)
        for question in document.questions:
            asked = tokenizer.decode(question.token_ids)
            opening, answer = asked[asked.rindex("The ") :], tokenizer.decode(question.answer)
            assert f"{opening}{answer}. Remember it." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "short.txt"], r"short.txt: \d+ tokens of text are too few to profile at --length 800, \d+ are"),
        (["--data", "absent.txt"], "cannot read absent.txt"),
        (["--data", "binary.txt"], "binary.txt is not text"),
        (["--texts", "0"], "--texts is at least 1, got 0"),
        (["--length", "700"], "--length 700 is too short"),
        (["--sink", "100"], "sink_size must be a positive multiple of 64, got 100"),
        (["--output", "nowhere/heads.json"], "--output nowhere/heads.json: there is no directory nowhere"),
        (["--model", "absent"], "absent"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    message: str,
    tiny_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("short.txt").write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 40)
    Path("binary.txt").write_bytes(b"\xff\xfe\x00" * 1000)
    assert main(["profile", "--model", str(tiny_directory), *SMALL, *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "\n" not in error
    assert not Path("head-profile.json").exists()


@pytest.mark.parametrize("share", ["0", "2", "x", "-1", "200%"])
def test_the_allowed_loss_is_a_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--max-loss", share])
    assert "expected a share such as 0.3%" in capsys.readouterr().err


def test_the_profile_of_another_model_is_refused(tiny_directory: Path, tmp_path: Path) -> None:
    from lserve.engine.config import EngineConfig, SparsityConfig
    from lserve.engine.errors import FormatMismatchError
    from lserve.engine.loading import load

    path = tmp_path / "heads.json"
    HeadProfile("of-another", 64, 64, ((True, False),) * 3).save(path)
    assert json.loads(path.read_text())["model_fingerprint"] == "of-another"
    with pytest.raises(FormatMismatchError, match="was made for model of-another"):
        load(EngineConfig(str(tiny_directory), sparsity=SparsityConfig(head_profile=str(path))))


def test_too_little_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match="notes.txt: 3 tokens of text are too few"):
        profile_texts.make_texts(tokenizer, "one two three", "notes.txt", LENGTH, 4, 0)
