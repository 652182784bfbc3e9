"""What a forged or garbled state.pt leads to: one line, before anything is executed or changed."""

import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.checkpoints.stored_state import read_checkpoint, read_state, restore
from common.errors import Refusal
from common.training.averages import Averages
from common.training.random_state import random_state


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def optimizer_of(module):
    optimizer = torch.optim.AdamW([{"params": list(module.parameters()), "lr_scale": 1.0, "decays": True}], lr=0.1)
    module(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def whole(module, optimizer):
    return {
        "step": 7,
        "task": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "random": [random_state()],
        "averages": [Averages().state()],
    }


def put(state, module, optimizer, steps=10):
    accelerator = SimpleNamespace(
        scaler=None, num_processes=1, process_index=0, device=torch.device("cpu"), print=print
    )
    return restore(state, module, optimizer, Averages(), accelerator, steps, "RUN/state/step_00000007")  # type: ignore[arg-type]


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_executed(tmp_path):
    torch.save({"step": 1, "task": Malicious(tmp_path / "owned")}, tmp_path / "state.pt")
    with pytest.raises(
        Refusal, match=r"state\.pt is no state to go on from.*remove that checkpoint's folder"
    ) as refusal:
        read_state(tmp_path / "state.pt")
    assert "\n" not in str(refusal.value) and not (tmp_path / "owned").exists()
    (tmp_path / "state.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    with pytest.raises(Refusal, match="no state to go on from"):
        read_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()


def test_what_is_packed_small_is_not_unpacked_large(tmp_path):
    torch.save({"step": 1, "task": {"weight": torch.zeros(1_000_000)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "state.pt", "w", 8) as packed:
        for item in plain.infolist():
            packed.writestr(item.filename, plain.read(item))
    assert (tmp_path / "state.pt").stat().st_size < 20_000
    with pytest.raises(Refusal, match="it is compressed"):
        read_state(tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "it holds a list"),
        ({"task": {}}, "its step is None"),
        ({"step": -1}, "its step is -1"),
        ({"step": True}, "its step is True"),
        ({"step": 6}, "it is of step 6"),
    ],
)
def test_what_is_no_checkpoint_of_that_step(tmp_path, content, reason):
    (tmp_path / "step_00000007").mkdir()
    torch.save(content, tmp_path / "step_00000007" / "state.pt")
    with pytest.raises(Refusal, match=reason):
        read_checkpoint(tmp_path / "step_00000007")


def test_what_fits_is_put_in_place(module):
    optimizer = optimizer_of(module)
    state = whole(module, optimizer)
    drawn = torch.rand(3)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert put(state, other, optimizer_of(other)) == 7
    assert all(torch.equal(value, state["task"][name]) for name, value in other.state_dict().items())
    assert torch.equal(torch.rand(3), drawn)


def changed(state, at, value):
    *way, last = at
    for step in way:
        state = state[step]
    state[last] = value


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (["step"], 11, "it is of step 11, and the training has 10"),
        (["task"], [1], "its weights are no dictionary of tensors"),
        (["task", "0.weight"], "none", "its weights are no dictionary of tensors"),
        (["task", "0.weight"], torch.zeros(2, 3).to_sparse(), "its weights are no dictionary of tensors"),
        (["task", "0.weight"], torch.zeros(3, 3), r"0\.weight: \(3, 3\), expected \(2, 3\)"),
        (["task", "0.weight"], torch.zeros(2, 3, dtype=torch.int64), "of torch.int64, expected torch.float32"),
        (["task", "0.weight"], torch.full((2, 3), torch.nan), "0.weight is not finite"),
        (["optimizer"], None, "its optimizer does not fit"),
        (["optimizer", "param_groups"], [], "its optimizer does not fit"),
        (["optimizer", "param_groups", 0, "betas"], "often", "betas is 'often'"),
        (["optimizer", "state", 0, "exp_avg"], torch.zeros(9), "exp_avg of a weight of shape"),
        (["optimizer", "state", 0, "exp_avg_sq"], torch.full((2, 3), torch.inf), "exp_avg_sq is not finite"),
        (["random"], None, "its random state"),
        (["averages"], [{"sums": [[True, 3]]}], "its random state, averages"),
        (["random"], [{"cpu": torch.zeros(3)}], "its random state"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(module, at, value, reason):
    optimizer = optimizer_of(module)
    state = whole(module, optimizer)
    state["optimizer"]["state"] = {key: dict(each) for key, each in state["optimizer"]["state"].items()}
    state["optimizer"]["param_groups"] = [dict(group) for group in state["optimizer"]["param_groups"]]
    changed(state, at, value)
    with torch.random.fork_rng(), pytest.raises(Refusal, match=reason) as refusal:
        put(state, module, optimizer)
    assert "\n" not in str(refusal.value)
