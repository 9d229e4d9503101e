"""Views: their random numbers, and each step against torchvision with the same parameters."""

import dataclasses
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from moco_ext.data import Augmentation, TwoCropsTransform, augment_batch
from moco_ext.data.augment import (
    _Choices,
    blur,
    color_transform,
    crop_boxes,
    file_crops,
    gaussian_kernels,
    of_each_view,
    shift_hue,
)
from moco_ext.data.seeds import hash_seeds, uniforms
from moco_ext.ops import color_steps

pytest.importorskip("torchvision")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeds(n, seed=0):
    return torch.from_numpy(hash_seeds(seed, torch.arange(n)))


def still(size, **changes):
    """An augmentation with ``changes`` only."""
    nothing = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "jitter": (0, 0, 0, 0), "gray_p": 0.0, "flip_p": 0.0}
    return Augmentation(size, **(nothing | changes))


# --- random numbers -----------------------------------------------------------------------------------------


def test_uniforms_are_splitmix64():
    # The first three outputs of the reference implementation with seed 1234567, as published by its author.
    outputs = np.array([6457827717110365317, 3203168211198807973, 9817491932198370423], np.uint64)
    assert uniforms(torch.tensor([1234567]), 3)[0].tolist() == ((outputs >> np.uint64(40)) / 2**24).tolist()


def test_uniforms_are_uniform_and_independent():
    numbers = torch.from_numpy(uniforms(seeds(20_000), 34)).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    error = 1 / math.sqrt(12 * len(numbers))
    assert (numbers.mean(0) - 0.5).abs().max() < 4.5 * error
    assert (numbers.var(0) - 1 / 12).abs().max() < 0.003
    correlations = torch.corrcoef(torch.cat([numbers[:-1], numbers[1:]], dim=1).T) - torch.eye(68)
    assert correlations.abs().max() < 5 / math.sqrt(len(numbers))  # of neighboring numbers and rows


def test_uniforms_can_start_anywhere():
    assert np.array_equal(uniforms(seeds(5), 10, start=22), uniforms(seeds(5), 32)[:, 22:])


def test_hash_seeds_depends_on_every_argument():
    values = {int(hash_seeds(*names)) for names in [(0, 1), (1, 0), (0, 0), (0,), (0, 0, 0), (-1, 0), (2**63, 0)]}
    assert len(values) == 7
    assert all(0 <= value < 2**63 for value in values)
    assert hash_seeds(3, torch.tensor([5, 6])).tolist() == [int(hash_seeds(3, 5)), int(hash_seeds(3, 6))]


# --- crops --------------------------------------------------------------------------------------------------


def boxes(n, height, width, scale, ratio, whole=False, seed=0):
    return torch.from_numpy(crop_boxes(uniforms(seeds(n, seed), 22), height, width, scale, ratio, whole)).double()


def test_crop_boxes_have_the_published_distribution():
    top, left, height, width = boxes(40_000, 100, 200, (0.2, 1.0), (3 / 4, 4 / 3)).T
    area, aspect = height * width / 20_000, width / height
    assert 0.2 <= area.min() < 0.205
    assert area.max() <= 2 / 3 + 1e-6  # 4:3 in an image of 2:1
    assert 3 / 4 - 1e-5 <= aspect.min() < 0.76
    assert 1.32 < aspect.max() <= 4 / 3 + 1e-5
    # Every box is inside the image, its position uniform.
    for corner, side, room in ((top, height, 100), (left, width, 200)):
        assert corner.min() >= 0
        assert (corner + side).max() <= room + 1e-4
        place = (corner / (room - side))[side < 0.9 * room]
        assert abs(place.mean() - 0.5) < 0.01
        assert abs(place.var() - 1 / 12) < 0.003


