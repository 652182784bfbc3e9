"""Two real processes: what each draws, and that every objective trains in them."""

from pathlib import Path

import pytest
from ranks.job import ranks
from ranks.plans import plans
from runs.children import Run, Train

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_each_process_draws_plans_of_its_own_and_a_sample_takes_its_plan_along() -> None:
    first, second = ([tuple(plan) for plan in drawn] for drawn in ranks(plans))
    assert len(first) == len(second) == 8  # two steps, half of the batch each
    assert not {plan for _, plan in first} & {plan for _, plan in second}
    assert sorted(first + second) == sorted(plans(0, 1))


@pytest.mark.slow
def test_both_train_under_plans(train: Train, tiny: list[str], tmp_path: Path) -> None:
    """DDP stops at the second step if a parameter got no gradient at the first. Without dropout the first losses are
    those of one process: the same samples under the same plans."""
    absolute = "keep=0.7 position=partial position_keep=0.3 context=0.5 attentive=image smoothing=1"
    decoder = "decoder.blocks=1 decoder.width=16 decoder.heads=2"
    words = [f"objectives.absolute.{word}" for word in f"{absolute} {decoder}".split()]
    words += [f"objectives.relative.{word}" for word in ["keep=0.5", "head=separable", "pairs=5"]]
    still = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0"]
    same = [*tiny, *words, *still, "steps=3", "tensorboard=false", "monitor.held_out=0"]
    for processes in (1, 2):
        ended = train(*same, f"run={tmp_path / str(processes)}", processes=processes)
        assert ended.status == 0, ended.stderr
        assert f"{processes} x CPU" in ended.stdout
    one, two = (Run(tmp_path / str(processes)).metrics for processes in (1, 2))
    assert len(one) == len(two) == 3
    assert one[0]["relative/loss"] == pytest.approx(two[0]["relative/loss"], abs=1e-5)
    assert one[0]["absolute/accuracy"] == pytest.approx(two[0]["absolute/accuracy"], abs=1e-6)
    # a weighted mean over all: with each process's own weights as its sum, the two would differ in the third digit
    assert one[0]["absolute/loss"] == pytest.approx(two[0]["absolute/loss"], abs=1e-5)
