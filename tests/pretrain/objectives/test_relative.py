"""`relative` against a plain computation over the concatenation of every pair: losses, gradients, floors, memory."""

import itertools
import math
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import options_for
from torch import Tensor
from torch.nn import functional as F

from common import positions
from common.errors import Refusal
from common.models import Features, ModelConfig, create
from common.models.plan import TokenPlan
from pretrain import objectives
from pretrain.automatic import suited
from pretrain.heads import DensePairHead, PairHead
from pretrain.objectives import relative
from pretrain.objectives.relative import Relative

HEADS = ("half", "separable", "regression", "distance")


def objective(grid: tuple[int, int] = (2, 3), width: int = 8, **given: Any) -> Relative:
    torch.manual_seed(0)
    backbone: Any = SimpleNamespace(grid=grid, width=width)
    options, _ = suited({"relative": objectives.options("relative", given)}, grid, class_token=True)
    return Relative(options["relative"], backbone)


def features(tokens: Tensor, grid: tuple[int, int] = (2, 3), kept: Tensor | None = None) -> dict[str, Features]:
    return {"tokens": Features(tokens, tokens[:, :0], grid, TokenPlan("none", kept=kept))}


def draws(made: Relative, count: int, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    assert made.draw is not None
    return {"pairs": torch.from_numpy(np.stack([made.draw(rng)["pairs"] for _ in range(count)]))}


def enlarge(made: Relative) -> Relative:
    """Weights so large that the answers differ from pair to pair."""
    std = 0.7 if made.options.head != "distance" else 0.1  # its layers are wide
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=std)
    return made


def plainly(made: Relative, tokens: Tensor, places: list[list[int]], pairs: list[list[tuple[int, int]]]) -> dict:
    """The same, pair by pair, with the concatenation of the paper. `places` of the tokens, `pairs` of them asked."""
    (h, w), head = made.grid, made.head
    half = tokens.shape[-1] // 2
    losses: list[Any] = []
    right, away = [], []
    for b, asked in enumerate(pairs):
        for query, key in asked:
            if made.options.head == "distance":
                whole = torch.cat([tokens[b, query], tokens[b, key]])
                out = head.classifier(F.relu(head.hidden(F.relu(head.first(whole)))))
            else:
                both = torch.cat([tokens[b, query, :half], tokens[b, key, half:]])
                out = head.classifier(head.hidden(F.gelu(head.first(both))))
            (r0, c0), (r1, c1) = divmod(places[b][query], w), divmod(places[b][key], w)
            down, across = r0 - r1, c0 - c1
            if made.options.head == "distance":
                down, across = abs(down), abs(across)
                losses.append(((out[0] - down / h).abs() + (out[1] - across / w).abs()) / 2)
                answered = [place * side for place, side in zip(out.tolist(), (h, w), strict=True)]
                away.append(math.dist(answered, (down, across)))
                guess = [max(0, min(m, round(x))) for x, m in zip(answered, (h - 1, w - 1), strict=True)]
            elif out.numel() == 2:
                smooth = [d.abs() - 0.5 if d.abs() >= 1 else d * d / 2 for d in (out[0] - down, out[1] - across)]
                losses.append(sum(smooth) / 2)
                away.append(math.dist(out.tolist(), (down, across)))
                guess = [max(-m, min(m, round(x))) for x, m in zip(out.tolist(), (h - 1, w - 1), strict=True)]
            else:
                if out.numel() == (2 * h - 1) * (2 * w - 1):
                    losses.append(-out.log_softmax(0)[(down + h - 1) * (2 * w - 1) + across + w - 1])
                    guess = list(divmod(int(out.argmax()), 2 * w - 1))
                else:
                    rows, columns = out[: 2 * h - 1], out[2 * h - 1 :]
                    losses.append(-rows.log_softmax(0)[down + h - 1] - columns.log_softmax(0)[across + w - 1])
                    guess = [int(rows.argmax()), int(columns.argmax())]
                guess = [guess[0] - h + 1, guess[1] - w + 1]
                away.append(math.dist(guess, (down, across)))
            right.append(guess == [down, across])
    return {"loss": torch.stack(losses).mean(), "accuracy": np.mean(right), "distance": np.mean(away)}


