"""Data parallelism: the devices of a run and the sharding of its arrays.

There is one mesh with one axis, ``"data"``. Parameters, statistics and optimizer state are replicated on every device; a
batch is sharded into equal parts. A jitted function computes the same on one device and on many; XLA inserts the
communication. Several processes form one mesh of all their devices after :func:`connect` was called in each.
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
        """The number of devices over all processes."""
        return self.mesh.size

    @property
    def first(self) -> jax.Device:
        """A device that belongs to this process."""
        return self.mesh.local_devices[0]

    @property
    def platform(self) -> str:
        """``"cpu"``, ``"gpu"`` or ``"tpu"``."""
        return self.first.platform

    @property
    def whole(self) -> NamedSharding:
        """The sharding of replicated arrays."""
        return NamedSharding(self.mesh, PartitionSpec())

    def cut(self, axis: int = 0) -> NamedSharding:
        """The sharding of an array whose ``axis`` is the batch."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data"))

    def put(self, value: Any, layout: NamedSharding) -> jax.Array:
        """Places an array on the mesh; every process has the whole array."""
        if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                self.put(jax.random.key_data(value), layout), impl=jax.random.key_impl(value)
            )
        if jax.process_count() == 1:
            return jax.device_put(value, layout)
        array = np.asarray(value)  # device_put would compare the values of all processes
        return jax.make_array_from_callback(array.shape, layout, lambda index: array[index])

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that belong to this process's devices."""
        own = self.cut().addressable_devices_indices_map((batch_size,)).values()
        starts_and_ends = [index[0].indices(batch_size) for index in own if index is not None]
        return slice(min(start for start, *_ in starts_and_ends), max(end for _, end, _ in starts_and_ends))

    def assemble(self, rows: np.ndarray, batch_size: int) -> jax.Array:
        """Builds a sharded batch from this process's ``rows``."""
        if jax.process_count() == 1:
            return jax.device_put(rows, self.cut())
        return jax.make_array_from_process_local_data(self.cut(), rows, (batch_size, *rows.shape[1:]))

    def replicate(self, tree: Any) -> Any:
        """Replicates a tree of arrays on all devices; arrays that are already replicated are not copied."""
        return jax.tree.map(lambda value: self.put(value, self.whole), tree)


def find(count: int | None = None) -> Devices:
    """The first ``count`` devices of each process; all by default.

    Raises:
        InputError: there are fewer devices.
    """
    local = jax.local_device_count()
    if count is not None and not 1 <= count <= local:
        raise InputError(
            f"`devices` must be from 1 to {local}, the number on this machine ({jax.local_devices()[0].platform}), got "
            f"{count}. On a CPU, JAX_NUM_CPU_DEVICES=N simulates N devices"
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in [d for d in jax.devices() if d.process_index == process][:count]
    ]
    return Devices(Mesh(np.array(chosen), ("data",)))


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process to the others of a run. Call it before anything else of JAX is used.

    Args:
        coordinator: ``HOST:PORT`` of process 0. Anybody who can reach this port can disturb the run, so use it only in
            trusted networks. ``None``: JAX finds all three values from SLURM, Open MPI, Kubernetes or Cloud TPU.
        processes: number of processes.
        process_id: index of this process, from 0.

    Raises:
        InputError: the connection fails.
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
        raise InputError(f"cannot connect the processes of this run ({where}): {error}") from error


def _is_address(coordinator: str | None) -> bool:
    """Whether the coordinator is an address of its own, so that process 0 listens only there instead of on all interfaces.

    A host name is excluded, because it may resolve to another address on that host.
    """
    host = (coordinator or "").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def together(values: Any) -> list[Any]:
    """Gathers a small array of numbers from every process; all processes must call it at the same point."""
    if jax.process_count() == 1:
        return [np.asarray(values)]
    from jax.experimental import multihost_utils

    return list(np.asarray(multihost_utils.process_allgather(np.asarray(values))))


def meet(place: str) -> None:
    """A barrier: waits up to an hour until all processes reach ``place``.

    On the CPU (gloo), the first collective waits only 30 s for the other processes, but compilation may take longer.
    """
    if jax.process_count() == 1:
        return
    with contextlib.suppress(ImportError, AttributeError):  # JAX has no public barrier without a collective
        from jax._src import distributed

        client: Any = distributed.global_state.client
        client.wait_at_barrier(place, timeout_in_ms=3_600_000)


def from_first(values: Any) -> Any:
    """Broadcasts process 0's ``values``, a tree of arrays with the same shapes in every process."""
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(values)
