"""Parts of a network by name: what is frozen, what learns how fast, whose features are wanted."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import randomise
from flax import nnx

import jresnet
from jresnet.errors import InputError
from jresnet.models import params, paths
from jresnet.training import optim

TINY = jresnet.ResNetConfig("basic", (2, 1), (4, 8), num_classes=3, stem="cifar")
X = np.random.default_rng(0).standard_normal((4, 8, 8, 3), np.float32)
Y = np.array([0, 1, 2, 0])


def tiny(**options: Any) -> jresnet.ResNet:
    model = jresnet.ResNet(TINY, rngs=nnx.Rngs(0), **options)
    randomise(model)
    return model


def bits(model: nnx.Module) -> dict[str, bytes]:
    return {path: np.asarray(value).tobytes() for path, value in params.arrays(model).items()}


# --- Names.

PATHS = tuple(path for path in params.shapes(TINY) if not path.endswith((".mean", ".var")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("head", {"fc.kernel", "fc.bias"}),
        ("fc", {"fc.kernel", "fc.bias"}),
        ("backbone", {path for path in PATHS if not path.startswith("fc")}),
        ("stem", {"conv1.kernel", "bn1.scale", "bn1.bias"}),
        ("layer1", {path for path in PATHS if path.startswith("layer1.")}),
        ("layer1.1.bn2", {"layer1.1.bn2.scale", "layer1.1.bn2.bias"}),
        ("layer2.0.conv1.kernel", {"layer2.0.conv1.kernel"}),
        ("layer*.bn1", {f"layer{block}.bn1.{leaf}" for block in ("1.0", "1.1", "2.0") for leaf in ("scale", "bias")}),
        ("*.bias", {path for path in PATHS if path.endswith(".bias")}),
        ("norms", {path for path in PATHS if ".bn" in f".{path}" or "downsample.1" in path}),
        ("*", set(PATHS)),
    ],
)
def test_what_a_name_means(name: str, expected: set[str]) -> None:
    assert expected
    assert paths.select(name, PATHS) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer3", "'layer3' is no part of this network: did you mean 'layer"),
        ("haed", "did you mean 'head'"),
        ("layer1.0.cnv1", "did you mean 'layer1.0.conv1'"),
        ("zzz*", "there are backbone, bn1, conv1, fc, head, layer1, layer2, norms, stem"),
        (7, "must be a string such as 'layer1' or 'head', got 7"),
        ("layer", "did you mean"),
    ],
)
def test_a_name_of_nothing(name: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        paths.select(name, PATHS)
    with pytest.raises(InputError, match=words):
        optim.mask(name)(nnx.state(tiny(), nnx.Param))


def test_a_module_of_that_name_comes_first() -> None:
    assert paths.select("backbone", ["backbone.conv1.kernel", "head.kernel"]) == {"backbone.conv1.kernel"}


# --- Optimizers.


def by_path(tree: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(tree)}


def test_labels_and_masks_of_a_state() -> None:
    state = nnx.state(tiny(), nnx.Param)
    found = by_path(optim.labels({"slow": ["stem", "layer1"], "fast": "head"})(state))
    assert found == {
        path: "fast" if path.startswith("fc") else "rest" if path.startswith("layer2") else "slow" for path in PATHS
    }
    assert by_path(optim.mask("head")(state)) == {path: path.startswith("fc") for path in PATHS}
    last = by_path(optim.labels({"all": "*", "one": "layer1.0"})(state))
    assert {path for path in PATHS if last[path] == "one"} == {path for path in PATHS if path.startswith("layer1.0.")}
    assert optim.mask("a")({"a": jnp.zeros(2), "b": {"c": jnp.zeros(2)}}) == {"a": True, "b": {"c": False}}


def trained(model: nnx.Module, tx: optax.GradientTransformation, steps: int = 2) -> nnx.Optimizer:
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        def loss(model: nnx.Module) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(X, train=True), Y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(steps):
        step(model, optimizer)
    return optimizer


@pytest.mark.parametrize(
    "tx",
    [
        optim.optimizer("sgd", 0.1, weight_decay=0.1, frozen=("stem", "layer1.0", "*.bias")),
        optim.optimizer("adamw", 0.1, weight_decay={"*": 0.1}, rates={"stem": 2.0}, clip_norm=1.0,
                        frozen=("stem", "layer1.0", "*.bias")),
        optax.multi_transform({"hold": optax.set_to_zero(), "rest": optax.adam(0.1)},
                              optim.labels({"hold": ["stem", "layer1.0", "*.bias"]})),
    ],
)  # fmt: skip
def test_frozen_is_bit_by_bit_the_same(tx: optax.GradientTransformation) -> None:
    model = tiny()
    before = bits(model)
    optimizer = trained(model, tx)
    held = {path for path, value in bits(model).items() if value == before[path]}
    assert held == {
        path for path in PATHS if path.startswith(("conv1.", "bn1.", "layer1.0.")) or path.endswith(".bias")
    }
    sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(optimizer)) if leaf.size > 1]
    assert sum(sizes) < 2 * sum(
        value.size for value in jax.tree.leaves(nnx.state(model, nnx.Param))
    )  # no state for those


def test_minus_zero_and_gradients_that_are_no_numbers_change_nothing() -> None:
    frozen = {"a": jnp.array([-0.0, 0.0, 1.5]), "b": jnp.ones(2)}
    tx = optim.freeze(optax.sgd(0.1), "a")
    updates, _ = tx.update({"a": jnp.array([jnp.nan, jnp.inf, 1.0]), "b": jnp.ones(2)}, tx.init(frozen), frozen)
    for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
        after = apply(frozen, updates)
        assert np.asarray(after["a"]).tobytes() == np.asarray(frozen["a"]).tobytes()
        np.testing.assert_allclose(after["b"], 0.9)


def test_rates_and_decays_by_part() -> None:
    values = {
        "conv1": {"kernel": jnp.full((2, 2), 3.0)},
        "fc": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)},
    }
    zero = jax.tree.map(jnp.zeros_like, values)

    def change(**options: Any) -> dict[str, float]:
        tx = optim.optimizer("sgd", 0.1, **options)
        updates, _ = tx.update(zero, tx.init(values), values)
        return {f"{a}.{b}": float(leaf.ravel()[0]) for a, inner in updates.items() for b, leaf in inner.items()}

    found = change(weight_decay={"*": 0.5, "head": 0.1}, rates={"head": 10.0})
    assert found == pytest.approx({"conv1.kernel": -0.15, "fc.kernel": -0.3, "fc.bias": -0.3})
    found = change(weight_decay={"head": 0.1}, decay_norms=False)
    assert found == pytest.approx({"conv1.kernel": 0.0, "fc.kernel": -0.03, "fc.bias": 0.0})
    assert change(weight_decay=0.1) == change(weight_decay={"*": 0.1})


def test_clipping_counts_what_learns_alone() -> None:
    values = {"conv1": jnp.zeros(4), "fc": jnp.zeros(1)}
    tx = optim.optimizer("sgd", 1.0, clip_norm=1.0, frozen="conv1")
    updates, _ = tx.update({"conv1": jnp.full(4, 100.0), "fc": jnp.ones(1)}, tx.init(values), values)
    np.testing.assert_allclose(updates["fc"], -1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rates": {"layer7": 0.1}}, "'layer7' is no part of this network: did you mean"),
        ({"weight_decay": {"layer7": 0.1}}, "'layer7' is no part"),
        ({"frozen": ("layer7",)}, "'layer7' is no part"),
        ({"rates": {"head": -1.0}}, "rates must be numbers of at least 0, got -1.0 for 'head'"),
        ({"weight_decay": {"head": float("nan")}}, "weight_decay must be numbers of at least 0, got nan for 'head'"),
    ],
)
def test_mistakes_are_told_before_the_first_step(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        optim.optimizer("sgd", 0.1, **options).init(nnx.state(tiny(), nnx.Param))


def test_layer_rates() -> None:
    assert optim.layer_rates(tiny(), 0.5) == {"stem": 0.125, "layer1": 0.25, "layer2": 0.5, "head": 1.0}
    headless = jresnet.ResNet(jresnet.ResNetConfig("basic", (1,), (4,), 0, stem="cifar"), rngs=nnx.Rngs(0))
    assert optim.layer_rates(headless, 0.5) == {"stem": 0.25, "layer1": 0.5}
    for decay in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="decay must be above 0 and at most 1"):
            optim.layer_rates(headless, decay)


# --- Statistics.


@pytest.mark.parametrize(
    ("names", "held", "remat"),
    [
        ((), ("",), False),
        (("layer1",), ("layer1.",), True),
        (("layer*.bn1", "stem"), ("bn1.", "layer1.0.bn1.", "layer1.1.bn1.", "layer2.0.bn1."), False),
    ],
)
def test_frozen_statistics_stay_and_the_rest_learns(names: tuple[str, ...], held: tuple[str, ...], remat: bool) -> None:
    model = tiny(remat=remat)
    model.freeze_statistics(*names)
    before = bits(model)
    model.train()
    trained(model, optax.sgd(0.1), steps=1)
    for path, value in bits(model).items():
        frozen = path.endswith((".mean", ".var")) and path.startswith(held)
        assert (value == before[path]) == frozen, path


def test_frozen_statistics_are_those_of_evaluation() -> None:
    model, expected = tiny(), tiny()(X)
    model.freeze_statistics()
    np.testing.assert_array_equal(model(X, train=True), expected)
    np.testing.assert_array_equal(model(X[:1, :1, :1], train=True).shape, (1, 3))  # no batch is too small
    model.freeze_statistics("layer1", frozen=False)
    before = bits(model)
    model(X, train=True)
    moved = {path for path, value in bits(model).items() if value != before[path]}
    assert moved == {path for path in before if path.startswith("layer1.") and path.endswith((".mean", ".var"))}
    model.freeze_statistics(frozen=False)
    model(X, train=True)
    assert not any(bits(model)[path] == before[path] for path in before if path.endswith((".mean", ".var")))


def test_copies_keep_frozen_statistics() -> None:
    model = tiny()
    plain = nnx.split(model)[0]
    model.freeze_statistics()
    graph, state = nnx.split(model)
    assert graph != plain  # so that jit does not take one for the other
    for again in (nnx.merge(graph, state), nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = bits(again)
        again.train()
        again(X)
        assert bits(again) == before
    np.testing.assert_allclose(jresnet.fuse(model)(X), model(X), rtol=1e-4, atol=1e-5)


def test_a_mistake_in_names_freezes_nothing() -> None:
    model = tiny()
    for names, words in (
        (("layer1", "layer9"), "'layer9' is no part of this network"),
        (("head",), "'head' is no part of this network"),
    ):
        with pytest.raises(InputError, match=words):
            model.freeze_statistics(*names)
    assert not any(module.frozen for _, module in nnx.iter_modules(model) if hasattr(module, "frozen"))
    with pytest.raises(InputError, match="no BatchNorm whose statistics could be frozen: it is fused"):
        jresnet.fuse(model).freeze_statistics()


# --- Features.


def test_features_by_name() -> None:
    model = tiny()
    found = model.features(X, names=["layer2", "stem", "layer1.0", "layer1.1"])
    assert list(found) == ["layer2", "stem", "layer1.0", "layer1.1"]
    whole = model.features(X)
    assert list(whole) == ["stem", "layer1", "layer2"]
    np.testing.assert_array_equal(found["layer1.1"], whole["layer1"])
    np.testing.assert_array_equal(model.layer1[1](found["layer1.0"]), whole["layer1"])
    np.testing.assert_array_equal(model.features(X, names="layer1.0")["layer1.0"], found["layer1.0"])
    np.testing.assert_array_equal(found["stem"], whole["stem"])
    assert model.features(X, names=()) == {}


def test_what_lies_behind_is_not_computed() -> None:
    model = tiny()
    before = bits(model)
    model.features(X, True, "layer1.0")
    moved = {path.rpartition(".")[0] for path, value in bits(model).items() if value != before[path]}
    assert moved == {"bn1", "layer1.0.bn1", "layer1.0.bn2"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["stem", "layer1", "layer1.0", "layer2.0", "layer2"])
def test_logits_from_features(name: str, fused: bool) -> None:
    model = jresnet.fuse(tiny()) if fused else tiny()
    np.testing.assert_allclose(
        model.logits_from(name, model.features(X, names=name)[name]), model(X), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layer3", "'layer3' is no stage or block of this network: did you mean 'layer"),
        ("fc", "there are layer1, layer2, stem"),
    ],
)
def test_features_of_no_layer(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tiny().features(X, names=["stem", name])
    with pytest.raises(InputError, match=words):
        tiny().logits_from(name, X)
