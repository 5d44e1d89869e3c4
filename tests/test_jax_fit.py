"""Is the installed jax fit for use? Recomputes what some releases got silently wrong."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

UNFIT = f"jax {jax.__version__} with jaxlib {jax.lib.__version__} gives wrong results here: use another version"


@pytest.mark.parametrize("n", [16_385, 32_769])
def test_vmapped_products_survive_jit(n: int) -> None:
    """jax#39103: 0.10.2 on the CPU lost the last row of a jitted vmapped product followed by a sum."""
    rows = np.zeros((n, 3), np.float32)
    rows[:, 0] = np.arange(n)
    result = jax.jit(lambda x: jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x))(rows)
    np.testing.assert_allclose(result, rows[:, 0] ** 2, rtol=1e-6, err_msg=f"{UNFIT} (jax#39103)")


@pytest.mark.parametrize("n", [49, 50, 64, 200])
def test_arctan(n: int) -> None:
    """jax#39352: 0.10.2 on the CPU returned zeros and its own input for 50 elements and more."""
    x = np.linspace(-3, 3, n, dtype=np.float32)
    np.testing.assert_allclose(jnp.arctan(x), np.arctan(x), rtol=1e-5, atol=1e-6, err_msg=f"{UNFIT} (jax#39352)")


@pytest.mark.parametrize("rank", [7, 8])
def test_reductions_of_high_rank(rank: int) -> None:
    """jax#39257: fused reductions over seven or eight axes crashed in 0.10.2 and 0.11.0."""
    x = np.arange(3**rank, dtype=np.float32).reshape((3,) * rank) % 7
    for axes in [tuple(range(0, rank, 2)), tuple(range(rank))]:
        result = jax.jit(lambda x, axes=axes: (x * 2).sum(axes))(x)
        np.testing.assert_allclose(result, 2 * x.sum(axes), rtol=1e-5, err_msg=f"{UNFIT} (jax#39257)")
