"""Orders, shards and failures of the loaders."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vje.data import ImageSet, derive_seed, load_dataset, make_loader


def numbered(count: int) -> torch.Tensor:
    """Images that say which they are."""
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def numbers(loader) -> list[list[int]]:
    return [images[:, 0, 0, 0].tolist() for images, _ in loader]


@pytest.fixture
def lazy(tmp_path):
    for i in range(20):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i:02d}.png")
    return load_dataset("folder", tmp_path, "all", image_size=4, residency="stream")


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
    loader = make_loader(numbered(20), 6, seed=1)
    assert len(loader) == 3
    first = numbers(loader)
    assert [len(batch) for batch in first] == [6, 6, 6]
    assert len(set(sum(first, []))) == 18  # noqa: RUF017
    assert numbers(loader) == first  # the order is a function of seed and epoch
    loader.batch_sampler.set_epoch(1)
    assert numbers(loader) != first
    resumed = make_loader(numbered(20), 6, seed=1)
    resumed.batch_sampler.set_epoch(1)
    assert numbers(resumed) == numbers(loader)
    assert numbers(make_loader(numbered(20), 6, seed=2)) != first


def test_ranks_share_each_global_batch():
    whole = numbers(make_loader(numbered(21), 8, seed=3))
    ranks = [numbers(make_loader(numbered(21), 8, seed=3, rank=r, world_size=2)) for r in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_streaming_has_the_order_of_a_resident_loader(lazy):
    loader = make_loader(lazy, 6, seed=1, num_workers=0)
    resident = make_loader(numbered(20), 6, seed=1)
    for epoch in (0, 3):
        loader.batch_sampler.set_epoch(epoch)
        resident.batch_sampler.set_epoch(epoch)
        assert numbers(loader) == numbers(resident)
    shard = make_loader(lazy, 6, seed=1, num_workers=0, rank=1, world_size=2)
    shard.batch_sampler.set_epoch(3)
    assert numbers(shard) == [batch[3:] for batch in numbers(resident)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_worker_processes_change_nothing(lazy):
    loader = make_loader(lazy, 6, seed=1, num_workers=1)
    alone = make_loader(lazy, 6, seed=1, num_workers=0)
    for epoch in (0, 1):  # the workers stay alive between epochs and must see the new order
        loader.batch_sampler.set_epoch(epoch)
        alone.batch_sampler.set_epoch(epoch)
        assert numbers(loader) == numbers(alone)


def test_a_damaged_file_leaves_every_batch_full(lazy, caplog):
    for i in (3, 7):
        with open(lazy.paths[i], "wb") as file:
            file.write(b"damaged")
    loader = make_loader(lazy, 5, seed=1, num_workers=0)
    for _ in range(2):
        batches, failed = zip(*loader, strict=True)
        assert [len(batch) for batch in batches] == [5] * 4
        assert {3, 7}.isdisjoint(torch.cat(batches)[:, 0, 0, 0].tolist())
        for some in failed:
            lazy.add_failed(some)
    assert sorted(path for path, _ in lazy.failed) == [lazy.paths[3], lazy.paths[7]]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 2


def test_the_next_image_stands_in_for_a_damaged_one_and_wholly_damaged_data_are_an_error(lazy):
    order = sum(numbers(make_loader(lazy, 2, seed=1, num_workers=0)), [])  # noqa: RUF017
    for i in (18, 19):
        with open(lazy.paths[i], "wb") as file:
            file.write(b"damaged")
    now = sum(numbers(make_loader(lazy, 2, seed=1, num_workers=0)), [])  # noqa: RUF017
    assert now == [0 if i in (18, 19) else i for i in order]
    for path in lazy.paths:
        with open(path, "wb") as file:
            file.write(b"damaged")
    _, failed = next(iter(make_loader(lazy, 2, num_workers=0)))
    assert sorted(path for path, _ in failed) == lazy.paths
    assert list(lazy.batches(6)) == []


@pytest.mark.parametrize("kind", ["resident", "stream", "workers"])
def test_a_pass_goes_on_where_it_was_left(lazy, kind):
    """Also where the first batch to be read is damaged."""

    def make():
        if kind == "resident":
            return make_loader(numbered(20), 4, seed=1)
        return make_loader(lazy, 4, seed=1, num_workers=2 * (kind == "workers"))

    whole, resumed = make(), make()
    for loader in (whole, resumed):
        loader.batch_sampler.set_epoch(3)
    if kind != "resident":
        for i in list(whole.batch_sampler)[2]:
            with open(lazy.paths[i], "wb") as file:
                file.write(b"damaged")
    expected = numbers(whole)
    resumed.batch_sampler.start = 2
    assert numbers(resumed) == expected[2:]
    assert numbers(resumed) == expected  # the next pass is whole


def test_evaluation_order(lazy):
    images = ImageSet(numbered(20), [str(i) for i in range(20)])
    for image_set in (images, lazy):
        index, batch = zip(*image_set.batches(6), strict=True)
        assert torch.cat(index).tolist() == list(range(20))
        assert torch.equal(torch.cat(batch)[:, 0, 0, 0], torch.arange(20, dtype=torch.uint8))
        assert [len(b) for b in batch] == [6, 6, 6, 2]


def test_the_choice_of_loader_is_logged(lazy, caplog):
    with caplog.at_level(logging.DEBUG, "pyro_vje"):
        make_loader(ImageSet(numbered(20), [str(i) for i in range(20)]), 5, seed=1)
        make_loader(lazy, 5, num_workers=0)
    assert "20 images, 0.00 GB, in the memory of cpu" in caplog.text
    assert "decoded by 0 worker processes" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resident_on_a_gpu():
    images = ImageSet(numbered(20), [str(i) for i in range(20)])
    loader = make_loader(images, 5, device="cuda", seed=1)
    batches = list(loader)
    assert batches[0][0].is_cuda
    assert numbers(batches) == numbers(loader)
    assert not next(iter(make_loader(images, 5, device="cuda", residency="stream")))[0].is_cuda


def test_user_errors_name_both_numbers():
    with pytest.raises(ValueError, match="batch_size 32 is larger than the data, 20 images: choose at most 20"):
        make_loader(numbered(20), 32)
    with pytest.raises(ValueError, match="batch_size 9 cannot be shared equally by 2 processes"):
        make_loader(numbered(20), 9, world_size=2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        next(ImageSet(numbered(2), ["0", "1"]).batches(0))


def test_seeds_are_unrelated_and_reproducible():
    seeds = {derive_seed("order", seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(seeds) == 900
    assert max(seeds) < 2**63
    assert derive_seed("views", 1, 2) == derive_seed("views", 1, 2) != derive_seed("views", 12)
