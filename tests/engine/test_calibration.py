"""Calibrated weights: closer to the native model than rounding alone, made once, and the same for every worker."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import VOCABULARY, make_checkpoint, our_logits, random_tokens

from lserve.cli.demo_model import demo_model
from lserve.engine.calibrated_weights import CalibratedWeights
from lserve.engine.config import EngineConfig
from lserve.engine.errors import SettingsError
from lserve.engine.gptq import gptq_w4, gptq_w8, input_hessian
from lserve.engine.loading import load
from lserve.engine.model import Model
from lserve.engine.quantization import NativeLinear, QuantizedLinear
from lserve.engine.weights import load_model
from lserve.kernels.weight_format import W8Weight, decode_w4, quantize_w4, quantize_w8

FORMATS = ["fp8", "int8", "w4a8"]
TEXT = torch.randint(0, VOCABULARY, (3000,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def demo_files() -> Path:
    """The demo model's directory, for its tokenizer."""
    return demo_model()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 (it has biases) of 3 layers with outlier channels behind its norms, as real models have."""
    path = tmp_path_factory.mktemp("outliers")
    make_checkpoint(path, "Qwen2", num_layers=3)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[::24] *= 40
        if any(part in name for part in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj", "up_proj")):
            tensor[:, ::24] /= 40
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def calibrated(checkpoint: Path, weights: str = "int8", fingerprint: str = "f") -> tuple[Model, str]:
    low_bit = CalibratedWeights(weights, fingerprint, TEXT, prefix=[3])
    model = load_model(str(checkpoint), "cpu", torch.float32, low_bit=low_bit)
    return model, low_bit.digest


def divergence(model: Model, native: Model) -> float:
    """Mean Kullback-Leibler divergence of the next token's distribution on text that calibration did not see."""
    tokens = random_tokens()
    expected = our_logits(native, tokens).log_softmax(-1)
    return (expected.exp() * (expected - our_logits(model, tokens).log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("weights", FORMATS)
def test_calibrated_weights_stay_closer_to_the_native_model(weights: str, checkpoint: Path) -> None:
    native = load_model(str(checkpoint), "cpu", torch.float32)
    rounded = load_model(str(checkpoint), "cpu", torch.float32, weights)
    assert divergence(calibrated(checkpoint, weights)[0], native) < 0.75 * divergence(rounded, native)


def test_outer_layers_stay_native_where_the_rest_is_fp8(checkpoint: Path) -> None:
    calibrated(checkpoint, "fp8")
    layers = calibrated(checkpoint, "fp8")[0]._weights.layers
    assert [type(layer.down) for layer in layers] == [NativeLinear, QuantizedLinear, NativeLinear]


def test_workers_that_share_nothing_arrive_at_the_same_weights(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrated(checkpoint)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    second = calibrated(checkpoint)
    assert first[1] == second[1] != ""
    assert torch.equal(our_logits(first[0], random_tokens()), our_logits(second[0], random_tokens()))


def test_formats_and_checkpoints_are_kept_apart(checkpoint: Path, cache: Path) -> None:
    digests = {calibrated(checkpoint, "int8")[1], calibrated(checkpoint, "w4a8")[1]}
    calibrated(checkpoint, "int8", "another")
    assert len(digests) == 2
    assert len(list(cache.glob("lserve/calibrated/*/digests.json"))) == 3


def test_pages_of_calibrated_weights_have_a_format_of_their_own(tmp_path: Path, demo_files: Path) -> None:
    make_checkpoint(tmp_path / "model", "Llama", vocab_size=49152)
    for file in demo_files.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    config = EngineConfig(str(tmp_path / "model"), weights="int8")
    first, again = load(config), load(config)
    assert first.page_format.format_id == again.page_format.format_id
    plain = load(replace(config, calibrate=False))
    assert plain.page_format.format_id != first.page_format.format_id
    assert load(config, weights=first).page_format.format_id == first.page_format.format_id


def test_later_starts_read_what_the_first_one_made(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lserve")
    first = calibrated(checkpoint)
    assert "calibrated layer 3 of 3" in caplog.text
    # what is kept needs no layer of the checkpoint, which may as well have lost them
    tensors = {name: t for name, t in load_file(checkpoint / "model.safetensors").items() if "layers." not in name}
    (tmp_path / "hollow").mkdir()
    save_file(tensors, tmp_path / "hollow" / "model.safetensors", {"format": "pt"})
    (tmp_path / "hollow" / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    second = calibrated(tmp_path / "hollow")
    assert first[1] == second[1]
    assert torch.equal(our_logits(first[0], random_tokens()), our_logits(second[0], random_tokens()))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "list"])
def test_damaged_results_are_made_again(
    damage: str, checkpoint: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = calibrated(checkpoint)[1]
    file = next(cache.glob("lserve/calibrated/int8-*/layer-001.safetensors"))
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[:-100])
        case "changed":
            content[-1] ^= 1
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "list":
            (file.parent / "digests.json").write_text("{")
    assert calibrated(checkpoint)[1] == digest
    assert "are damaged" in caplog.text
    caplog.clear()
    assert calibrated(checkpoint)[1] == digest
    assert not caplog.text


def test_of_workers_that_start_together_one_calibrates(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lserve")
    digests: list[str] = []
    threads = [threading.Thread(target=lambda: digests.append(calibrated(checkpoint)[1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 3 and len(set(digests)) == 1
    assert caplog.text.count("they are kept in") == 1


def test_a_cache_that_cannot_be_written_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        SettingsError, match=r"calibrated weights cannot be kept in .*: Not a directory; XDG_CACHE_HOME"
    ):
        calibrated(checkpoint)


def decoded(weight: W8Weight) -> torch.Tensor:
    return weight.codes.float() * weight.scale[:, None]


def test_errors_are_made_up_for() -> None:
    torch.manual_seed(2)
    x = torch.randn(2000, 40) @ torch.randn(40, 320) + 0.3 * torch.randn(2000, 320)
    matrix = torch.randn(24, 320) * torch.rand(24, 1)

    def error(weight: W8Weight) -> float:
        return (x @ (decoded(weight) - matrix).t()).square().sum().item()

    assert error(decode_w4(gptq_w4(matrix, input_hessian(x, "int8")))) < 0.5 * error(decode_w4(quantize_w4(matrix)))
    for dtype, form in ((torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")):
        compensated = gptq_w8(matrix, input_hessian(x, form), dtype)
        assert compensated.codes.dtype == dtype
        assert error(compensated) < 0.5 * error(quantize_w8(matrix, dtype))


def test_channels_that_are_never_used_are_rounded_as_they_are() -> None:
    x = torch.randn(500, 160)
    x[:, 100:] = 0
    matrix = torch.randn(8, 160)
    rounded = decoded(gptq_w8(matrix, input_hessian(x, "int8"), torch.int8))
    nearest = decoded(quantize_w8(matrix, torch.int8))
    torch.testing.assert_close(rounded[:, 100:], nearest[:, 100:])
