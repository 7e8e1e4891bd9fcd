"""The rungs of reid's ladder: what is switched, in which order, and what the notes promise of it.

Legend: B samples of a batch, R images of a batch, P identities of a batch, K samples of each, Q queries, G gallery
images, E embedding dim.

Training starts from the original pipeline's arrangement (originals.py) around this app's model: the notes' own changes
come first, then ours. Every switch replaces one thing and leaves what is computed as it is: with equal draws the losses
and gradients are equal (the tests say so). "it/s" of the notes are steps/s (T-4), and the factors of rows must not be
multiplied (T-8): the last cumulative row is what they come to.
"""

import io
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from apps.reid import losses
from apps.reid.clipping import AdaptiveClip
from apps.reid.config import Config, TrainConfig
from apps.reid.dataset import (
    IMAGE_MODALITIES,
    MODALITIES,
    NIR,
    RGB,
    TEXT,
    Batch,
    Frame,
    ImageFiles,
    PackedImages,
    People,
    Queries,
    draw_rows,
    lists_by_rule,
    make_texts,
)
from apps.reid.diagnose import InThisThread
from apps.reid.evaluate import (
    Truth,
    cosine_scores,
    encode_people,
    evaluate,
    gallery_features,
    list_metrics,
    make_truth,
    needed_items,
    own_images,
    query_features,
    query_lists,
    uses_camera_rule,
)
from apps.reid.images import png_bytes
from apps.reid.loaders import Batches, Key, Loader, LoaderConfig
from apps.reid.model import Output, ReID
from apps.reid.originals import (
    DRAWN,
    VIEWS,
    CallsPerModality,
    OneByOne,
    Record,
    Records,
    cached_batches,
    clip_by_loops,
    collate_records,
    inferring_batches,
    log_by_reads,
    modalities_of,
    normalised,
    rows_by_modality,
    sorted_metrics,
    use_calls_per_modality,
)
from apps.reid.tokenizer import BytePairTokenizer, ByteTokenizer
from apps.reid.train import (
    DROPOUT_STREAM,
    Components,
    augmented,
    build,
    compile_or_say_why,
    epoch_keys,
    loss_fn,
    make_optimizer,
    tokenizer_of,
    tokens_of,
)
from shared.amp import AmpConfig, amp_step, make_state
from shared.device import to_device
from shared.ladder import Epoch, Ladder, Part, Run, Rung, Switch, Unmeasured, Work, both_ways, endless
from shared.log import SilentLog, due
from shared.pk_sampler import plan_epoch
from shared.seed import make_generator, seed_step

QUICK_SHAPE = (4, 2)  # identities and samples of each in a step with --quick, so that the slowest rows fit
CHUNKS = 4  # batches that every row goes round in
WORKERS = (4, 2)  # processes of the original's loader, before and after the notes
LARGER = ((12, 4), (16, 3), (16, 4))  # identities and samples of each, as the notes advise
BAR_EVERY, BAR_S = 5, 0.5  # steps between the original's drawings of its bar, seconds between ours
PEOPLE, EACH = 2, 3  # of the evaluation: people, and images of each modality of each of them
QUERIES, GALLERY, RANKED_PEOPLE = 200, 4000, 100  # of the ranking alone, made up

# What the notes were measured on: the identities to train on, those to validate on, and images of each.
NOTES_SAMPLES, NOTES_PEOPLE, NOTES_VALID = 14_910, 320, 80
NOTES_EACH = {"nir": 26, "cp": 18, "sk": 18}
NOTES_SHAPE, NOTES_FRAME = (8, 4), Frame(256, 128, 8, 4)
NOTES_PICTURES = 512  # that are different; others repeat them

# The original's names of the image modalities, in our order.
NAMES = ("vis", "nir", "cp", "sk")

NOTHING: Mapping[str, Any] = MappingProxyType({})

SWITCHES = {
    switch.name: switch
    for switch in (
        Switch(
            "sampling",
            "the epoch's batches planned at once, instead of asking each candidate's record in each batch",
            "S4-1, S4-8: sampling 3-5x",
        ),
        Switch(
            "logging",
            "the losses read every --log-every steps, instead of ten figures and a read per sample in each step",
            "S4-2, S4-15, S4-16, S4-18: logging 2x, 50-75 % less of it",
        ),
        Switch(
            "clip",
            "gradients measured and clipped together on the device, instead of two reads per parameter",
            "S4-3, S4-21, S4-22: gradient norm 1.5x",
        ),
        Switch(
            "transfer",
            "copies from pinned memory that nobody waits for, instead of plain ones",
            "S4-4, S4-20: transfer 1.3x",
        ),
        Switch(
            "bar",
            f"a progress bar that looks at the clock, instead of one drawn every {BAR_EVERY} steps with the loss",
            "S4-6, S4-17: progress bar 1.1x; with the rows above S4-7: 4-8x, 1.9 -> 8-15 steps/s",
        ),
        Switch("tokens", "captions tokenised once and as long as the longest, instead of in each step and padded"),
        Switch(
            "pack",
            "bytes gathered from a pack and augmented as a batch, instead of a dictionary per sample with every image "
            "decoded, cropped and made floats by itself",
        ),
        Switch(
            "ahead",
            "batches made ahead by a thread, instead of when they are asked for",
            "S4-5, S4-19: loader 1.2x",
        ),
        Switch("bytes", "patches read bytes, mean and deviation folded into their weights, instead of floats"),
        Switch("tower", "one call of the image tower for all modalities, instead of one for each"),
        Switch("optimizer", "fused Adam instead of Adam as it comes"),
        Switch("precision", ""),
    )
}


