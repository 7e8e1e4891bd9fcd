"""Flip, shifted crop and erasing of uint8 images, a whole batch at once; and the patch weights that read uint8 images.

Legend: R images, C channels, H and W height and width of the result, P patch size.

What is drawn depends on a generator of the CPU alone, so that a step is the same on every device. Applying it reads
nothing back from the device.
"""

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB values in 0..1, as CLIP was trained
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(round(255 * mean) for mean in CLIP_MEAN)  # nearly zero once normalised

ASPECT = (0.3, 1 / 0.3)  # height / width of an erased rectangle
_COLUMNS = 7


def draw_augment(
    generator: torch.Generator,
    rows: int,
    *,
    source: tuple[int, int],
    target: tuple[int, int],
    flip: float = 0.5,
    pad: int = 10,
    erase: float = 0.5,
    erase_area: tuple[float, float] = (0.02, 0.4),
) -> Tensor:
    """What happens to each image: [R, 7] int64 on the CPU, which `augment` takes once it is on the images' device.

    Columns: 1 if mirrored; first row and column of the crop in the source (negative or beyond its end inside the
    padding); top, left, bottom, right of the erased rectangle in the crop, bottom and right excluded, all 0 for none.
    source, target: (height, width) before and after. pad: pixels around the source that a crop may reach into. flip,
    erase: probabilities. erase_area: smallest and largest share of the crop. An image's draws depend on its position
    alone, not on how many follow it.
    """
    height, width = target
    free_y, free_x = source[0] + 2 * pad - height, source[1] + 2 * pad - width
    if min(free_y, free_x) < 0:
        raise ValueError(
            f"a crop of {height} x {width} does not fit into images of {source[0]} x {source[1]} with {pad} pixels of "
            "padding; prepare larger images or pad more"
        )
    draw = torch.rand(rows, _COLUMNS + 1, generator=generator, dtype=torch.float64)
    mirrored = draw[:, 0] < flip
    crop_y, crop_x = _below(draw[:, 1], free_y + 1) - pad, _below(draw[:, 2], free_x + 1) - pad
    share = erase_area[0] + (erase_area[1] - erase_area[0]) * draw[:, 3]
    # only aspects at which a rectangle of that area fits, so that nothing has to be drawn again
    lowest = (share * height / width).clamp(min=ASPECT[0])
    highest = (height / (width * share)).clamp(max=ASPECT[1])
    aspect = lowest * (highest / lowest).clamp(min=1.0) ** draw[:, 4]
    area = share * (height * width)
    tall = (area * aspect).sqrt().round().clamp(1, height)
    wide = (area / aspect).sqrt().round().clamp(1, width)
    erased = draw[:, 7] < erase
    top, left = _below(draw[:, 5], height - tall + 1) * erased, _below(draw[:, 6], width - wide + 1) * erased
    bottom, right = top + tall.long() * erased, left + wide.long() * erased
    return torch.stack([mirrored.long(), crop_y, crop_x, top, left, bottom, right], dim=1)


def _below(draw: Tensor, bound: Tensor | int) -> Tensor:
    """Integers 0 .. bound - 1 from numbers in [0, 1)."""
    return (draw * bound).floor().long()


def augment(image: Tensor, plan: Tensor, *, target: tuple[int, int]) -> Tensor:
    """The images as the plan says: [R, 3, H, W] uint8 from images of one size, [R, 3, any, any] uint8.

    plan: [R, 7] int64 of `draw_augment`, on the images' device. Padding and erased rectangles have the mean colour,
    which is nearly zero once normalised.
    """
    return (_by_slices if plan.device.type == "cpu" else _by_gather)(image, plan, target)


def _by_slices(image: Tensor, plan: Tensor, target: tuple[int, int]) -> Tensor:
    """Image by image: on a CPU copies of whole rows are several times as fast as a gather, and the plan is at hand."""
    rows, channels, source_height, source_width = image.shape
    height, width = target
    result = image.new_empty(rows, channels, height, width)
    colour = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None]
    for row, (mirrored, y, x, top, left, bottom, right) in enumerate(plan.tolist()):
        out = result[row]
        first_y, first_x = min(max(0, -y), height), min(max(0, -x), width)
        end_y = max(first_y, min(height, source_height - y))
        end_x = max(first_x, min(width, source_width - x))
        if (end_y - first_y, end_x - first_x) != (height, width):
            out.copy_(colour)
        inside = image[row, :, y + first_y : y + end_y, x + first_x : x + end_x]
        if mirrored:
            out[:, first_y:end_y, width - end_x : width - first_x] = inside.flip(2)
        else:
            out[:, first_y:end_y, first_x:end_x] = inside
        if bottom > top:
            out[:, top:bottom, left:right] = colour
    return result


def _by_gather(image: Tensor, plan: Tensor, target: tuple[int, int]) -> Tensor:
    """All images at once: a fixed number of operations, nothing of the plan is read."""
    rows, channels, source_height, source_width = image.shape
    height, width = target
    mirrored, crop_y, crop_x, top, left, bottom, right = (column[:, None] for column in plan.unbind(1))
    y = torch.arange(height, device=image.device)
    x = torch.arange(width, device=image.device)
    x_RW = torch.where(mirrored.bool(), width - 1 - x, x) + crop_x
    y_RH = y + crop_y
    # rows of pixels first, as whole copies; then the pixels of each row
    first = torch.arange(rows * channels, device=image.device).view(rows, channels, 1) * source_height
    lines = first + y_RH.clamp(0, source_height - 1)[:, None]
    taken = image.reshape(-1, source_width).index_select(0, lines.view(-1)).view(rows, channels, height, source_width)
    columns = x_RW.clamp(0, source_width - 1)[:, None, None].expand(rows, channels, height, width)
    result = taken.gather(3, columns)
    # bytes of 0 or 255, which veil a pixel by & and |
    outside_RH, outside_RW = _veil((y_RH < 0) | (y_RH >= source_height)), _veil((x_RW < 0) | (x_RW >= source_width))
    erased_RH, erased_RW = _veil((y >= top) & (y < bottom)), _veil((x >= left) & (x < right))
    veil_RHW = (outside_RH[:, :, None] | outside_RW[:, None]) | (erased_RH[:, :, None] & erased_RW[:, None])
    result &= ~veil_RHW[:, None]
    for channel, value in enumerate(MEAN_COLOUR):
        result[:, channel] |= veil_RHW & value
    return result


def _veil(mask: Tensor) -> Tensor:
    return mask.to(torch.uint8) * 255


def centre_crop(image: Tensor, target: tuple[int, int]) -> Tensor:
    """The middle of each image as a view, for evaluation: [..., H, W] from images that may have a margin."""
    height, width = target
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    if min(top, left) < 0:
        raise ValueError(
            f"images of {image.shape[-2]} x {image.shape[-1]} hold no crop of {height} x {width}; prepare larger ones"
        )
    return image[..., top : top + height, left : left + width]


def fold_normalisation(weight: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that do to bytes 0..255 what `weight` [..., C, P, P] without a bias does to normalised images.

    mean, std: [C], of values in 0..1. Differentiable: training may move the unfolded weight, whose scale learning rates
    and pretrained values are made for.
    """
    bias = -(weight * (mean / std)[:, None, None]).sum((-3, -2, -1))
    return weight / (255 * std)[:, None, None], bias
