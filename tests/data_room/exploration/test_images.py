"""Facts of images and pictures that occur twice."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mgm_exp.data.exploration.image_facts import ImageFacts, measure_images
from mgm_exp.data.exploration.images import image_groups, image_statistics
from mgm_exp.data.exploration.perceptual_hash import look_alikes, perceptual_hash
from mgm_exp.data.exploration.processes import WorkerPool


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth blobs, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def measured(root: Path, names: list[str], workers: int = 1) -> ImageFacts:
    with WorkerPool(workers) as pool:
        return measure_images(root, names, len(names), pool, max_megapixels=50)


def test_the_hash_is_that_of_the_formula() -> None:
    pixels = np.asarray(picture(1).convert("L").resize((32, 32), Image.Resampling.BOX))
    low = [
        [
            sum(
                float(pixels[y, x])
                * math.cos(math.pi * (2 * y + 1) * v / 64)
                * math.cos(math.pi * (2 * x + 1) * u / 64)
                for y in range(32)
                for x in range(32)
            )
            for u in range(8)
        ]
        for v in range(8)
    ]
    flat = [value for row in low for value in row]
    middle = (sorted(flat)[31] + sorted(flat)[32]) / 2
    expected = sum(1 << (63 - place) for place, value in enumerate(flat) if value > middle)
    assert perceptual_hash(pixels) == expected


def test_facts_are_those_of_the_files(tmp_path: Path) -> None:
    picture(1, (100, 50)).save(tmp_path / "a.jpg")
    picture(2, (40, 80)).convert("L").save(tmp_path / "b.png")
    Image.new("RGB", (30, 30), "white").save(tmp_path / "blank.png")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:400])
    names = ["a.jpg", "gone.jpg", "b.png", "cut.jpg", "blank.png", "../a.jpg"]
    facts = measured(tmp_path, names)
    groups = image_groups(facts)
    found = image_statistics(facts, groups, rows_without=3, shared_paths=1)
    assert (found["count"], found["usable"], found["missing"], found["broken"]) == (6, 3, 1, 2)
    assert found["faults"] == {"missing": 1, "truncated": 1, "outside_root": 1}
    assert found["width_mean"] == pytest.approx((100 + 40 + 30) / 3)
    assert found["height_mean"] == pytest.approx((50 + 80 + 30) / 3)
    assert found["formats"] == {"PNG": 2, "JPEG": 1} and found["modes"] == {"RGB": 2, "L": 1}
    assert found["bytes_total"] == sum((tmp_path / name).stat().st_size for name in ("a.jpg", "b.png", "blank.png"))
    assert groups.blank == [4] and found["blank"] == 1


def test_copies_are_found_through_scaling_recompression_and_another_format(tmp_path: Path) -> None:
    original = picture(7, (320, 240))
    original.save(tmp_path / "0.png")
    original.save(tmp_path / "1.jpg", quality=60)
    original.resize((160, 120)).save(tmp_path / "2.jpg", quality=85)
    original.filter(ImageFilter.GaussianBlur(1)).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "0.png").read_bytes())
    names = ["0.png", "1.jpg", "2.jpg", "3.png", "4.png"]
    for seed in range(30):
        picture(100 + seed).save(tmp_path / f"other{seed}.png")
        names.append(f"other{seed}.png")
    groups = image_groups(measured(tmp_path, names))
    assert groups.alike == [[0, 1, 2, 3, 4]]
    assert groups.identical == [[0, 4]]


def test_nearly_empty_pictures_of_different_brightness_are_not_the_same() -> None:
    hashes = np.array([5, 5], dtype=np.uint64)
    assert look_alikes(hashes, np.array([[10] * 64, [200] * 64], dtype=np.uint8)) == []
    assert look_alikes(hashes, np.array([[10] * 64, [12] * 64], dtype=np.uint8)) == [[0, 1]]


def test_hashes_within_the_distance_are_found_wherever_they_differ() -> None:
    generator = np.random.default_rng(0)
    base = generator.integers(0, 1 << 63, 50, dtype=np.uint64)
    flipped = base.copy()
    for place in range(50):
        for bit in generator.choice(64, 4, replace=False):
            flipped[place] ^= np.uint64(1) << np.uint64(bit)
    glimpses = np.zeros((100, 64), dtype=np.uint8)
    assert len(look_alikes(np.concatenate([base, flipped]), glimpses)) == 50


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    names = []
    for seed in range(140):
        picture(seed, (24, 24)).save(tmp_path / f"{seed}.png")
        names.append(f"{seed}.png")
    (tmp_path / "17.png").unlink()
    one, two = measured(tmp_path, names), measured(tmp_path, names, workers=2)
    assert one.hash.tolist() == two.hash.tolist() and one.sha256.tobytes() == two.sha256.tobytes()
    assert one.faults == two.faults and list(one.faults) == [17]