@pytest.mark.parametrize("whole", [False, True])
def test_crop_boxes_agree_with_torchvision(whole):
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(8, (0.2, 1.0))
    image = torch.zeros(1, 120, 100)
    torch.manual_seed(0)
    params = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).double()
    ours = boxes(4000, 120, 100, (0.2, 1.0), (3 / 4, 4 / 3), whole)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]).double()
    # In pixels. Standard error of a quantile of 4,000 draws: below 0.8; torchvision rounds to whole pixels.
    torch.testing.assert_close(ours.quantile(quantiles, 0), theirs.quantile(quantiles, 0), atol=3, rtol=0)
    if whole:
        assert torch.equal(ours, ours.round())
        assert (ours[:, :2] >= 0).all()
        assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([120, 100])).all()
        assert (ours[:, 0] + ours[:, 2]).max() == 120  # the last position occurs too


def test_crop_boxes_fall_back_to_the_center():
    want = torch.tensor([0.0, 45, 10, 10]).double().expand(5, 4)
    torch.testing.assert_close(boxes(5, 10, 100, (1.0, 1.0), (1.0, 1.0)), want)
    assert torch.equal(boxes(5, 10, 100, (1.0, 1.0), (1.0, 1.0), whole=True), want)


def test_file_crops_agree_with_torchvision():
    from torchvision.transforms.v2 import functional

    image = torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8, generator=generator())
    augmentation = Augmentation.v1(32)
    views = file_crops(image, augmentation, seeds(3))
    for view, seed in zip(views, seeds(3), strict=True):
        box = crop_boxes(uniforms(seed[None], 22), 90, 70, augmentation.scale, augmentation.ratio, whole=True)[0]
        assert torch.equal(view, functional.resized_crop(image, *map(int, box), [32, 32], antialias=True))


def test_a_full_crop_is_the_image_and_a_flip_its_mirror():
    images = torch.rand(4, 3, 9, 9, generator=generator())
    torch.testing.assert_close(augment_batch(images, still(9), seeds(4)), images, atol=1e-5, rtol=0)
    mirrored = augment_batch(images, still(9, flip_p=1.0), seeds(4))
    torch.testing.assert_close(mirrored, images.flip(3), atol=1e-5, rtol=0)


# --- colors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Augmentation.v1, Augmentation.v2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_each_view_equals_torchvisions_steps_in_the_views_order(recipe, dtype):
    """torchvision's functions, with each image's random parameters and order, give the same view."""
    from torchvision.transforms.v2 import functional as tv

    augmentation = recipe(64)
    images = torch.rand(24, 3, 64, 64, generator=generator())
    if dtype == torch.uint8:
        images = (images * 255).round().to(torch.uint8)
    got = color_transform(images, augmentation, seeds(24))
    assert got.dtype == dtype
    choices = _Choices.of(augmentation, seeds(24), images.device)
    assert len({tuple(order) for order in choices.order.tolist()}) > 10
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for i, image in enumerate(images):
        view = image / 255 if dtype == torch.uint8 else image
        if augmentation.gray_first and choices.gray[i]:
            view = tv.rgb_to_grayscale(view, 3)
        for step in choices.order[i]:
            view = adjust[step](view, choices.factors[i, step].item()) if step >= 0 else view
        if not augmentation.gray_first and choices.gray[i]:
            view = tv.rgb_to_grayscale(view, 3)
        if radius := choices.radius[i]:
            # torchvision reflects at the edges; PIL and we replicate: so blur a padded image, and crop
            wide = tv.pad(view, [int(radius)] * 4, padding_mode="edge")
            kernel = choices.kernels[i].max().item()
            sigma = _sigma_of(kernel, int(radius))
            view = tv.center_crop(tv.gaussian_blur(wide, [2 * int(radius) + 1] * 2, [sigma] * 2), [64, 64])
        if choices.flip[i]:
            view = tv.horizontal_flip(view)
        if dtype == torch.uint8:
            assert (got[i].int() - (view * 255).round().int()).abs().max() <= 1
        else:
            # torchvision's luma weights sum to 0.9999, ours (and PIL's) to 1
            torch.testing.assert_close(got[i], view, atol=2e-4, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (5, 37), (3, 64), (40, 19)])
