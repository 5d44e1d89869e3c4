"""What an accelerator would be given, told without one: the traced step, an epoch's loop, and a run that takes its way."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jresnet.kernels.norm import normalise
from jresnet.kernels.platforms import plainly
from jresnet.models import zoo
from jresnet.models.resnet import ResNet, ResNetConfig
from jresnet.reports.metrics_file import read_metrics
from jresnet.training import augment, devices, loop, optim
from jresnet.training import step as train
from jresnet.training.config import default_config
from jresnet.training.loop import StepsLoop
from jresnet.training.program import Program, load_data
from jresnet.training.stop import Interrupted
from jresnet.training.trainer import Options, Trainer
from jresnet.weights import native

TINY = ResNetConfig("basic", (1, 1), (4, 8), num_classes=10, stem="cifar", shortcut="pad")
BATCH, STEPS, PIXELS = 6, 3, 8
# What XLA joins to the operations around it, so that its result need not lie in memory.
FUSIBLE = {
    "convert_element_type", "add", "sub", "mul", "div", "neg", "max", "square", "integer_pow", "gt", "select_n", "and",
    "broadcast_in_dim", "reduce_sum", "reshape", "copy", "stop_gradient", "add_any",
}  # fmt: skip


class Operation(NamedTuple):
    name: str
    inputs: tuple[int, ...]  # numbers of values
    outputs: tuple[int, ...]


class Traced(NamedTuple):
    """A function's operations in order, with what it calls written out."""

    operations: list[Operation]
    values: list[Any]  # shapes and dtypes
    results: list[int]

    def longest(self, name: str) -> int:
        """How many operations of that name the longest chain of them has, each of which needs the one before."""
        depth = [0] * len(self.values)
        for operation in self.operations:
            found = max((depth[i] for i in operation.inputs), default=0) + (operation.name == name)
            for i in operation.outputs:
                depth[i] = found
        return max(depth)


def traced(function: Callable, *arguments: Any) -> Traced:
    """``function`` as it is for all platforms but the CPU."""
    found = Traced([], [], [])

    def new(variable: Any) -> int:
        found.values.append(variable.aval)
        return len(found.values) - 1

    def walk(jaxpr: Any, inputs: list[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: new(v) for v in jaxpr.constvars}

        def of(variable: Any) -> int:
            return new(variable) if hasattr(variable, "val") else known[variable]

        for equation in jaxpr.eqns:
            taken = [of(variable) for variable in equation.invars]
            called = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
            if called is not None:
                given = walk(getattr(called, "jaxpr", called), taken)
            else:
                given = [new(variable) for variable in equation.outvars]
                found.operations.append(Operation(equation.primitive.name, tuple(taken), tuple(given)))
            known |= dict(zip(equation.outvars, given, strict=True))
        return [of(variable) for variable in jaxpr.outvars]

    with plainly():
        closed = jax.make_jaxpr(function)(*arguments)
    found.results.extend(walk(closed.jaxpr, [new(variable) for variable in closed.jaxpr.invars]))
    return found


def setup(dtype: Any = None) -> tuple[Any, train.TrainState, train.Images]:
    model = ResNet(TINY, dtype=dtype, rngs=nnx.Rngs(0))
    optimizer = optim.optimizer("sgd", 0.1, nesterov=True, weight_decay=5e-4)
    pipeline = augment.Pipeline("pad", PIXELS, "random", (0.5,) * 3, (0.25,) * 3)
    step = train.train_step(nnx.graphdef(model), optimizer, pipeline)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (STEPS * BATCH, PIXELS, PIXELS, 3)).astype(np.uint8)
    return step, train.init(model, optimizer), train.Images(jnp.asarray(images), jnp.arange(STEPS * BATCH) % 10)


@pytest.fixture(scope="module")
def bfloat16_step() -> Traced:
    step, state, split = setup(jnp.bfloat16)
    return traced(step, state, split, jnp.arange(BATCH), jax.random.key(0))


