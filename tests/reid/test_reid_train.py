"""The training loop: it learns to find people across modalities, stops, saves and resumes exactly, reads nothing."""

import functools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apps.reid import augment as augmentation
from apps.reid.config import Config, DataConfig, ModelConfig, TrainConfig
from apps.reid.dataset import RGB, Batch, Frame, PackedImages, People, lists_by_rule, make_texts
from apps.reid.evaluate import evaluate
from apps.reid.loaders import WINDOWS_LINE, Batches, Loader
from apps.reid.model import ReID
from apps.reid.train import (
    Components,
    Outcome,
    augmented,
    build,
    epoch_keys,
    fit,
    fresh_meter,
    learning_rate_factor,
    loss_fn,
    restore,
    result_table,
    say_skipped,
    tokenizer_of,
    tokens_of,
    train_epoch,
    write_result,
)
from shared.amp import NonFiniteError, TrainState, amp_step, resolve_precision
from shared.checkpoint import MismatchError, load_checkpoint, newest_checkpoint
from shared.files import write_safetensors
from shared.log import RunLog, SilentLog, StopSignal, read_metrics
from shared.timing import RateMeter, StepTimer

TRAIN, VALID, TEST = 8, 3, 4
FRAME = Frame(16, 8, 2, 1)


def made_up(
    file: Path | None = None, *, held_out: bool = True, tested: bool = True, others: bool = True, partial: bool = False
) -> People:
    """People who are a colour and a height of its edge each; every modality shows them in its own way.

    others: with other modalities than RGB. partial: the first two people have RGB images without a caption alone.
    """
    generator = torch.Generator().manual_seed(0)
    count = TRAIN + (VALID if held_out else 0) + (TEST if tested else 0)
    colour_P3 = torch.rand(count, 3, generator=generator)
    edge_P = torch.randint(2, 14, (count,), generator=generator)
    height, width = FRAME.stored
    rows, pictures, captions = [], [], []
    for person in range(count):
        bare = partial and person < 2
        for modality, number in ((RGB, 3), (1, 2), (2, 2), (3, 2)):
            for _ in range(number if (others and not bare) or modality == RGB else 0):
                picture = torch.zeros(3, height, width)
                picture[:, : edge_P[person] + FRAME.rows] = colour_P3[person, :, None, None]
                if modality == 1:
                    picture = picture.mean(0, keepdim=True).expand(3, -1, -1)
                elif modality == 2:
                    picture = 0.5 + picture / 2
                elif modality == 3:
                    picture = 1 - picture
                noise = 0.08 * torch.randn(picture.shape, generator=generator)
                pictures.append(((picture + noise).clamp(0, 1) * 255).to(torch.uint8))
                has_caption = modality == RGB and others and not bare
                captions += [f"{edge_P[person]} {int(9 * colour_P3[person, 0])}"] * has_caption
                rows.append((person, modality, len(captions) - 1 if has_caption else -1))
    image = torch.stack(pictures)
    if file is not None:
        write_safetensors(file, {"image": image}, {})
    identity, modality_N, caption = (torch.tensor(column) for column in zip(*rows, strict=True))
    people = People(
        identity=identity,
        camera=torch.zeros_like(identity),
        modality=modality_N,
        view=torch.full_like(identity, -1),
        caption=caption,
        captions=make_texts(captions),
        path=make_texts([str(i) for i in range(len(rows))]),
        images=PackedImages(file or Path("none"), FRAME, image),
        identity_ids=tuple(f"p{person}" for person in range(count)),
        num_identities=TRAIN,
        num_valid=VALID if held_out else 0,
        valid=None,
        test=None,
        fingerprint="made up",
        name="made up",
        split="made up",
    )
    first = TRAIN + people.num_valid
    return replace(
        people,
        valid=lists_by_rule(people, TRAIN, first) if held_out else None,
        test=lists_by_rule(people, first, count) if tested else None,
    )