@pytest.mark.parametrize("gray_first", [True, False])
def test_bytes_get_the_steps_that_floats_get(size, gray_first):
    """The native kernel, against torch's operations; sizes that do not fill its vectors, blurs wider than the image."""
    images = torch.randint(0, 256, (60, 3, *size), dtype=torch.uint8, generator=generator())
    augmentation = Augmentation(
        1, gray_first=gray_first, jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=0.8, blur_p=0.5, solarize_p=0.3, gray_p=0.3
    )
    want = color_transform(images / 255, augmentation, seeds(60)) * 255
    # Half a level of rounding; and what tips a value over the edge of solarization
    wrong = (color_transform(images, augmentation, seeds(60)) - want).abs() > 0.5 + 1e-3
    assert wrong.sum() <= want.numel() / 1e4
    no_hue = dataclasses.replace(augmentation, jitter=(0.4, 0.4, 0.4, 0.0), solarize_p=0.0)
    want = color_transform(images / 255, no_hue, seeds(60)) * 255
    assert (color_transform(images, no_hue, seeds(60)) - want).abs().max() <= 0.5 + 1e-3


def test_a_view_does_not_depend_on_the_number_of_threads():
    images = torch.randint(0, 256, (9, 3, 50, 41), dtype=torch.uint8, generator=generator())
    threads, views = torch.get_num_threads(), []
    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            views.append(color_transform(images, Augmentation.v2(64), seeds(9)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*views)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_older_processors(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "torchvisions_steps or bytes_get or solarization_is_pils"]
    done = subprocess.run(command, env=os.environ | {"MOCO_EXT_ISA": isa}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def good_steps():
    generator_ = generator()
    return {
        "images": torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=generator_),
        "steps": torch.tensor([[0, 5, 7], [3, -1, 6]]),
        "factors": torch.rand(2, 4, generator=generator_),
        "kernels": torch.tensor([[0.25, 0.5, 0.25]] * 2),
    }


def test_color_steps_opcheck():
    torch.library.opcheck(torch.ops.moco_ext.color_steps.default, tuple(good_steps().values()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", torch.zeros(2, 3, 8, 8), "images: expected uint8, got float32"),
        (
            "images",
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            r"images: expected shape \[N, 3, H, W\], got \[2, 1, 8, 8\]",
        ),
        ("steps", torch.zeros(2, 3), "steps: expected int64, got float32"),
        ("steps", torch.zeros(3, 3, dtype=torch.int64), r"steps: expected shape \[2, steps\], got \[3, 3\]"),
        ("steps", torch.full((2, 1), 8), "steps: expected -1 to 7, got 8"),
        ("factors", torch.zeros(2, 3), r"factors: expected shape \[2, 4\], got \[2, 3\]"),
        ("kernels", torch.zeros(2, 2), r"kernels: expected shape \[2, odd number\], got \[2, 2\]"),
    ],
)
def test_color_steps_names_the_argument(name, value, message):
    with pytest.raises(ValueError, match=message):
        color_steps(**(good_steps() | {name: value}))


def _sigma_of(peak, radius):
    """The sigma whose sampled, truncated Gaussian has that peak, by bisection."""
    low, high = 0.05, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        at = torch.arange(-radius, radius + 1).double()
        low, high = (middle, high) if torch.softmax(-0.5 * (at / middle) ** 2, 0).max() > peak else (low, middle)
    return middle


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.7, 2.0])
def test_blur_agrees_with_torchvision(sigma):
    from torchvision.transforms.v2 import functional

    images = torch.rand(2, 3, 40, 31, generator=generator())
    radius = math.ceil(3 * sigma)
    kernels = gaussian_kernels(torch.tensor([sigma, 0.3]), 8)
    want = functional.gaussian_blur(
        functional.pad(images[:1], [radius] * 4, padding_mode="edge"), 2 * radius + 1, sigma
    )
    got = blur(images, kernels)
    torch.testing.assert_close(got[:1], functional.center_crop(want, [40, 31]), atol=1e-6, rtol=0)
    assert (got[1:] - blur(images[1:], kernels[:1])).abs().max() > 0.01 or sigma < 0.4  # one kernel per image


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_spreads_as_far_as_pil(sigma):
    """The official blur is PIL's: box filters with the Gaussian's spread, but not its shape."""
    from PIL import Image, ImageFilter

    line = torch.zeros(31, 31)
    line[:, 15] = 255
    theirs = np.array(Image.fromarray(line.byte().numpy()).filter(ImageFilter.GaussianBlur(sigma)))[15]
    ours = blur(line[None, None], gaussian_kernels(torch.tensor([sigma]), 6))[0, 0, 15]
    spreads = []
    for profile in (torch.from_numpy(theirs).double(), ours.double()):
        spreads.append(((profile * (torch.arange(31) - 15) ** 2).sum() / profile.sum()).sqrt().item())
    assert abs(spreads[0] - spreads[1]) < 0.06  # pixels; PIL rounds to bytes three times
    assert abs(spreads[1] - sigma) < 0.06


