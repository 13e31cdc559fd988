"""What an installation gets: the wheel holds the packages and nothing else, and the model package stands alone."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from artemis_vlm.version import __version__

ROOT = Path(__file__).parent.parent
#: What a wheel may hold beside Python files.
DATA = {"artemis_vlm/py.typed", "pipelines/py.typed", "pipelines/compare.html"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with sdist and wheel, made as `make package` does, from a copy: setuptools writes beside what it reads."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.strip("\0").split("\0"):
        if (ROOT / name).exists():  # deleted, but not committed yet
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"artemis_vlm-{__version__}-py3-none-any.whl"
    return wheel


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    info = f"artemis_vlm-{__version__}.dist-info/"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(info)}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    modules = {n for n in tracked if n.split("/")[0] in ("artemis_vlm", "pipelines") and (ROOT / n).exists()}
    assert names == modules
    assert {name for name in names if not name.endswith(".py")} >= DATA
    assert wheel.stat().st_size < 1_000_000


def test_its_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        info = f"artemis_vlm-{__version__}.dist-info"
        fields = email.message_from_bytes(opened.read(f"{info}/METADATA"))
        assert b"Apache License" in opened.read(f"{info}/licenses/LICENSE")
        points = opened.read(f"{info}/entry_points.txt").decode()
    assert points == "[vllm.general_plugins]\nartemis_vlm = artemis_vlm.vllm_plugin:register\n"
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert set(fields.get_all("Provides-Extra", [])) >= {"ray", "demo", "dev", "vllm"}
    base = {line.split(">")[0].split("<")[0] for line in fields.get_all("Requires-Dist", []) if "extra" not in line}
    assert base == {"torch", "transformers", "pillow", "numpy", "accelerate"}
    assert fields.get_payload().startswith("# A3 on Ray")


def test_the_sdist_builds_without_git(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "artemis_vlm/modeling.py"} <= names
    assert not any(name.startswith("demo/") for name in names)


def test_the_nodes_of_a_cluster_install_it_with_what_was_tested() -> None:
    """Every file that the set-up names is mounted, from where the repo and `make package` have it."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    (setup,), mounts = config["setup_commands"], config["file_mounts"]
    wheel = f"artemis_vlm-{__version__}-py3-none-any.whl"
    assert f"pip install -q -c ~/constraints.txt ~/{wheel}'[ray,gpu]'" in setup
    token = {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert mounts == token | {"~/constraints.txt": "constraints.txt", f"~/{wheel}": f"dist/{wheel}"}
    assert set(re.findall(r"~/[\w./-]+", setup)) - {"~/a3", "~/a3/bin/activate"} == mounts.keys() - token.keys()
    pinned = re.search(r"torch==\S+", setup)
    assert pinned is not None
    assert pinned[0] in (ROOT / "constraints.txt").read_text().split()


def test_the_unpacked_wheel_works_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Outside the checkout: the import registers the classes, and what the pipelines need is said by the extra."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, artemis_vlm, transformers\n"
        "assert artemis_vlm.__file__.startswith(sys.argv[1]), artemis_vlm.__file__\n"
        "config = transformers.AutoConfig.for_model('artemis_vlm')\n"
        "assert type(config) is artemis_vlm.ArtemisVLMConfig\n"
        "assert not {'ray', 'sacrebleu', 'pipelines', 'demo'} & {m.split('.')[0] for m in sys.modules}\n"
        "print(artemis_vlm.__version__)"
    )
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, sys.argv[1])\n{code}", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == __version__
