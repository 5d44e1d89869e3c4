"""What a checkpoint promises: whole or not there, right or refused, the newest and the best kept, readable by others."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from conftest import REPOSITORY, command
from flax import nnx

import jresnet
from jresnet.errors import InputError, WeightsError
from jresnet.training import checkpoint
from jresnet.training import step as train
from jresnet.training.checkpoint import KEPT, Checkpoints


class State(NamedTuple):
    """Stands for a TrainState, of which nothing but its step is known to the checkpoints."""

    step: Any
    params: Any
    averaged: Any


def state(step: int, size: int = 1000) -> Any:
    """A state with several dtypes, whose values follow from its step."""
    params = {"kernel": jax.random.normal(jax.random.key(step), (size,)), "scale": jnp.full((3, 1), step, jnp.bfloat16)}
    odd = jnp.asarray([-0.0, jnp.nan, jnp.inf, 1e-45], jnp.float32)
    return State(jnp.asarray(step, jnp.int32), params, [odd, jnp.zeros((0, 2)), None])


def progress(step: int) -> dict[str, Any]:
    return {"epochs": step // 4, "seconds": step * 1.1, "best": {"epoch": None, "names": ["a", "é"]}}


def same(found: Any, expected: Any) -> bool:
    """Whether two states are the same bit for bit."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def steps(folder: Path) -> list[int]:
    """The steps whose checkpoints are in the folder, and nothing else is."""
    return sorted(int(path.name.removesuffix(".safetensors")) for path in folder.iterdir())


def names(*numbers: int) -> set[str]:
    return {f"{step}.safetensors" for step in numbers}


def write(folder: Path, *numbers: int, score: float | None = None) -> None:
    with Checkpoints(folder) as checkpoints:
        for step in numbers:
            checkpoints.save(state(step), progress(step), score)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 4 and 8; to be copied."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    write(folder, 4, 8)
    return folder


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are written only once this event is set."""
    event, original = threading.Event(), checkpoint.write_atomically

    def gated(*arguments: Any) -> None:
        if not event.wait(timeout=60):
            raise TimeoutError("the gate was never opened")
        original(*arguments)

    monkeypatch.setattr(checkpoint, "write_atomically", gated)
    yield event
    event.set()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes the write of the checkpoint under way, and of all after it, fail as on a full disk."""
    failing, original = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        if failing.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return failing.set


# What is saved comes back.


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.restore(state(0)) is None
        checkpoints.save(state(7), progress(7))
        found = checkpoints.restore(state(0))
    assert found is not None
    assert same(found.state, state(7))
    assert (found.step, found.progress, found.notes) == (7, progress(7), [])


