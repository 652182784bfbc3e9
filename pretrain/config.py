"""The options of a pretraining run, and which of them may change when it is resumed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf

from common import config as configuration
from common.batches.strong import auto_augment
from common.batches.unreadable import Limit
from common.batches.views import View, height_width, presets
from common.caching.pixels import FULL, check_option
from common.checkpoints.run_folder import CONFIG
from common.checkpoints.storage import sweep, write_atomically
from common.data.location import OPTIONS, place
from common.errors import Refusal
from common.limits import BelowOne, Betas, Count, NotNegative, Positive, Range
from common.limits import check as check_limits
from common.models import ModelConfig
from common.paths import expanded, if_there, path_option
from common.training.optim import ClipBy
from common.training.schedules import Kind
from pretrain import objectives
from pretrain.task import resolve


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up. Whatever changes over the training does so with every optimizer step."""

    lr: NotNegative = 5e-4
    """Peak learning rate for 256 images per step; the rate used grows with the batch, see scaling."""
    scaling: Literal["linear", "sqrt"] = "linear"
    """linear: the rate used is lr * batch / 256. sqrt: lr * sqrt(batch / 256), as in DINOv2."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end, scaled alike."""
    schedule: Kind = "cosine"
    """How the rate goes from lr to min_lr after the warm-up: constant, linear or cosine."""
    warmup: Any = "auto"
    """How long the rate rises linearly: a share of the training, "10 epochs", "500 steps", or auto (10 epochs, at most
    a tenth of the training)."""
    weight_decay: Any = 0.05
    """Decay of matrices; biases and norms have none. A number, or {schedule: cosine, start: 0.04, end: 0.4}."""
    decay_tokens: bool = False
    """Whether learned position embeddings and class, register and mask tokens decay as well, as with DINO, DINOv2, iBOT
    and DropPos, where with layer_decay a mask token also has the embedding's rate; DeiT and BEiT spare them."""
    layer_decay: Annotated[float | None, Range(at_least=0, at_most=1)] = None
    """The rate of each block is this times that of the block above it (DINOv2's short schedule: 0.9); null: all
    alike."""
    patch_embed_lr: NotNegative = 1.0
    """The rate of the patch embedding is this times that of its layer (DINOv2: 0.2)."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moments."""
    clip: NotNegative = 3.0
    """Largest gradient norm; 0 does not clip."""
    clip_by: ClipBy = "global"
    """global: the norm of all gradients together. per_tensor: of each parameter's on its own, as DINO does: a different
    algorithm, in which every matrix may have this norm."""
    most_skipped: Count = 50
    """A step whose loss or gradient is not finite is not taken; after so many in a row the run stops."""


@dataclass
class TeacherConfig:
    """The teacher that objectives such as dino and ibot compare with: a moving average of the backbone's weights."""

    momentum: Any = "auto"
    """teacher = momentum * teacher + (1 - momentum) * student after every step: a number, {schedule: cosine, start:
    0.996, end: 1.0}, or auto: from the number of images and the batch."""
    half_life: Positive | None = None
    """The same said in images, after which a weight counts half: DINO's 0.996 at batch 1024 is 177,000. It sets where
    the momentum starts; it ends at 1."""


@dataclass
class LoaderConfig:
    """Reading images."""

    workers: Annotated[int | None, Range(at_least=0)] = None
    """Processes that decode and crop, per training process; 0 does it in the training process, null chooses."""
    cache: Any = None
    """Decode each image once and keep it on disk: 256 (or another number) scales its shorter side to at most so many
    pixels, full keeps it as it is. null: decoded whenever it is needed."""
    cache_root: str | None = field(default=None, metadata=path_option(expanded))
    """Folder of such caches; null: poslabel/decoded in the user's cache folder."""
    decode: Literal["full", "scaled"] = "full"
    """scaled: a JPEG is decoded to a half, a quarter or an eighth of its sides where all its crops still have the
    pixels of their views. Much faster for pictures of a camera's size; crops differ a little (docs/data.md)."""