@pytest.mark.parametrize("shift", [-0.5, -0.4, -0.1, 0.0, 0.25, 0.5])
def test_shift_hue_agrees_with_torchvision(shift):
    from torchvision.transforms.v2 import functional

    images = torch.rand(3, 3, 6, 6, generator=generator())
    images[0] = images[0, :1]  # gray has no hue to shift
    images[1] = images[1].round()  # the corners of the cube, where two channels are equal
    expected = functional.adjust_hue(images, shift)
    torch.testing.assert_close(shift_hue(images, torch.tensor(shift).view(1, 1, 1, 1)), expected, atol=1e-5, rtol=0)


def deformed(size):
    return Augmentation.v2(size, rotate=15.0, elastic=50.0, erase_p=0.5)


@pytest.mark.parametrize("recipe", [Augmentation.v1, Augmentation.v2, deformed])
def test_a_view_does_not_depend_on_its_batch(recipe):
    """Bit for bit: alone, in another order, or in a batch large enough to be processed in chunks."""
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=generator())
    together = color_transform(images, recipe(64), seeds(40))
    for i in (0, 17, 39):
        assert torch.equal(color_transform(images[i : i + 1], recipe(64), seeds(40)[i : i + 1])[0], together[i])
    assert torch.equal(color_transform(images.flip(0), recipe(64), seeds(40).flip(0)).flip(0), together)
    small = augment_batch(images, recipe(16), seeds(40))
    assert torch.equal(augment_batch(images[5:9], recipe(16), seeds(40)[5:9]), small[5:9])


def test_each_image_has_its_own_random_numbers():
    one = torch.rand(1, 3, 12, 12, generator=generator())
    views = augment_batch(one.expand(64, -1, -1, -1), Augmentation.v1(12), seeds(64))
    distances = torch.cdist(views.flatten(1), views.flatten(1)) + torch.eye(64)
    assert distances.min() > 0.1
    assert views.min() >= 0
    assert views.max() <= 1


def test_input_images_are_not_modified():
    for dtype in (torch.float32, torch.uint8):
        images = (torch.rand(6, 3, 64, 64, generator=generator()) * (1 if dtype.is_floating_point else 255)).to(dtype)
        before = images.clone()
        color_transform(images, Augmentation.v2(64), seeds(6))
        augment_batch(images, Augmentation.v2(64), seeds(6))
        assert torch.equal(images, before)


