"""What a launcher's configuration asks for, and what is said and done of it."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from common.errors import Refusal
from common.processes import group


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "MASTER_", "WORLD_"))]:
        monkeypatch.delenv(name)
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """`configured(text)`: `accelerate launch` with that default configuration started this process."""

    def configure(text):
        (tmp_path / "default_config.yaml").write_text(text)
        monkeypatch.setattr(group, "default_config_file", str(tmp_path / "default_config.yaml"))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    return configure


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: MULTI_CPU\nnum_processes: 2\n", "asked for 2 processes"),
        ("distributed_type: MULTI_GPU\nnum_processes: 8\n", "--nproc-per-node 8"),
        ("distributed_type: 'NO'\nnum_processes: 1\n", None),
        ("num_processes: many\n", None),
        ("[", None),
    ],
)
def test_processes_that_were_asked_for_and_not_started_are_said(configured, text, said, capsys):
    configured(text)
    assert group.join(cpu=True).num_processes == 1
    out = capsys.readouterr().out
    assert (said in out and out.count("\n") == 1) if said else out == ""


def test_nothing_is_said_to_who_has_not_launched(configured, monkeypatch, capsys):
    configured("num_processes: 2\n")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    group.join(cpu=True)
    assert capsys.readouterr().out == ""


def test_the_launchers_accumulation_divides_no_gradient(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    group.join(cpu=True)
    made = group.accelerator("fp32")
    weight = torch.nn.Parameter(torch.ones(()))
    made.backward(3 * weight)
    assert weight.grad == 3
    layer = torch.nn.Linear(2, 2)
    assert made.prepare(layer) is layer  # not compiled
    out = capsys.readouterr().out
    assert "gradient_accumulation_steps=4; accumulate= is used" in out and "dynamo_backend=inductor" in out


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_other_ways_to_share_a_model_out_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(Refusal, match=rf"asked for {name} .*DistributedDataParallel"):
        group.join(cpu=True)
    assert not PartialState._shared_state