@dataclass
class MonitorConfig:
    """Measurements on images held out of the training data. Monitors may use labels; only the objective
    `classification` trains on them."""

    every: Count | None = None
    """Steps between measurements; null: ten times in a run, or fewer, so that they take a tenth of its time at most by
    what is measured before the first step."""
    images: Annotated[int | None, Range(at_least=2)] = None
    """At most so many held-out images are looked at, beside twice as many of `bank`; null: all, or, where even one
    measurement would take more than a tenth of the run's time and `every` is null, fewer."""
    control_every: Count | None = None
    """Steps between controls on noise and on images with shuffled patches; null: with the other measurements."""
    validation: Literal["held_out", "val"] = "held_out"
    """Images that a classifier is judged on while it trains: those held out of its training data, or the val split that
    comes with them (val: no longer a test set, if anything is chosen by it)."""
    held_out: Annotated[float, Range(at_least=0, at_most=0.9)] = 0.1
    """Share of the training images that is held out."""
    most: Annotated[int, Range(at_least=0)] = 1000
    """At most so many are held out."""
    bank: Count = 2000
    """Training images whose labels the k-NN (as DINO's, not centred) and ridge monitors learn from, where labelled."""
    shots: Count = 10
    """Images of each class that the ridge monitor learns from."""


def options_of(name: str) -> type | None:
    """The dataclass of an objective's options; None where there is no such objective, which is refused later."""
    return objectives.find(name).Options if name in objectives.names() else None


@dataclass
class PretrainConfig:
    """Pretraining: a folder of unlabelled images in, a backbone out."""

    run: str | None = field(default=None, metadata=path_option())
    """Run folder; null numbers itself below runs/. One that exists is refused (see --overwrite, --resume)."""
    data: str = field(default="builtin", metadata=path_option(place))
    """builtin, fashion-mnist, cifar10, cifar100, stl10, hf:NAME_OR_PATH, or the path of a folder of images (./builtin
    for one of such a name), of a tar archive, or of shards: 'NAME-{000..099}.tar'."""
    data_root: str | None = field(default=None, metadata=path_option(if_there))
    """Folder in which a named data set is looked for, and fetched to."""
    data_train: str | None = field(default=None, metadata=path_option(expanded))
    """Sub-folder, archive, or split of hf:, that is trained on; of a folder "." is all of it. null: by its name, such
    as train, training, train2017."""
    data_validation: str | None = field(default=None, metadata=path_option(expanded))
    """Sub-folder, archive, or split of hf:, that evaluations judge on; null: by its name, such as test, val2017."""
    data_image: str | None = None
    """Column of the images in hf:, or ending of the images in shards; null: the only one there is."""
    data_label: str | None = None
    """Column of their labels in hf:, or field of the .json in shards; null: the only one, by its type and name."""
    data_stream: bool = False
    """Read the data from beginning to end, shuffled a block at a time, without a list of them: shards behind a URL
    ('http://HOST/NAME-{000..099}.tar') or here, and hf:. Needs steps; the first 512 samples are for the monitors."""
    data_block: Count = 1000
    """Samples of a stream that are shuffled among each other, and kept in memory, in each process."""
    data_range: str | None = None
    """Values of black and white in pictures of more than 8 bits a channel, LOW:HIGH, or HIGH alone: 4095, -1:1. null:
    what a file declares, else all of 16 bits, 0 to 1 or 0 to 255; where that is open, a picture is unreadable."""
    max_bad: str = "auto"
    """Unreadable images that are borne, others taking their places: a share below 1 (0.01 or 1%), a number from 1, 0
    for none, or auto: a hundredth or, of less than 600 images, 5 but no more than a tenth."""
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0
    """Initial weights, order, crops, sampled pairs, dropout."""
    epochs: Positive | None = None
    """Length in passes over the training images."""
    steps: Count | None = None
    """Length in optimizer steps; goes before epochs."""
    batch: Count = 256
    """Images per optimizer step over all processes."""
    accumulate: Count = 1
    """Parts a step is computed in, one after the other, to save memory."""
    repeats: Count = 1
    """Crops of each image among neighbouring steps: repeated augmentation (DeiT: 3), with so many times fewer images in
    an epoch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """fp32, bf16, fp16 (GPUs), or auto: measured at the start on this device for this model, and stored."""
    threads: Count | None = None
    """CPU threads per process; null shares the usable cores among the processes of this machine."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null leaves it to checkpoint_minutes alone."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between checkpoints; 0 leaves it to checkpoint_every alone."""
    keep: Count = 2
    """So many last checkpoints are kept."""
    milestone_every: Count | None = None
    """Checkpoints at multiples of so many steps are kept for good."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    augment: Literal["auto", "host", "device"] = "auto"
    """Where crops are resized, flipped, coloured and blurred: host, in the loader's processes; device, a batch at a
    time, to the same pixels but for rounding (docs/data.md); auto: device on a CUDA GPU, unless a view has a policy,
    erasing, or changes of single patches (gap, patch_jitter, patch_drop_colour)."""
    export: Literal["auto", "teacher", "student", "both", "average"] = "auto"
    """Which backbone is written for evaluation: student, teacher, both (the student's as student.safetensors), average,
    or auto: the average where there is one, else the teacher."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    average: BelowOne | None = None
    """Momentum of a moving average of all weights, which is judged beside them and exported in their place (DeiT:
    0.99996); null: none. For recipes with `classification`."""
    allow_leak: bool = False
    """Train although the audit found that the answer is in the question; the checkpoint and every table say so."""
    diagnose: bool = False
    """Name the module whose output, and the weights whose gradient, is not finite where a step is not; slow, and
    without model.compile."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    views: dict[str, View] = field(default_factory=lambda: {"global": View()})
    """Named crops of each image; `global` sets the backbone's input size."""
    objectives: dict[str, Any] = field(default_factory=dict, metadata={configuration.OPTIONS_OF: options_of})
    """What is trained: {NAME: {weight: 1.0, ...}}; the options of each are listed below."""


