"""DINO-MC's views of a JPEG of 256 px: what a worker costs, and the whole, against PIL and torchvision.

Then the parts of what a worker does, and what one worker gives through the loader. Run it as `python
benchmarks/augmentation.py`. The usual way does all in the workers, image by image and view by view, with
torchvision's transforms on PIL images. Here the workers decode, crop, resize and flip in uint8, and colour
is for the training device; in the second line that is the CPU. One thread. First, each operation has to give
what torchvision gives on the same image, within 3 of 255 levels on average.
"""

import argparse
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import dino_mc
from benchmarks.timing import compare, median_seconds
from demo.scenes import write_dataset

MEAN, STD = common.IMAGENET_MEAN, common.IMAGENET_STD
NORMALISATION = argparse.Namespace(mean=MEAN, std=STD)
VIEWS = dino_mc.make_views("mc", 224, dino_mc.MC_SIZES, (0.32, 1.0), (0.05, 0.32))


class Blur:
    """PIL's Gaussian blur of a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blurs."""
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(0.1, 2.0).item()))


def pil_transform(view: dino_mc.View) -> transforms.Compose:
    """A view's recipe as torchvision's transforms on PIL images."""
    return transforms.Compose([
        transforms.RandomResizedCrop(view.size, view.scale, interpolation=view.interpolation),
        transforms.RandomHorizontalFlip(view.p_flip),
        transforms.RandomApply([transforms.ColorJitter(*view.jitter)], view.p_jitter),
        transforms.RandomGrayscale(view.p_gray),
        transforms.RandomApply([Blur()], view.p_blur),
        transforms.RandomApply([transforms.Lambda(ImageOps.solarize)], view.p_solarize),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def check(path: str) -> None:
    """Each operation against torchvision's on PIL images, with the same parameters."""
    image, tensor = Image.open(path).convert("RGB"), common.read_image(path)

    def same(ours: torch.Tensor, theirs: Image.Image, what: str) -> None:
        difference = 255 * (ours - TF.to_tensor(theirs)).abs().mean()
        assert difference < 3, f"{what}: {difference:.2f} levels"

    for view in VIEWS[1:]:
        box = 31, 17, 150, 190
        crop = dino_mc.resized_crop(tensor, *box, [view.size] * 2, view.interpolation)
        same(crop / 255, TF.resized_crop(image, *box, [view.size] * 2, view.interpolation), "crop")
    x, one = tensor[None] / 255, torch.ones(1, dtype=torch.bool)
    pairs = zip(common.ADJUSTMENTS, (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation,
                                     TF.adjust_hue), (1.3, 0.7, 1.4, 0.1), strict=True)
    for adjust, theirs, value in pairs:
        same(adjust(x.clone(), torch.tensor([value]))[0], theirs(image, value), theirs.__name__)
    same(common.grayscale(x.clone(), one)[0], TF.to_grayscale(image, 3), "grayscale")
    same(common.solarize(x.clone(), one)[0], ImageOps.solarize(image), "solarize")
    blurred = common.gaussian_blur(x.clone(), one, torch.tensor([1.5]))[0]
    same(blurred, image.filter(ImageFilter.GaussianBlur(1.5)), "blur")


def draw_jpegs(folder: Path, number: int) -> list[str]:
    """Writes scenes of 256 px as JPEG files to a new folder; returns their paths."""
    counts = {"train_per_class": -(-number // 10), "val_per_class": 1, "locations": 0, "dates": 1}
    write_dataset(folder, {**counts, "image_size": 256, "seed": 0})
    shutil.rmtree(folder / "val")
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=90)
        path.unlink()
    return sorted(map(str, folder.rglob("*.jpg")))[:number]


def print_parts(dataset: dino_mc.ViewDataset, paths: list[str], encoded: list[bytes]) -> None:
    """Milliseconds an image of decoding, reading, cropping, all of an item, and of 640 items by a worker."""
    images = [common.read_image(path) for path in paths]
    parts = {
        "JPEG decoding": lambda: [Image.open(io.BytesIO(data)).load() for data in encoded],
        "read_image": lambda: [common.read_image(path) for path in paths],
        "crops": lambda: [dataset._crop(image, view) for image in images for view in VIEWS],
        "item": lambda: [dataset[0, i] for i in range(len(paths))],
    }
    for name, part in parts.items():
        print(f"{name}: {1000 * median_seconds(part, rounds=15) / len(paths):.2f} ms an image")
    keys = [(epoch, i) for epoch in range(-(-640 // len(paths))) for i in range(len(paths))]
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size=16, sampler=keys, num_workers=1))
    next(loader)
    began = time.perf_counter()
    count = 16 * sum(1 for _ in loader)
    print(f"one worker, through the loader: {1000 * (time.perf_counter() - began) / count:.2f} ms an image")


def main() -> None:
    """Both comparisons, on drawn scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="of 256 px, in one batch")
    B = parser.parse_args().images
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_jpegs(Path(folder) / "data", B)
        for path in paths:
            check(path)
        encoded = [Path(path).read_bytes() for path in paths]
        pil = [pil_transform(view) for view in VIEWS]
        dataset = dino_mc.ViewDataset(common.Samples(paths), VIEWS, seed=0)
        generator = torch.Generator().manual_seed(0)

        def usual() -> None:
            for data in encoded:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                for transform in pil:
                    transform(image)

        def worker() -> None:
            for i in range(B):
                dataset[0, i]

        def whole() -> None:
            samples = [dataset[0, i] for i in range(B)]
            crops = [torch.stack(crops) for crops in zip(*samples, strict=True)]
            dino_mc.color_views(crops, VIEWS, NORMALISATION, generator)

        compare(f"worker, {B} images", worker, usual, rounds=15)
        compare(f"whole augmentation, {B} images", whole, usual, rounds=15)
        print_parts(dataset, paths, encoded)


if __name__ == "__main__":
    main()
