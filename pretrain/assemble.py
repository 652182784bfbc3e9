"""From options to parts: data, backbone, task, optimizer; and a reason for every automatic value."""

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from common.batches.sampler import HELD_OUT_EPOCH, StepSampler, held_out
from common.batches.samples import Faster, Samples
from common.batches.unreadable import LISTED, Limit, Look, look_at
from common.checkpoints import pretrained
from common.data import Images, open_data, with_classes_of
from common.data.location import location_of
from common.errors import Refusal
from common.features.finite import refuse_spoiled
from common.features.whitened import fill, filters_for, stem_of
from common.models import Backbone, create
from common.processes import collectives
from common.processes.launch import set_threads, usable_cores
from common.processes.stopping import Stopped, StopSignal, at_once
from common.training import precision, schedules
from common.training.optim import Optimization, parameter_groups
from common.training.run import Feed
from common.training.tracking import patient
from pretrain import automatic, objectives
from pretrain.automatic import Facts, Labels, Settled
from pretrain.config import PretrainConfig
from pretrain.leaks.verdict import Verdict, cached_audit
from pretrain.streaming.reading import HEAD, LEAST, Stream, images_of
from pretrain.streaming.sampling import StreamSampler, StreamSamples
from pretrain.streaming.source import open_source
from pretrain.task import Pretraining, build, resolve

T = TypeVar("T")
HALF = 0.5  # of what is kept of a stream for its monitors is held out, and the other half is their bank
PATIENCE = 3.0  # seconds after which what is being done is told
UNWRITTEN = "stopped before the run began; nothing was written"


