"""Data parallelism: eight simulated devices and two processes train the same function as one device."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, command

from jresnet.errors import InputError
from jresnet.training import config, devices, program

CHECK = "tests/devices_check.py"
# Largest difference of any loss, weight, momentum or statistic after eight steps. Partial sums over devices round
# differently: measured 2.4e-7 in float32 and 4e-16 in float64, of values up to 2.
FLOAT32, FLOAT64 = 2e-6, 1e-13


def environment(count: int) -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(count)}


def results(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = zip([one["losses"], *one["state"]], [other["losses"], *other["state"]], strict=True)
    return max(float(np.abs(np.subtract(a, b)).max()) for a, b in pairs)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def simulated() -> dict[str, dict[str, Any]]:
    """Eight steps each on one and on eight simulated devices."""
    settings = {
        "one": {"devices": 1},
        "eight": {"devices": 8},
        "loop": {"devices": 8, "on_device": True},
        "per-device": {"devices": 8, "bn": "per-device"},
        "one, float64": {"devices": 1, "x64": True},
        "eight, float64": {"devices": 8, "x64": True},
    }
    done = command(CHECK, json.dumps({"settings": list(settings.values())}), env=environment(8), timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(zip(settings, results(done.stdout), strict=True))


def test_a_step_is_the_same_however_it_is_shared_out() -> None:
    """Over automatic and explicit axes, by shard_map and by pmap."""
    done = command("tests/meshes_check.py", env=environment(2))
    assert done.returncode == 0, done.stderr
    distances = json.loads(done.stdout)
    assert len(distances) == 5
    for name, distance in distances.items():
        assert distance < 1e-12, name  # measured 1e-16 to 3e-15


def test_the_batch_is_cut_over_the_devices(simulated: dict[str, dict[str, Any]]) -> None:
    for name, expected in (("one", 1), ("eight", 8), ("loop", 8), ("per-device", 8)):
        assert simulated[name]["devices"] == expected
        assert simulated[name]["parts"]
        assert bool(simulated[name]["exchanges"]) == (expected > 1)


def test_all_gradients_go_in_one_exchange(simulated: dict[str, dict[str, Any]]) -> None:
    """Beside it BN over all devices exchanges its sums, forward and backward; mixup takes images from other devices."""
    norms = 5  # of the stem and two blocks
    for name, channels in (("eight", 4 * norms), ("loop", 4 * norms), ("per-device", 0)):
        assert simulated[name]["kernels"] == 1, name
        assert simulated[name]["channels"] <= channels, name


@pytest.mark.parametrize(
    ("name", "one", "tolerance"),
    [("eight", "one", FLOAT32), ("loop", "one", FLOAT32), ("eight, float64", "one, float64", FLOAT64)],
)
def test_eight_devices_train_as_one(
    simulated: dict[str, dict[str, Any]], name: str, one: str, tolerance: float
) -> None:
    """Mixed, erased, smoothed and averaged: losses, weights, momenta, BN statistics, averages."""
    assert largest_difference(simulated[name], simulated[one]) < tolerance
    assert simulated[name]["predictions"] == simulated[one]["predictions"]


def test_batch_norm_by_device_is_another_function(simulated: dict[str, dict[str, Any]]) -> None:
    """What it is, parity/test_ddp.py tells beside PyTorch's DistributedDataParallel."""
    assert largest_difference(simulated["per-device"], simulated["one"]) > 1e-3


def processes(folder: Path, *arguments: object) -> list[subprocess.Popen[bytes]]:
    """Two of them, whose output goes to files 0 and 1: a pipe that nobody empties would keep both waiting."""
    port, started = free_port(), []
    for i in range(2):
        with (folder / str(i)).open("w") as file:
            line = [sys.executable, *(str(argument).format(port=port, id=i) for argument in arguments)]
            started.append(
                subprocess.Popen(line, cwd=REPOSITORY, env=environment(2), stdout=file, stderr=subprocess.STDOUT)
            )
    return started


def test_two_processes_train_as_one(tmp_path: Path, simulated: dict[str, dict[str, Any]]) -> None:
    given = '{{"settings": [{{}}], "connect": ["127.0.0.1:{port}", 2, {id}]}}'
    codes = [process.wait(timeout=600) for process in processes(tmp_path, CHECK, given)]
    outputs = [(tmp_path / str(i)).read_text() for i in range(2)]
    assert codes == [0, 0], outputs
    first, second = (results(output)[0] for output in outputs)
    assert first["devices"] == 4
    assert first == second  # every bit
    assert largest_difference(first, simulated["one"]) < FLOAT32


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_and_one_device_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    short = (
        "scripts/train_cifar10.py", "--depth", 8, "--dataset", "digits", "--limit-train", 64, "--limit-test", 40,
        "--batch-size", 16, "--out", out,
    )  # fmt: skip
    first, second = processes(
        tmp_path, *short, "--epochs", 1000, "--coordinator", "127.0.0.1:{port}", "--num-processes", 2,
        "--process-id", "{id}",
    )  # fmt: skip
    deadline = time.monotonic() + 500
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text().count("\n") > 2:
        assert first.poll() is None, (tmp_path / "0").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    first.wait(timeout=60)
    second.wait()
    assert time.monotonic() - killed < 60
    said = (tmp_path / "0").read_text()
    assert first.returncode not in (0, None)
    assert "another task died" in said or "the connection between the processes was lost" in said, said[-2000:]
    before = len((out / "metrics.jsonl").read_text().splitlines())
    assert before < 1000

    config_file = out / "config.json"  # the run ends an epoch later
    config_file.write_text(config_file.read_text().replace('"epochs": 1000', f'"epochs": {before + 1}'))
    done = command(*short, "--resume", "--milestones", 500, 750, env=environment(1))
    assert done.returncode == 0, done.stderr
    assert "resumed  at step" in done.stdout
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, before + 2))


def test_devices_and_batches_that_cannot_be_had() -> None:
    with pytest.raises(InputError, match=r"`devices` must be from 1 to \d+"):
        devices.find(9999)
    chosen = config.default_config(arch="resnet8_cifar", dataset="digits", batch_size=9, limit_train=8)
    eight = devices.Devices(jax.sharding.Mesh(np.array(jax.devices() * 2), ("data",)))
    with pytest.raises(InputError) as caught:
        program.Program(chosen, program.load_data(chosen, None), eight)
    assert "a batch of 9 is larger than the 8 training images" in str(caught.value)
    assert "a batch of 9 cannot be divided into 2 equal parts" in str(caught.value)


def test_half_of_what_names_a_process_is_refused() -> None:
    done = command("scripts/train_cifar10.py", "--coordinator", "127.0.0.1:1", "--num-processes", 2)
    assert done.returncode == 2
    assert "must be given together" in done.stderr
    assert "--out is required with several processes" in done.stderr


def test_one_process_is_the_first_and_alone() -> None:
    assert devices.is_first()
    assert [value.tolist() for value in devices.together(np.array([3, 4]))] == [[3, 4]]
