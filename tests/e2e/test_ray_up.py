"""cluster-local.yaml for real: `ray up` over ssh to three hosts, a streamed answer, `ray down` leaves nothing.

The hosts are namespaces with addresses, processes and home directories of their own, each with an sshd of the test. Of
the file only what it says to change is changed, and what a laptop lacks: GPUs, and a model of 16 GB.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from namespaces import Host, Network, wait_for, why_not
from openai import OpenAI

from lserve.cli.demo_model import SERVED_NAME, demo_model

pytestmark = [pytest.mark.proof, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
PREFIX = Path(sys.executable).parent.parent
NAMES = ("head", "prefill", "decode")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
ALLOWED = {"unshare", "sshd", "sh"}
"""What may run on a host before and after."""

WRAPPER = """#!/bin/sh
export RAY_TMPDIR={session} PATH=/usr/local/bin:/usr/bin:/bin SHELL=/bin/bash
cd "$HOME"
exec /bin/bash -c "$SSH_ORIGINAL_COMMAND"
"""

SSHD_CONFIG = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
ForceCommand {wrapper}
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

INSTALL = """# This environment in place of a new one; lserve is what was copied.
ln -sfn {prefix} ~/.lserve/venv
mkdir -p ~/.lserve/bin
printf '#!/bin/sh\\nexec python -m lserve.cli.main "$@"\\n' > ~/.lserve/bin/lserve
chmod +x ~/.lserve/bin/lserve
echo 'export PATH=$HOME/.lserve/bin:$PATH PYTHONPATH=$HOME/lserve UCX_TLS=tcp' >> ~/.lserve/environment
"""

START = """
mount -t tmpfs tmpfs /run && mkdir /run/sshd && mount --bind {passwd} /etc/passwd && exec {sshd} -D -e -f {config}
"""


def why_not_ssh() -> str | None:
    """Why `ray up` cannot be tried here; None when it can."""
    for program, found in (("sshd", SSHD), *((name, shutil.which(name)) for name in ("ssh", "rsync", "unshare"))):
        if found is None:
            return f"ray up needs {program}"
    return why_not()


class Machines:
    """Three hosts that one can ssh to, and somebody's home directory to do it from."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.hosts, self.folder = network.hosts, folder
        self.home, self.session = folder / "home", folder / "ray"
        for name in ("host_key", "key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(keygen, check=True)
        self.home.mkdir()
        for host in self.hosts.values():
            self._start_sshd(host)
        wait_for(lambda: all(self._answers(host) for host in self.hosts.values()), 30, "sshd")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UCX_", "PYTHON"))},
            "HOME": str(self.home),
            "PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(self.session),  # `ray up` copies its state to the head, to the same path
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def ray(self, *command: str, timeout_s: float = 300.0) -> str:
        """`ray`, as typed in the checkout."""
        done = subprocess.run(
            ["ray", *command],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        return done.stdout

    def left_over(self) -> list[str]:
        """What runs on the hosts, ssh aside."""
        return [f"{h.name}: {name}" for h in self.hosts.values() for name in h.names if name not in ALLOWED]

    def _start_sshd(self, host: Host) -> None:
        home = self.folder / f"{host.name}-home"
        home.mkdir()
        wrapper, config = self.folder / f"{host.name}-wrapper", self.folder / f"{host.name}-sshd"
        wrapper.write_text(WRAPPER.format(session=self.session))
        wrapper.chmod(0o755)
        config.write_text(SSHD_CONFIG.format(address=host.address, folder=self.folder, wrapper=wrapper))
        passwd = self.folder / f"{host.name}-passwd"
        others = Path("/etc/passwd").read_text().splitlines()[1:]  # ssh looks for a home there, not in $HOME
        passwd.write_text("\n".join([f"root:x:0:0:root:{home}:/bin/bash", *others]) + "\n")
        command = START.format(passwd=passwd, sshd=SSHD, config=config)
        environment = {"PATH": os.environ["PATH"]}
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.start("sh", "-c", command, environment=environment, private=self.session, log=log)

    def _answers(self, host: Host) -> bool:
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=2"]
        call = ["ssh", "-i", str(self.folder / "key"), *options, f"root@{host.address}", "true"]
        return subprocess.run(call, capture_output=True).returncode == 0


def changed(text: str, changes: dict[str, str]) -> str:
    """The file with these changes, each of which must have something to change."""
    for old, new in changes.items():
        assert old in text, f"cluster-local.yaml does not hold {old!r} any more"
        text = text.replace(old, new)
    return text


@pytest.fixture
def machines() -> Iterator[Machines]:
    """The hosts, and secrets as the file's first lines make them."""
    if (reason := why_not_ssh()) is not None:
        pytest.skip(reason)
    with TemporaryDirectory(prefix="lsv-", dir="/tmp") as folder, Network(*NAMES) as network:
        made = Machines(network, Path(folder))
        made.ray("get-auth-token", "--generate")
        (made.home / ".lserve").mkdir()
        names = ("LSERVE_CLUSTER_SECRET", "LSERVE_REDIS_PASSWORD")
        (made.home / ".lserve" / "secrets").write_text("".join(f"export {n}={secrets.token_hex(32)}\n" for n in names))
        yield made


def test_ray_up_serves_and_ray_down_leaves_nothing(machines: Machines) -> None:
    head, prefill, decode = (machines.hosts[name].address for name in NAMES)
    install = 'python3 -m venv ~/.lserve/venv && ~/.lserve/venv/bin/pip install --quiet "$HOME/lserve[nixl]"'
    script = machines.folder / "install"
    script.write_text(INSTALL.format(prefix=PREFIX))
    text = changed(
        (ROOT / "cluster-local.yaml").read_text(),
        {
            "192.0.2.10": head,
            "192.0.2.11": prefill,
            "192.0.2.12": decode,
            "ssh_user: ubuntu": "ssh_user: root",
            "~/.ssh/id_ed25519": str(machines.folder / "key"),
            install: f"sh {script}",
            "--memory-gib 16": "--memory-gib 1",
            "path: Qwen/Qwen3-8B": f"path: {demo_model()}\n        served_name: {SERVED_NAME}",
            "num_gpus: 1": "num_cpus: 1",
            "token_budget: 8192": "token_budget: 1024",
            "kv_dtype: int4": "kv_dtype: int4\n        retrieval_pool_bytes: 268435456",
        },
    )
    file = machines.folder / "cluster-local.yaml"
    file.write_text(text)
    assert machines.left_over() == []
    machines.ray("up", "--yes", str(file))
    url = f"http://{head}:8000"
    wait_for(lambda: _is_healthy(url), 240, "the application")

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    stream = client.chat.completions.create(
        model=SERVED_NAME,
        messages=question,
        max_tokens=16,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3 and "Paris" in "".join(pieces)
    assert machines.hosts["prefill"].bytes_sent > 0

    machines.ray("down", "--yes", str(file))
    wait_for(lambda: not machines.left_over(), 150, "the end of everything")


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