@pytest.mark.parametrize("average", [False, True])
def test_a_networks_whole_state(tmp_path: Path, average: bool) -> None:
    def fresh(seed: int) -> train.TrainState:
        return train.init(jresnet.create("resnet8_cifar", seed=seed), optimizer, average)

    optimizer = optax.sgd(0.1, momentum=0.9)
    expected = jax.tree.map(lambda leaf: leaf + 1, fresh(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(expected, {})
        found = checkpoints.restore(fresh(2))
    assert found is not None
    assert isinstance(found.state.params, nnx.State)
    assert same(found.state, expected)


def test_anybody_reads_it_by_names(tmp_path: Path) -> None:
    """With safetensors alone."""
    state = train.init(jresnet.create("resnet8_cifar", seed=1), optax.sgd(0.1, momentum=0.9), True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, progress(4))
    found = safetensors.numpy.load_file(tmp_path / "0.safetensors")
    for name, expected in (
        ("step", state.step),
        ("params.layer1.0.conv1.kernel", state.params["layer1"][0]["conv1"]["kernel"][...]),
        ("batch_stats.bn1.mean", state.batch_stats["bn1"]["mean"][...]),
        ("opt_state.0.trace.fc.bias", state.opt_state[0].trace["fc"]["bias"][...]),
        ("averaged.params.fc.kernel", state.averaged.params["fc"]["kernel"][...]),
    ):
        np.testing.assert_array_equal(found[name], expected)
    assert len(found) == len(jax.tree.leaves(state))
    with safetensors.safe_open(tmp_path / "0.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["about"])["progress"] == progress(4)


def test_a_restored_state_may_be_donated(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
        assert found is not None
        after = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(found.state)
        again = checkpoints.restore(state(0))
    assert same(after, jax.tree.map(lambda leaf: leaf + 1, state(8)))
    assert again is not None
    assert same(again.state, state(8))


def test_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    write(folder, 4)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is not None
    assert found.step == 4


# Saving does not keep training waiting.


def test_a_save_returns_before_it_is_on_disk(tmp_path: Path, gate: threading.Event) -> None:
    """Once it has returned, the state's arrays may be overwritten."""
    donated = state(4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(donated, progress(4))
        assert steps(tmp_path) == []
        for leaf in jax.tree.leaves(donated):
            leaf.delete()
        gate.set()
        checkpoints.wait()
        assert steps(tmp_path) == [4]
        found = checkpoints.restore(state(0))
    assert found is not None
    assert same(found.state, state(4))


def test_the_end_waits(tmp_path: Path, gate: threading.Event) -> None:
    opener = threading.Timer(0.2, gate.set)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(4), progress(4))
        opener.start()
    assert steps(tmp_path) == [4]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    """As after a signal in the evaluation that would have scored it: the score comes with the second save."""
    write(tmp_path, 4)
    write(tmp_path, 4, score=0.9)
    write(tmp_path, 5, 6, 7, 8, score=0.5)
    assert steps(tmp_path) == [4, 6, 7, 8]


# Which ones are kept.


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([None] * 6, [4, 5, 6]),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [4, 5, 6]),
        ([0.1, 0.9, 0.3, 0.4, 0.5, 0.6], [2, 4, 5, 6]),
        ([0.1, 0.9, 0.9, 0.4, 0.9, 0.6], [2, 4, 5, 6]),  # of equal ones the earlier
        ([0.0, None, None, None, None, None], [1, 4, 5, 6]),
        ([-5.0, float("nan"), None, -6.0, None, None], [1, 4, 5, 6]),
        ([0.5, None, 0.4, 0.6, None, None], [4, 5, 6]),  # the best is among the newest
    ],
)
@pytest.mark.parametrize("reopened", [False, True])
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, scores: list[float | None], kept: list[int], reopened: bool
) -> None:
    """In one run as in one that was resumed after every checkpoint."""
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(tmp_path))
        for step, score in enumerate(scores, 1):
            checkpoints.save(state(step, 10), {}, score)
            if reopened:
                stack.close()
                checkpoints = stack.enter_context(Checkpoints(tmp_path))
    assert KEPT == 3
    assert steps(tmp_path) == kept


def test_the_old_ones_stay_until_the_new_one_is_whole(tmp_path: Path, gate: threading.Event) -> None:
    gate.set()
    write(tmp_path, 1, 2, 3)
    gate.clear()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(4), {}, 1.0)
        assert steps(tmp_path) == [1, 2, 3]
        gate.set()
    assert steps(tmp_path) == [2, 3, 4]