def configure(*, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any) -> Config:
    base = {"epochs": 2, "identities_per_batch": 4, "num_instances": 2, "device": "cpu", "precision": "fp32"}
    base |= {"log_every": 2, "norm_every": 2, "eval_every": 1, "warmup_steps": 2, "lr": 3e-3, "pad": 1, "ks": (1,)}
    small: dict[str, Any] = {"embed_dim": 16, "tower_width": 16, "tower_layers": 2, "tower_heads": 2, "patch": 8}
    small |= {"text_width": 16, "text_layers": 1, "text_heads": 2, "rank": 2, "fusion_heads": 2}
    return Config(
        data=replace(DataConfig(), **(data or {})),
        model=replace(ModelConfig(), **{**small, **(model or {})}),
        training=replace(TrainConfig(), **{**base, **training}),
    )


def run(config: Config, run_dir: Path, people: People | None = None, *, resume: bool = False) -> Outcome:
    c = build(config, people or made_up())
    found = newest_checkpoint(run_dir / "checkpoints", warn=print) if resume else None
    start = restore(c, *found) if found else None
    step = start.state.step if start else None
    with RunLog(run_dir, say=lambda line: None, resume_step=step) as log, StopSignal(say=print) as stop:
        return fit(c, run_dir, log=log, stop=stop, start=start)


def weights(outcome: Outcome) -> Tensor:
    return torch.cat([value.detach().flatten().float() for value in outcome.state.model.state_dict().values()])


def said(run_dir: Path) -> str:
    return (run_dir / "train.log").read_text(encoding="utf-8")


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time") and not k.endswith("_per_s")} for line in lines]


def steps_of(c: Components, count: int, *, epoch: int = 0) -> TrainState:
    """The state after so many steps of an epoch, by hand and without a loader."""
    batches = Batches(c.samples, c.modalities, c.config.training.modality_dropout)
    state = replace(c.state, epoch=epoch)
    state.model.train()
    size = c.config.training.accumulate
    keys = epoch_keys(c, epoch=epoch)
    for index in range(count):
        numbers = range(index * size, min((index + 1) * size, len(keys)))
        parts = [augmented(c, batches[keys[number]], epoch=epoch, number=number) for number in numbers]
        state, _ = amp_step(
            state,
            parts,
            functools.partial(loss_fn, training=c.config.training),
            amp=c.amp,
            lr_factor=learning_rate_factor(c, state.step),
            clip=c.clip,
        )
    return state


# Learning


@pytest.mark.parametrize(("fusion", "subsets"), [("pooled", "all"), ("tokens", "all"), ("pooled", "single")])
def test_it_learns_to_find_people_it_was_not_trained_on(fusion, subsets, tmp_path):
    config = configure(epochs=6, eval_every=3, subsets=subsets, temperature=0.1, model={"fusion": fusion})
    people = made_up()
    fresh = build(config, people)
    untrained = evaluate(fresh.state.model, people, "test", config=config, token_CL=fresh.token_CL)
    outcome = run(config, tmp_path, people)
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["MM/mAP"] > untrained["MM/mAP"] + 0.1


def test_every_part_moves_and_what_is_frozen_does_not():
    cases: list[tuple[dict[str, Any], str]] = [({}, ""), ({"tower_lr": 0.0}, "towers"), ({"expert_lr": 0.0}, "experts")]
    for options, still in cases:
        c = build(configure(clip="off", lr_scheduler="constant", warmup_steps=0, **options), made_up())
        assert isinstance(c.state.model, ReID)
        before = {name: value.detach().clone() for name, value in c.state.model.named_parameters()}
        steps_of(c, 3)
        moved = {name for name, value in c.state.model.named_parameters() if not torch.equal(value, before[name])}
        own = {name for name in before if name.endswith((".up", ".down", "patch_weight")) or name == "null"}
        towers = {name for name in before if name.startswith("clip.")} - own
        for group, names in (("towers", towers), ("experts", own), ("head", set(before) - towers - own)):
            expected = set() if group == still else {name for name in names if before[name].numel()}
            assert moved & names == expected, group


