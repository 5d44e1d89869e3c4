"""Data parallelism: which devices a run uses, and how its arrays lie on them.

One mesh of one axis, ``"data"``: parameters, statistics and optimizer state are whole on every device, a batch is cut into
equal parts. A jitted function over arrays laid out so is the same function on one device and on many; XLA adds the
communication. Several processes form one mesh of all their devices once :func:`connect` was called in each.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jresnet.errors import InputError

HEARTBEAT = 30  # seconds after which a silent process counts as dead


@dataclass(frozen=True)
class Devices:
    """The devices of a run, as a mesh with the axis ``"data"``."""

    mesh: Mesh

    @property
    def count(self) -> int:
        """Devices, over all processes."""
        return self.mesh.size

    @property
    def first(self) -> jax.Device:
        """One of them that belongs to this process."""
        return self.mesh.local_devices[0]

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"gpu"`` or ``"tpu"``."""
        return self.first.platform

    @property
    def whole(self) -> NamedSharding:
        """The layout of what every device holds."""
        return NamedSharding(self.mesh, PartitionSpec())

    def cut(self, axis: int = 0) -> NamedSharding:
        """The layout of an array whose ``axis`` is a batch."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data"))

    def put(self, value: Any, layout: NamedSharding) -> jax.Array:
        """An array that every process has whole, laid out on the mesh."""
        if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                self.put(jax.random.key_data(value), layout), impl=jax.random.key_impl(value)
            )
        if jax.process_count() == 1:
            return jax.device_put(value, layout)
        array = np.asarray(value)  # device_put would ask all processes whether they hold the same
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that lie on this process's devices."""
        own = self.cut().addressable_devices_indices_map((batch_size,)).values()
        starts_and_ends = [index[0].indices(batch_size) for index in own if index is not None]
        return slice(min(start for start, *_ in starts_and_ends), max(end for _, end, _ in starts_and_ends))

    def assemble(self, rows: np.ndarray, batch_size: int) -> jax.Array:
        """A batch, cut over the devices, of which this process has the ``rows`` that lie on its own."""
        if jax.process_count() == 1:
            return jax.device_put(rows, self.cut())
        return jax.make_array_from_process_local_data(self.cut(), rows, (batch_size, *rows.shape[1:]))

    def replicate(self, tree: Any) -> Any:
        """A tree of arrays, whole on every device; an array that lies there already is the same one, not a copy."""
        return jax.tree.map(lambda value: self.put(value, self.whole), tree)


def find(count: int | None = None) -> Devices:
    """The first ``count`` of each process's devices, all by default.

    Raises:
        InputError: where there are fewer.
    """
    local = jax.local_device_count()
    if count is not None and not 1 <= count <= local:
        raise InputError(
            f"`devices` {count}: this machine has {local} ({jax.local_devices()[0].platform}). On a CPU, "
            "JAX_NUM_CPU_DEVICES=N simulates N"
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices() if d.process_index == process][:count]
    ]
    return Devices(Mesh(np.array(chosen), ("data",)))


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process with the others of a run, before anything else of JAX is used.

    Args:
        coordinator: ``HOST:PORT`` of process 0. Anybody who reaches that port can disturb the run: trusted networks only.
            ``None``: JAX finds all three from SLURM, Open MPI, Kubernetes or Cloud TPU.
        processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        InputError: where they do not come together.
    """
    if coordinator is not None and not (
        re.fullmatch(r"[\w.:%\[\]-]{1,255}:[0-9]{1,5}", coordinator) and int(coordinator.rpartition(":")[2]) < 2**16
    ):
        raise InputError(f"`coordinator` must be HOST:PORT, got {coordinator[:80]!r}")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            coordinator_bind_address=coordinator if process_id == 0 and _is_address(coordinator) else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{coordinator}, process {process_id} of {processes}" if coordinator else "found by JAX"
        raise InputError(f"the processes of this run do not come together ({where}): {error}") from error


def _is_address(coordinator: str | None) -> bool:
    """Whether to listen there alone, not on all interfaces as JAX does: a host's name may mean another address inside."""
    host = (coordinator or "").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_first() -> bool:
    """Whether this is process 0, the one that writes and speaks."""
    return jax.process_index() == 0


def together(values: Any) -> list[Any]:
    """A small array of numbers from every process, by process: all must call it at the same place."""
    if jax.process_count() == 1:
        return [np.asarray(values)]
    from jax.experimental import multihost_utils

    return list(np.asarray(multihost_utils.process_allgather(np.asarray(values))))


def meet(place: str) -> None:
    """Waits until every process has come to ``place``, up to an hour.

    The first collective gives the others only 30 s on the CPU (gloo), while compilation may take one of them longer.
    """
    if jax.process_count() == 1:
        return
    with contextlib.suppress(ImportError, AttributeError):  # no public function waits without a collective
        from jax._src import distributed

        client: Any = distributed.global_state.client
        client.wait_at_barrier(place, timeout_in_ms=3_600_000)


def from_first(values: Any) -> Any:
    """Process 0's ``values``, a tree of arrays that has the same shapes in every process."""
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(values)