def test_what_a_killed_save_left_is_removed(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    (folder / ".12.safetensors.ab12cd").write_text("half")
    write(folder, 16)
    assert steps(folder) == [4, 8, 16]


# Damage.


def damages(content: bytes, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(What was done, what is left); None: the file is gone."""
    for _ in range(3):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        yield (
            f"bit {bit} of byte {place} flipped",
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :],
        )
    for length in (0, len(content) // 2, len(content) - 1):
        yield f"cut to {length} bytes", content[:length]
    yield "removed", None


def test_any_damage_is_passed_over(two: Path, tmp_path: Path) -> None:
    """Of the newest checkpoint, in its header and in its arrays: never a wrong state, never another exception."""
    draw = random.Random(0)
    content = (two / "8.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *draw.sample(range(8, header), 150), *draw.sample(range(header, len(content)), 40)]
    flipped = [
        (f"byte {place}", content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        for place in places
    ]
    lengths = (0, 1, 7, 8, header // 2, header, len(content) // 2, len(content) - 1)
    cut = [(f"cut to {length} bytes", content[:length]) for length in lengths]
    harmless = 0
    for what, damaged in [*flipped, *cut, ("longer", content + b"x")]:
        folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
        (folder / "8.safetensors").write_bytes(damaged)
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(state(0))
        assert found is not None, what
        assert found.step == (4 if found.notes else 8), what
        assert same(found.state, state(found.step)), what
        assert found.progress == progress(found.step), what
        for note in found.notes:
            assert f"{folder / '8.safetensors'} is damaged and skipped, renamed to damaged-8.safetensors: " in note
            assert note.isprintable()
        harmless += not found.notes  # a space that pads the header turned into another white one
        shutil.rmtree(folder)
    assert harmless < 3


def test_a_checkpoint_that_is_gone(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    (folder / "8.safetensors").unlink()
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is not None
    assert (found.step, found.notes) == (4, [])


def test_a_flipped_bit_that_safetensors_restores(two: Path, tmp_path: Path) -> None:
    """In every part of the arrays; safetensors by itself gives a wrong state."""
    content = (two / "8.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    draw = random.Random(1)
    for part in range(16):
        folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
        place = begin + (len(content) - begin) * part // 16
        damaged = content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
        (folder / "8.safetensors").write_bytes(damaged)
        with safetensors.safe_open(folder / "8.safetensors", "numpy") as file:  # else the digest is needless
            assert [file.get_tensor(name).shape for name in file.keys()]  # noqa: SIM118
        with Checkpoints(folder) as checkpoints:
            found = checkpoints.restore(state(0))
        assert found is not None
        assert found.step == 4, place
        assert "its arrays were altered after they were written" in found.notes[0]
        shutil.rmtree(folder)


def test_a_changed_digit_of_the_progress(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    path = folder / "8.safetensors"
    assert path.read_bytes().count(b"8.8") == 1
    path.write_bytes(path.read_bytes().replace(b"8.8", b"8.9"))
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is not None
    assert found.progress == progress(4)
    assert "its description is missing or was altered after it was written" in found.notes[0]


def test_a_checkpoint_under_another_steps_name(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    (folder / "8.safetensors").rename(folder / "80.safetensors")
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is not None
    assert found.step == 4
    assert "it contains step 8" in found.notes[0]


def test_going_on_after_damage(tmp_path: Path) -> None:
    """The damaged steps are saved again, and stand for the newest; the best is still known."""
    write(tmp_path, 1, score=0.9)
    write(tmp_path, 4, 8, 12, score=0.5)
    for step in (8, 12):
        (tmp_path / f"{step}.safetensors").write_text("")
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore(state(0))
        assert found is not None
        assert found.step == 4
        assert [note.split(" is ")[0] for note in found.notes] == [
            f"checkpoint {tmp_path / name}.safetensors" for name in ("12", "8")
        ]
        for step in (8, 12):
            checkpoints.save(state(step), progress(step), 0.5)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == names(1, 4, 8, 12) | {"damaged-8.safetensors", "damaged-12.safetensors"}
    (tmp_path / "12.safetensors").write_text("")  # once more
    with Checkpoints(tmp_path) as checkpoints:
        again = checkpoints.restore(state(0))
        assert again is not None
        assert again.step == 8
        assert same(again.state, state(8))
    assert {path.name for path in tmp_path.iterdir()} == left - names(12)


def test_all_damaged(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    (folder / "4.safetensors").write_bytes(b"\x1b[31m" * 10)
    (folder / "8.safetensors").write_text("")
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(WeightsError, match=r"all checkpoints in .* are damaged \(8: .*; 4: .*\): delete that folder"),
    ):
        checkpoints.restore(state(0))
    assert steps(folder) == [4, 8]


def test_what_is_no_checkpoint(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    (folder / "notes").mkdir()
    (folder / "007.safetensors").write_text("")
    (folder / "90.safetensors").mkdir()
    (folder / "91.safetensors.txt").write_text("")
    os.mkfifo(folder / "92.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(3)}, folder / "12.safetensors")  # somebody else's
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0))
    assert found is not None
    assert found.step == 8
    assert len(found.notes) == 1
    assert str(folder / "12.safetensors") in found.notes[0]


@pytest.mark.parametrize(
    "other",
    [
        lambda like: like._replace(params={**like.params, "scale": jnp.zeros((1, 3), jnp.bfloat16)}),
        lambda like: like._replace(params={**like.params, "scale": jnp.zeros((3, 1), jnp.float16)}),
        lambda like: like._replace(params={**like.params, "bias": jnp.zeros(3)}),
        lambda like: like._replace(averaged=None),
    ],
)
def test_another_network_is_refused_at_once(two: Path, tmp_path: Path, other: Callable[[State], State]) -> None:
    """Even where an older checkpoint is of this one."""
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    like: Any = other(state(0))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(WeightsError, match=r"checkpoints/8\.safetensors belongs to another network or optimizer"):
            checkpoints.restore(like)
        checkpoints.save(like._replace(step=jnp.asarray(12)), {})
        with pytest.raises(WeightsError, match=r"checkpoints/12\.safetensors belongs to another network or optimizer"):
            checkpoints.restore(state(0))
    assert steps(folder) == [4, 8, 12]


# Disks that fail.


def test_a_failed_save_is_told_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[], None]
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(4), progress(4))
        checkpoints.wait()
        full_disk()
        checkpoints.save(state(8), progress(8))
        with pytest.raises(
            InputError, match=r"cannot write a checkpoint to .*No space left.*The checkpoint of step 4 is complete"
        ) as info:
            checkpoints.save(state(8), progress(8))
        assert isinstance(info.value.__cause__, OSError)
        checkpoints.wait()  # told once
        found = checkpoints.restore(state(0))
        assert found is not None
        assert found.step == 4
    monkeypatch.undo()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(8), progress(8))
    assert steps(tmp_path) == [4, 8]  # and nothing half-written


def test_a_failed_save_is_told_at_the_end(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    full_disk()
    with (
        pytest.raises(InputError, match=r"No space left on device\. There is no earlier checkpoint"),
        Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(state(4), progress(4))


def test_a_failed_save_deletes_nothing_and_may_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[[], None]
) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), progress(step))
        checkpoints.wait()
        full_disk()
        checkpoints.save(state(4), progress(4))
        with pytest.raises(InputError, match="The checkpoint of step 3 is complete"):
            checkpoints.wait()
        assert steps(tmp_path) == [1, 2, 3]
        monkeypatch.undo()
        checkpoints.save(state(4), progress(4))
    assert steps(tmp_path) == [2, 3, 4]


def test_free_space_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(4), progress(4))
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6))
        with pytest.raises(
            InputError,
            match=r"it takes 1,05\d,\d{3} bytes, but the disk has 1,000,000 free\. The checkpoint of step 4 is complete",
        ):
            checkpoints.save(state(8), progress(8))
    assert steps(tmp_path) == [4]


def test_the_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(4), progress(4))
        checkpoints.wait()
        shutil.rmtree(folder)
        with pytest.raises(InputError, match=r"No such file or directory.*There is no earlier checkpoint"):
            checkpoints.save(state(8), progress(8))
    assert not folder.exists()


def test_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write checkpoints to .*file/checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


DISKS = {  # what is done once a first checkpoint is whole, and what is said
    "full": ("pass", "No space left on device"),
    "limited": (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))",
        "File too large",
    ),
    "read-only": ("folder.chmod(0o500)", "Permission denied"),
    "locked away": ("folder.chmod(0)", "Permission denied"),
    "taken away": ("shutil.rmtree(folder)", "No such file or directory"),
}


def in_a_small_disk(folder: Path) -> list[str]:
    """A command that runs the one after it with 1.5 MB of its own at ``folder``."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=1500k tmpfs"
    if not shutil.which("unshare") or subprocess.run([*inside, f"{mount} /tmp"], check=False).returncode:
        pytest.skip("nobody may mount here")
    return [*inside, f'{mount} "$0" && exec "$@"', str(folder)]


@pytest.mark.parametrize("disk", DISKS)
def test_a_real_disk_that_fails(tmp_path: Path, disk: str) -> None:
    """In a process of its own, whose standard error stays empty: no traceback of the thread that writes."""
    change, message = DISKS[disk]
    script = f"""
import shutil, sys
from types import SimpleNamespace
sys.path.insert(0, "tests")
from pathlib import Path
from test_checkpoint import Checkpoints, InputError, state, same, steps
folder = Path(sys.argv[1])
if {disk == "full"}:
    shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)  # as where something else fills it meanwhile
try:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state(4, 100_000), {{}})
        checkpoints.wait()
        {change}
        for step in range(8, 40, 4):
            checkpoints.save(state(step, 100_000), {{}})
except InputError as error:
    print(error)
if folder.exists():
    folder.chmod(0o700)
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore(state(0, 100_000))
        assert same(found.state, state(found.step, 100_000)) and not found.notes
    print(found.step, steps(folder))
"""
    program = [sys.executable, "-c", script, str(tmp_path)]
    if disk == "full":
        program = [*in_a_small_disk(tmp_path), *program]
    if (
        disk in ("read-only", "locked away") and os.geteuid() == 0
    ):  # root may write everywhere, unless it gives its capabilities away
        program = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", *program]
    # XLA tells stderr of a kept program, on a CPU with AVX-512, that it was made for another machine, which it was not.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        program, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"cannot write a checkpoint to {tmp_path}: " in done.stdout
    assert message in done.stdout
    if disk != "taken away":
        last, left = done.stdout.splitlines()[-1].split(maxsplit=1)
        assert f"The checkpoint of step {last} is complete: fix the cause and resume" in done.stdout
        assert last in left


# Several devices and processes.

PROCESS = """
import faulthandler, sys
faulthandler.dump_traceback_later(100, exit=True)  # a barrier that waits for the other process shows itself
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
me, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, me, coordinator_bind_address=address if me == 0 else None)
sys.path.insert(0, "tests")
from pathlib import Path
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from test_checkpoint import Checkpoints, progress, same, state

def whole_on(devices):
    return NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

def put(tree, sharding):
    return jax.tree.map(lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__), tree)

assert jax.process_count() == 2 and len(jax.devices()) == 4
everywhere = whole_on(jax.devices())
assert not everywhere.is_fully_addressable
if me == 0:
    with Checkpoints(Path(folder)) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(put(state(step), everywhere), progress(step), score=-step)
    with Checkpoints(Path(folder)) as checkpoints:
        for layout in (everywhere, whole_on(jax.local_devices()), SingleDeviceSharding(jax.local_devices()[1])):
            found = checkpoints.restore(put(state(0), layout))
            assert found.step == 5 and found.progress == progress(5) and not found.notes
            assert all(leaf.sharding == layout for leaf in jax.tree.leaves(found.state))
            assert same(found.state, state(5))
            for leaf, expected in zip(jax.tree.leaves(found.state), jax.tree.leaves(state(5)), strict=True):
                assert all(
                    np.asarray(shard.data).tobytes() == np.asarray(expected).tobytes() for shard in leaf.addressable_shards
                )
    print(sorted(path.stem for path in Path(folder).iterdir()))
multihost_utils.sync_global_devices("end")
"""


def test_one_of_two_processes_saves_and_restores(tmp_path: Path) -> None:
    """A state on all their devices, onto all, onto one process's, onto one; the other process does nothing meanwhile."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    arguments = [[sys.executable, "-c", PROCESS, str(me), address, str(tmp_path)] for me in (0, 1)]
    processes = [
        subprocess.Popen(line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in arguments
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "['1', '3', '4', '5']" in outputs[0][0]


def test_another_number_of_devices(two: Path, tmp_path: Path) -> None:
    """Saved on one device, gone on with on four, donation included."""
    folder = Path(shutil.copytree(two, tmp_path / "checkpoints"))
    script = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, "tests")
from pathlib import Path
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_checkpoint import Checkpoints, same, state
layout = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec())
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    found = checkpoints.restore(jax.device_put(state(0), layout))
    assert all(leaf.sharding == layout for leaf in jax.tree.leaves(found.state))
    after = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(found.state)
    expected = jax.tree.map(lambda leaf: leaf + 1, state(8))
    for device in range(4):
        assert same(jax.tree.map(lambda leaf: leaf.addressable_shards[device].data, after), expected)
    checkpoints.save(after, {})
    assert same(checkpoints.restore(state(0)).state, expected)
"""
    done = command("-c", script, folder)
    assert (done.returncode, done.stderr) == (0, "")