def ladder(config: Config, people: People, *, quick: bool = False, only: Collection[str] = ()) -> Ladder:
    """Everything that `bench` measures under this configuration, on these people.

    Worker processes and larger batches are left out of a quick look, torch.compile of all that `only` does not name it
    in.
    """
    setting = Setting(comparable(config), people)
    switches = switches_of(setting)
    unmeasured = [epoch_claim(setting)]
    if setting.device.type != "cuda":
        unmeasured.append(
            Unmeasured(SWITCHES["transfer"].claim, "it speeds up copies to a GPU; this device is a CPU, without any")
        )
    if "clip" not in {switch.name for switch in switches}:
        unmeasured.append(Unmeasured(SWITCHES["clip"].claim, "--clip off: nothing is clipped"))
    parts = [
        sampling_part(setting),
        input_part(setting),
        *both_ways(
            "records asked by the sampler, a dictionary per sample, images decoded and made floats one by one, tokens "
            "made in the step, a tower call per modality, loops over gradients, figures read in every step, Adam",
            switches,
            partial(trainer, setting),
            unit="samples",
        ),
        ranking_part(setting),
    ]
    drawn, queries = samples_per_epoch(setting.c), 0
    if people.valid is not None:
        parts.append(evaluation_part(setting))
        queries = sum(found.identity.numel() for found in query_lists(people, "valid", setting.config).values())
    longer, larger = [workers_part(setting)], batches_part(setting)
    if larger is None:
        few = f"{people.num_identities} identities to train on, fewer than the {LARGER[0][0]} of a larger batch"
        unmeasured.append(Unmeasured("S4-32: batches of 48 and 64", few))
    else:
        longer.append(larger)
    for part in longer:
        if quick and not only:
            claims = dict.fromkeys(rung.claim for rung in part.rungs if rung.claim)
            unmeasured.append(Unmeasured("; ".join(claims), f"too long for a quick look: --only {part.name}"))
        else:
            parts.append(part)
    compiled = compile_part(setting)
    if {compiled.name, *(rung.name for rung in compiled.rungs)} & set(only):
        parts.append(compiled)
    else:
        unmeasured.append(Unmeasured(compiled.rungs[-1].claim, "compiling takes minutes: only with --only compile"))
    evaluation = "evaluation" if people.valid is not None else ""
    epoch = Epoch("cumulative", drawn, evaluation, queries // config.training.eval_every)
    return Ladder(tuple(parts), tuple(unmeasured), epoch)


def epoch_claim(setting: "Setting") -> Unmeasured:
    """What an epoch is here, beside the notes' figure for one."""
    drawn, people = samples_per_epoch(setting.c), setting.people.num_identities
    training = setting.config.training
    batches = people // training.identities_per_batch
    return Unmeasured(
        "S4-24: an epoch 16-17 -> 2-4 minutes",
        f"by the numbers of the notes most of it is an epoch that shrank (T-2): of identities, as there, it has "
        f"{batches} batches here; of all samples, {setting.c.sampler.num_batches} with {drawn:,} draws, which "
        "--project-epochs 1 projects from the first and last rows",
    )


def samples_per_epoch(c: Components) -> int:
    """The draws of an epoch."""
    summary = c.sampler.summary
    return summary.num_batches * summary.identities_per_batch * summary.num_instances


def comparable(config: Config) -> Config:
    """The configuration without what the original arrangement has no counterpart of."""
    return replace(
        config,
        model=replace(config.model, grad_checkpoint=False),
        training=replace(
            config.training,
            accumulate=1,
            ema_decay=0.0,
            modality_dropout=0.0,
            compile="off",
            num_workers=0,
            windows=False,
        ),
    )


def left_out(config: Config, people: People) -> list[str]:
    """Sentences on what of the configuration or the data is not in the measurements."""
    sides = (config, comparable(config))
    flags = [
        f"--{name.replace('_', '-')}"
        for section in ("model", "training")
        for name, value in vars(getattr(sides[0], section)).items()
        if value != getattr(getattr(sides[1], section), name)
    ]
    found = [f"measured without {', '.join(flags)}, which the original has no counterpart of"] if flags else []
    if isinstance(people.images, ImageFiles):
        found.append("the images are files, which all rows decode: measure a pack, which `prepare` makes of them")
    return found


class Setting:
    """What all rows share; files of images are written when they are first asked for, and go with it."""

    def __init__(self, config: Config, people: People) -> None:
        self.config, self.people = config, people
        self.tokenizer = tokenizer_of(config.data)
        self.token_CL = tokens_of(people, self.tokenizer)
        self.c = self.built()
        self.device = self.c.device
        self.keys: tuple[Key, ...] = tuple(epoch_keys(self.c, epoch=0)[:CHUNKS])

    def built(self, values: Mapping[str, Any] = NOTHING) -> Components:
        """A run of its own, with other values of some knobs; equal weights for all of them."""
        training = replace(self.config.training, **values)
        return build(replace(self.config, training=training), self.people, self.token_CL)

    @cached_property
    def places(self) -> list[int]:
        """The samples of all chunks, once each."""
        return sorted({place for _, places in self.keys for place in places})

    @cached_property
    def records(self) -> list[Record]:
        """Their entries of the original's index, with the one image of each modality that ours draws for them."""
        place_B = torch.tensor(self.places)
        samples, people = self.c.samples, self.people
        row_B4 = draw_rows(samples, place_B, epoch=0)
        file_of = self.files(torch.unique(row_B4[row_B4 >= 0]).tolist())
        found = []
        for place, rows in zip(self.places, row_B4.tolist(), strict=True):
            images = {name: [file_of[row]] if row >= 0 else [] for name, row in zip(NAMES, rows, strict=True)}
            caption = int(people.caption[rows[RGB]])
            text = people.captions[caption] if caption >= 0 else ""
            pid = str(int(samples.label[place]))
            found.append(
                {
                    "person_id": int(pid),
                    "pid": pid,
                    "images": images,
                    "images_by_view": {name: dict.fromkeys(VIEWS, images[name]) for name in DRAWN},
                    "modality_mask": {name: float(bool(files)) for name, files in images.items()},
                    "text": text,
                    "text_description": text,
                    "file_path": str(images["vis"][0]),
                    "anchor_vis": images["vis"][0],
                }
            )
        return found

    def files(self, rows: Sequence[int]) -> dict[int, Path]:
        """A file for each of these images: the source's own, or one written from the pack."""
        images = self.people.images
        if isinstance(images, ImageFiles):
            return {row: images.root / images.path[row] for row in rows}
        folder = tempfile.mkdtemp(prefix="reid-bench-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # at the end of the process at the latest
        found = {}
        for row in rows:
            found[row] = Path(folder) / f"{row}.png"
            found[row].write_bytes(png_bytes(images.load(torch.tensor([row]))[0]))
        return found

    def loaded(self, transform: Callable[[Path], Tensor]) -> Records:
        """The original's data set of these records; labels are ours."""
        found = Records(self.records, transform, self.people.images.frame[:2])
        found.label = {record["pid"]: record["person_id"] for record in self.records}
        return found

    def batches(self, on: Collection[str], transform: OneByOne | None = None) -> Batches:
        """What makes batches with those switches on."""
        c = self.c
        if "pack" in on:
            tokenizer = None if "tokens" in on else self.tokenizer
            return FromPack(c.samples, c.modalities, 0.0, tokenizer, self.people)
        training = self.config.training
        if transform is None:
            transform = OneByOne(self.people.images.frame, training.flip, training.pad, training.erase)
        return FromRecords(
            c.samples,
            c.modalities,
            0.0,
            self.loaded(transform.pixels if "bytes" in on else transform),
            {place: number for number, place in enumerate(self.places)},
            None if "tokens" in on else self.tokenizer,
            "bytes" in on,
        )


Tokenizer = ByteTokenizer | BytePairTokenizer


@dataclass(frozen=True)
class FromPack(Batches):
    """Our batches; with a tokenizer, captions are tokenised for each."""

    tokenizer: Tokenizer | None
    people: People

    def __getitem__(self, key: Key) -> Batch:
        batch = super().__getitem__(key)
        if self.tokenizer is None:
            return batch
        caption = self.people.caption[self.samples.row[torch.tensor(key[1])]].tolist()
        texts = [self.people.captions[place] if place >= 0 else "" for place in caption]
        return batch._replace(token=self.tokenizer.encode_batch(texts))


@dataclass(frozen=True)
class FromRecords(Batches):
    """The original's batches, made of a dictionary per sample, in the form that the model takes."""

    records: Records
    number_of: Mapping[int, int]  # place of a sample -> its record
    tokenizer: Tokenizer | None
    makes_bytes: bool

    def __getitem__(self, key: Key) -> Batch:
        places = key[1]
        found = collate_records([self.records[self.number_of[place]] for place in places])
        size, place_B = len(places), torch.tensor(places)
        used = [modality for modality in self.modalities if modality != TEXT]
        image = torch.cat([found["images"][NAMES[modality]] for modality in used])
        present_B5 = torch.zeros(size, len(MODALITIES), dtype=torch.bool)
        for modality in self.modalities:
            present_B5[:, modality] = found["modality_mask"]["text" if modality == TEXT else NAMES[modality]] > 0
        if self.tokenizer is None:
            token = self.samples.token[place_B].long()
        else:
            token = self.tokenizer.encode_batch(found["text_description"])
        return Batch(
            image=image.to(torch.uint8) if self.makes_bytes else image,  # zeros for absent images are floats
            modality=torch.tensor(used).repeat_interleave(size),
            slot=torch.arange(size).repeat(len(used)),
            present=present_B5,
            token=token,
            label=found["person_id"],
            camera=self.samples.camera[place_B],
        )


def needless(setting: Setting) -> frozenset[str]:
    """Switches that change nothing here; every row has them on."""
    training = setting.config.training
    cases = {
        "clip": training.clip == "off",
        "transfer": setting.device.type != "cuda",
        "ahead": setting.c.loader.prefetch == 0,  # on a CPU nothing is made ahead, with the switch or without
        "tokens": TEXT not in setting.c.modalities,
        "precision": setting.c.amp.precision == "fp32",
    }
    return frozenset(name for name, is_needless in cases.items() if is_needless)


def switches_of(setting: Setting) -> list[Switch]:
    """The switches that change anything here, in their order."""
    found = dict(SWITCHES)
    found["precision"] = found["precision"]._replace(text=f"{setting.c.amp.precision} instead of fp32")
    return [switch for name, switch in found.items() if name not in needless(setting)]


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Arrangement:
    """Training steps with the switches of those names on; `run` does so many."""

    def __init__(
        self,
        setting: Setting,
        on: Collection[str],
        values: Mapping[str, Any] = NOTHING,
        *,
        transform: OneByOne | None = None,
    ) -> None:
        self.on = on = frozenset(on) | needless(setting)
        c = setting.built(values)
        self.training = training = c.config.training
        model = c.state.model
        assert isinstance(model, ReID)
        self.model = model
        self.calls: CallsPerModality | None = None if "tower" in on else use_calls_per_modality(model)
        precision = c.amp.precision if "precision" in on else "fp32"
        optimizer = make_optimizer(model, training)
        if "optimizer" not in on:
            optimizer = plain_optimizer(optimizer, training)
        clips = training.clip == "fixed" and "clip" in on
        self.c = replace(
            c,
            state=make_state(model, [optimizer], precision=precision, device=c.device),
            amp=AmpConfig(precision=precision, clip_norm=training.clip_norm if clips else 0.0),
            clip=c.clip if {"clip", "optimizer"} <= on else None,
        )
        clip: Callable[[], object] | None = None
        if "clip" not in on:
            clip = partial(clip_by_loops, list(model.parameters()))
        elif c.clip is not None and self.c.clip is None:  # only a fused optimizer can be told to leave a step out
            clip = partial(clip_together, c.clip, list(model.parameters()))
        if clip is not None:
            optimizer.register_step_pre_hook(partial(call_before_step, clip))
        if training.compile != "off":
            compile_or_say_why(self.c, RefusingLog())
        self.state = self.c.state
        model.train()
        self.next_key = endless(setting.keys if not values else epoch_keys(c, epoch=0)[: CHUNKS * training.accumulate])
        self.batches = setting.batches(self.on, transform)
        self.draws = planned_batches(c) if "sampling" in on else record_batches(setting, training)
        settings = LoaderConfig(0, c.loader.prefetch, "transfer" in on and c.device.type == "cuda", None, "")
        self.loader = (Loader if "ahead" in on else InThisThread)(self.batches, settings, c.device)
        self.total = torch.zeros((), device=c.device)
        self.output: Output | None = None
        self.bar = TextBar()

    def run(self, steps: int) -> Work:
        """So many steps; nothing is under way behind them."""
        samples, size = 0, self.training.accumulate
        with closing(self.loader.run([self.next_key() for _ in range(steps * size)])) as source:
            for _ in range(steps):
                next(self.draws)  # every row trains on the same samples, whatever was drawn
                found = [next(source) for _ in range(size)]
                self.step(found)
                samples += sum(len(batch.label) for batch in found)
        return Work(samples, steps)

    def step(self, found: Sequence[Batch]) -> None:
        """One optimizer step."""
        training, index = self.training, self.state.step
        if self.calls is not None:
            self.calls.rows = rows_by_modality(found[0].modality)
        batches = [self.moved(batch, number=index * len(found) + i) for i, batch in enumerate(found)]
        seed_step(training.seed, 0, index, DROPOUT_STREAM)
        loss_of = partial(loss_fn, training=training) if "logging" in self.on else self.loss_of
        self.state, output = amp_step(self.state, batches, loss_of, amp=self.c.amp, clip=self.c.clip)
        self.total += output.loss
        if "logging" not in self.on:
            assert self.output is not None
            self.log(output.loss, output.scalars, batches[0])
        elif due(self.state.step, training.log_every):
            torch.stack([self.total, *output.scalars.values()]).tolist()  # sync: one copy for all
            self.total = torch.zeros_like(self.total)
        if "bar" in self.on:
            self.bar.advance()
        elif due(self.state.step, BAR_EVERY):
            self.bar.draw(self.state.step, float(output.loss))  # sync

    def moved(self, batch: Batch, *, number: int) -> Batch:
        """The batch on the device, as the model takes it."""
        device = self.c.device
        if "transfer" not in self.on:
            batch = Batch(*(tensor.to(device) for tensor in batch))
        if "pack" not in self.on:
            return to_device(batch, device)
        batch = augmented(self.c, batch, epoch=0, number=number)
        return batch if "bytes" in self.on else batch._replace(image=normalised(batch.image))

    def loss_of(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss as training has it, its output kept for the log."""
        output: Output = model(batch)
        self.output = Output(*(value.detach() for value in output))
        found = losses.total(output, batch.label, self.training, [len(subset) for subset in self.model.subsets])
        return found.total, {"ce": found.identity, "sdm": found.sdm}

    def log(self, loss: Tensor, scalars: Mapping[str, Tensor], batch: Batch) -> None:
        """What the original reads in every step."""
        output = self.output
        assert output is not None
        features = {"vis": output.rgb_BE, "neck": output.neck_FBE[0]}
        if len(output.query_CBE):
            features["fused"] = output.query_CBE[-1]
        log_by_reads(
            {"total": loss, **scalars}, output.logits_FBP[0], batch.label, features, ["vis"] * len(batch.label)
        )


def trainer(setting: Setting, on: Collection[str], values: Mapping[str, Any] = NOTHING) -> Run:
    """Training steps with the switches of those names on, and with other values of some knobs."""
    return Arrangement(setting, on, values).run


def plain_optimizer(fused: Optimizer, training: TrainConfig) -> Optimizer:
    """The same groups in an optimizer as it comes."""
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    names = ("params", "lr", "weight_decay")
    return kind([{name: group[name] for name in names} for group in fused.param_groups])


def clip_together(clip: AdaptiveClip, parameters: Sequence[nn.Parameter]) -> None:
    """Clip the gradients there are, in place."""
    clip([parameter.grad for parameter in parameters if parameter.grad is not None])


def call_before_step(call: Callable[[], object], *_: object) -> None:
    """Just call it: what a hook returns would be taken for arguments."""
    call()


class RefusingLog(SilentLog):
    """Makes an error of a warning: what cannot be compiled is not measured as if it were."""

    def warn(self, msg: str) -> None:
        raise ValueError(msg)


class TextBar:
    """A line that is drawn again and again, for nobody."""

    def __init__(self) -> None:
        self._sink = io.StringIO()
        self._begin = time.perf_counter()
        self._due = self._begin + BAR_S
        self._steps = 0

    def advance(self) -> None:
        """Count a step; draw where the last drawing is long enough ago."""
        self._steps += 1
        now = time.perf_counter()
        if now >= self._due:
            self._due = now + BAR_S
            self.draw(self._steps, None)

    def draw(self, step: int, loss: float | None) -> None:
        """Write the line over the one before."""
        elapsed = time.perf_counter() - self._begin
        note = "" if loss is None else f", loss={loss:.4f}"
        line = f"\rEpoch 1: {'#' * (step % 40):<40} {step}/1863 [{elapsed:.0f}s, {step / elapsed:.2f}it/s{note}]"
        self._sink.seek(0)
        self._sink.write(line)
        self._sink.flush()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def planned_batches(c: Components) -> Iterator[list[int]]:
    """Our batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from plan_epoch(c.sampler, seed=c.config.training.seed, epoch=epoch).flatten(1).tolist()
        epoch += 1


def record_batches(setting: Setting, training: TrainConfig) -> Iterator[list[int]]:
    """Batches of a sampler that asks the record of each candidate."""
    return inferring_batches(
        labels_of(setting),
        lambda number: modalities_of(setting.records[number]),
        identities=training.identities_per_batch,
        instances=training.num_instances,
    )


def labels_of(setting: Setting) -> list[int]:
    """The identity of each record."""
    return [record["person_id"] for record in setting.records]


def sampling_part(setting: Setting) -> Part:
    """Choosing the samples of a batch, nothing else."""
    training = setting.config.training
    shape = {"identities": training.identities_per_batch, "instances": training.num_instances}
    transform = OneByOne(setting.people.images.frame, training.flip, training.pad, training.erase)

    def make(draws: Callable[[], Iterator[list[int]]]) -> Run:
        source = draws()

        def run(steps: int) -> Work:
            return Work(sum(len(next(source)) for _ in range(steps)), steps)

        return run

    def by_loading() -> Iterator[list[int]]:
        records = setting.loaded(transform)
        return inferring_batches(labels_of(setting), lambda number: modalities_of(records[number]), **shape)

    def cached() -> Iterator[list[int]]:
        return cached_batches(labels_of(setting), lambda number: modalities_of(setting.records[number]), **shape)

    by_records, planned = partial(record_batches, setting, training), partial(planned_batches, setting.c)
    claim = SWITCHES["sampling"].claim
    return Part(
        "sampling",
        "sampling alone: the samples of a batch chosen, not loaded",
        "input",
        "samples",
        (
            Rung(
                "original",
                "every candidate of a batch loaded, images and all, to see what it shows",
                partial(make, by_loading),
            ),
            Rung("records", "its record asked instead, still in every batch", partial(make, by_records), claim),
            Rung(
                "cached",
                "asked once, lists of each person's samples kept",
                partial(make, cached),
                f"{claim}; S4-9, S4-11: the index in 2-3 s, then by lookups",
            ),
            Rung("planned", "all batches of an epoch by operations on tensors", partial(make, planned), claim),
        ),
        cumulative=True,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Input


def input_run(setting: Setting, on: Collection[str], loader: Loader | None = None) -> Run:
    """Batches on the host, augmented, without any model."""
    c, next_key, number = setting.c, endless(setting.keys), 0
    if loader is None:
        loader = InThisThread(setting.batches(on), LoaderConfig(0, 1, False, None, ""), c.device)
    host = replace(c, device=torch.device("cpu"))

    def run(steps: int) -> Work:
        nonlocal number
        samples = 0
        with closing(loader.run([next_key() for _ in range(steps)])) as source:
            for batch in source:
                if "pack" in on:
                    batch = augmented(host, batch, epoch=0, number=number)
                    if "bytes" not in on:
                        normalised(batch.image)
                number += 1
                samples += len(batch.label)
        return Work(samples, steps)

    return run


def input_part(setting: Setting) -> Part:
    """Making batches, without any model."""
    return Part(
        "input",
        "input alone: batches with their images, augmented, without any model",
        "input",
        "samples",
        (
            Rung(
                "original",
                "a dictionary per sample, every image decoded, cropped and made floats by itself, collated",
                partial(input_run, setting, {"tokens"}),
            ),
            Rung(
                "gathered",
                "gathered from the pack, augmented as a batch, made floats",
                partial(input_run, setting, {"tokens", "pack"}),
            ),
            Rung("no floats", "left as bytes", partial(input_run, setting, {"tokens", "pack", "bytes"})),
        ),
        cumulative=True,
    )


def workers_part(setting: Setting) -> Part:
    """The original's input by processes, and ours by a thread."""

    def make(on: Collection[str], workers: int) -> Run:
        settings = LoaderConfig(workers, 1 if workers else 2, False, None, "")
        run = input_run(setting, on, Loader(setting.batches(on), settings, torch.device("cpu")))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores
            run(1)  # starts them
        return run

    first, second = WORKERS
    claim = "S4-5, S4-19: loader 1.2x, workers 4 -> 2 on Windows"
    return Part(
        "workers",
        "loader alone: processes that decode, or a pack that needs none",
        "input",
        "samples",
        (
            Rung("original", f"{first} workers that decode", partial(make, {"tokens"}, first)),
            Rung("two workers", f"{second} workers that decode", partial(make, {"tokens"}, second), claim),
            Rung("pack", "the pack, without processes", partial(make, {"tokens", "pack", "bytes"}, 0), claim),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches and compilation


def batches_part(setting: Setting) -> Part | None:
    """Larger batches, which compare more samples with each other; None where there are too few identities."""
    training, on = setting.config.training, SWITCHES.keys()
    rungs = []
    for identities, instances in LARGER:
        if identities <= setting.people.num_identities:
            values = {"identities_per_batch": identities, "num_instances": instances}
            size = identities * instances
            rungs.append(
                Rung(
                    f"{identities}x{instances}",
                    f"batches of {size}: other losses, fewer steps",
                    partial(trainer, setting, on, values),
                    "S4-32: batches of 48 and 64",
                )
            )
    if not rungs:
        return None
    shape = f"{training.identities_per_batch} x {training.num_instances}"
    return Part(
        "batches",
        "batches: all switches on",
        "train",
        "samples",
        (
            Rung("original", f"batches of {shape}, as asked", partial(trainer, setting, on)),
            *rungs,
            Rung(
                "accumulate-2",
                f"two batches of {shape} a step, each with losses of its own",
                partial(trainer, setting, on, {"accumulate": 2}),
                "S4-33: accumulation",
            ),
        ),
    )


def compile_part(setting: Setting) -> Part:
    """The model compiled."""
    on = SWITCHES.keys()
    return Part(
        "compile",
        "compilation: all switches on",
        "train",
        "samples",
        (
            Rung("original", "as it is", partial(trainer, setting, on)),
            Rung(
                "reduce-overhead",
                "--compile reduce-overhead",
                partial(trainer, setting, on, {"compile": "reduce-overhead"}),
                'S4-34: torch.compile, mode="reduce-overhead"',
            ),
        ),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ranking and evaluation


def ranking_part(setting: Setting) -> Part:
    """Metrics of a list from features that are made up, scores included."""
    generator = make_generator(setting.config.training.seed)
    width, ks, budget = setting.config.model.embed_dim, setting.config.training.ks, setting.config.training.memory_mib
    identity_Q, identity_G = (torch.randint(RANKED_PEOPLE, (size,), generator=generator) for size in (QUERIES, GALLERY))
    centre_PE = torch.randn(RANKED_PEOPLE, width, generator=generator)
    query_QE, gallery_GE = (
        F.normalize(centre_PE[identity] + 2 * torch.randn(len(identity), width, generator=generator), dim=1).to(
            setting.device
        )
        for identity in (identity_Q, identity_G)
    )

    def by_sorting(*, together: bool) -> Run:
        queries, gallery = identity_Q.to(setting.device), identity_G.to(setting.device)
        none = torch.zeros(QUERIES, GALLERY, dtype=torch.bool, device=setting.device)

        def run(steps: int) -> Work:
            for _ in range(steps):
                sorted_metrics(query_QE @ gallery_GE.T, queries, gallery, none, ks=ks, together=together)
            return Work(steps * QUERIES, steps)

        return run

    def by_counting() -> Run:
        truth = truth_of(identity_Q, identity_G)

        def run(steps: int) -> Work:
            for _ in range(steps):
                list_metrics(cosine_scores(query_QE, gallery_GE), truth, ks=ks, budget_bytes=budget << 20)
            return Work(steps * QUERIES, steps)

        return run

    return Part(
        "ranking",
        f"ranking alone: {QUERIES:,} queries, {GALLERY:,} gallery images, made up",
        "evaluation",
        "queries",
        (
            Rung("original", "everything sorted, a loop over queries", partial(by_sorting, together=False)),
            Rung("together", "everything sorted, no loop", partial(by_sorting, together=True)),
            Rung("counted", "ranks of right images alone, nothing sorted", by_counting, "T-6: in no note"),
        ),
    )


def truth_of(identity_Q: Tensor, identity_G: Tensor) -> Truth:
    """Who is right, without cameras."""
    identity, order = identity_G.sort(stable=True)
    return Truth(
        order,
        torch.zeros_like(order),
        torch.searchsorted(identity, identity_Q),
        torch.searchsorted(identity, identity_Q, right=True),
        torch.full_like(identity_Q, -1),
    )


def evaluation_part(setting: Setting) -> Part:
    """All lists of a few people, from images to metrics."""
    config, people = setting.config, few_people(setting.people, num_people=PEOPLE, each=EACH)
    num_queries = sum(found.identity.numel() for found in query_lists(people, "valid", config).values())

    def make(measure: Callable[[ReID], object]) -> Run:
        model = setting.built().state.model
        assert isinstance(model, ReID)

        def run(steps: int) -> Work:
            for _ in range(steps):
                measure(model)
            return Work(steps * num_queries, steps)

        return run

    def by_list(model: ReID) -> object:
        return list_by_list(model, people, config=config, token_CL=setting.token_CL)

    def ours(model: ReID) -> object:
        return evaluate(model, people, "valid", config=config, token_CL=setting.token_CL)

    return Part(
        "evaluation",
        f"evaluation: {num_queries:,} queries of {PEOPLE} people, from images to metrics",
        "evaluation",
        "queries",
        (
            Rung("original", "images of each list encoded for it, everything sorted, a loop", partial(make, by_list)),
            Rung("once", "each image encoded once for all lists, ranks of right images", partial(make, ours),
                 "T-6: in no note"),
        ),
        cumulative=True,
    )  # fmt: skip


def few_people(people: People, *, num_people: int, each: int) -> People:
    """The people with at most so many of them to validate on, and so many of their images of each modality."""
    assert people.valid is not None
    kept = torch.unique(people.identity[people.valid.gallery])[:num_people]

    def first_of(identity_Q: Tensor) -> Tensor:
        """Places of the first few of each identity that is kept."""
        rows = [(identity_Q == identity).nonzero().squeeze(1)[:each] for identity in kept.tolist()]
        return torch.cat(rows)

    queries = {}
    for name, found in people.valid.queries.items():
        rows = first_of(found.identity)
        if rows.numel():
            queries[name] = Queries(found.modalities, found.item[rows], found.identity[rows])
    # all RGB images of a person where its own camera would not count
    gallery = people.valid.gallery
    is_kept = torch.isin(people.identity[gallery], kept)
    gallery = gallery[is_kept] if people.valid.camera_rule else gallery[first_of(people.identity[gallery])]
    return replace(people, valid=replace(people.valid, gallery=gallery, queries=queries))


def list_by_list(model: ReID, people: People, *, config: Config, token_CL: Tensor) -> dict[str, dict[str, float]]:
    """The metrics of every list: its images and captions encoded for it, all scores sorted, a loop over queries."""
    retrieval = people.valid
    assert retrieval is not None
    found = {}
    camera_rule = uses_camera_rule(retrieval, config)
    for name, queries in query_lists(people, "valid", config).items():
        row_R, place_X = needed_items(people, "valid", config, only=name)
        encodings = encode_people(model, people, row_R, place_X, token_CL, config=config)
        query_QE = query_features(model, people, encodings, queries, token_CL, config=config)
        score_QG = query_QE @ gallery_features(encodings, retrieval).T
        truth = make_truth(people, retrieval, queries, camera_rule=camera_rule)
        left_out_QG = torch.zeros(score_QG.shape, dtype=torch.bool)
        column_QP, _, is_left_out_QP = own_images(truth, torch.arange(len(queries.identity)))
        row, place = is_left_out_QP.nonzero().unbind(1)
        left_out_QG[row, column_QP[row, place]] = True
        identity_G = people.identity[retrieval.gallery]
        found[name] = sorted_metrics(
            score_QG,
            *to_device((queries.identity, identity_G, left_out_QG), score_QG.device),
            ks=config.training.ks,
            together=False,
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The notes' sizes


@dataclass(frozen=True)
class RepeatedImages(PackedImages):
    """As many images as are asked for, made of a few."""

    def load(self, rows: Tensor) -> Tensor:
        return self.image.index_select(0, rows % len(self.image))

    def __reduce__(self) -> tuple[Any, ...]:
        return RepeatedImages, (self.file, self.frame, self.image)


def notes_shape(config: Config) -> tuple[Config, People]:
    """The configuration and made-up people with the notes' sizes: as many samples and identities, 8 x 4 a batch."""
    generator = make_generator(1)
    height, width = NOTES_FRAME.stored
    coarse = torch.rand(NOTES_PICTURES, 3, 16, 8, generator=generator)
    picture = torch.cat([_pictures(part, height, width, generator) for part in torch.split(coarse, 16)])
    rows: list[tuple[int, int, int]] = []  # identity, modality, view
    for person in range(NOTES_PEOPLE + NOTES_VALID):
        own = NOTES_SAMPLES // NOTES_PEOPLE + (person % NOTES_PEOPLE < NOTES_SAMPLES % NOTES_PEOPLE)
        rows += [(person, RGB, -1)] * own
        for name, count in NOTES_EACH.items():
            modality = IMAGE_MODALITIES.index(name)
            rows += [(person, modality, -1 if modality == NIR else i % len(VIEWS)) for i in range(count)]
    identity, modality_N, view = torch.tensor(rows).unbind(1)
    is_rgb = modality_N == RGB
    caption = torch.where(is_rgb, is_rgb.cumsum(0) - 1, -1)
    texts = [
        f"Person {person} in picture {i} wears a dark coat, blue trousers and shoes, and carries a bag."
        for i, person in enumerate(identity[is_rgb].tolist())
    ]
    count = NOTES_PEOPLE + NOTES_VALID
    people = People(
        identity=identity,
        camera=torch.full_like(identity, -1),
        modality=modality_N,
        view=view,
        caption=caption,
        captions=make_texts(texts),
        path=make_texts([str(i) for i in range(len(rows))]),
        images=RepeatedImages(Path("made-up"), NOTES_FRAME, picture),
        identity_ids=tuple(f"{person:04d}" for person in range(count)),
        num_identities=NOTES_PEOPLE,
        num_valid=NOTES_VALID,
        valid=None,
        test=None,
        fingerprint="made up with the sizes of the notes",
        name="people with the sizes of the notes",
        split=f"made up: {NOTES_PEOPLE} to train on, {NOTES_VALID} to validate on",
    )
    people = replace(people, valid=lists_by_rule(people, NOTES_PEOPLE, count))
    identities, instances = NOTES_SHAPE
    training = replace(config.training, identities_per_batch=identities, num_instances=instances)
    return replace(config, training=training), people


def _pictures(coarse: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Soft shapes with some noise, uint8."""
    smooth = F.interpolate(coarse, (height, width), mode="bilinear") * 220
    noise = torch.randn(len(coarse), 1, height, width, generator=generator) * 8
    return (smooth + noise + 16).clamp(0, 255).to(torch.uint8)
