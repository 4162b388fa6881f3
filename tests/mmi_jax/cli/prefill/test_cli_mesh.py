"""`mmi prefill --mesh` on virtual devices, and `--distributed` on two processes, against one device."""

import json
import os
import socket
import subprocess
import sys

import pytest

from models.testing.random_checkpoint import write_random_checkpoint

ARGUMENTS = ["--prompt", "What happens? " + 300 * "word ", "--pattern", "AShape:local=64", "--dtype", "float32"]
ARGUMENTS += ["--max-new-tokens", "4", "--json"]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    """`mmi prefill` of the demo's model and a long text."""
    model = tmp_path_factory.mktemp("model") / "tiny"
    write_random_checkpoint(model)
    return [sys.executable, "-m", "mmi_jax.cli", "prefill", "--model", str(model), *ARGUMENTS]


def start(command: list[str], *, devices: int, **environment: str) -> subprocess.Popen:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, env=os.environ | flags | environment, text=True, **pipes)  # pyright: ignore


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


def ours(printed: str) -> list[str]:
    """The lines that are not from the library which CPUs talk through."""
    return [line for line in printed.splitlines() if line and not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def one_device(command) -> dict:
    """What one device answers."""
    return json.loads(output(start(command, devices=1)))


def assert_same_answer(got: dict, want: dict):
    assert len(want["new_tokens"]) == 4
    assert got["new_tokens"] == want["new_tokens"] and got["report"]["lengths"] == want["report"]["lengths"]
    assert got["report"]["padded_tokens"] % 512 == 0, "four devices hold whole blocks of 128"


@pytest.mark.slow
def test_a_mesh_answers_as_one_device(command, one_device):
    assert_same_answer(json.loads(output(start([*command, "--mesh"], devices=4))), one_device)


@pytest.mark.slow
def test_two_hosts_answer_as_one_and_one_of_them_speaks(command, one_device):
    """Hosts find each other as under Open MPI, one of the ways JAX knows; on a slice of TPUs it asks the runtime."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job = free.getsockname()[1] % 4096  # JAX derives the port of the meeting place from it
    hosts = [
        start(
            [*command, "--distributed"],
            devices=2,
            OMPI_MCA_orte_hnp_uri=f"{job * 4096}.0;tcp://127.0.0.1:1",
            OMPI_COMM_WORLD_SIZE="2",
            OMPI_COMM_WORLD_RANK=str(rank),
            OMPI_COMM_WORLD_LOCAL_RANK="0",
        )
        for rank in range(2)
    ]
    first, second = (output(host) for host in hosts)
    (line,) = ours(first)
    assert_same_answer(json.loads(line), one_device)
    assert ours(second) == []


def test_chunks_and_a_mesh_exclude_each_other(command):
    process = start([*command, "--mesh", "--chunk-tokens", "512"], devices=4)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "error: a mesh runs the whole prompt at once: expected no chunk_tokens, got 512" in err
