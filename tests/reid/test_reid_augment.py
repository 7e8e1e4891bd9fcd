"""Augmented batches equal a loop over images and pixels; draws are a function of the generator and the position."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from apps.reid import augment as module
from apps.reid.augment import (
    CLIP_MEAN,
    CLIP_STD,
    MEAN_COLOUR,
    augment,
    centre_crop,
    draw_augment,
    fold_normalisation,
)
from shared.seed import make_generator

SOURCE, TARGET = (20, 12), (16, 8)


def draw_images(rows: int, height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (rows, 3, height, width), generator=make_generator(1), dtype=torch.uint8)


def slow_augment(image: Tensor, plan: list[int], target: tuple[int, int]) -> Tensor:
    """One image, pixel by pixel: crop, mirror, erase."""
    mirrored, crop_y, crop_x, top, left, bottom, right = plan
    height, width = target
    result = torch.empty(3, height, width, dtype=torch.uint8)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + crop_y, (width - 1 - x if mirrored else x) + crop_x
            inside = 0 <= from_y < image.shape[1] and 0 <= from_x < image.shape[2]
            erased = top <= y < bottom and left <= x < right
            result[:, y, x] = image[:, from_y, from_x] if inside and not erased else torch.tensor(MEAN_COLOUR)
    return result


def test_a_batch_equals_a_loop_over_its_images():
    image = draw_images(30, *SOURCE)
    plan = draw_augment(make_generator(3), 30, source=SOURCE, target=TARGET, pad=3)
    expected = torch.stack([slow_augment(*pair, TARGET) for pair in zip(image, plan.tolist(), strict=True)])
    assert torch.equal(augment(image, plan, target=TARGET), expected)
    # mirrored and not, inside the padding on every side, erased and not
    assert plan[:, 0].unique().tolist() == [0, 1]
    assert plan[:, 1].min() < 0 < SOURCE[0] - TARGET[0] < plan[:, 1].max()
    assert plan[:, 2].min() < 0 < SOURCE[1] - TARGET[1] < plan[:, 2].max()
    assert 0 < (plan[:, 5] == 0).sum() < 30


def test_the_images_themselves_stay_as_they_are():
    image = draw_images(4, *TARGET)
    before = image.clone()
    plan = draw_augment(make_generator(3), 4, source=TARGET, target=TARGET, erase=1.0)
    augment(image, plan, target=TARGET)
    assert torch.equal(image, before)


def test_without_chances_and_padding_nothing_changes():
    image = draw_images(5, *TARGET)
    plan = draw_augment(make_generator(0), 5, source=TARGET, target=TARGET, flip=0.0, pad=0, erase=0.0)
    assert not plan.any()
    assert torch.equal(augment(image, plan, target=TARGET), image)


def test_images_that_lie_apart_in_memory_are_read_right():
    image = draw_images(12, *SOURCE)[::3, :, :, 2:]
    plan = draw_augment(make_generator(3), 4, source=(20, 10), target=TARGET)
    assert torch.equal(augment(image, plan, target=TARGET), augment(image.contiguous(), plan, target=TARGET))


def test_draws_depend_on_the_generator_and_the_position_alone():
    def plan(rows: int, step: int) -> Tensor:
        return draw_augment(make_generator(5, epoch=2, step=step), rows, source=SOURCE, target=TARGET)

    assert torch.equal(plan(50, 7), plan(50, 7))
    assert torch.equal(plan(50, 7)[:9], plan(9, 7))
    assert not torch.equal(plan(50, 7), plan(50, 8))


def test_chances_offsets_and_rectangles_are_as_asked_for():
    rows, (height, width) = 20_000, (64, 32)
    plan = draw_augment(
        make_generator(0), rows, source=(70, 32), target=(64, 32), flip=0.3, pad=2, erase=0.6, erase_area=(0.1, 0.4)
    )
    mirrored, crop_y, crop_x, top, left, bottom, right = plan.unbind(1)
    assert abs(mirrored.double().mean() - 0.3) < 0.02
    for offset, last in ((crop_y, 70 + 4 - 64), (crop_x, 4)):
        counts = torch.bincount(offset + 2, minlength=last + 1)
        assert len(counts) == last + 1
        assert (counts / rows * (last + 1) - 1).abs().max() < 0.1
    erased = bottom > 0
    assert abs(erased.double().mean() - 0.6) < 0.02
    assert not plan[~erased][:, 3:].any()
    tall, wide = (bottom - top)[erased].double(), (right - left)[erased].double()
    assert top.min() >= 0
    assert left.min() >= 0
    assert bottom.max() <= height
    assert right.max() <= width
    share = tall * wide / (height * width)
    assert 0.08 < share.min() < 0.11
    assert 0.38 < share.max() < 0.43
    assert abs(share.mean() - 0.25) < 0.01
    assert 0.25 < (tall / wide).min() < 0.35
    assert 3 < (tall / wide).max() < 4
    # rectangles lie anywhere
    assert {0, height - 10} <= set(top[erased].tolist())
    assert abs((top + bottom)[erased].double().mean() - height) < 1
    assert abs((left + right)[erased].double().mean() - width) < 1


def test_what_is_drawn_for_an_image_is_drawn_independently():
    height, width = 64, 32
    plan = draw_augment(make_generator(0), 20_000, source=(70, 38), target=(height, width), erase=0.5)
    mirrored, crop_y, crop_x, top, left, bottom, right = plan.double().unbind(1)
    always = torch.corrcoef(torch.stack([mirrored, crop_y, crop_x, bottom.clamp(max=1)]))
    tall, wide = bottom - top, right - left
    places = torch.stack([mirrored, crop_y, crop_x, tall * wide, (top + 0.5) / (height + 1 - tall)])
    erased = torch.corrcoef(places[:, bottom > 0])
    for correlation in (always, erased):
        assert (correlation - torch.eye(len(correlation))).abs().max() < 0.05


@pytest.mark.parametrize("target", [(8, 8), (3, 60), (60, 3), (1, 1)])
def test_rectangles_fit_into_crops_of_any_shape(target):
    plan = draw_augment(make_generator(0), 500, source=target, target=target, erase=1.0, erase_area=(0.3, 1.0))
    top, left, bottom, right = plan[:, 3:].unbind(1)
    assert ((top >= 0) & (top < bottom) & (bottom <= target[0])).all()
    assert ((left >= 0) & (left < right) & (right <= target[1])).all()


def test_what_is_filled_in_is_nearly_zero_once_normalised():
    colour = torch.tensor(MEAN_COLOUR) / 255
    assert ((colour - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).abs().max() < 0.01


def test_a_crop_larger_than_the_padded_image_is_an_error():
    with pytest.raises(ValueError, match=r"a crop of 16 x 8 does not fit into images of 10 x 12 with 2 pixels"):
        draw_augment(make_generator(0), 1, source=(10, 12), target=TARGET, pad=2)
    with pytest.raises(ValueError, match=r"images of 10 x 12 hold no crop of 16 x 8"):
        centre_crop(draw_images(1, 10, 12), TARGET)


def test_the_centre_is_as_far_from_every_edge():
    image = draw_images(2, *SOURCE)
    assert torch.equal(centre_crop(image, TARGET), image[:, :, 2:18, 2:10])
    assert torch.equal(centre_crop(image, SOURCE), image)


def test_folded_weights_do_what_normalising_first_does():
    image = draw_images(3, 24, 16)
    weight = torch.randn(7, 3, 8, 8, generator=make_generator(0))
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    folded, bias = fold_normalisation(weight, mean, std)
    found = F.conv2d(image.float(), folded, bias, stride=8)
    normalised = (image.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    expected = F.conv2d(normalised, weight.double(), stride=8)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_folding_keeps_leading_axes_and_gradients():
    weight = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mean, std = torch.tensor(CLIP_MEAN, dtype=torch.float64), torch.tensor(CLIP_STD, dtype=torch.float64)
    folded, bias = fold_normalisation(weight, mean, std)
    assert folded.shape == weight.shape
    assert bias.shape == (2, 5)
    image = draw_images(1, 4, 4)
    (gradient,) = torch.autograd.grad((folded * image[0]).sum() + bias.sum(), weight)
    normalised = (image[0].double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(gradient, normalised.expand_as(weight))


@pytest.mark.parametrize("pad", [0, 3, 40])
def test_the_way_of_a_cpu_gives_what_that_of_a_gpu_gives(pad: int):
    image = draw_images(60, *SOURCE)
    plan = draw_augment(make_generator(1), 60, source=SOURCE, target=TARGET, pad=pad)
    assert torch.equal(module._by_slices(image, plan, TARGET), module._by_gather(image, plan, TARGET))


class _Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_and_no_operator_is_added_by_more_rows():
    counts = []
    for rows in (2, 50):
        image = draw_images(rows, *SOURCE)
        plan = draw_augment(make_generator(0), rows, source=SOURCE, target=TARGET)
        with _Calls() as calls:
            module._by_gather(image, plan, TARGET)
        assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]
        counts.append(len(calls.names))
    assert counts[0] == counts[1]