@dataclass
class Parts:
    """Everything a run is made of, before it is prepared for many processes."""

    config: PretrainConfig  # no value in it is automatic any more
    process: PartialState
    images: Images
    train: Images
    held_out: Images
    task: Pretraining
    audit: Verdict
    samples: Samples
    steps: int
    per_epoch: int
    reasons: dict[str, str] = field(default_factory=dict)  # automatic value -> where it came from
    notes: list[str] = field(default_factory=list)  # what was repaired, and what looks unwise
    look: Look = field(default_factory=Look)  # at the images, before anything else
    init: str = ""  # what the backbone begins from, if not from scratch
    validation: Images | None = None  # what a classifier is judged on while it trains
    pace: float | None = None  # seconds for a forward and backward pass of one image, if it was measured
    stream: Stream | None = None  # what is trained on, if not `train`: then all images are of its beginning
    cache: str = ""  # what is read in place of the images, if anything

    @property
    def limit(self) -> Limit:
        """Limit on unreadable images; of a stream, of as many as are read of it."""
        return Limit(self.config.max_bad, None if self.stream is None else self.steps * self.config.batch)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the images, wherever they are kept."""
        return self.images.fingerprint()

    @functools.cached_property
    def ages(self) -> str:
        """Sizes and times of change of the files, in short; nothing of what is no folder."""
        return self.images.ages()

    def sampler(self, start: int) -> StepSampler | StreamSampler:
        """The sampler of this process from step `start` on."""
        config, process = self.config, self.process
        if self.stream is not None:
            return StreamSampler(self.stream, config.batch, self.steps, start, config.accumulate)
        return StepSampler(
            len(self.train), config.batch, config.seed, self.steps, start,
            process.process_index, process.num_processes, config.accumulate, config.repeats,
        )  # fmt: skip

    @property
    def feed(self) -> Feed:
        """Where the batches of this process come from."""
        workers = self.config.loader.workers or 0
        return Feed(self.samples, self.sampler, workers, self.images, self.limit, self.look)

    def agree_on(self, run: Path | None) -> Path:
        """The run folder that the first process made, known to all."""
        made = shared(self.process, run)
        assert made is not None
        return made

    def held_out_samples(self, images: Images) -> Samples:
        """Held-out images, cropped and drawn for as the training images are."""
        task, samples = self.task, self.samples
        options = task.draws, task.collates, task.labelled, samples.colours, samples.beside
        return Samples(images, samples.views, 0, samples.channels, *options, samples.faster)


def assemble(
    config: PretrainConfig,
    process: PartialState,
    fresh: bool = True,
    stop: StopSignal | None = None,
    typed: Collection[str] = ("batch",),
) -> Parts:
    """Build the parts of a run and settle every automatic value. Writes nothing. Raises Refusal for what cannot be.

    Not `fresh`: the weights will come from a checkpoint, and those of model.init are not asked for. `stop`: raises
    Stopped while something is measured or looked at. `typed`: options that the user gave; a batch that nobody typed is
    lowered to what few images fill.
    """
    threads = set_threads(config.threads)
    precision.refuse_impossible(config.precision, process.device)
    stream, images = _open(config, process)
    share = HALF if stream is not None and config.monitor.held_out else config.monitor.held_out
    train, aside = (images.subset(part) for part in held_out(len(images), share, config.monitor.most))
    count = len(train) if stream is None else (config.steps or 0) * config.batch  # of a stream: as if each came once
    labels = _labels_for(resolve(config.objectives), images)
    torch.manual_seed(config.seed)
    say = functools.partial(print, flush=True) if process.is_main_process else (lambda line: None)
    with patient(f"building   {config.model.name}", say, first=PATIENCE):
        backbone = create(config.model, config.views["global"].size)
        known = count, backbone.grid, backbone.has_class_token, labels, process.num_processes, usable_cores(), threads
        settled = automatic.resolve(config, Facts(*known, process.device.type, "batch" not in typed))
        config = settled.options
        init = _begin(config, backbone, train, process) if fresh else ""
        refuse_spoiled(backbone.model.state_dict() if init else None, f"model.init={config.model.init}")
        task = build(backbone, resolve(config.objectives), config.views)
        if init:
            init = "; ".join(filter(None, (init, _begin_classifier(config, task, images))))
    if config.average is not None:
        task.keep_average(config.average)
    task.momentum = schedules.parse(config.teacher.momentum, "teacher.momentum")
    heed = (lambda: None) if stop is None else stop.heed
    look = _look(config, images, backbone.channels, process, lambda: stop is not None and stop.received is not None)
    verdict = _audit(config, task, process)
    samples = _samples(config, train, task, images)
    settled, pace = _measured(settled, task, samples, process, heed)
    assert config.steps is not None
    return Parts(
        settled.options,
        process,
        images,
        train,
        aside,
        task,
        verdict,
        samples,
        config.steps,
        count // config.batch,
        settled.reasons,
        settled.notes,
        look,
        init,
        _validation(config, images, aside, task),
        pace,
        stream,
    )


def _open(config: PretrainConfig, process: PartialState) -> tuple[Stream | None, Images]:
    """Open the images, or a stream and the first of its samples. Raises Refusal for what cannot be done with them."""
    if config.data_stream:
        where, rank, processes = location_of(vars(config)), process.process_index, process.num_processes
        stream = Stream(open_source(where), config.seed, rank, processes, config.data_block)
        return stream, images_of(stream.head(max(LEAST, 2 * min(config.monitor.most, HEAD // 2))), where.spec)
    images = open_data(location_of(vars(config)))
    if config.loader.decode == "scaled" and not images.are_encoded:
        raise Refusal(f"loader.decode=scaled goes with files of pictures, and {images.where} holds decoded ones")
    return None, images


def _samples(config: PretrainConfig, train: Images, task: Pretraining, images: Images) -> Samples:
    """Training samples. What is read beside the pixels is opened for all `images`, those held out among them."""
    views = {name: view for name, view in config.views.items() if name in task.views}
    opened = {name: each.beside(images, Limit(config.max_bad)) for name, each in task.objectives.items()}
    beside = {name: source for name, source in opened.items() if source is not None}
    drawn = task.draws, task.collates, task.labelled, (config.model.mean, config.model.std), beside
    faster = Faster(scaled=config.loader.decode == "scaled", on_device=config.augment == "device")
    kind = StreamSamples if config.data_stream else Samples
    return kind(train, views, config.seed, task.backbone.channels, *drawn, faster)


def _begin(config: PretrainConfig, backbone: Backbone, train: Images, process: PartialState) -> str:
    """Let the backbone begin from model.init, in a line what that was; without, its stem of filters, if it has one,
    from patches of the training images, the first process's for all. Raises Refusal, or Stopped as `first_finds`."""
    if config.model.init is None and stem_of(backbone) is not None:
        workers = config.loader.workers or 0
        find = functools.partial(filters_for, backbone, train, config.seed, workers)
        fill(backbone, first_finds(process, "stem       whitened patches of training images", PATIENCE, find))
    return pretrained.begin_from(backbone, config.model.init, config.model.weights)


def _begin_classifier(config: PretrainConfig, task: Pretraining, images: Images) -> str:
    """Let a classifier begin as that of model.init, if they have the same classes; what was done, in a line."""
    name = task.classifying
    layer = None if name is None else task.objectives[name].classifier()
    if name is None or layer is None or config.model.init is None:
        return ""
    return pretrained.begin_classifier(layer, config.model.init, task.objectives[name].pools, images.classes or ())


def _validation(config: PretrainConfig, images: Images, aside: Images, task: Pretraining) -> Images | None:
    """What a classifier is judged on while it trains: labelled images held out, or the val split; None without either.
    Raises Refusal for classes that training lacks, or where there is no such split."""
    if task.classifying is None:
        return None
    judged = aside
    if config.monitor.validation == "val":
        judged = with_classes_of(images, open_data(location_of(vars(config)), "test"), config.data)
    return judged if judged.has_labels else None


def shared(process: PartialState, value: T) -> T:
    """The first process's `value`, in all processes."""
    values = [value]
    if process.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def first_finds(process: PartialState, line: str, patience: float, find: Callable[[], T]) -> T:
    """What the first process finds by itself, for which the others wait; `line` is said where that takes more seconds
    than `patience`. Raises Stopped, in all of them, if a signal reaches the first one meanwhile."""
    result: Any = None
    signal: int | None = None
    if process.is_main_process:
        say = functools.partial(print, flush=True)
        try:
            with collectives.single_process(), patient(line, say, first=patience), at_once(lost=UNWRITTEN):
                result = find()
        except Stopped as stopped:
            signal = stopped.number
    result, signal = shared(process, (result, signal))
    if signal is not None:
        raise Stopped(signal)
    return result


