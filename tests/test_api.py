"""A model as JAX's and Flax's users use one, and weights with what belongs to them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import command, randomise
from flax import nnx
from PIL import Image

import jresnet
from jresnet.models import config as configurations
from jresnet.models import fuse, layers, params, resnet, zoo
from jresnet.weights import native

TINY = jresnet.ResNetConfig("basic", (1, 1), (8, 16), num_classes=3, stem="cifar")
X = np.random.default_rng(0).standard_normal((4, 8, 8, 3), np.float32)
Y = np.array([0, 1, 2, 0])


def tiny(**options: object) -> jresnet.ResNet:
    model = jresnet.ResNet(TINY, rngs=nnx.Rngs(0), **options)
    randomise(model)
    return model


def statistics(model: jresnet.ResNet) -> dict[str, np.ndarray]:
    return {path: np.array(value) for path, value in params.arrays(model).items() if path.endswith((".mean", ".var"))}


def alike(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, bool]:
    return {path: np.array_equal(one[path], other[path]) for path in one}


# --- The mode.


@pytest.mark.parametrize("remat", [False, True])
def test_train_and_eval_set_the_mode(remat: bool) -> None:
    model, explicit = tiny(remat=remat), tiny()
    before = statistics(model)
    evaluated = model(X)
    model.train()
    trained = model(X)
    np.testing.assert_allclose(trained, explicit(X, train=True), rtol=1e-5, atol=1e-6)
    assert not any(alike(before, statistics(model)).values())
    after = statistics(model)
    np.testing.assert_allclose(model(X, train=False), explicit(X), rtol=1e-5, atol=1e-6)  # the call's own wins
    assert all(alike(after, statistics(model)).values())
    model.eval()
    assert not np.allclose(model(X), trained)
    assert not np.allclose(model(X), evaluated)  # the statistics have moved
    assert all(alike(after, statistics(model)).values())
    model(X, train=True)
    assert not any(alike(after, statistics(model)).values())


def test_features_and_embed_follow_the_mode() -> None:
    model, explicit = tiny(), tiny()
    model.train()
    np.testing.assert_array_equal(model.embed(X), explicit.embed(X, train=True))
    np.testing.assert_array_equal(model.features(X)["layer1"], explicit.features(X, train=True)["layer1"])


def test_a_part_can_be_frozen() -> None:
    model = tiny()
    before = statistics(model)
    model.train()
    model.bn1.eval()
    for block in model.layer1:
        block.eval()
    model(X)
    for path, same in alike(before, statistics(model)).items():
        assert same == (not path.startswith("layer2")), path


def test_the_mode_is_kept_by_split_view_and_clone() -> None:
    model = tiny()
    view = nnx.view(model, deterministic=False, use_running_average=False)
    before = statistics(model)
    view(X)
    assert model.deterministic
    assert not any(alike(before, statistics(model)).values())  # the same variables
    model.train()
    graph, state = nnx.split(model)
    for again in (nnx.merge(graph, state), nnx.clone(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_allclose(again(X), tiny()(X, train=True), rtol=1e-5, atol=1e-6)
    model.eval()
    assert nnx.split(model)[0] != graph  # so that jit does not take one for the other


def head() -> nnx.Sequential:
    return nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.Linear(16, 5, rngs=nnx.Rngs(2)))


def test_a_head_of_ones_own_follows_the_mode() -> None:
    model = tiny()
    model.fc = head()  # its Dropout begins in training mode, as Flax's do
    np.testing.assert_array_equal(model(X), model(X))
    assert not np.array_equal(model(X, train=True), model(X, train=True))
    model.train()
    assert not np.array_equal(model(X), model(X))
    np.testing.assert_array_equal(model(X, train=False), model(X, train=False))
    model.eval()
    fused = jresnet.fuse(model)
    np.testing.assert_allclose(jax.jit(fused)(X), model(X), rtol=1e-4, atol=1e-5)
    step = nnx.jit(lambda model: model(X, train=True))
    assert not np.array_equal(step(model), step(model))  # its random numbers go on


def test_a_batchnorm_in_a_head_of_ones_own_learns() -> None:
    model = tiny()
    model.fc = nnx.Sequential(nnx.BatchNorm(16, rngs=nnx.Rngs(1)), nnx.Linear(16, 5, rngs=nnx.Rngs(2)))
    norm = model.fc.layers[0]
    model(X)
    assert not np.asarray(norm.mean[...]).any()
    model(X, train=True)
    assert np.asarray(norm.mean[...]).all()


@pytest.mark.parametrize("fc", [None, jax.nn.log_softmax])
def test_heads_that_are_no_modules(fc: object) -> None:
    model = tiny()
    features = model.embed(X)
    model.fc = fc
    np.testing.assert_allclose(model(X), fc(features) if callable(fc) else features, rtol=1e-6)


def test_a_model_in_training_mode_is_fused_for_inference() -> None:
    model = tiny()
    expected = model(X)
    model.train()
    np.testing.assert_allclose(jresnet.fuse(model)(X), expected, rtol=1e-4, atol=1e-5)
    assert not model.deterministic


# --- JAX and Flax.


def test_a_training_loop_as_in_flaxs_documentation() -> None:
    model = tiny()
    before = statistics(model)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    model.train()

    @nnx.jit
    def step(model: jresnet.ResNet, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: jresnet.ResNet) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]
    assert not any(alike(before, statistics(model)).values())
    model.eval()
    np.testing.assert_array_equal(nnx.jit(lambda model: model(X))(model).shape, (4, 3))


def test_jit_vmap_and_grad() -> None:
    model = tiny()
    expected = model(X)
    np.testing.assert_allclose(jax.jit(model)(X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(model)(X[:, None])[:, 0], expected, rtol=1e-5, atol=1e-5)
    graph, state = nnx.split(model)
    slopes = jax.grad(lambda state, x: nnx.merge(graph, state)(x).sum(), argnums=(0, 1))(state, X)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes))


def test_pickle_and_deepcopy_are_copies() -> None:
    model = tiny()
    expected = model(X)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        np.testing.assert_array_equal(again(X), expected)
        assert (again.config, again.arch) == (model.config, None)
        again(X, train=True)
    np.testing.assert_array_equal(model(X), expected)


def test_as_a_linen_module() -> None:
    model = nnx.bridge.ToLinen(jresnet.ResNet, args=(TINY,))
    variables = model.init(jax.random.key(0), X)
    assert {"params", "batch_stats"} <= variables.keys()
    assert model.apply(variables, X).shape == (4, 3)
    logits, changed = model.apply(variables, X, train=True, mutable=["batch_stats"])
    assert logits.shape == (4, 3)
    assert np.asarray(jax.tree.leaves(changed)[0]).any()


def test_orbax(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    model = tiny()
    model.fc = head()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "one", nnx.state(model, nnx.Param, nnx.BatchStat)[0])
        checkpointer.save(tmp_path / "two", nnx.state(model, nnx.BatchStat))
        checkpointer.wait_until_finished()
        other = jresnet.ResNet(TINY, rngs=nnx.Rngs(9))
        other.fc = head()
        for name, kind in (("one", nnx.Param), ("two", nnx.BatchStat)):
            nnx.update(other, checkpointer.restore(tmp_path / name, nnx.state(other, kind)))
    np.testing.assert_array_equal(other(X), model(X))


# --- Types.


def test_annotations_can_be_read() -> None:
    for name in jresnet.__all__:
        value = getattr(jresnet, name)
        functions = [value] if inspect.isfunction(value) else []
        if inspect.isclass(value):
            typing.get_type_hints(value)
            functions = [member for _, member in inspect.getmembers(value, inspect.isfunction)]
        for function in functions:
            if function.__module__.startswith("jresnet"):
                typing.get_type_hints(function)
    for module in (configurations, fuse, layers, params, resnet, zoo):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            typing.get_type_hints(function)
    assert "n classes" in str(typing.get_type_hints(jresnet.ResNet.__call__)["return"])


def test_shapes_and_dtypes_are_as_annotated() -> None:
    """Every function of jresnet.models checks its arguments and results while networks of all kinds are traced."""
    pytest.importorskip("beartype")
    code = """
