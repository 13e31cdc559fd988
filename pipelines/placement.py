"""Which nodes train and which read: found before a run starts, because Ray waits for ever for a node that nobody has."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Final

import ray
from ray.train import ScalingConfig

from artemis_vlm.errors import RunError
from pipelines.recipe import TrainConfig

logger = logging.getLogger(__name__)

#: Seconds to wait for a node that may train before saying that there is none.
PLACEMENT_TIMEOUT_S: Final = 30.0


def with_workers(config: TrainConfig) -> TrainConfig:
    """The configuration with as many workers as suit the nodes that may train, if it leaves that open.

    Without GPUs two: two processes with half of the cores each meet once a step, one with all cores in every matrix
    product, where each waits for a core that Ray's own processes hold.

    Raises:
        RunError: no node may train.
    """
    if config.workers:
        return config
    gpus, cpus = (int(sum(n["Resources"].get(kind, 0) for n in _nodes(config))) for kind in ("GPU", "CPU"))
    return replace(config, workers=max(1, min(gpus or min(cpus, 2), config.batch_size)))


def placement(config: TrainConfig) -> ScalingConfig:
    """Where the ranks go: a GPU each if the nodes that may train have them, else CPUs.

    Raises:
        RunError: no node may train. Ray itself would wait for ever.
    """
    nodes = _nodes(config)
    gpus, cpus = (sum(n["Resources"].get(kind, 0) for n in nodes) for kind in ("GPU", "CPU"))
    for kind, found in (("GPU", gpus or config.workers), ("CPU", cpus)):
        if found < config.workers:
            raise RunError(
                f"{config.workers} workers need as many {kind}s; the nodes that may train have {found:g}: give fewer "
                "--workers, or start more nodes"
            )
    resources: dict[str, float] = {"CPU": 1}
    key, _, value = config.worker_label.partition("=")
    if value and any(value in n["Resources"] for n in nodes):
        resources[value] = 1  # a resource named like the label's value also keeps other jobs off the node
    return ScalingConfig(
        num_workers=config.workers,
        use_gpu=gpus > 0,
        resources_per_worker=resources | ({"GPU": 1} if gpus else {}),
        label_selector={key: value} if value else None,
    )


def _nodes(config: TrainConfig) -> list[dict[str, Any]]:
    """Those that may train, waited for."""
    deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
    while not (nodes := training_nodes(config.worker_label)) and time.monotonic() < deadline:
        time.sleep(1)
    if not nodes:
        labels = sorted(
            {f"{k}={v}" for n in ray.nodes() for k, v in n.get("Labels", {}).items() if not k.startswith("ray.io")}
        )
        raise RunError(
            f"no node of this cluster has the label {config.worker_label} (labels found: {', '.join(labels) or 'none'}); "
            f"start one with `ray start --labels {config.worker_label}`, or give --worker-label '' to train on any node"
        )
    return nodes


def training_nodes(label: str) -> list[dict[str, Any]]:
    """Live nodes with a `key=value` label; all of them for an empty label."""
    key, _, value = label.partition("=")
    return [n for n in ray.nodes() if n["Alive"] and (not label or n.get("Labels", {}).get(key) == value)]


def data_selector(config: TrainConfig) -> dict[str, str] | None:
    """Keeps reading and decoding off the nodes that train, where others can do it; None: anywhere."""
    key, _, value = config.worker_label.partition("=")
    training = training_nodes(config.worker_label)
    if not value or not training:
        return None
    if len(training) == len(training_nodes("")):
        logger.warning("only nodes with the label %s are there: they decode images too", config.worker_label)
        return None
    return {key: f"!{value}"}
