"""A tiny labelled data set and tiny checkpoints, and the evaluation scripts as modules."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import write_images

from common.checkpoints import public
from common.models import ModelConfig, create
from common.models.plan import PlanSpec
from common.processes.stopping import HEEDED

ROOT = Path(__file__).resolve().parents[2]
CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """12 training and 7 test images of each of three colours, 8x8."""
    folder = tmp_path_factory.mktemp("colours")
    write_images(folder / "train", 12, seed=0)
    write_images(folder / "test", 7, seed=1)
    return folder


@pytest.fixture
def make_run(tmp_path, data):
    """make_run("none", patch_size=4) -> a run folder with a one-block ViT in it."""

    def make(position="none", **kwargs):
        torch.manual_seed(7)
        shape = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "drop_path_rate": 0.0}
        backbone = create(ModelConfig("vit_tiny_patch16_224", shape | kwargs, crop=1.0), 8)
        backbone.use_plans({PlanSpec(position=position)})
        training = {"data": str(data), "data_root": None, "step": 12, "recipe": "tiny", "precision": "fp32"}
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        public.export(run, backbone, public.describe(backbone, position, "mean", training))
        return run

    return make


@pytest.fixture
def script():
    """script("knn") -> evaluate/knn.py as a module, without putting its folder on the path."""
    handlers = {number: signal.getsignal(number) for number in HEEDED}
    threads = torch.get_num_threads()

    def load(name):
        spec = importlib.util.spec_from_file_location(f"evaluate_scripts.{name}", ROOT / "evaluate" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


@pytest.fixture
def run_script(tmp_path):
    """run_script("knn", "--ckpt", ...) as a user would, from another directory; processes=2 under torchrun."""

    def run(name, *arguments, processes=1):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start = [sys.executable] if processes == 1 else torchrun
        return subprocess.run(
            [*start, str(ROOT / "evaluate" / f"{name}.py"), *map(str, arguments)],
            cwd=tmp_path, env=os.environ | CALM, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture
def report_of():
    """report_of(run, "knn") -> the report's content."""
    return lambda run, name: json.loads((run / "evaluate" / f"{name}.json").read_text())