def test_rates_go_by_group_and_depth_and_vectors_do_not_decay():
    config = configure(lr=0.1, tower_lr=0.5, expert_lr=2.0, layer_decay=0.1, weight_decay=0.3)
    c = build(config, made_up())
    found = {
        id(parameter): (round(group["initial_lr"], 9), group["weight_decay"])
        for group in c.state.optimizers[0].param_groups
        for parameter in group["params"]
    }
    model = c.state.model
    assert isinstance(model, ReID)
    named = dict(model.named_parameters())
    assert set(found) == {id(parameter) for parameter in named.values()}
    expected = {
        "clip.image.blocks.1.qkv.weight": (0.05, 0.3),
        "clip.image.blocks.0.qkv.weight": (0.005, 0.3),
        "clip.image.position": (0.0005, 0.3),
        "clip.image.blocks.1.qkv.bias": (0.05, 0.0),
        "clip.image.blocks.0.norm_1.weight": (0.005, 0.0),
        "clip.image.blocks.0.qkv.down": (0.2, 0.3),
        "clip.image.patch_weight": (0.2, 0.3),
        "classifier.weight": (0.1, 0.3),
        "neck.weight": (0.1, 0.0),
    }
    assert {name: found[id(named[name])] for name in expected} == expected


# Batches of an epoch


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_takes_its_batches_and_the_last_one_what_is_left(accumulate, tmp_path):
    config = configure(epochs=1, accumulate=accumulate, epoch_length="7")
    c = build(config, made_up())
    assert c.steps_per_epoch == -(-7 // accumulate)
    assert run(config, tmp_path).state.step == c.steps_per_epoch


def test_accumulated_batches_count_alike_and_keep_their_losses_to_themselves():
    c = build(configure(accumulate=2, clip="off", epoch_length="2"), made_up())
    batches = Batches(c.samples, c.modalities, 0.0)
    parts = [augmented(c, batches[key], epoch=0, number=i) for i, key in enumerate(epoch_keys(c, epoch=0))]
    c.state.model.train()
    for part in parts:
        (loss_fn(c.state.model, part, training=c.config.training)[0] / 2).backward()
    expected = [p.grad.clone() for p in c.state.model.parameters() if p.grad is not None]
    c.state.model.zero_grad()
    found: list[Tensor] = []

    def look(gradients: Any) -> Tensor:
        found.extend(gradient.clone() for gradient in gradients)
        return torch.ones(())

    loss_of = functools.partial(loss_fn, training=c.config.training)
    amp_step(c.state, parts, loss_of, amp=c.amp, clip=look)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("length", "batches"), [("samples", 4), ("identities", 2), ("11", 11)])
def test_an_epoch_is_as_long_as_asked(length, batches):
    c = build(configure(epoch_length=length), made_up())
    assert c.steps_per_epoch == batches
    keys = epoch_keys(c, epoch=3)
    assert len(keys) == batches
    for epoch, places in keys:
        assert epoch == 3
        labels = c.samples.label[torch.tensor(places)].view(4, 2)
        assert bool((labels[:, 0] == labels[:, 1]).all())
        assert len(set(labels[:, 0].tolist())) == 4
    if length == "samples":
        assert {place for _, places in keys for place in places} == set(range(len(c.samples)))
    assert epoch_keys(c, epoch=3, first_step=1) == keys[1:]


def test_an_epoch_length_that_is_none_is_refused():
    for wrong in ("0", "-3", "epochs", "1.5"):
        with pytest.raises(ValueError, match="--epoch-length must be samples, identities, or a number of batches"):
            build(configure(epoch_length=wrong), made_up())


def test_people_are_pairable_whose_samples_show_rgb_and_more():
    people = made_up(partial=True)
    summaries = [build(configure(prefer_complete=p), people).sampler.summary for p in ("any", "first")]
    assert [(s.num_identities, s.num_pairable) for s in summaries] == [(8, 6)] * 2
    assert build(configure(), made_up(others=False)).sampler.summary.num_pairable == 0
    assert build(configure(), made_up()).sampler.summary.num_pairable == 8
    only = build(configure(prefer_complete="only"), people)
    drawn = {place for _, places in epoch_keys(only, epoch=0) for place in places}
    assert set(only.samples.label[torch.tensor(sorted(drawn))].tolist()) == set(range(2, 8))
    with pytest.raises(
        ValueError, match="6 of 8 identities have RGB and another modality, fewer than the 7 of a batch"
    ):
        build(configure(prefer_complete="only", identities_per_batch=7), people)
    first = build(configure(prefer_complete="first"), people)
    for epoch in range(3):
        is_bare = [
            sum(bool(first.samples.label[place] < 2) for place in places)
            for _, places in epoch_keys(first, epoch=epoch)
        ]
        assert is_bare == sorted(is_bare)