def test_kernels_are_cast_once_a_step(bfloat16_step: Traced) -> None:
    cast, values = [], bfloat16_step.values
    for operation in bfloat16_step.operations:
        if operation.name != "convert_element_type":
            continue
        before, after = values[operation.inputs[0]], values[operation.outputs[0]]
        if after.dtype == jnp.bfloat16 and before.shape[:2] == (3, 3):
            cast.append(operation.inputs[0])
    assert len(cast) == len(set(cast)) == 5  # the stem and two blocks; the shortcuts are padded


def test_no_float32_activation_need_lie_in_memory(bfloat16_step: Traced) -> None:
    """Convolutions read and write bfloat16; what is float32 between them is what XLA fuses."""
    values = bfloat16_step.values
    wide = {
        i for i, value in enumerate(values)
        if value.dtype == jnp.float32 and value.ndim == 4 and value.shape[0] == BATCH and value.shape[-1] > 3
    }  # fmt: skip
    touching = {o.name for o in bfloat16_step.operations if wide & {*o.inputs, *o.outputs}}
    assert touching <= FUSIBLE
    assert not wide & set(bfloat16_step.results)
    convolutions = [o for o in bfloat16_step.operations if o.name == "conv_general_dilated"]
    assert len(convolutions) == 3 * 5 - 1  # none for the gradient of the images
    assert all(values[i].dtype == jnp.bfloat16 for o in convolutions for i in o.inputs)


def test_statistics_are_read_in_one_pass() -> None:
    """Mean and variance need no sum of each other, so XLA takes them side by side; two more sums backward."""
    x, channels = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.float32)

    def forward(x, scale, bias, about):
        return normalise(x, scale, bias, about, 1e-5)

    def backward(x, scale, bias, about):
        y, pull = jax.vjp(lambda *differentiated: forward(*differentiated, about)[0], x, scale, bias)
        return pull(y)

    assert traced(forward, x, channels, channels, channels).longest("reduce_sum") == 1
    assert traced(backward, x, channels, channels, channels).longest("reduce_sum") == 2


def test_a_batch_and_its_crops_are_two_gathers_of_bytes() -> None:
    """Whole images and whole windows: what reads a GPU's memory in rows. Read in the program that is lowered for CUDA."""
    step, state, split = setup(jnp.bfloat16)
    lowered = (
        jax.jit(step).trace(state, split, jnp.arange(BATCH), jax.random.key(0)).lower(lowering_platforms=("cuda",))
    )
    gathers = [line for line in lowered.as_text().splitlines() if "stablehlo.gather" in line and "ui8" in line]
    sizes = [re.search(r"slice_sizes = array<i64: ([\d, ]+)>", line)[1] for line in gathers]  # type: ignore[index]
    assert sizes == [f"1, {PIXELS}, {PIXELS}, 3"] * 2


def test_an_epoch_is_one_call_that_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX refuses transfers that nobody asked for; the metrics are asked for, once."""
    step, state, split = setup()
    where = devices.find(1)
    steps = StepsLoop(step, where, on_device=True)
    order = jax.device_put(np.arange(STEPS * BATCH, dtype=np.int32).reshape(STEPS, BATCH), where.cut(1))
    state, split, key = where.replicate((state, split, jax.random.key(0)))
    steps.compile(state, split, order, key)
    program, calls, fetched, get = steps._compiled[STEPS], [], [], jax.device_get
    # XLA knows how often it turns.
    assert re.search(rf'known_trip_count":{{"n":"{STEPS}"', program.as_text())  # type: ignore[attr-defined]
    monkeypatch.setitem(steps._compiled, STEPS, lambda *given: calls.append(given) or program(*given))
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or get(tree))
    with jax.transfer_guard("disallow"), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of a buffer which could not be used again
        after, metrics = steps(state, split, order, 0, STEPS, key)
    assert len(calls) == len(fetched) == 1
    assert metrics.loss.shape == (STEPS,)
    assert int(after.step) == STEPS
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # donated
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"), jax.transfer_guard("disallow"):
        jax.jit(lambda x: x)(np.zeros(1))  # the guard is awake


@pytest.mark.parametrize(("steps", "stretch"), [(1, 1), (390, 390), (500, 500), (501, 251), (1562, 391)])
def test_stretches_are_equal(steps: int, stretch: int) -> None:
    assert StepsLoop(setup()[0], devices.find(1), on_device=True).stretch(steps) == stretch
    assert StepsLoop(setup()[0], devices.find(1)).stretch(steps) is None


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the CPU for a GPU, and a tiny network for ResNet-20."""
    monkeypatch.setattr(devices.Devices, "platform", property(lambda self: "gpu"))
    monkeypatch.setitem(zoo.ZOO, "resnet20_cifar", dataclasses.replace(zoo.ZOO["resnet20_cifar"], config=TINY))