def test_probabilities_of_flip_grayscale_jitter_and_blur():
    images = torch.rand(1, 3, 4, 4, generator=generator()).expand(4000, -1, -1, -1)

    def share(changed):
        return changed.double().mean().item()

    flat = augment_batch(images, still(4, flip_p=0.5), seeds(4000))
    assert abs(share((flat - images).abs().amax((1, 2, 3)) > 1e-3) - 0.5) < 0.03  # 4 standard errors
    gray = augment_batch(images, still(4, gray_p=0.2), seeds(4000))
    assert abs(share((gray - gray[:, :1]).abs().amax((1, 2, 3)) < 1e-6) - 0.2) < 0.03
    jittered = augment_batch(images, still(4, jitter=(0.4, 0, 0, 0), jitter_p=0.8), seeds(4000))
    assert abs(share((jittered - images).abs().amax((1, 2, 3)) > 1e-4) - 0.8) < 0.03
    blurred = augment_batch(images, still(4, blur_p=0.5, blur_sigma=(1.0, 2.0)), seeds(4000))
    assert abs(share((blurred - images).abs().amax((1, 2, 3)) > 1e-2) - 0.5) < 0.03


def test_brightness_and_contrast_are_uniform_in_their_range():
    images = torch.full((4000, 1, 2, 2), 0.5)
    factors = augment_batch(images, still(2, jitter=(0.4, 0, 0, 0)), seeds(4000))[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.015
    halves = torch.tensor([0.4, 0.6]).view(1, 1, 1, 2).expand(4000, 1, 2, 2)
    views = augment_batch(halves, still(2, jitter=(0, 0.4, 0, 0)), seeds(4000))
    torch.testing.assert_close(views.mean((1, 2, 3)), torch.full((4000,), 0.5))  # contrast preserves the mean
    spread = (views[:, 0, 0, 1] - views[:, 0, 0, 0]) / 0.2
    assert 0.6 - 1e-5 <= spread.min() < 0.61
    assert 1.39 < spread.max() <= 1.4 + 1e-5


def test_views_have_the_moments_of_torchvision_transforms():
    from torchvision.transforms import v2

    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=generator())
    theirs_once = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    recipe = still(8, gray_first=False, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
    torch.manual_seed(0)
    theirs = torch.stack([theirs_once(image) for _ in range(400)])
    ours = augment_batch(image.expand(4000, -1, -1, -1), recipe, seeds(4000))
    # A pixel's mean and deviation over 400 views: standard errors below 0.3 / sqrt(400) = 0.015.
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.05, rtol=0)
    assert math.isclose(ours.mean(), theirs.mean(), abs_tol=0.015)