def test_modalities_are_those_asked_for_that_the_data_have():
    assert build(configure(), made_up()).modalities == (0, 1, 2, 3, 4)
    assert build(configure(), made_up(others=False)).modalities == (0,)
    c = build(configure(data={"modalities": ("sk", "rgb", "text")}), made_up())
    assert c.modalities == (0, 3, 4)
    assert isinstance(c.state.model, ReID)
    assert c.state.model.subsets == ((3,), (4,), (3, 4))
    batch = Batches(c.samples, c.modalities, 0.0)[epoch_keys(c, epoch=0)[0]]
    assert set(batch.modality.tolist()) == {0, 3}
    for wrong in (("nir", "text"), ("rgb", "xray")):
        with pytest.raises(ValueError, match=r"--modalities takes some of rgb, nir, cp, sk, text, and rgb among them"):
            build(configure(data={"modalities": wrong}), made_up())


def test_augmentation_depends_on_the_batch_in_the_epoch_and_changes_pixels_alone():
    c = build(configure(erase=1.0), made_up())
    key = epoch_keys(c, epoch=1)[2]
    batch = Batches(c.samples, c.modalities, 0.0)[key]
    once, again, other = (augmented(c, batch, epoch=1, number=number) for number in (2, 2, 3))
    assert once.image.shape[2:] == FRAME[:2]
    assert torch.equal(once.image, again.image)
    assert not torch.equal(once.image, other.image)
    assert all(torch.equal(a, b) for a, b in zip(once[1:], batch[1:], strict=True))


def test_captions_are_tokenised_once_and_as_short_as_they_can_be():
    people = made_up()
    tokenizer = tokenizer_of(DataConfig())
    token_CL = tokens_of(people, tokenizer)
    whole = tokenizer.encode_batch(people.captions)
    assert torch.equal(token_CL.long(), whole[:, : token_CL.shape[1]])
    assert not bool(whole[:, token_CL.shape[1] :].any())
    assert bool(token_CL[:, -1].any())
    assert tokens_of(made_up(others=False), tokenizer).shape == (0, 1)
    assert tokenizer_of(DataConfig(max_tokens=5)).context == 5
    with pytest.raises(ValueError, match="max_tokens is 2"):
        tokenizer_of(DataConfig(max_tokens=2))


# Same seed, same run


