"""The Ray engine: workers as Ray actors, on an existing cluster or on one of this machine alone.

Nothing of ours is pickled: an actor imports its class and the operations by name, and tasks and
answers are JSON texts. So Surgeon, in the same version, and the models have to be on every node.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from ..errors import BadInput, MissingExtra
from .schedule import Crew, Event
from .worker import THREADS, Worker

# seconds to wait for an answer from the address of a cluster; Ray itself would try for minutes
CONNECT = 10.0


class RayCrew(Crew):
    """Actors, one a worker. address: auto, host:port or ray://host:port; None starts Ray on this
    machine, reachable from nowhere else.

    workers, threads (CPUs that an actor reserves): None for as many as the cluster has. gpus: that
    an actor reserves, may be a fraction.
    Raises: MissingExtra without `weight-surgeon[cluster]`; BadInput for an address where no cluster
    answers, or one that has no room.
    """

    def __init__(
        self,
        registry: str,
        most: int,
        workers: int | None = None,
        threads: int | None = None,
        address: str | None = None,
        gpus: float = 0.0,
    ) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray would tell its makers
        if address is None:
            # Ray binds to all interfaces unless its node is at 127.0.0.1, and only this, set before
            # it is imported, lets it be there
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        try:
            import ray
        except ImportError as error:
            raise MissingExtra("the engine ray", "cluster") from error
        self.ray: Any = ray
        self.registry = registry
        self._joined = not ray.is_initialized()
        if self._joined:
            self._connect(address)
        nodes = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        largest = int(max((n.get("CPU", 0) for n in nodes), default=0))
        self.threads = threads or max(1, min(THREADS, largest))
        room = sum(int(n.get("CPU", 0) // self.threads) for n in nodes)
        if gpus:
            room = min(room, sum(int(n.get("GPU", 0) / gpus) for n in nodes))
        if room < 1:
            self.close()
            raise BadInput(
                f"no node of the Ray cluster has {self.threads} CPUs and {gpus:g} GPUs for a"
                f" worker; the largest has {largest} CPUs."
            )
        self.size = min(most, workers or room)
        self.options = {
            "num_cpus": self.threads,
            "num_gpus": gpus,
            "max_restarts": 0,  # a lost task is given to another worker by us, and counted
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
        }
        self._hired = 0
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, tuple[int, str]] = {}  # what was asked of whom

    def _connect(self, address: str | None) -> None:
        if address not in (None, "auto"):
            _require_answer(str(address))
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        where = {"address": "local", **local} if address is None else {"address": address}
        try:
            self.ray.init(**where, **quiet)
        except Exception as error:  # Ray raises many types here, all of them about the connection
            said = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
            # from Ray 2.59 on a cluster may ask for a token, and a driver with an address offers
            # its own only when it is told to
            hint = "; if the cluster asks for a token, set RAY_AUTH_MODE=token here too"
            hint = "" if address is None else hint
            raise BadInput(
                f"no Ray cluster could be joined at {address or 'this machine'}: {said}{hint}."
            ) from error

    def hire(self) -> int:
        self._hired += 1
        actor = self.ray.remote(Worker).options(**self.options).remote(self.registry, self.threads)
        self._actors[self._hired] = actor
        self._pending[actor.ready.remote()] = (self._hired, "ready")
        return self._hired

    def give(self, worker: int, job: str) -> None:
        self._pending[self._actors[worker].run.remote(job)] = (worker, "answer")

    def next(self, timeout: float) -> Event | None:
        ready, _ = self.ray.wait(list(self._pending), num_returns=1, timeout=timeout)
        if not ready:
            return None
        worker, kind = self._pending.pop(ready[0])
        try:
            text = self.ray.get(ready[0])
        except self.ray.exceptions.RayError as error:
            # a node that cannot be reached may still be at work; what it says later is not heard
            self.ray.kill(self._actors.pop(worker))
            return Event("lost", worker, f"Ray says: {_plainly(error)}")
        return Event("ready" if kind == "ready" else "answer", worker, text)

    def close(self) -> None:
        for actor in getattr(self, "_actors", {}).values():
            self.ray.kill(actor)
        if self._joined:
            self.ray.shutdown()


def _plainly(error: Exception) -> str:
    """The line that says what happened: of an actor that failed as it was made, the last one of its
    traceback.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if "Traceback" in str(error) or "ray::" in lines[0] else lines[0]


def _require_answer(address: str) -> None:
    """Raises: BadInput if nothing listens there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise BadInput(
            f"‹address› {address} is not known; use auto, host:port, or ray://host:port."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or"
            " leave ‹address› out."
        ) from error