def trainer(out: Path, epochs: int = 3, **options: Any) -> Trainer:
    config = default_config(
        arch="resnet20_cifar",
        dataset="digits",
        limit_train=64,
        limit_test=41,
        val_split=40,
        batch_size=16,
        epochs=epochs,
    )
    return Trainer(config, load_data(config, None), out, options=Options(**options))


def compilations() -> list[str]:
    """A list that grows with each program that is compiled."""
    found: list[str] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    return found


@pytest.mark.usefixtures("accelerator")
def test_a_run_compiles_first_and_then_calls_four_programs_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path)
    program, called, compiled, laid = run.program, [], compilations(), []
    compiled_at: dict[int, int] = {}
    step, evaluate, batches = Program.compile, Program.evaluate, loop.batches

    def counted(name: str, function: Callable) -> Callable:
        return lambda *given: called.append(name) or function(*given)

    def compile_(self: Program, *given: Any) -> None:
        step(self, *given)
        assert list(self.loop._compiled) == [4]
        self.loop._compiled[4] = counted("epoch", self.loop._compiled[4])
        self.eval_step, self.finite = counted("evaluate", self.eval_step), counted("finite", self.finite)
        self._order = counted("order", self._order)

    def evaluate_(self: Program, state: train.TrainState, name: str, *given: Any) -> Any:
        compiled_at[int(state.step)] = len(compiled)
        return evaluate(self, state, name, *given)

    monkeypatch.setattr(Program, "compile", compile_)
    monkeypatch.setattr(Program, "evaluate", evaluate_)
    monkeypatch.setattr(loop, "batches", lambda split, *more: laid.append(len(split.labels)) or batches(split, *more))
    run.fit()
    assert called[:5] == ["order", "epoch", "finite", "evaluate", "evaluate"]  # of both splits, a batch each
    assert called[:-1] == called[:5] * 3  # and the test images at the end
    assert program.eval_batch == 41
    assert sorted(laid) == [40, 41]  # once, for all evaluations
    assert compiled_at[12] == compiled_at[8]
    assert list(program.loop._compiled) == [4]


@pytest.mark.usefixtures("accelerator")
def test_short_epochs_do_not_wait_for_checkpoints(tmp_path: Path) -> None:
    """But the best weights and the state are there at the end, and after a signal, whence it goes on bit for bit."""
    whole, cut = trainer(tmp_path / "whole"), trainer(tmp_path / "cut")
    summary = whole.fit()
    evaluate = Program.evaluate

    def stopping(state: train.TrainState, name: str, *given: Any) -> Any:
        assert not list((tmp_path / "cut").glob("checkpoints/*"))
        assert not (tmp_path / "cut" / "best.safetensors").exists()
        if int(state.step) == 8:
            cut.stop.signal = 15
        return evaluate(cut.program, state, name, *given)

    cut.program.evaluate = stopping  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        cut.fit()
    best = max(read_metrics(tmp_path / "cut" / "metrics.jsonl"), key=lambda row: row["val_accuracy"])
    assert json.loads(native.read(tmp_path / "cut" / "best.safetensors")[3]["metrics"]) == best
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["8.safetensors"]
    assert trainer(tmp_path / "cut").fit(resume=True)["final"] == summary["final"]
    for name in ("last.safetensors", "best.safetensors"):
        ours, other = (native.read(tmp_path / folder / name)[2] for folder in ("whole", "cut"))
        assert all(value.tobytes() == other[path].tobytes() for path, value in ours.items())
    assert [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()] == ["12.safetensors"]