# What may differ when a run is resumed: it changes neither the samples nor what is learned from them.
MAY_CHANGE = (
    "loader.workers", "loader.cache_root", "log_every", "max_bad", "checkpoint_every", "checkpoint_minutes", "keep",
    "milestone_every", "monitor.every", "monitor.images", "monitor.validation", "monitor.control_every",
    "optimizer.most_skipped", "tensorboard", "export", "allow_leak", "diagnose", *OPTIONS.values(), "run",
)  # fmt: skip
MAY_GROW = ("steps", "epochs")
# Values of an option that differ in speed alone.
SAME_PIXELS: dict[str, tuple[Any, ...]] = {"loader.cache": (None, FULL)}


def load(recipe: Path | None, words: Sequence[str]) -> PretrainConfig:
    """The options of a recipe and `key=value` words, over the presets of the views it names, checked. Raises
    Refusal."""
    config = configuration.load(
        PretrainConfig, recipe, words, lambda given: {"views": presets(given.get("views") or {})}
    )
    check(config)
    return config


def check(config: PretrainConfig) -> None:
    """Raises Refusal for a value outside its range."""
    check_limits(config)
    check_option(config.loader.cache, "loader.cache=")
    if config.loader.cache is not None and config.loader.decode == "scaled":
        raise Refusal(
            f"loader.cache={config.loader.cache} decodes each image once, and loader.decode=scaled for every crop: "
            "leave one of them out"
        )
    if config.augment == "device" and (why := host_alone(config.views)):
        raise Refusal(f"augment=device: {why}; expected augment=host")
    Limit(config.max_bad).check()
    configuration.as_yaml(config)  # what could not be stored later
    for name, view in config.views.items():
        if view.auto_augment is not None:  # tried once, before any time is spent
            auto_augment(view.auto_augment, height_width(view.size), config.model.mean, f"views.{name}.auto_augment=")
    if config.data_stream:
        _refuse_in_stream(config)
    if config.steps is None and config.epochs is None:
        raise Refusal("how long to train? set steps=N or epochs=N")
    if "global" not in config.views:
        raise Refusal(
            f"views: expected one named global, which sets the backbone's input size; found {', '.join(config.views)}"
        )


