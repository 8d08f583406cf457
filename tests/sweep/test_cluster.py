"""The Ray engine on a real cluster of two nodes on the loopback: a worker is killed, then a whole
node, in the middle of a sweep.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sweep_work import finished, read_log

from surgeon.errors import BadInput, MissingExtra
from surgeon.sweep import query
from surgeon.sweep.cluster import RayCrew

NINE = (
    "seeds: [0, 1, 2]\noperations:\n  - {name: count, params: {seconds: 1.0}, grid: {value: [1, 2,"
    " 3]}}\n"
)
ALL = [f"{value}.{seed}" for value in (1, 2, 3) for seed in (0, 1, 2)]


@pytest.fixture
def cluster(log: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, and two nodes of one, on the loopback alone."""
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(str(Path(__file__).parents[n] / d) for n, d in ((1, "."), (2, "src"))),
    )
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
    }
    # whether Ray asks for a token would else depend on what was run on this machine before; nobody
    # else reaches the loopback
    for name, value in {**settings, "RAY_AUTH_MODE": "disabled"}.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    node = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20}
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **node}
    )
    try:
        made.two = [made.add_node(num_cpus=1, **node) for _ in range(2)]
        yield made
    finally:
        made.shutdown()


def at_work() -> list[int]:
    done = finished()
    return [int(w[0]) for w in read_log() if w[1] == "start" and w[2] not in done]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_worker_and_a_node_lost_in_the_middle(sweep: Any, cluster: Any) -> None:
    lost: list[str] = []

    def harm() -> None:
        while len(finished()) < 2 or not at_work():
            time.sleep(0.05)
        os.kill(at_work()[0], signal.SIGKILL)
        lost.append("worker")
        while len(finished()) < 5 or not at_work():
            time.sleep(0.05)
        cluster.remove_node(cluster.two[0], allow_graceful=False)
        lost.append("node")

    thread = threading.Thread(target=harm, daemon=True)
    thread.start()
    summary, store = sweep(NINE, partial(RayCrew, "sweep_work", threads=1, address=cluster.address))
    thread.join(30)
    assert lost == ["worker", "node"]
    assert (summary.done, summary.failures) == (9, [])
    assert finished() == sorted(ALL)  # nothing lost, nothing done twice
    assert query(store, "SELECT count(*), count(DISTINCT task), sum(answer) FROM results").rows == [
        (9, 9, 189)
    ]
    assert (
        len({w[0] for w in read_log()}) >= 2
    )  # the one that was killed, and at least one that went on
    again, _ = sweep(NINE, lambda _: pytest.fail("a crew was hired"))
    assert again.before == 9


def test_addresses_where_no_cluster_answers() -> None:
    pytest.importorskip("ray")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(BadInput, match="no Ray cluster answers at"):
                RayCrew("sweep_work", 1, address=address)
    for address in ("banana", "host:", "ray://", "1.2.3.4:x"):
        with pytest.raises(BadInput, match="use auto, host:port, or ray://host:port"):
            RayCrew("sweep_work", 1, address=address)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"weight-surgeon\[cluster\]"):
        RayCrew("sweep_work", 1)
