"""The ORL faces as a table that reid reads: people to train on, new people to find, and two modalities derived.

    python -m benchmarks.orl_faces ORL_FOLDER runs/orl-faces
    python -m apps.reid prepare runs/orl-faces/table.csv runs/orl-faces.safetensors --height 56 --width 48
    python -m apps.reid train --config faces --data-path runs/orl-faces.safetensors

ORL_FOLDER holds s1/1.pgm to s40/10.pgm, 92 x 112 grey pixels. The last `--test` identities are not trained on: their
images 1 and 2 are queries, 3 to 10 the gallery. The other modalities do not exist for these people: they are derived
from the same photographs (no sensor and no artist saw them), "nir" as a dark, blurred image, "sk" as its edges, and so
their figures say that the machinery works, not how people would be found.
"""

import argparse
import csv
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.reid.images import png_bytes, read_image
from shared.files import atomic_write_text

IMAGES = 10
QUERIES = 2
HEADER = ("path", "identity", "modality", "split")


def derived(image: Tensor) -> dict[str, Tensor]:
    """What is derived from a photograph [3, H, W] uint8: by modality, images of the same size."""
    grey = image[:1].float() / 255
    blurred = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    dark = blurred.pow(2.2)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    padded = F.pad(blurred[None], (1, 1, 1, 1), mode="replicate")
    slope = F.conv2d(padded, torch.stack([kernel, kernel.t()])[:, None]).pow(2).sum(1).sqrt()
    edges = 1 - (slope / slope.max()).clamp(0, 1)
    return {
        name: (value * 255).round().to(torch.uint8).expand(3, -1, -1) for name, value in (("nir", dark), ("sk", edges))
    }


def convert(source: Path, output: Path, *, test: int) -> Path:
    """Write the images and table.csv into `output`; gives the table."""
    people = sorted(
        (folder for folder in source.glob("s*") if folder.is_dir()), key=lambda folder: int(folder.name[1:])
    )
    if len(people) <= test:
        raise SystemExit(f"{source}: expected more than {test} folders s1, s2, ..., found {len(people)}")
    rows = []
    for place, folder in enumerate(people):
        target = output / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for number in range(1, IMAGES + 1):
            image = read_image(folder / f"{number}.pgm")
            split = "train"
            if place >= len(people) - test:
                split = "query" if number <= QUERIES else "gallery"
            for modality, pixels in {"rgb": image, **derived(image)}.items():
                if modality != "rgb" and split == "gallery":
                    continue
                file = target / f"{number}_{modality}.png"
                file.write_bytes(png_bytes(pixels))
                rows.append((f"{folder.name}/{file.name}", folder.name, modality, split))
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows([HEADER, *rows])
    atomic_write_text(output / "table.csv", table.getvalue())
    return output / "table.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a table of the ORL faces that reid reads.")
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--test", type=int, default=10, help="identities that are not trained on")
    arguments = parser.parse_args()
    print(convert(arguments.source, arguments.output, test=arguments.test))


if __name__ == "__main__":
    main()
