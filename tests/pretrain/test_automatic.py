"""Automatic options: the rules' values by hand, what is said of them, what wins; and those of every shipped recipe."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from small import loaded

from common.config import flat
from common.errors import Refusal
from common.processes.launch import ROOT
from common.training.schedules import parse
from pretrain.automatic import (
    Facts,
    Labels,
    Settled,
    half_life,
    momentum_for,
    prototypes_for,
    replaced,
    resolve,
    suited,
    temperature_for,
)
from pretrain.config import OptimizerConfig, PretrainConfig, TeacherConfig
from pretrain.task import resolve as options_of

AUTO = {"prototypes": "auto", "teacher_temperature": "auto", "freeze_last_layer": "auto"}
SHOWN = ("classes", "pool", "prototypes", "freeze_last_layer", "loss_on", "pairs")  # of an objective
ALWAYS = ("threads", "steps", "export", "loader.workers")  # have a reason in every run


def settled(
    images: int = 1_280_000,
    batch: int = 1024,
    epochs: int = 100,
    chosen: dict[str, Any] | None = None,
    processes: int = 1,
    accumulate: int = 1,
    optimizer: dict[str, Any] | None = None,
    teacher: dict[str, Any] | None = None,
) -> tuple[PretrainConfig, dict[str, Any], dict[str, str], list[str]]:
    """(config, options, reasons, notes) of a run over so many images."""
    config = PretrainConfig(batch=batch, accumulate=accumulate, epochs=epochs)
    config.optimizer, config.teacher = OptimizerConfig(**(optimizer or {})), TeacherConfig(**(teacher or {}))
    config.objectives = {"dino": {}} if chosen is None else chosen
    result = resolve(config, Facts(images, (14, 14), class_token=True, processes=processes))
    chosen = {name: SimpleNamespace(**options) for name, options in result.options.objectives.items()}
    reasons = {name: reason for name, reason in result.reasons.items() if name not in ALWAYS}
    return result.options, chosen, reasons, result.notes


# ------------------------------------------------------------------------------------------ every shipped recipe

# Of the backbone: rows of its grid, whether it has a class token. Then on ImageNet: steps, warm-up, the momentum's
# start, export, and what was automatic of each objective.
IMAGENET = """
pretrain/apl                    14 -     375300  0.0667  0.998063  student   all
pretrain/cifar10                 4 -     2500    0.1    0.9995    student   all
pretrain/cifar10_compare         8 class 200180     0.1    0.9995  student
pretrain/compare                 7 class  40036     0.1    0.9995  student
pretrain/compare_dino            4 class  30027     0.1      0.99  teacher   256   0.1   all
pretrain/dino                   14 class 125100     0.1  0.996129  teacher 65536  0.01
pretrain/dino_absolute          14 class 125100     0.1  0.996129  teacher 65536  0.01   all
pretrain/dino_relative          14 class 125100     0.1  0.996129  teacher 65536  0.01   784
pretrain/dinov2                 14 class 125100     0.1     0.992  teacher 65536  0.01 65536  0.01
pretrain/dinov2_absolute        14 class 125100     0.1     0.992  teacher 65536  0.01 65536  0.01   all
pretrain/droppos                14 class 125000    0.05  0.992274  student hidden
pretrain/imagenet100            14 -     250200  0.05  0.996129  student   all   784
pretrain/imagenette             14 -     1000800 0.05  0.999031  student   all   784
pretrain/jigsaw                 14 class 375300  0.0167  0.996129  student   all
pretrain/mp3                    14 class 125000    0.05  0.992274  student   all
pretrain/quickstart              4 -     360324     0.1    0.9995  student   all
pretrain/sigreg                 14 class 125100     0.1  0.996129  student
pretrain/sigreg_absolute        14 class 125100     0.1  0.996129  student   all
pretrain/vit_small              14 class 500400    0.05  0.999031  student   all   784
supervised/cifar10                   4 -     1000       0.1  0.9995    student  1000   mean
supervised/cifar10_absolute          4 -     1000       0.1  0.9995    student  1000   mean   all
supervised/cifar10_relative          4 -     1000       0.1  0.9995    student  1000   mean   64
supervised/deit_base                14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_base_absolute       14 class 375300  0.0167  0.996129  average  1000  class   all
supervised/deit_base_absolute_mini  14 class 1501200  0.0167  0.999031  average  1000  class   all
supervised/deit_base_irpe_k         14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_base_irpe_qk        14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_base_irpe_qkv       14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_base_mini           14 class 1501200  0.0167  0.999031  average  1000  class
supervised/deit_base_relative       14 class 375300  0.0167  0.996129  average  1000  class   784
supervised/deit_base_relative_mini  14 class 1501200  0.0167  0.999031  average  1000  class   784
supervised/deit_small               14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_small_absolute      14 class 375300  0.0167  0.996129  average  1000  class   all
supervised/deit_small_irpe_k        14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_small_irpe_qk       14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_small_irpe_qkv      14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_small_relative      14 class 375300  0.0167  0.996129  average  1000  class   784
supervised/deit_tiny                14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_tiny_irpe_k         14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_tiny_irpe_qk        14 class 375300  0.0167  0.996129  average  1000  class
supervised/deit_tiny_irpe_qkv       14 class 375300  0.0167  0.996129  average  1000  class
supervised/lvvit_l                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/lvvit_l_384              24 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_l_448              28 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_l_512              32 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_m                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/lvvit_m_384              24 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_m_448              28 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_m_512              32 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_s                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/lvvit_s_384              24 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_s_448              28 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_s_512              32 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_t                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/lvvit_t_384              24 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_t_448              28 class 75060    0.167  0.998063  average  1000   class
supervised/lvvit_t_512              32 class 75060    0.167  0.998063  average  1000   class
supervised/nest_base                14 -     375300  0.0667  0.996129  student  1000   mean
supervised/nest_base_absolute       14 -     375300  0.0667  0.996129  student  1000   mean   all
supervised/nest_base_absolute_mini  14 -     1501200  0.0667  0.999031  student  1000   mean   all
supervised/nest_base_mini           14 -     1501200  0.0667  0.999031  student  1000   mean
supervised/nest_base_relative       14 -     375300  0.0667  0.996129  student  1000   mean   784
supervised/nest_base_relative_mini  14 -     1501200  0.0667  0.999031  student  1000   mean   784
supervised/nest_small               14 -     375300  0.0667  0.996129  student  1000   mean
supervised/nest_small_absolute      14 -     375300  0.0667  0.996129  student  1000   mean   all
supervised/nest_small_relative      14 -     375300  0.0667  0.996129  student  1000   mean   784
supervised/nest_tiny                14 -     375300  0.0667  0.996129  student  1000   mean
supervised/nest_tiny_absolute       14 -     375300  0.0667  0.996129  student  1000   mean   all
supervised/nest_tiny_relative       14 -     375300  0.0667  0.996129  student  1000   mean   784
supervised/spvit_l                  14 class 496310  0.0161  0.996975  average  1000   class
supervised/spvit_l_384              24 class 75060    0.167  0.998063  average  1000   class
supervised/spvit_m                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/spvit_m_384              24 class 300270   0.167  0.9995    average  1000   class
supervised/spvit_s                  14 class 387810  0.0161  0.996129  average  1000   class
supervised/spvit_s_384              24 class 150120   0.167  0.999031  average  1000   class
supervised/swin_base                 7 -     375300  0.0667  0.996129  student  1000   mean
supervised/swin_base_absolute       14 -     375300  0.0667  0.998063  student  1000   mean   all
supervised/swin_base_absolute_mini  14 -     750600  0.0667  0.999031  student  1000   mean   all
supervised/swin_base_conv            7 -     375300   0.133  0.998063  student  1000   mean
supervised/swin_base_conv_14        14 -     375300  0.0667  0.998063  student  1000   mean
supervised/swin_base_conv_14_mini   14 -     750600  0.0667  0.999031  student  1000   mean
supervised/swin_base_conv_mini       7 -     750600   0.133  0.999031  student  1000   mean
supervised/swin_base_mini            7 -     1501200  0.0667  0.999031  student  1000   mean
supervised/swin_base_relative        7 -     375300   0.133  0.998063  student  1000   mean   all
supervised/swin_base_relative_mini   7 -     750600   0.133  0.999031  student  1000   mean   all
supervised/swin_tiny                 7 -     375300  0.0667  0.996129  student  1000   mean
supervised/swin_tiny_absolute       14 -     375300  0.0667  0.998063  student  1000   mean   all
supervised/swin_tiny_conv            7 -     375300   0.133  0.998063  student  1000   mean
supervised/swin_tiny_conv_14        14 -     375300  0.0667  0.998063  student  1000   mean
supervised/swin_tiny_relative        7 -     375300   0.133  0.998063  student  1000   mean   all
supervised/tokens_annotator          4 -     60054      0.1  0.9995    student  1000   mean
supervised/tokens_lvvit              4 class 40036      0.1  0.9995    student  1000   class
supervised/tokens_lvvit_96           6 class 10009      0.1  0.9995    student  1000   class
supervised/tokens_lvvit_transfer     4 class 10009      0.1  0.9995    student  1000   class
supervised/tokens_vit                4 class 40036      0.1  0.9995    student  1000   class
supervised/vit_base                 14 -     375300  0.0667  0.998063  student  1000   mean
supervised/vit_base_absolute        14 -     375300  0.0667  0.998063  student  1000   mean   all
supervised/vit_base_absolute_mini   14 -     750600  0.0667  0.999031  student  1000   mean   all
supervised/vit_base_mini            14 -     750600  0.0667  0.999031  student  1000   mean
supervised/vit_base_relative        14 -     375300  0.0667  0.998063  student  1000   mean   784
supervised/vit_base_relative_mini   14 -     750600  0.0667  0.999031  student  1000   mean   784
"""


@pytest.mark.parametrize("line", IMAGENET.strip().splitlines())
def test_automatic_values_of_a_recipe(line: str) -> None:
    name, rows, token, *values = line.split()
    given = loaded(ROOT / "configs" / f"{name}.yaml")
    before = dataclasses.asdict(given)
    facts = Facts(
        1_281_167,
        (int(rows), int(rows)),
        token == "class",
        Labels("here", 1000, 1_281_167),
        processes=8,
        cores=128,
        threads=(16, "16 cores"),
    )
    result = resolve(given, facts)
    again = resolve(dataclasses.replace(result.options, epochs=None), facts).options
    assert dataclasses.asdict(given) == before and again == dataclasses.replace(result.options, epochs=None)
    assert shown(result) == values
    left = [key for key, value in flat(dataclasses.asdict(result.options)).items() if value == "auto"]
    assert set(left) <= {"precision", "model.attention", "max_bad"}  # two measured; a rule for other images too
    automatic = {
        f"objectives.{objective}.{key}"
        for objective, options in options_of(given.objectives).items()
        for key, value in vars(options).items()
        if value == "auto"
    }
    assert automatic <= result.reasons.keys()


def shown(result: Settled) -> list[str]:
    """The automatic values as the table has them."""
    config, objectives = result.options, result.options.objectives
    momentum = parse(config.teacher.momentum, "teacher.momentum")
    values = [config.steps, f"{config.optimizer.warmup:.3g}", f"{momentum.start:.6g}", config.export]
    for options in objectives.values():
        shown = (options[key] for key in SHOWN if key in options)
        values += [value if isinstance(value, str) else f"{value:g}" for value in shown]
    assert (config.threads, config.loader.workers, config.teacher.half_life) == (16, 8, None)
    return [str(value) for value in values]


def test_the_table_has_every_recipe() -> None:
    recipes = {
        f"{folder}/{path.stem}"
        for folder in ("pretrain", "supervised")
        for path in (ROOT / "configs" / folder).glob("*.yaml")
    }
    assert recipes == {line.split()[0] for line in IMAGENET.strip().splitlines()}


def test_values_by_their_dotted_names() -> None:
    given = PretrainConfig()
    made = replaced(given, {"monitor.every": 5, "monitor.images": 7, "batch": 3})
    assert (made.monitor.every, made.monitor.images, made.batch) == (5, 7, 3)
    assert given == PretrainConfig() and made.model is given.model
    assert Settled(given).having({"seed": 1}, {"seed": "so"}) == Settled(replaced(given, {"seed": 1}), {"seed": "so"})


# ------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("wanted", "grid", "class_token", "value", "reason"),
    [
        ({"absolute": {"position": "partial"}}, (14, 14), True, "hidden", "position=partial: those that are told"),
        ({"absolute": {"position": "full"}}, (14, 14), True, "all", "position=full treats all patches alike"),
        ({"relative": {}}, (14, 14), True, 784, "4 for each of 196 patches"),
        ({"relative": {"keep": 0.25}}, (14, 14), True, 196, "4 for each of 49 patches"),
        ({"relative": {}}, (2, 2), True, 16, "all of 4 patches"),
        ({"relative": {"diagonal": False}}, (2, 2), True, 12, "all of 4 patches"),
        ({"classification": {}}, (7, 7), True, "class", "the model has a class token"),
        ({"classification": {}}, (7, 7), False, "mean", "the model has no class token"),
    ],
)
def test_what_follows_from_the_backbone(
    wanted: dict[str, Any], grid: tuple[int, int], class_token: bool, value: Any, reason: str
) -> None:
    given = options_of(wanted)
    before = {name: dataclasses.asdict(options) for name, options in given.items()}
    made, reasons = suited(given, grid, class_token)
    (told,) = reasons
    _, name, option = told.split(".")
    assert getattr(made[name], option) == value and reasons[told].startswith(reason)
    assert {name: dataclasses.asdict(options) for name, options in given.items()} == before
    assert suited(made, grid, class_token) == (made, {})  # nothing is left to say
    assert suited(options_of({name: {**wanted[name], option: value}}), (9, 9), False)[1] == {}  # a given value wins


def test_too_few_patches_to_ask_about_are_refused_by_name() -> None:
    with pytest.raises(Refusal, match=r"objectives\.relative: keep=0.2 of 6 patches leaves 1: at least 2 are needed"):
        suited(options_of({"relative": {"keep": 0.2}}), (2, 3), True)


@pytest.mark.parametrize(
    ("images", "prototypes", "temperature"),
    [
        (40, 64, 0.04),
        (600, 64, 0.04),  # 37.5
        (2_000, 128, 0.04),  # 125
        (9_000, 512, 0.04),  # 562
        (20_000, 1024, 0.04),  # 1,250: LightlyTrain's 1,024
        (54_000, 4096, 0.049),  # 3,375; 0.04 + 0.03 * ln(2.7) / ln(25)
        (100_000, 8192, 0.055),  # 6,250 lies nearer to 8,192 in ratio; the middle of the logarithms
        (500_000, 32_768, 0.07),
        (1_281_167, 65_536, 0.07),  # ImageNet: DINO's
        (10**9, 65_536, 0.07),
    ],
)
def test_rules_on_images(images: int, prototypes: int, temperature: float) -> None:
    assert prototypes_for(images) == prototypes
    assert temperature_for(images) == temperature


@pytest.mark.parametrize(
    ("images", "batch", "momentum"),
    [
        (1_281_167, 1024, pytest.approx(0.996, abs=2e-4)),  # DINO's
        (1_281_167, 256, pytest.approx(0.999, abs=1e-4)),
        (1_281_167, 64, 0.9995),  # what DINO advises for small batches
        (54_000, 64, pytest.approx(0.5 ** (64 * 7 / 54_000), abs=1e-6)),  # 0.994266
        (54_000, 256, 0.99),
        (600, 64, 0.99),
        (600, 1, pytest.approx(0.5 ** (7 / 600), abs=1e-6)),
    ],
)
def test_rule_on_momentum(images: int, batch: int, momentum: Any) -> None:
    assert momentum_for(images, batch) == momentum


def test_half_life() -> None:
    assert half_life(0.996, 1024) == pytest.approx(177_000, rel=2e-3)  # the specification's
    assert half_life(0.5, 256) == 256
    assert half_life(1.0, 256) == math.inf
    assert half_life(0.0, 256) == 0


def test_imagenet_gives_dinos_values() -> None:
    """arXiv 2104.14294: K 65,536, momentum 0.996 to 1, temperature 0.04 to 0.07 over 30 epochs, warm-up 10."""
    config, chosen, _, notes = settled(1_281_167, 1024, epochs=100)
    dino, per_epoch = chosen["dino"], 1251
    assert dino.prototypes == 65_536
    assert dino.teacher_temperature == {"schedule": "linear", "start": 0.04, "end": 0.07, "over": 0.3}
    momentum = parse(config.teacher.momentum, "")
    assert (momentum.schedule, momentum.end) == ("cosine", 1.0)
    assert momentum.start == pytest.approx(0.996, abs=2e-4)
    assert config.optimizer.warmup * 100 * per_epoch == pytest.approx(10 * per_epoch)
    assert dino.freeze_last_layer * 100 * per_epoch == pytest.approx(per_epoch)
    assert not notes
    assert settled(1_281_167, 1024, epochs=300)[1]["dino"].teacher_temperature["over"] == pytest.approx(0.1)


def test_a_short_run_on_few_images() -> None:
    config, chosen, _, notes = settled(600, 64, epochs=5)
    dino = chosen["dino"]
    assert (dino.prototypes, dino.teacher_temperature) == (64, 0.04)
    assert (config.optimizer.warmup, dino.freeze_last_layer) == (0.1, 0.1)
    assert config.teacher.momentum == {"schedule": "cosine", "start": 0.99, "end": 1.0}
    assert not notes


def test_frozen_for_an_epoch_to_the_step() -> None:
    """The objective asks whether step / steps is below the share: the first step of the second epoch must not be."""
    for per_epoch in (3, 7, 49, 1251):
        share = settled(per_epoch * 64, 64, epochs=30)[1]["dino"].freeze_last_layer
        assert (per_epoch - 1) / (30 * per_epoch) < share <= per_epoch / (30 * per_epoch)


def test_every_reason_has_its_numbers() -> None:
    _, _, reasons, _ = settled(54_000, 64, epochs=50)
    assert reasons == {
        "optimizer.warmup": "5 epochs of 50 epochs: 10 epochs, at most 10 % of the training",
        "teacher.momentum": "starts with a half-life of 7,714 images at batch 64 (a seventh of an epoch, 7,714)",
        "objectives.dino.prototypes": "the power of two nearest to 54,000 images / 16, from 64 to 65,536",
        "objectives.dino.teacher_temperature": "ends at 0.049 for 54,000 images: 0.04 up to 20,000, 0.07 from 500,000, "
        "between linear in the logarithm; over 30 epochs, at most 30 % of the training",
        "objectives.dino.freeze_last_layer": "1 epoch of 50 epochs: 1 epoch, at most 10 % of the training",
    }
    assert settled()[2]["objectives.dino.teacher_temperature"] == (
        "ends at 0.07 for 1,280,000 images: 0.04 up to 20,000, 0.07 from 500,000, between linear in the logarithm; "
        "over 30 epochs, at most 30 % of the training"
    )
    _, _, reasons, _ = settled(600, 64)
    assert reasons["teacher.momentum"] == (
        "starts with a half-life of 4,414 images at batch 64 "
        "(a seventh of an epoch, 86, but the momentum not below 0.99)"
    )


def test_explicit_values_win() -> None:
    given = {"prototypes": 300, "teacher_temperature": 0.05, "freeze_last_layer": 0.5}
    schedule = {"schedule": "linear", "start": 0.9, "end": 1}
    config, chosen, reasons, notes = settled(
        600, 64, 20, {"dino": given}, optimizer={"warmup": "10 epochs"}, teacher={"momentum": schedule}
    )
    dino = chosen["dino"]
    assert (dino.prototypes, dino.teacher_temperature, dino.freeze_last_layer) == (300, 0.05, 0.5)
    assert (config.optimizer.warmup, config.teacher.momentum) == (0.5, schedule)
    assert not reasons and not notes


def test_half_life_in_images() -> None:
    config, _, reasons, _ = settled(600, 64, teacher={"half_life": 177_000.0})
    assert config.teacher.momentum == {"schedule": "cosine", "start": 0.5 ** (64 / 177_000), "end": 1.0}
    assert config.teacher.half_life is None
    assert reasons["teacher.momentum"] == ("starts with a half-life of 177,000 images at batch 64 (teacher.half_life)")


def test_times_are_settled_and_repaired() -> None:
    rising = {"schedule": "linear", "start": 0.04, "end": 0.07, "over": "30 epochs"}
    decay = {"schedule": "cosine", "start": 0.04, "end": 0.4, "over": "2 epochs"}
    given = {"teacher_temperature": rising, "freeze_last_layer": "9 epochs"}
    config, chosen, _, notes = settled(
        640, 64, 5, {"dino": given}, optimizer={"warmup": "10 epochs", "weight_decay": decay}
    )
    assert config.optimizer.warmup == 0.3
    assert config.optimizer.weight_decay == decay | {"over": 0.4}
    assert chosen["dino"].teacher_temperature == rising | {"over": 0.3}
    assert rising["over"] == "30 epochs"  # the recipe's own is left alone
    assert chosen["dino"].freeze_last_layer == 0.1
    assert notes == [
        "optimizer.warmup=10 epochs is longer than the training (5 epochs): 30 % of it, 1.5 epochs, is used instead",
        "objectives.dino.teacher_temperature.over=30 epochs is longer than the training (5 epochs): 30 % of it, "
        "1.5 epochs, is used instead",
        "objectives.dino.freeze_last_layer=9 epochs is longer than the training (5 epochs): 10 % of it, 0.5 epochs, is "
        "used instead",
    ]


def test_more_prototypes_than_images() -> None:
    assert settled(9_000, 64, chosen={"dino": {"prototypes": 65_536}})[3] == [
        "objectives.dino.prototypes=65536 is more than one prototype per image (9,000 images): most will stay empty; "
        "about 512 would make sense"
    ]
    assert not settled(40, 8, chosen={"dino": {"prototypes": 64}})[3]  # what was chosen automatically before


def test_a_shared_head_is_dinos() -> None:
    chosen = {"ibot": {"shared_head": True}, "dino": {"prototypes": 300, "freeze_last_layer": "2 epochs"}}
    _, chosen, reasons, notes = settled(9_000, 64, chosen=chosen)
    assert (chosen["ibot"].prototypes, chosen["ibot"].freeze_last_layer) == (300, 0.02)
    assert reasons["objectives.ibot.prototypes"] == reasons["objectives.ibot.freeze_last_layer"]
    assert reasons["objectives.ibot.prototypes"] == "dino's, whose head it shares"
    assert chosen["ibot"].teacher_temperature == 0.04
    assert not notes


def test_a_shared_head_without_its_owner_is_the_objectives_own_matter() -> None:
    assert settled(9_000, 64, chosen={"ibot": {"shared_head": True}})[1]["ibot"].prototypes == 512


def test_without_a_teacher_nothing_is_said_of_it() -> None:
    config, _, reasons, _ = settled(chosen={"koleo": {}})
    assert list(reasons) == ["optimizer.warmup"]
    assert config.teacher.momentum != "auto"


def test_what_was_settled_is_plain_and_stays() -> None:
    """A resumed run settles its stored options again."""
    config, _, _, _ = settled(54_000, 64, 50, {"dino": {}, "ibot": {}})
    assert "auto" not in json.dumps([*map(dataclasses.asdict, (config.optimizer, config.teacher)), config.objectives])
    stored = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert OmegaConf.create(stored).teacher.momentum == config.teacher.momentum
    again = resolve(dataclasses.replace(config, epochs=None), Facts(54_000, (14, 14), class_token=True))
    assert again.notes == [] and again.reasons == {"threads": "given"}
    assert OmegaConf.to_yaml(OmegaConf.structured(again.options)) == stored.replace(
        "epochs: 50.0", "epochs: null"
    ).replace("epochs: 50\n", "epochs: null\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prototypes": 1}, r"objectives\.dino\.prototypes=1: expected auto or a whole number of at least 2"),
        ({"prototypes": True}, "prototypes=True: expected auto or a whole number"),
        ({"prototypes": 64.0}, "prototypes=64.0: expected auto or a whole number"),
        ({"prototypes": None}, "prototypes=None: expected auto or a whole number"),
        ({"prototypes": "atuo"}, "prototypes='atuo': expected auto or a whole number .*; did you mean 'auto'"),
        ({"teacher_temperature": 0}, r"teacher_temperature=0: expected a number above 0"),
        ({"teacher_temperature": -0.1}, r"teacher_temperature=-0\.1: expected a number above 0"),
        (
            {"teacher_temperature": {"schedule": "linear", "start": 0.04, "end": 0}},
            r"linear 0.04 -> 0: expected numbers",
        ),
        ({"teacher_temperature": "autp"}, "did you mean 'auto'"),
        (
            {"teacher_temperature": {"schedule": "step", "start": 1, "end": 2}},
            "expected one of constant, linear, cosine",
        ),
        ({"freeze_last_layer": "one epoch"}, r"objectives\.dino\.freeze_last_layer='one epoch': expected a share"),
        ({"freeze_last_layer": 2}, r"freeze_last_layer=2: expected a share"),
    ],
)
def test_bad_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(Refusal, match=told):
        settled(chosen={"dino": {**options}})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"optimizer": {"warmup": "aut"}}, r"optimizer\.warmup='aut': expected auto or a time .*did you mean 'auto'"),
        ({"optimizer": {"weight_decay": -1}}, r"optimizer\.weight_decay=-1: expected a number of at least 0"),
        ({"teacher": {"momentum": 1.1}}, r"teacher\.momentum=1\.1: expected a number from 0 to 1"),
        ({"teacher": {"momentum": {"schedule": "cosine", "start": 0.9, "end": -1}}}, "expected numbers from 0 to 1"),
        ({"teacher": {"momentum": None}}, r"teacher\.momentum=None: expected a number or"),
        ({"teacher": {"momentum": 0.99, "half_life": 100.0}}, r"half_life=100 and teacher\.momentum say the same"),
    ],
)
def test_bad_config(given: dict[str, Any], told: str) -> None:
    with pytest.raises(Refusal, match=told):
        settled(**given)


@pytest.mark.parametrize(
    ("batch", "accumulate", "processes", "options", "refused"),
    [
        (1, 1, 1, {}, True),
        (2, 1, 1, {}, False),
        (8, 8, 1, {}, True),
        (32, 4, 4, {}, False),  # neighbours are looked for among all processes
        (8, 2, 4, {"local": True}, True),
        (16, 2, 4, {"local": True}, False),
        (1, 1, 1, {"weight": 0.0}, False),
    ],
)
def test_koleo_needs_two(batch: int, accumulate: int, processes: int, options: Any, refused: bool) -> None:
    def run() -> Any:
        return settled(600, batch, chosen={"koleo": options}, processes=processes, accumulate=accumulate)

    if not refused:
        run()
        return
    parts = accumulate * (processes if options.get("local") else 1)
    with pytest.raises(Refusal, match=rf"objectives\.koleo needs at least two images .*batch={batch} .*{2 * parts}"):
        run()
