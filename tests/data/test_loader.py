"""Order and content of batches: a function of (seed, epoch), whoever iterates."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import Subset, TensorDataset

import planish
from planish.data import BatchedTensorDataset, calibration_subset, make_loader, set_epoch
from planish.errors import PlanishError
from planish.models import Preprocessing

P = Preprocessing((1, 8, 8), (0.5,), (0.5,), crop_pct=1.0)
LABELS = np.arange(50) % 5


def images():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8)
    return BatchedTensorDataset(pixels, LABELS, P, augment=True)


def fingerprint(loader):
    digest = hashlib.sha256()
    for x, y in loader:
        digest.update(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
    return digest.hexdigest()


def test_epochs_differ_and_each_can_be_had_again():
    loader = make_loader(images(), 8, shuffle=True, seed=1)
    prints = []
    for epoch in (0, 1, 2, 1):
        set_epoch(loader, epoch)
        prints.append(fingerprint(loader))
    assert len(set(prints)) == 3
    assert prints[3] == prints[1]
    assert fingerprint(make_loader(images(), 8, shuffle=True, seed=2)) != prints[0]
    assert sorted(torch.cat([y for _, y in loader]).tolist()) == sorted(LABELS.tolist())


def test_workers_and_global_state_change_nothing():
    state = torch.get_rng_state()
    inline, two = (make_loader(images(), 8, shuffle=True, seed=1, workers=w) for w in (0, 2))
    set_epoch(inline, 3)
    set_epoch(two, 3)
    assert fingerprint(inline) == fingerprint(two)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_process_gives_the_same_batches():
    here = make_loader(images(), 8, shuffle=True, seed=1)
    set_epoch(here, 2)
    code = (
        "import test_loader as t; l = t.make_loader(t.images(), 8, shuffle=True, seed=1); t.set_epoch(l, 2);"
        "print(t.fingerprint(l))"
    )
    path = f"{Path(__file__).parent}:{Path(planish.__path__[0]).parent}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == fingerprint(here)


def test_accelerate_keeps_the_order_counts_epochs_and_resumes_within_one():
    plain = make_loader(images(), 8, shuffle=True, seed=1)
    prepared = Accelerator(cpu=True).prepare(make_loader(images(), 8, shuffle=True, seed=1))
    for epoch in (0, 1):  # Accelerate advances the epoch by itself
        set_epoch(plain, epoch)
        assert fingerprint(prepared) == fingerprint(plain)
    resumed = Accelerator(cpu=True).prepare(make_loader(images(), 8, shuffle=True, seed=1))
    set_epoch(resumed, 1)
    rest, whole = list(skip_first_batches(resumed, 3)), list(plain)
    assert len(rest) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(rest, whole[3:], strict=True))


def test_every_process_count_of_accelerate_reaches_the_epoch():
    from accelerate.data_loader import prepare_data_loader

    for skipped in (0, 1):
        seen = []
        for rank in (0, 1):
            loader = prepare_data_loader(
                make_loader(images(), 5, shuffle=True, seed=1), num_processes=2, process_index=rank
            )
            loader.set_epoch(1)
            seen.append([x for x, _ in (skip_first_batches(loader, skipped) if skipped else loader)])
        plain = make_loader(images(), 5, shuffle=True, seed=1)
        set_epoch(plain, 1)
        merged = [x for pair in zip(*seen, strict=True) for x in pair]
        assert all(torch.equal(a, b) for a, (b, _) in zip(merged, list(plain)[2 * skipped :], strict=True))


def test_loaders_over_the_same_images_do_not_share_an_epoch():
    data = images()
    one, two = (make_loader(data, 8, shuffle=True, seed=1) for _ in range(2))
    before = fingerprint(one)
    set_epoch(two, 5)
    assert fingerprint(one) == before != fingerprint(two)


def test_augment_can_be_decided_by_the_loader():
    data = images()
    off = make_loader(data, 50, shuffle=False, seed=0, augment=False)
    on = make_loader(data.augmented(False), 50, shuffle=False, seed=0, augment=True)
    assert torch.equal(next(iter(off))[0], data.augmented(False).__getitems__(list(range(50))).images)
    kept = make_loader(data, 50, shuffle=False, seed=0)
    assert torch.equal(next(iter(kept))[0], data.__getitems__(list(range(50))).images)
    assert torch.equal(next(iter(on))[0], data.__getitems__(list(range(50))).images)


def test_any_data_set_and_subset_works():
    other = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))
    loader = make_loader(Subset(other, [3, 1, 4]), 2, shuffle=False, seed=0)
    assert torch.cat([y for _, y in loader]).tolist() == [3, 1, 4]


def test_drop_last_and_bad_arguments():
    assert len(list(make_loader(images(), 8, shuffle=True, seed=0, drop_last=True))) == 6
    for batch, kwargs, words in ((0, {}, "1 or more"), (51, {"drop_last": True}, "do not fill")):
        with pytest.raises(PlanishError, match=words):
            make_loader(images(), batch, shuffle=True, seed=0, **kwargs)


def test_calibration_is_balanced_plain_and_seeded():
    data = images()
    picked = calibration_subset(data, data.labels, 13, seed=0)
    counts = np.bincount(LABELS[picked.indices])
    assert len(set(picked.indices)) == 13
    assert counts.max() - counts.min() <= 1
    assert picked.indices == calibration_subset(data, data.labels, 13, seed=0).indices
    assert picked.indices != calibration_subset(data, data.labels, 13, seed=1).indices
    assert torch.equal(picked[0][0], data.augmented(False)[picked.indices[0]][0])


def test_calibration_fills_up_from_larger_classes_and_refuses_too_many():
    data = BatchedTensorDataset(np.zeros((12, 8, 8), np.uint8), [0] * 10 + [1] * 2, P)
    picked = calibration_subset(data, data.labels, 8)
    assert np.bincount([data.labels[i] for i in picked.indices]).tolist() == [6, 2]
    for n in (0, 13):
        with pytest.raises(PlanishError, match="choose 1 to 12"):
            calibration_subset(data, data.labels, n)