from jaxtyping import TypeCheckError, install_import_hook
with install_import_hook("jresnet.models", "beartype.beartype"):
    import jresnet, jresnet.models.fuse
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
for block, shortcut, stem in (
    ("basic", "pad", "cifar"), ("basic", "projection_first", "imagenet"), ("bottleneck", "conv", "cifar"),
):
    for dtype, classes in ((None, 3), ("bfloat16", 0)):
        config = jresnet.ResNetConfig(block, (1, 2), (8, 16), classes, stem=stem, shortcut=shortcut)
        model = jresnet.ResNet(config, dtype=dtype, remat=classes == 0, rngs=None)
        x = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
        for train in (None, False, True):
            nnx.eval_shape(lambda model, x: (model(x, train), model.features(x, train)), model, x)
        model.train()
        nnx.eval_shape(nnx.grad(lambda model, x: model(x).sum()), model, x)
model = jresnet.ResNet(jresnet.ResNetConfig("basic", (1,), (8,), 3), rngs=nnx.Rngs(0))
jresnet.fuse(model)(np.ones((1, 16, 16, 3), np.float32))
try:
    model.bn1(jnp.ones((2, 3)))
except TypeCheckError:
    print("checked")
"""
    done = command("-c", code)
    assert done.stdout == "checked\n", done.stderr[-3000:]


# --- Weights with what belongs to them.


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("described") / "mine.safetensors"
    model = jresnet.create("resnet20_cifar", num_classes=3)
    native.save(
        path, model, source="a test", categories=("cat", "dog", "eel"), scores={"top1": 12.5},
        preprocessing=jresnet.Preprocessing(36, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)),
    )  # fmt: skip
    return path


def test_get_weights(described: Path, tmp_path: Path) -> None:
    weights = jresnet.get_weights(described)
    assert (weights.arch, weights.source) == ("resnet20_cifar", "a test")
    assert (weights.categories, weights.scores) == (("cat", "dog", "eel"), {"top1": 12.5})
    assert weights.config.num_classes == 3
    assert weights.digest == weights.metadata["digest"]
    model = jresnet.create(weights=weights)
    assert native.digest(params.arrays(model)) == weights.digest
    assert jresnet.resnet20_cifar(weights=weights).config == weights.config
    with pytest.raises(jresnet.WeightsError, match="belong to resnet20_cifar, not to resnet18"):
        jresnet.create("resnet18", weights=weights)
    # What belongs to weights is saved with them and comes back.
    kept = {name: getattr(weights, name) for name in ("preprocessing", "categories", "scores", "source")}
    jresnet.save(tmp_path / "again.safetensors", model, **kept)
    again = jresnet.get_weights(str(tmp_path / "again.safetensors"))
    assert {name: getattr(again, name) for name in kept} == kept


def test_weights_that_say_nothing(native_file: Path) -> None:
    weights = jresnet.get_weights("resnet20_cifar", str(native_file))
    assert (weights.preprocessing, weights.categories, weights.scores) == (None, None, None)
    with pytest.raises(jresnet.WeightsError, match="does not specify its preprocessing"):
        weights.preprocess(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(jresnet.InputError, match="given as a string or a path, got 50"):
        jresnet.get_weights(50)
    with pytest.raises(jresnet.WeightsError, match="not a JSON object"):
        _ = dataclasses.replace(weights, metadata={"scores": json.dumps([1])}).scores


def test_preprocess(described: Path) -> None:
    weights = jresnet.get_weights(described)
    draw = np.random.default_rng(0)
    several = draw.integers(0, 256, (2, 50, 40, 3), np.uint8)
    both = weights.preprocess(several)
    assert (both.shape, both.dtype) == ((2, 32, 32, 3), np.float32)
    one = several[0]
    for same in (one, Image.fromarray(one), [one], jnp.asarray(one), (Image.fromarray(one),)):
        np.testing.assert_array_equal(weights.preprocess(same), both[:1])
    grey = weights.preprocess(Image.fromarray(one[..., 0]))
    np.testing.assert_array_equal(grey, weights.preprocess(one[..., :1]))
    mixed = weights.preprocess([one, Image.fromarray(draw.integers(0, 256, (32, 90, 4), np.uint8))])
    np.testing.assert_array_equal(mixed[:1], both[:1])
    assert jresnet.create(weights=weights)(mixed).shape == (2, 3)
    # Pixel by pixel: (x / 255 - mean) / std
    flat = weights.preprocess(np.full((40, 40, 3), 51, np.uint8))
    np.testing.assert_allclose(flat[0, 0, 0], (0.2 - np.array([0.5, 0.4, 0.3])) / [0.2, 0.3, 0.4], rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((32, 32, 3), np.float32), r"got float32 \[32, 32, 3\]"),
        (np.zeros((3, 32, 32), np.uint8), r"got uint8 \[3, 32, 32\]"),
        (np.zeros((32, 32), np.uint8), r"got uint8 \[32, 32\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"got uint8 \[0, 32, 32, 3\]"),
        ([], "got an empty sequence"),
        ("photo.jpg", r"got a file name: open it with PIL.Image.open\('photo.jpg'\)"),
        ([Path("a.png")], r"PIL.Image.open\('a.png'\)"),
    ],
)
def test_what_is_no_image(described: Path, images: object, words: str) -> None:
    with pytest.raises(jresnet.InputError, match=words):
        jresnet.get_weights(described).preprocess(images)


def test_list_weights() -> None:
    assert jresnet.list_weights("resnet50") == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    assert jresnet.list_weights("resnet20_cifar") == []
    assert "resnet50:IMAGENET1K_V2" in jresnet.list_weights()
    assert len(jresnet.list_weights()) == 17
    with pytest.raises(jresnet.InputError, match="did you mean resnet50"):
        jresnet.list_weights("resnet5")