VARIANTS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "accumulated, dropped modalities": {"accumulate": 2, "modality_dropout": 0.4, "clip_window": 4},
    "average, dropout": {"ema_decay": 0.9, "model": {"dropout": 0.3, "drop_path": 0.3, "fusion": "tokens"}},
    "adam, fixed clipping, all losses": {
        "optimizer": "adam", "clip": "fixed", "triplet_weight": 1.0, "circle_weight": 0.1, "sdm_form": "ce",
    },
    "no clipping, step schedule": {"clip": "off", "lr_scheduler": "step", "lr_step_epochs": 1, "subsets": "single"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_like_one_that_was_not(name, tmp_path):
    options = {"save_every": 2, **VARIANTS[name]}
    whole = run(configure(**options), tmp_path / "whole")
    c = build(configure(**options), made_up())
    cut_at = c.steps_per_epoch + 1
    steps = 0

    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:

        def count(note: str | None) -> None:
            nonlocal steps
            steps += 1
            if steps == cut_at:
                signal.raise_signal(signal.SIGTERM)

        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_step=count)
        assert stop.exit_code == 143
    assert cut.metrics is None
    assert cut.state.step == cut_at
    resumed = run(configure(**options), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics
    assert whole.progress == resumed.progress
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    first, again, other = (run(configure(seed=seed), tmp_path / str(i)) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(weights(first), weights(again))
    assert first.metrics == again.metrics
    assert not torch.equal(weights(first), weights(other))


def test_a_run_is_the_same_whoever_makes_its_batches(tmp_path):
    people = made_up(tmp_path / "images.safetensors")
    options: dict[str, Any] = {"epochs": 2, "modality_dropout": 0.3, "eval_every": 2, "model": {"dropout": 0.2}}
    makers: dict[str, dict[str, Any]] = {
        "thread": {"prefetch": 3},
        "spawn": {"windows": True, "num_workers": 2},
    }
    found = {name: run(configure(**options, **how), tmp_path / name, people) for name, how in makers.items()}
    assert torch.equal(weights(found["thread"]), weights(found["spawn"]))
    assert found["thread"].metrics == found["spawn"].metrics
    assert numbers(tmp_path / "thread") == numbers(tmp_path / "spawn")
    assert WINDOWS_LINE in said(tmp_path / "spawn")
    assert "loader: workers=2, prefetch=1, persistent, started by spawn: --windows" in said(tmp_path / "spawn")


def test_a_signal_during_validation_saves_and_resumes_with_the_validation(tmp_path):
    whole = run(configure(), tmp_path / "whole")
    c = build(configure(), made_up())
    with RunLog(tmp_path / "cut", say=lambda line: None) as log, StopSignal(say=lambda line: None) as stop:
        cut = fit(c, tmp_path / "cut", log=log, stop=stop, on_images=lambda done: signal.raise_signal(signal.SIGINT))
        assert stop.exit_code == 130
    assert cut.metrics is None
    resumed = run(configure(), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "cut")


def test_a_run_cut_by_max_steps_goes_on_like_one_that_was_not(tmp_path):
    whole = run(configure(epochs=3), tmp_path / "whole")
    assert run(configure(epochs=3, max_steps=6), tmp_path / "cut").state.step == 6
    resumed = run(configure(epochs=3), tmp_path / "cut", resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.metrics == resumed.metrics


# Clipping in a run


def test_norms_are_remembered_beyond_an_epoch_and_a_restart(tmp_path):
    options: dict[str, Any] = {"accumulate": 2, "epoch_length": "6", "epochs": 5, "eval_every": 5, "norm_every": 1}
    run(configure(**options, max_steps=4), tmp_path)
    run(configure(**options), tmp_path, resume=True)
    tree = newest_checkpoint(tmp_path / "checkpoints", warn=print)
    assert tree is not None
    assert int(tree[1]["clip"]["known"]) == 15  # steps, of 3 an epoch
    norms = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "norm"]
    assert [line["clip_limit"] for line in norms[:10]] == [1.0] * 10
    cut = torch.tensor([line["grad_norm"] for line in norms[:10]], dtype=torch.float64).quantile(0.7)
    assert norms[10]["clip_limit"] == pytest.approx(min(3.0, max(0.5, 1.15 * float(cut))), rel=1e-5)


def test_norms_are_recorded_when_due_and_never_where_they_are_off(tmp_path):
    run(configure(epochs=1, epoch_length="7", norm_every=3), tmp_path / "on")
    lines = [line for line in read_metrics(tmp_path / "on" / "metrics.jsonl") if line["kind"] == "norm"]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(line["fused_norm"] > 0 and line["neck_norm"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert "[\u7279\u5f81\u76d1\u63a7] Epoch 1, Batch 3: \u878d\u5408\u7279\u5f81=" in said(tmp_path / "on")
    run(configure(epochs=1, norm_every=0, clip="off"), tmp_path / "off")
    assert not [line for line in read_metrics(tmp_path / "off" / "metrics.jsonl") if line["kind"] == "norm"]


def test_fixed_clipping_has_its_limit_and_off_has_none(tmp_path):
    for clip, limit in (("fixed", 0.25), ("off", None)):
        run(configure(epochs=1, clip=clip, clip_norm=0.25), tmp_path / clip)
        lines = [line for line in read_metrics(tmp_path / clip / "metrics.jsonl") if line["kind"] == "norm"]
        assert [line.get("clip_limit") for line in lines] == [limit] * len(lines)
        assert lines


def test_skipped_steps_are_told_and_nothing_but_them_ends_the_run(tmp_path):
    with RunLog(tmp_path, say=print) as log:
        say_skipped(0, 20, 40, log)
        say_skipped(3, 20, 60, log)
        say_skipped(2, 2, 62, log)
        with pytest.raises(NonFiniteError, match="no gradient of the last 20 steps, up to step 80, was finite"):
            say_skipped(20, 20, 80, log)
    assert said(tmp_path).count("were skipped") == 2
    assert "step 60: 3 of the last 20 steps were skipped, since their gradients were not finite" in said(tmp_path)


# Host reads


class HostReads(TorchDispatchMode):
    """Names operators of this thread that make a host wait for a device, because a scalar or a shape is asked for.

    Scalars are item(), float(), int(), bool(); shapes those of nonzero, masks as indexes, unique. On a CPU the
    operators are the same as on CUDA. tolist() is no operator. The thread that makes batches is not looked at: what it
    reads never was on a device.
    """

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.NAMES or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def train_some(
    c: Components, steps: int, *, first: int = 0, on_step: Callable[[str | None], None] = lambda note: None
) -> TrainState:
    """The loop itself, from step `first` of the first epoch on."""
    state = replace(c.state, step=first)
    with Loader(Batches(c.samples, c.modalities, 0.3), c.loader, c.device) as loader:
        return train_epoch(
            c,
            state,
            fresh_meter(c.device),
            loader=loader,
            log=SilentLog(),
            timer=StepTimer(c.device),
            rates=RateMeter(),
            check=lambda state: None,
            save=lambda state, meter: None,
            stopping=lambda state: state.step >= first + steps,
            on_step=on_step,
        )[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2, "triplet_weight": 1.0, "circle_weight": 1.0, "sdm_form": "ce", "ema_decay": 0.9},
        {"clip": "fixed", "subsets": "single"},
        {"model": {"fusion": "tokens", "dropout": 0.2, "drop_path": 0.2}},
    ],
)
def test_the_host_asks_the_device_for_nothing_between_steps_where_something_is_due(options, monkeypatch):
    tolist: Callable[[Tensor], Any] = Tensor.tolist
    read: list[str] = []

    def counted(tensor: Tensor) -> Any:
        read.append("tolist")
        return tolist(tensor)

    def reads_of(first: int, steps: int) -> list[str]:
        """What `steps` steps read, but for one before them that also plans the epoch."""
        reads, done = HostReads(), 0

        def on_step(note: str | None) -> None:
            nonlocal done
            done += 1
            if done == 1:
                monkeypatch.setattr(Tensor, "tolist", counted)
                reads.__enter__()
            elif done == steps + 1:
                reads.__exit__(None, None, None)
                monkeypatch.setattr(Tensor, "tolist", tolist)

        train_some(c, steps + 1, first=first, on_step=on_step)
        found = reads.found + read
        read.clear()
        return found

    monkeypatch.setattr(augmentation, "_by_slices", augmentation._by_gather)  # the way that images on a device go
    # batches made by the thread, as beside a GPU: what it does with tensors of the host is no read of a device
    c = build(configure(epoch_length="80", log_every=10, norm_every=20, prefetch=2, **options), made_up())
    assert reads_of(0, 4) == []
    assert reads_of(11, 6) == []
    assert reads_of(8, 2) == ["tolist"]  # one copy of all that is logged
    assert reads_of(18, 2) == ["tolist", "tolist"]  # and one of the norms


# Selection, ends and results


def test_early_stopping_and_the_best_checkpoint_follow_validation(tmp_path):
    outcome = run(configure(epochs=30, patience=2, lr=0.02, select="NIR+SK/R1"), tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "valid"]
    values = [line["NIR+SK/R1"] for line in lines]
    best = values.index(max(values))
    assert len(values) == best + 3 < 30
    assert outcome.progress.best_epoch == lines[best]["epoch"]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.safetensors")["progress"]["best"] == max(values)
    assert outcome.metrics is not None
    assert outcome.metrics["valid"]["NIR+SK/R1"] == max(values)


def test_without_a_validation_part_the_last_weights_are_tested_and_it_is_said(tmp_path):
    people = made_up(held_out=False)
    config = configure(epochs=2, select="anything")
    outcome = run(config, tmp_path, people)
    assert outcome.metrics is not None
    assert list(outcome.metrics) == ["test"]
    assert outcome.progress.best_epoch == 1
    assert "testing the last weights: nobody is held out to validate on" in said(tmp_path)
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_without_a_test_part_validation_is_reported_and_it_is_said(tmp_path):
    people = made_up(tested=False)
    c = build(configure(), people)
    with RunLog(tmp_path, say=lambda line: None) as log, StopSignal(say=print) as stop:
        outcome = fit(c, tmp_path, log=log, stop=stop)
    result = write_result(c, tmp_path, outcome, notes=["a note"], command="train", git=None)
    assert list(result["metrics"]) == ["valid"]
    assert "nobody to test on: what is reported is validation" in said(tmp_path)


def test_people_without_either_part_are_refused():
    with pytest.raises(ValueError, match=r"nobody to validate or to test on.*--val-share 0\.2"):
        build(configure(), made_up(held_out=False, tested=False))


def test_rgb_alone_is_trained_and_ranked(tmp_path):
    config = configure(sdm_weight=0.0, triplet_weight=1.0, triplet_margin=0.0, select="RGB/mAP")
    outcome = run(config, tmp_path, made_up(others=False))
    assert outcome.metrics is not None
    assert outcome.metrics["test"]["RGB/mAP"] > 0


def test_what_is_watched_is_in_the_log(tmp_path):
    run(configure(epochs=1), tmp_path, made_up(partial=True))
    text = said(tmp_path)
    for line in (
        "\u5f00\u59cb\u7f13\u5b58\u6570\u636e\u96c6\u5143\u4fe1\u606f\uff0c\u517124\u4e2a\u6837\u672c...",
        "\u53ef\u914d\u5bf9ID\u6570: 6 (75.0%)",
        "24 samples of 8 identities, of which 6 (75.0%) have RGB and another modality",
        "loader: workers=0, prefetch=0: batches",
        "75.0% of the identities pairable",
        "to look at: fewer than 80% pairable",
    ):
        assert line in text
    assert WINDOWS_LINE not in text
    (health,) = [line for line in text.splitlines() if "epoch 1: " in line and "steps/s" in line]
    assert "samples/s" in health
    assert "memory" in health


def test_the_result_has_metrics_with_their_protocol_and_a_short_table(tmp_path):
    c = build(configure(epochs=1), made_up())
    with RunLog(tmp_path, say=lambda line: None) as log, StopSignal(say=print) as stop:
        outcome = fit(c, tmp_path, log=log, stop=stop)
    result = write_result(c, tmp_path, outcome, notes=[], command="train", git="abc")
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["metrics"]["test"]["protocol"] == result["protocol"]
    assert result["table_columns"][0] == "model"
    assert {"MM/mAP", "MM-1/mAP", "MM-4/mAP"} <= set(result["table_columns"])
    assert not any("NIR" in name for name in result["table_columns"])
    assert result["table"][0]["model"] == "reid"
    assert len(result["table"]) >= 3
    assert result["data"]["samples per epoch"] == c.steps_per_epoch * 8


def test_re_ranked_metrics_are_a_row_of_their_own():
    columns, rows = result_table({"MM/mAP": 0.5, "NIR/mAP": 0.4, "MM re-ranked/mAP": 0.6}, {"chance": {"MM/mAP": 0.1}})
    assert columns == ["model", "MM/mAP"]
    assert [(row["model"], row["MM/mAP"]) for row in rows] == [("reid", 0.5), ("reid re-ranked", 0.6), ("chance", 0.1)]


def test_an_unknown_selection_metric_and_impossible_ranks_are_named():
    with pytest.raises(ValueError, match=r'select is "mAP"; --select must be LIST/FIGURE.*NIR\+SK'):
        build(configure(select="mAP"), made_up())
    with pytest.raises(ValueError, match=r"ks are \[0\]; --ks needs"):
        build(configure(ks=(0,)), made_up())


# Checkpoints


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lr": 0.02}, "config.training.lr: 0.003 in the checkpoint, 0.02 now"),
        ({"model": {"rank": 1}}, "config.model.rank"),
        ({"data": {"max_tokens": 40}}, "config.data.max_tokens"),
        ({"modality_dropout": 0.1}, "config.training.modality_dropout"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_differing_key(change, key, tmp_path):
    run(configure(epochs=1, epoch_length="2"), tmp_path)
    with pytest.raises(MismatchError, match=key):
        run(configure(epochs=1, epoch_length="2", **change), tmp_path, resume=True)


def test_a_checkpoint_of_other_people_is_refused(tmp_path):
    run(configure(epochs=1, epoch_length="2"), tmp_path)
    with pytest.raises(MismatchError, match=r"data\.fingerprint"):
        run(configure(epochs=1, epoch_length="2"), tmp_path, replace(made_up(), fingerprint="other"), resume=True)


def test_what_changes_no_weight_may_differ_on_resume(tmp_path):
    run(configure(epochs=1, epoch_length="2"), tmp_path)
    changes: dict[str, Any] = {"log_every": 7, "keep": 5, "prefetch": 5, "rerank": True, "memory_mib": 1}
    run(configure(epochs=1, epoch_length="2", **changes), tmp_path, resume=True)


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    c = build(configure(epochs=3), made_up())
    done = 0

    def poison(note: str | None) -> None:
        nonlocal done
        done += 1
        if done == c.steps_per_epoch + 1:
            with torch.no_grad():
                next(c.state.model.parameters()).fill_(float("nan"))

    with (
        RunLog(tmp_path, say=lambda line: None) as log,
        StopSignal(say=print) as stop,
        pytest.raises(
            NonFiniteError, match=rf"since step {c.steps_per_epoch + 2}; the last good checkpoint is .*step-"
        ),
    ):
        fit(c, tmp_path, log=log, stop=stop, on_step=poison)
    found = newest_checkpoint(tmp_path / "checkpoints", warn=print)
    assert found is not None
    assert all(torch.isfinite(value).all() for value in found[1]["model"].values())


def test_averaged_weights_are_what_is_validated_and_tested(tmp_path):
    config = configure(epochs=1, ema_decay=0.8, clip="off")
    people = made_up()
    outcome = run(config, tmp_path, people)
    assert isinstance(outcome.state.ema, ReID)
    c = build(config, people)
    average = torch.cat([p.detach().flatten() for p in c.state.model.parameters()])
    for count in range(1, c.steps_per_epoch + 1):
        fresh = build(config, people)
        now = torch.cat([p.detach().flatten() for p in steps_of(fresh, count).model.parameters()])
        average = 0.8 * average + 0.2 * now
    found = torch.cat([p.flatten() for p in outcome.state.ema.parameters()])
    torch.testing.assert_close(found, average, rtol=1e-4, atol=1e-6)
    again = evaluate(outcome.state.ema, people, "test", config=config, token_CL=c.token_CL)
    assert outcome.metrics is not None
    assert outcome.metrics["test"] == again


# Precision, start, compilation


def test_a_gpu_that_computes_bf16_trains_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision(TrainConfig().precision, torch.device("cuda"))[0] == "bf16"
    c = build(configure(), made_up())
    batch = augmented(c, Batches(c.samples, c.modalities, 0.0)[epoch_keys(c, epoch=0)[0]], epoch=0, number=0)
    seen = []

    def look(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return loss_fn(model, batch, training=c.config.training, with_norms=True)

    state, output = amp_step(c.state, [batch], look, amp=replace(c.amp, precision="bf16"), clip=c.clip)
    assert seen == [(True, torch.bfloat16)]
    assert not state.scaler.is_enabled()
    assert all(value.isfinite() and value.dtype == torch.float32 for value in (output.loss, *output.scalars.values()))


def test_weights_to_start_from_must_be_there():
    with pytest.raises((ValueError, OSError), match=r"nowhere\.safetensors"):
        build(configure(init="nowhere.safetensors"), made_up())


def test_sizes_that_patches_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"images of 16 x 8 cannot be cut into patches of 5 x 5"):
        build(configure(model={"patch": 5}), made_up())


def test_compile_that_fails_is_said_once_and_training_goes_on_as_without(tmp_path, monkeypatch):
    plain = run(configure(epochs=1), tmp_path / "plain")

    def broken(self: torch.nn.Module, *args: object, **kwargs: object) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("no compiler here")

        self._compiled_call_impl = fail

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    found = run(configure(epochs=1, compile="reduce-overhead"), tmp_path / "compiled")
    line = "warning: --compile has no effect here, training goes on without it: no compiler here"
    assert said(tmp_path / "compiled").count(line) == 1
    assert torch.equal(weights(plain), weights(found))


def test_the_learning_rate_is_a_function_of_the_step():
    c = build(configure(epochs=4, warmup_steps=4, min_lr=0.1), made_up())
    factors = [learning_rate_factor(c, step) for step in range(4 * c.steps_per_epoch + 1)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
def test_a_run_on_cuda_learns(precision, tmp_path):
    outcome = run(configure(epochs=6, eval_every=3, temperature=0.1, device="cuda", precision=precision), tmp_path)
    assert outcome.metrics is not None
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_steps_on_cuda_wait_for_nothing():
    c = build(configure(epoch_length="40", log_every=50, norm_every=50, device="cuda"), made_up())
    train_some(c, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_some(c, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
