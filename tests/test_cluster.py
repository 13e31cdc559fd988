"""cluster.yaml is valid, and placement finds the GB10 node or says that there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.cluster_utils import Cluster
from ray.train import RunConfig
from ray.train.torch import TorchTrainer

from artemis_vlm import RunError
from pipelines import local, placement
from pipelines.recipe import A3

ROOT = Path(__file__).parent.parent


def test_submitted_commands_name_places_that_every_node_sees() -> None:
    """Of a working directory Ray uploads what git does not ignore."""
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("ray job submit")]
    places = re.findall(r"--(?:model|input|output) (\S+)", " ".join(lines))
    assert len(places) >= 5
    assert [place for place in places if not place.startswith(("/", "s3://"))] == []


def test_cluster_yaml_is_valid() -> None:
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    start = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert start.count("RAY_AUTH_MODE=token") == 2, "token authentication is on for the head and for the workers"
    assert "--dashboard-host=127.0.0.1" in start


@pytest.mark.parametrize(
    ("replicas", "says"),
    [
        ([{"CPU": 2, "GPU": 0}, {"CPU": 0.1}, {"CPU": 0.1, "GPU": 1, "gb10": 1}], ""),
        ([{"CPU": 2, "GPU": 1}], "a replica asks for 2 CPU, 1 GPU, and no node of this cluster has that"),
        ([{"GPU": 0.5}] * 3, "3 replicas ask for 1.5 GPU, and the nodes of this cluster have 1"),
        ([{"CPU": 0.1}] * 30, ""),
        ([{"CPU": 1, "tpu": 1}], "a replica asks for 1 CPU, 1 tpu, and no node of this cluster has that"),
    ],
)
def test_room_for_replicas(replicas: list[dict[str, float]], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0, "gb10": 1.0}, {"CPU": 64.0, "GPU": 8.0}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": i < 2, "Resources": node} for i, node in enumerate(nodes)])
    refused = pytest.raises(RunError, match=f"{says}; start more nodes, or ask for less")
    with refused if says else nullcontext():
        local.check_room(replicas, 0)


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_the_worker_lands_on_the_gb10_node(two_nodes: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement, "PLACEMENT_TIMEOUT_S", 1.0)
    with pytest.raises(RunError, match=r"no node of this cluster has the label a3/role=gb10 .*--worker-label ''"):
        placement.placement(A3)
    anywhere = replace(A3, worker_label="", workers=3)
    with pytest.raises(
        RunError, match=r"3 workers need as many CPUs; the nodes that may train have 2: give fewer --workers"
    ):
        placement.placement(anywhere)
    assert placement.placement(replace(anywhere, workers=2)).num_workers == 2
    assert placement.data_selector(A3) is None, "alone, a node must also decode"

    gb10 = two_nodes.add_node(num_cpus=2, resources={"gb10": 1}, labels={"a3/role": "gb10"})
    two_nodes.wait_for_nodes()
    scaling = placement.placement(A3)
    assert placement.data_selector(A3) == {"a3/role": "!gb10"}
    trainer = TorchTrainer(
        lambda: ray.get_runtime_context().get_node_id(),
        scaling_config=scaling,
        run_config=RunConfig(name="where", storage_path=str(tmp_path)),
    )
    assert trainer.fit().return_value == gb10.node_id
