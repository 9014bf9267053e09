"Real Ray nodes on this machine, for tests of what a cluster does."
from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest


def two_nodes() -> tuple[Any, Any]:
    "A Ray cluster of two nodes with a core each: the cluster and its second node. Ray gives a node thirty seconds to start, which a busy machine may not keep to."
    from ray.cluster_utils import Cluster

    with (Path(tempfile.gettempdir()) / f"ray-{os.getuid()}.lock").open("w") as turn:     # two test processes that start nodes at once would both be too slow
        fcntl.flock(turn, fcntl.LOCK_EX)
        return _started(Cluster)


def _started(cluster: Any) -> tuple[Any, Any]:
    small = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_log_monitor": False}
    for _ in range(3):
        nodes = cluster()
        try:
            nodes.add_node(**small, include_dashboard=False, no_monitor=True)
            second = nodes.add_node(**small)
            nodes.wait_for_nodes()
            return nodes, second
        except Exception as error:  # noqa: BLE001
            if "timed out during startup" not in str(error):
                raise
            nodes.shutdown()
    pytest.skip("this machine is too busy: no Ray node started within Ray's own limit of 30 s, tried three times")