def _refuse_in_stream(config: PretrainConfig) -> None:
    """Raises Refusal for what needs a list of the images."""
    instead = {
        "steps": ("null", config.steps is None, "steps=N, as nobody knows how long an epoch is"),
        "loader.cache": (config.loader.cache, config.loader.cache is not None, "loader.cache=null"),
        "loader.decode": (config.loader.decode, config.loader.decode != "full", "loader.decode=full"),
        "repeats": (config.repeats, config.repeats != 1, "repeats=1"),
        "monitor.validation": (config.monitor.validation, config.monitor.validation != "held_out", "held_out"),
        "data_range": (config.data_range, config.data_range is not None, "data_range=null"),
    }
    for name, (value, is_wrong, expected) in instead.items():
        if is_wrong:
            raise Refusal(f"data_stream=true and {name}={value}: a stream has no list of its images; set {expected}")


def host_alone(views: Mapping[str, View]) -> str:
    """Why crops cannot be made on the device; nothing where they can."""
    for name, view in views.items():
        if view.auto_augment is not None:
            return f"views.{name}.auto_augment={view.auto_augment} is a policy of Pillow's, one crop after the other"
        if view.erasing > 0:
            return f"views.{name}.erasing={view.erasing} is done in the loader's processes"
        if view.by_patch:
            option = next(each for each in ("gap", "patch_jitter", "patch_drop_colour") if getattr(view, each) > 0)
            return f"views.{name}.{option}={getattr(view, option)} is done in the loader's processes, patch by patch"
    return ""


def option_names() -> list[str]:
    """The options by name, with dots, and "group." of each group: what may be typed on a command line."""
    names = [name for name, *_ in configuration.fields(PretrainConfig)]
    return [*names, *sorted({f"{name.partition('.')[0]}." for name in names if "." in name} | {"objectives."})]


def may_change(name: str) -> bool:
    """Whether a resume may change the option `name`, given with dots."""
    return name in MAY_CHANGE or name.startswith(tuple(item for item in MAY_CHANGE if item.endswith(".")))


def resumed(run: Path, words: list[str]) -> PretrainConfig:
    """The stored options of a run with `key=value` words applied. Raises Refusal, naming them, if they change
    what is learned."""
    stored = stored_in(run)
    if stored.run is not None and not Path(stored.run).is_absolute():  # of a run from before paths were stored so
        stored.run = str(run)
    changed = configuration.override(stored, words, PretrainConfig)
    wanted: Any = OmegaConf.to_container(changed.objectives)
    resolve(wanted)  # names an option that is misspelt
    before, after = (
        configuration.flat(dataclasses.asdict(configuration.to_object(each, PretrainConfig)))
        for each in (stored, changed)
    )
    differ = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    forbidden = []
    for name in sorted(differ):
        if name in MAY_GROW:
            was, now = before.get(name), after.get(name)
            if was is None or now is None or now < was:
                forbidden.append(f"{name} ({was} -> {now}, may only grow)")
        elif not may_change(name) and not all(each.get(name) in SAME_PIXELS.get(name, ()) for each in (before, after)):
            forbidden.append(f"{name} ({before.get(name)} -> {after.get(name)})")
    if forbidden:
        raise Refusal(
            f"--resume {run} with another recipe: {', '.join(forbidden)}; leave them as they were, or start a new run "
            f"(what may change: {', '.join(item.rstrip('.') for item in MAY_CHANGE)}; steps and epochs may grow)"
        )
    if "epochs" in differ and "steps" not in differ:
        changed.steps = None  # stored beside the epochs they were counted from: to be counted again
    return configuration.to_object(changed, PretrainConfig)


def stored_in(run: Path) -> DictConfig:
    """The options in a run's config.yaml."""
    path = run / CONFIG
    structure = OmegaConf.structured(PretrainConfig(augment="host"))  # of a run from before it could be chosen
    return configuration.merge(structure, configuration.read_yaml(path, PretrainConfig), str(path), PretrainConfig)


def store(run: Path, config: PretrainConfig, line: str | None = None) -> None:
    """Let run/config.yaml say what was changed at this resume, so that the next one need not repeat it; and `line`, a
    comment."""
    path, before = run / CONFIG, stored_in(run)
    sweep(path)
    if config.epochs is None and config.steps == before.steps:  # they follow from the epochs, which may grow later
        config = dataclasses.replace(config, epochs=before.epochs)
    after = OmegaConf.structured(config)
    if after != before or line is not None:
        comments = [line] if line is not None else []
        comments += [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        text = "\n".join([*comments, configuration.as_yaml(after)])
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