def _labels_for(chosen: Mapping[str, Any], images: Images) -> Labels | None:
    """What is known of the labels, where an objective reads them. Raises Refusal where there are none."""
    readers = [name for name, options in chosen.items() if objectives.find(name).labelled and options.weight > 0]
    if not readers:
        return None
    if not images.has_labels:
        raise Refusal(f"objectives.{readers[0]} reads labels, and {images.where} has none: {images.why_unlabelled}")
    labels = images.labels
    assert labels is not None and images.classes is not None
    classes = max(len(images.classes), int(labels.max()) + 1)
    return Labels(images.where, classes, len(images), int((labels < 0).sum()))


def _look(
    config: PretrainConfig, images: Images, channels: int, process: PartialState, stopped: Callable[[], bool]
) -> Look:
    """What the first process finds when it looks at the images. Raises Refusal, in all processes, if more of them
    cannot be read than max_bad allows."""
    say = functools.partial(print, flush=True)
    look = shared(process, look_at([images], channels, say, stopped) if process.is_main_process else Look())
    try:
        Limit(config.max_bad).refuse(len(look.bad), look.looked, look.images, images.where, look.bad)
    except Refusal:
        if process.is_main_process:
            print("\n".join(look.lines("too many", most=LISTED)), flush=True)
        raise
    return look


def _audit(config: PretrainConfig, task: Pretraining, process: PartialState) -> Verdict:
    """Whether the answer is in the question, found by the first process. Raises Leak unless the recipe allows it."""
    line = "audit      is the answer in the question? Asked once for a recipe, then the verdict is remembered"
    say = functools.partial(print, flush=True)
    verdict = first_finds(process, line, PATIENCE, lambda: cached_audit(config, task, say))
    if not config.allow_leak:
        verdict.refuse()
    return verdict


def _measured(
    settled: Settled, task: Pretraining, samples: Samples, process: PartialState, heed: Callable[[], None]
) -> tuple[Settled, float | None]:
    """Options with precision and attention that the first process measured to be fastest, where they are automatic, and
    seconds for a forward and backward pass of one image, which are also measured where the monitors' intervals follow
    from them. Raises Stopped, in all processes, if a signal reached the first one meanwhile."""
    config = settled.options
    was = config.precision, config.model.attention
    if "auto" not in was and config.monitor.every is not None:
        return settled, None
    batches: dict[int, Any] = {}

    def step(images: int) -> Tensor:
        if images not in batches:
            keys = [(HELD_OUT_EPOCH, i % len(samples)) for i in range(images)]
            batches[images] = samples.__getitems__(keys).to(process.device)
        return task(batches[images])["loss"]

    def choose() -> precision.Choice:
        task.to(process.device).train()
        task.begin_step(0.0, measured=False)
        try:
            return precision.choose(*was, task, step, process.device, heed, budget)
        finally:
            task.begin_step(0.0, True)  # what objectives counted is forgotten
            task.to("cpu")

    budget = precision.BUDGET if "auto" in was else precision.BUDGET / 4
    what = "the fastest precision and attention" if "auto" in was else "the speed"
    line = f"measuring  {what} on this {process.device.type}, for about {budget:.0f} s at most"
    fastest = first_finds(process, line, 0.0, choose)
    precision.set_attention(task, fastest.attention)
    names = ("precision", "model.attention")
    settled = settled.having(
        dict(zip(names, (fastest.precision, fastest.attention), strict=True)),
        {name: fastest.why for name, before in zip(names, was, strict=True) if before == "auto"},
    )
    task.backbone.config = settled.options.model  # what its description says
    return settled, fastest.seconds


def optimization_for(config: PretrainConfig, task: Pretraining, steps: int) -> Optimization:
    """AdamW over the trained parameters of a task, and its schedules over a run of so many `steps`: the learning rate
    is scaled with the batch, warmed up, then as optimizer.schedule says."""
    options = config.optimizer
    decay = schedules.parse(options.weight_decay, "optimizer.weight_decay")
    groups = parameter_groups(task, decay.at(0.0), options.layer_decay, options.patch_embed_lr, options.decay_tokens)
    scale = config.batch / 256 if options.scaling == "linear" else math.sqrt(config.batch / 256)
    warmup, peak, floor = round(options.warmup * steps), options.lr * scale, options.min_lr * scale
    return Optimization(
        torch.optim.AdamW(groups, lr=0.0, betas=tuple(options.betas), fused=True),  # type: ignore[arg-type]
        lambda step: schedules.rate(step, steps, warmup, peak, floor, options.schedule),
        None if decay.schedule == "constant" else lambda step: decay.at(step / steps),
        config.accumulate,
        options.clip,
        options.clip_by,
        options.most_skipped,
    )