@pytest.mark.parametrize("piece", [1, 3000, 1 << 30], ids=["pair by pair", "in pieces", "at once"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", ["all", "all others", "kept", "drawn", "kept, drawn, others"])
def test_equals_the_concatenation_pair_by_pair(monkeypatch: Any, case: str, head: str, piece: int) -> None:
    """Loss, statistics and the gradients of tokens and of every parameter, in double precision, however it is cut."""
    monkeypatch.setitem(relative.PIECE, "cpu", piece)
    keep, diagonal = 0.67 if "kept" in case else 1.0, "others" not in case
    made = enlarge(objective(head=head, pairs=7 if "drawn" in case else "all", diagonal=diagonal, keep=keep)).double()
    B, K = 3, 4 if "kept" in case else 6
    kept = torch.tensor([[0, 2, 3, 5], [1, 2, 3, 4], [0, 1, 4, 5]]) if "kept" in case else None
    tokens = torch.randn(B, K, 8, dtype=torch.double, requires_grad=True)
    every = [(i, j) for i in range(K) for j in range(K) if diagonal or i != j]
    drawn = draws(made, B) if "drawn" in case else {}
    pairs = [[every[p] for p in row] for row in drawn["pairs"].tolist()] if drawn else [every] * B
    places = kept.tolist() if kept is not None else [list(range(6))] * B
    ours, theirs = made(features(tokens, kept=kept), drawn), plainly(made, tokens, places, pairs)
    for name, within in (("loss", 1e-12), ("accuracy", 1e-6), ("distance", 2e-6)):
        assert float(ours[name].detach()) == pytest.approx(float(torch.as_tensor(theirs[name]).detach()), abs=within)
    of = [tokens, *made.parameters()]
    mine, plain = torch.autograd.grad(3 * ours["loss"], of), torch.autograd.grad(3 * theirs["loss"], of)
    for one, other in zip(mine, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("head", HEADS)
def test_pieces_change_nothing_in_single_precision(monkeypatch: Any, head: str) -> None:
    made = enlarge(objective((5, 4), 16, head=head, pairs="all"))
    tokens = torch.randn(3, 20, 16, requires_grad=True)
    found = []
    for piece in (1 << 30, 40_000):
        monkeypatch.setitem(relative.PIECE, "cpu", piece)
        report = made(features(tokens, (5, 4)), {})
        found.append([report["loss"], *torch.autograd.grad(report["loss"], [tokens, *made.parameters()])])
    assert len(made._pieces((tokens[..., :8],), 400)) > 3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_nothing_changes_where_no_gradient_is_wanted(head: str) -> None:
    made, tokens = enlarge(objective(head=head, pairs=24)), torch.randn(2, 6, 8)
    drawn = draws(made, 2)
    trained = made(features(tokens), drawn)
    with torch.no_grad():
        judged = made(features(tokens), drawn)
    assert trained["loss"].requires_grad
    assert not any(trained[name].requires_grad for name in trained if name != "loss")
    for name, value in judged.items():
        torch.testing.assert_close(value, trained[name].detach())


@pytest.mark.parametrize(("grid", "loss"), [((7, 7), 5.130), ((14, 14), 6.592), ((2, 5), math.log(27))])
def test_starts_near_ln_of_the_classes_and_exactly_there_with_zeros(grid: tuple[int, int], loss: float) -> None:
    N = grid[0] * grid[1]
    for head in ("half", "separable"):  # ln((2h-1)(2w-1)) is the sum of both, too
        made, tokens = objective(grid, 64, head=head), torch.randn(2, N, 64)
        drawn = {} if made.draw is None else draws(made, 2)
        assert float(made(features(tokens, grid), drawn)["loss"].detach()) == pytest.approx(loss, abs=0.05)
        torch.nn.init.zeros_(made.head.classifier.weight)
        exact = math.log((2 * grid[0] - 1) * (2 * grid[1] - 1))
        assert float(made(features(tokens, grid), drawn)["loss"].detach()) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_who_answers_the_prior_gains_nothing(head: str, keep: float, diagonal: bool) -> None:
    """Over all choices of kept patches, the head that ignores the tokens and answers the prior has gain 0."""
    made = objective(head=head, keep=keep, diagonal=diagonal, pairs="all").double()
    K = made.num_kept
    assert (3 if keep < 1 else 6) == K
    table = positions.relative((2, 3))
    kept = torch.tensor(list(itertools.combinations(range(6), K)))
    asked = ~torch.eye(K, dtype=torch.bool) if not diagonal else torch.ones(K, K, dtype=torch.bool)
    classes = table[kept[:, :, None], kept[:, None, :]][:, asked].flatten()
    prior = torch.bincount(classes, minlength=15).double() / len(classes)  # counted, not from the formula
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        shares = {"half": prior, "separable": torch.cat([prior.view(3, 5).sum(1), prior.view(3, 5).sum(0)])}
        if head in shares:
            made.head.classifier.bias.copy_(shares[head].clamp_min(1e-300).log())
        if head == "distance":  # the medians: half of the pairs, or more, have no row between them; and one column
            down, across = ((positions.offsets((2, 3)).abs()[classes, axis]).double() for axis in (0, 1))
            made.head.classifier.bias.copy_(torch.stack([down.quantile(0.5) / 2, across.quantile(0.5) / 3]))
    report = made(features(torch.randn(len(kept), K, 8, dtype=torch.double), kept=kept), {})
    assert float(report["gain"]) == pytest.approx(0, abs=1e-12)
    unsigned = torch.zeros(15).double().index_add(0, positions.folded((2, 3), torch.arange(15)), prior)
    assert float(report["chance"]) == pytest.approx(float((unsigned if head == "distance" else prior).max()))
    if head == "half":
        assert float(report["accuracy"]) == pytest.approx(float(prior.max()))
    if head == "regression":  # no other constant is better
        for down, right in ((0.3, 0), (0, -0.4), (-1, 1)):
            with torch.no_grad():
                made.head.classifier.bias.copy_(torch.tensor([down, right]))
            other = made(features(torch.randn(len(kept), K, 8, dtype=torch.double), kept=kept), {})
            assert float(other["gain"]) < 0


def test_pairs_are_drawn_from_those_that_are_asked() -> None:
    assert objective((14, 14)).draw is not None
    assert draws(objective((14, 14)), 2)["pairs"].shape == (2, 784)  # 4N
    assert draws(objective((14, 14), keep=0.25), 2)["pairs"].shape == (2, 196)  # 4K
    assert objective((2, 2)).draw is None and objective((2, 2), pairs=16).draw is None  # all of them: nothing to draw
    others = objective((2, 2), pairs=11, diagonal=False)
    counts = torch.zeros(12)
    for seed in range(2000):
        counts[draws(others, 1, seed)["pairs"][0]] += 1
    assert float((counts / 2000 - 11 / 12).abs().max()) < 0.03  # 4.8 standard deviations
    copy = pickle.loads(pickle.dumps(others.draw))  # goes to the loader's workers
    assert (copy(np.random.default_rng(5))["pairs"] == others.draw(np.random.default_rng(5))["pairs"]).all()  # type: ignore[misc]


def test_a_uniform_sample_has_the_whole_loss_as_its_mean() -> None:
    made, tokens = enlarge(objective(pairs=5, diagonal=False)), torch.randn(2, 6, 8)
    whole = float(made(features(tokens), {})["loss"].detach())
    every = torch.arange(30).expand(2, -1)
    assert float(made(features(tokens), {"pairs": every.flip(1)})["loss"].detach()) == pytest.approx(whole, rel=1e-6)
    with torch.no_grad():
        single = [float(made(features(tokens), {"pairs": every[:, p : p + 1]})["loss"]) for p in range(30)]
        drawn = [float(made(features(tokens), draws(made, 2, seed))["loss"]) for seed in range(400)]
    assert np.mean(single) == pytest.approx(whole, rel=1e-5)
    assert np.mean(drawn) == pytest.approx(whole, abs=4 * np.std(drawn) / 400**0.5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kept", [None, [[0, 2, 5], [1, 3, 4]]])
def test_answers_agree_with_the_statistics(monkeypatch: Any, head: str, kept: list | None) -> None:
    monkeypatch.setitem(relative.PIECE, "cpu", 2000)
    places = torch.tensor(kept) if kept else torch.arange(6).expand(2, -1)
    made = enlarge(objective(head=head, pairs="all", keep=0.5 if kept else 1.0))
    given = features(torch.randn(2, places.shape[1], 8), kept=torch.tensor(kept) if kept else None)
    answers, report = made.answers(given, {}), made(given, {})
    table = positions.relative((2, 3))
    if head == "distance":
        table = positions.folded((2, 3), table)
    assert torch.equal(answers.labels, table[places[:, :, None], places[:, None, :]].flatten(1))
    assert float(answers.accuracy()) == pytest.approx(float(report["accuracy"]))
    assert float(answers.mean(answers.distances)) == pytest.approx(float(report["distance"]), rel=1e-6)
    assert int(answers.guesses.min()) >= 0 and int(answers.guesses.max()) < 15
    # where the patches came from instead of where they lie
    origin = torch.tensor([[5, 4, 3, 2, 1, 0], [1, 0, 3, 2, 5, 4]])
    moved, came = made.answers(given, {}, origin), origin.gather(1, places)
    assert torch.equal(moved.labels, table[came[:, :, None], came[:, None, :]].flatten(1))
    assert torch.equal(moved.guesses, answers.guesses)


def test_a_right_answer_has_distance_zero_and_a_neighbouring_one_one() -> None:
    made = objective((1, 3), head="regression", pairs="all")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.head.classifier.bias.copy_(torch.tensor([0.0, 1.4]))
    answers = made.answers(features(torch.randn(1, 3, 8), (1, 3)), {})
    assert answers.labels[0].tolist() == [2, 1, 0, 3, 2, 1, 4, 3, 2]
    assert answers.guesses[0].tolist() == [3] * 9  # 1.4 to the right, rounded
    assert answers.distances[0].tolist() == pytest.approx([1.4, 2.4, 3.4, 0.4, 1.4, 2.4, 0.6, 0.4, 1.4])
    torch.nn.init.constant_(made.head.classifier.bias, 99.0)
    assert made.answers(features(torch.randn(1, 3, 8), (1, 3)), {}).guesses.unique().tolist() == [4]  # the grid's end


def test_unsigned_offsets_by_hand() -> None:
    """A row of four patches, one answer to all pairs: half of a side, which is two patches."""
    made = objective((1, 4), head="distance", pairs="all")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.head.classifier.bias.copy_(torch.tensor([0.0, 0.5]))
    given = features(torch.randn(1, 4, 8), (1, 4))
    answers, report = made.answers(given, {}), made(given, {})
    assert answers.labels[0].tolist() == [3, 4, 5, 6, 4, 3, 4, 5, 5, 4, 3, 4, 6, 5, 4, 3]  # 3: no offset; 6: three
    assert answers.guesses[0].tolist() == [5] * 16
    # 4 pairs of no offset, 6 of one patch, 4 of two, 2 of three
    assert float(report["loss"].detach()) == pytest.approx((4 * 0.5 + 6 * 0.25 + 4 * 0 + 2 * 0.25) / 16 / 2)
    assert float(report["accuracy"]) == pytest.approx(4 / 16)
    assert float(report["distance"]) == pytest.approx((4 * 2 + 6 * 1 + 2 * 1) / 16)
    assert float(report["chance"]) == pytest.approx(6 / 16) and made.apart().chance == pytest.approx(6 / 12)
    assert float(report["gain"]) == pytest.approx((4 * 0.25 + 4 * 0.25 + 2 * 0.5) / 16 / 2 - 4 / 32)  # the best: one


@pytest.mark.parametrize("head", [DensePairHead, PairHead])
def test_distances_are_learned(head: Any) -> None:
    """Not by `PairHead`, which starts as nearly a sum over both ends: its loss stays at the median's."""
    made = objective((3, 3), 32, head="distance", pairs="all")
    made.head = head(32, 2)
    tokens = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(made.parameters(), 2e-3)
    for _ in range(60):
        report = made(features(tokens, (3, 3)), {})
        optimizer.zero_grad()
        report["loss"].backward()
        optimizer.step()
    learned = float(report["gain"]) > 0.1 and float(report["accuracy"]) > 0.9
    assert learned if head is DensePairHead else float(report["gain"]) < 0.01


def test_sixty_four_pairs_are_asked_for_their_distance() -> None:
    assert draws(objective((14, 14), head="distance"), 2)["pairs"].shape == (2, 64)
    assert objective((2, 3), head="distance").draw is None  # all 36
    assert draws(objective((14, 14), head="distance", pairs=100), 2)["pairs"].shape == (2, 100)


def test_co_permuted_patches_leave_the_loss() -> None:
    made, tokens = enlarge(objective(pairs="all")), torch.randn(1, 6, 8)
    order = torch.tensor([[3, 0, 5, 1, 4, 2]])
    before, after = made.answers(features(tokens), {}), made.answers(features(tokens[:, order[0]]), {}, order)
    assert sorted(zip(before.guesses[0].tolist(), before.labels[0].tolist(), strict=True)) == sorted(
        zip(after.guesses[0].tolist(), after.labels[0].tolist(), strict=True)
    )
    kept = made(features(tokens[:, order[0]], kept=order), {})  # in any order, if their places are told
    assert float(kept["loss"].detach()) == pytest.approx(float(made(features(tokens), {})["loss"].detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "width", "grid"), [(1, 192, (3, 3)), (3, 384, (2, 5)), (5, 768, (4, 4)), (2, 1024, (7, 7))]
)
def test_any_batch_width_and_grid(count: int, width: int, grid: tuple[int, int]) -> None:
    made = objective(grid, width)
    tokens = torch.randn(count, grid[0] * grid[1], width, requires_grad=True)
    report = made(features(tokens, grid), draws(made, count) if made.draw else {})
    report["loss"].backward()
    assert report["loss"].isfinite() and float(tokens.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_logits_meet_the_loss_in_single(monkeypatch: Any, head: str, dtype: torch.dtype) -> None:
    made, tokens = enlarge(objective((4, 4), 32, head=head, pairs="all")), torch.randn(2, 16, 32, requires_grad=True)
    exact = made(features(tokens, (4, 4)), {})
    wanted = torch.autograd.grad(exact["loss"], tokens)[0]
    seen, loss = [], made.reading.loss
    monkeypatch.setattr(made.reading, "loss", lambda out, labels: seen.append(out.dtype) or loss(out, labels))
    lowest: list[torch.dtype] = []
    made_outputs = made.head.outputs
    monkeypatch.setattr(
        made.head,
        "outputs",
        lambda *given: lowest.append((out := made_outputs(*given)).dtype) or out,
    )
    with torch.autocast("cpu", dtype):
        report = made(features(tokens, (4, 4)), {})
    assert (set(lowest), set(seen), report["loss"].dtype) == ({dtype}, {torch.float32}, torch.float32)
    assert float(report["loss"].detach()) == pytest.approx(float(exact["loss"].detach()), rel=0.02)
    found = torch.autograd.grad(report["loss"], tokens)[0]
    rounded = 0.03 if head != "distance" else 0.05  # its hidden layer is rounded too
    assert float((found - wanted).norm() / wanted.norm()) < rounded


def test_gradients_added_over_many_pieces_are_not_rounded_away(monkeypatch: Any) -> None:
    """bf16 has 8 bits: a sum of a thousand equal terms would stop growing at a quarter of it."""
    made, tokens = enlarge(objective((1, 2))), torch.randn(1, 2, 8, requires_grad=True)
    drawn = {"pairs": torch.ones(1, 1000, dtype=torch.long)}
    exact = torch.autograd.grad(made(features(tokens, (1, 2)), drawn)["loss"], tokens)[0]
    monkeypatch.setitem(relative.PIECE, "cpu", 1)
    with torch.autocast("cpu", torch.bfloat16):
        report = made(features(tokens, (1, 2)), drawn)
    found = torch.autograd.grad(report["loss"], tokens)[0]
    assert float((found - exact).norm() / exact.norm()) < 0.05


class Held:
    """A tensor kept for backward; counts the bytes that are kept at a time."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        Held.now += self.size
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.size


def held(made: Relative, grid: tuple[int, int], width: int) -> tuple[int, int]:
    """Bytes kept for backward: (most at a time, at the end of the forward pass)."""
    tokens = torch.randn(1, grid[0] * grid[1], width, requires_grad=True)
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        loss = made(features(tokens, grid), {})["loss"]
        after = Held.now
        loss.backward()
    return Held.most, after


@pytest.mark.parametrize(
    ("head", "large"), [pytest.param("half", (18, 18), marks=pytest.mark.slow), ("separable", (28, 28))]
)
def test_memory_is_bounded_over_all_pairs(head: str, large: tuple[int, int]) -> None:
    """A piece at a time while it runs, and afterwards what grows with N, not with its square. All pairs' logits at once
    would be 514 MB on 18x18 with `half` and 270 MB on 28x28 with `separable`, and a piece has 8."""
    small, width, piece = (14, 14), 16, relative.PIECE["cpu"]
    for grid in (small, large):
        most, _ = held(objective(grid, width, head=head, pairs="all"), grid, width)
        assert most < 1.5 * piece
    after = [held(objective(grid, width, head=head, pairs="all"), grid, width)[1] for grid in (small, large)]
    assert after[1] / after[0] < 1.1 * (large[0] * large[1]) / 196


def test_keeps_to_a_backbone_s_plan() -> None:
    """From pixels: a real ViT, half of the patches kept, and every parameter trained."""
    kwargs = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = create(ModelConfig("vit_tiny_patch16_224", kwargs), [16, 24])
    made: Any = objectives.build(
        "relative", options_for({"relative": {"keep": 0.5, "diagonal": False}}, backbone)["relative"], backbone
    )
    plan = made.passes["tokens"].plan
    backbone.use_plans({plan})
    drawn = [plan.draw(np.random.default_rng(seed), 6) for seed in range(3)]
    kept = torch.from_numpy(np.stack([one["kept"] for one in drawn]))
    found = backbone(torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8), plan.plan({"kept": kept}))
    made({"tokens": found}, {})["loss"].backward()
    assert made.answers({"tokens": found}, {}).labels.shape == (3, 6)  # 3 kept: 3 * 2 pairs
    trained = [*backbone.named_parameters(), *made.named_parameters()]
    assert not [name for name, one in trained if one.requires_grad and one.grad is None]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"head": "halff"}, "did you mean 'half'"),
        ({"head": "linear"}, "expected one of half, separable, regression, distance"),
        ({"position": "partial"}, "which pairs would then be asked is not defined"),
        ({"position": "non"}, "did you mean 'none'"),
        ({"pairs": 37}, "from 1 to 36"),
        ({"pairs": 31, "diagonal": False}, "from 1 to 30 (6 patches have that many ordered pairs with diagonal=false)"),
        ({"pairs": 10, "keep": 0.5}, "from 1 to 9"),
        ({"pairs": 0}, "expected auto, all, or a number"),
        ({"pairs": True}, "expected auto, all, or a number"),
        ({"keep": 0.2}, "at least 2 are needed"),
        ({"pair": 3}, "did you mean 'pairs'"),
    ],
)
def test_what_is_not_understood_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        objective(**given)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("pairs", ["auto", "all", 81])
def test_apart_asks_about_different_patches_only(pairs: Any) -> None:
    made = objective((3, 3), pairs=pairs)
    other = made.apart()
    assert made.diagonal and not other.diagonal and other.num_pairs == 72
    assert other.chance == pytest.approx(float(positions.offset_prior((3, 3), 0.0).max())) == pytest.approx(1 / 12)
    assert other.draw is None or other.num_pairs > 36
    if pairs == "auto":
        queries, keys = positions.pair_ends(torch.from_numpy(other.draw(np.random.default_rng(0))["pairs"]), 9, False)
        assert (queries != keys).all()