def test_the_published_recipes():
    v1, v2 = Augmentation.v1(224), Augmentation.v2(224)
    assert (v1.gray_first, v1.jitter, v1.jitter_p, v1.blur_p) == (True, (0.4, 0.4, 0.4, 0.4), 1.0, 0.0)
    assert (v2.gray_first, v2.jitter, v2.jitter_p) == (False, (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (v2.blur_p, v2.blur_sigma) == (0.5, (0.1, 2.0))
    for recipe in (v1, v2):
        assert (recipe.scale, recipe.ratio, recipe.gray_p, recipe.flip_p) == ((0.2, 1.0), (3 / 4, 4 / 3), 0.2, 0.5)
    assert Augmentation.v2(32).blur_p == 0


def test_the_two_views_of_moco_v3():
    first = Augmentation.byol(224, flip_p=0.0)
    second = first.second
    for recipe in (first, second):
        assert (recipe.gray_first, recipe.jitter, recipe.jitter_p, recipe.gray_p) == (
            False,
            (0.4, 0.4, 0.2, 0.1),
            0.8,
            0.2,
        )
        assert recipe.flip_p == 0.0
    assert (first.blur_p, first.solarize_p) == (1.0, 0.0)
    assert (second.blur_p, second.solarize_p, second.second) == (0.1, 0.2, None)
    small = Augmentation.byol(32)
    assert (small.blur_p, small.second.blur_p, small.second.solarize_p) == (0.0, 0.0, 0.2)


def test_solarization_is_pils():
    from torchvision.transforms.v2.functional import solarize

    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    got = color_transform(images, still(16, solarize_p=1.0), seeds(1))
    assert torch.equal(got, solarize(images, 128))
    some = color_transform(images.expand(2000, -1, -1, -1), still(16, solarize_p=0.2), seeds(2000))
    share = (some == got).flatten(1).all(1).double().mean().item()
    assert share == pytest.approx(0.2, abs=0.04)  # 4.5 standard errors


def test_rotation_is_torchvisions():
    from torchvision.transforms.v2 import InterpolationMode, functional

    images = torch.rand(8, 1, 16, 16, generator=generator())
    got = color_transform(images, still(16, rotate=30.0), seeds(8))
    angles = 30 * (2 * uniforms(seeds(8), 1, start=33)[:, 0] - 1)
    assert np.abs(angles).max() > 15
    for image, angle, view in zip(images, angles.tolist(), got, strict=True):
        want = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        torch.testing.assert_close(view[:, 4:12, 4:12], want[:, 4:12, 4:12], atol=1e-4, rtol=0)  # inside of the edges


@pytest.mark.slow
def test_elastic_deformation_is_as_strong_as_torchvisions():
    from torchvision.transforms.v2 import ElasticTransform

    image = torch.linspace(0, 1, 64).expand(1, 64, 64)  # values are positions, so differences are displacements
    ours = color_transform(image.expand(600, 1, 64, 64), still(64, elastic=50.0), seeds(600)) - image
    torch.manual_seed(0)
    theirs = torch.stack([ElasticTransform(50.0, 5.0)(image) for _ in range(600)]) - image
    spread, wanted = (shift[..., 20:44, 20:44].std().item() for shift in (ours, theirs))
    assert spread == pytest.approx(wanted, rel=0.09)  # 3 standard errors
    assert 0.5 < 63 * spread < 1.5  # pixels


def test_erasing_sets_a_box_to_0_and_changes_nothing_else():
    images = torch.rand(2000, 1, 28, 28, generator=generator()) + 0.01
    plain, erased = (augment_batch(images, still(28, flip_p=0.5, erase_p=p), seeds(2000)) for p in (0.0, 0.25))
    gone = erased == 0
    assert torch.equal(erased, plain.masked_fill(gone, 0))
    area = gone[:, 0].double().mean((1, 2))
    assert (area > 0).double().mean() == pytest.approx(0.25, abs=0.04)  # 4 standard errors
    assert 0.01 < area[area > 0].min() < area.max() < 0.36  # torchvision's 0.02 to 0.33, and whole pixels
    for box in gone[area > 0, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)


def test_each_view_has_its_own_augmentation():
    images = torch.rand(6, 3, 16, 16, generator=generator())
    second = still(16, solarize_p=1.0)
    both = of_each_view(augment_batch, images, still(16, second=second), seeds(6))
    assert torch.equal(both[:3], augment_batch(images[:3], still(16), seeds(6)[:3]))
    assert torch.equal(both[3:], augment_batch(images[3:], second, seeds(6)[3:]))
    assert torch.equal(of_each_view(augment_batch, images, second, seeds(6)), augment_batch(images, second, seeds(6)))


def test_augment_batch_rejects_other_shapes():
    with pytest.raises(ValueError, match=r"images: expected shape \[N, 1 or 3"):
        augment_batch(torch.rand(1, 2, 8, 8), Augmentation.v1(8), seeds(1))
    with pytest.raises(ValueError, match=r"seeds: expected int64 \[2\], got torch.int64 \[3\]"):
        augment_batch(torch.rand(2, 3, 8, 8), Augmentation.v1(8), seeds(3))


def test_two_crops_transform_applies_the_transform_twice():
    draws = iter(range(10))
    assert TwoCropsTransform(lambda image: (image, next(draws)))("cat") == [("cat", 0), ("cat", 1)]
