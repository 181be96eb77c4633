"""Batches built in memory: shapes, augmentation, seeds, the split, and the test set that is read once."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.common import UserError
from utils.data_loader import (
    PADDING,
    BatchLoader,
    TestLoader,
    TestSetReadTwice,
    channel_statistics,
    data_loader,
    loaders_from,
    split_indices,
)

MEAN, STD = np.zeros(3), np.ones(3)  # leaves pixel values as they are


def numbered_images(n: int) -> np.ndarray:
    """Image i holds the value i + 1 in its first channel and a left-right ramp in its second."""
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[..., 0] = np.arange(1, n + 1)[:, None, None]
    images[..., 1] = 100 + np.arange(32)
    return images


def loader(n: int = 10, batch_size: int = 4, **kwargs) -> BatchLoader:
    return BatchLoader(numbered_images(n), np.arange(n), batch_size, mean=MEAN, std=STD, **kwargs)


def test_plain_batches_are_the_images_in_order():
    batches = list(loader())
    assert [len(targets) for _, targets in batches] == [4, 4, 2]
    inputs, targets = batches[1]
    assert inputs.shape == (4, 3, 32, 32) and inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert targets.tolist() == [4, 5, 6, 7]
    assert inputs[0, 0].unique().tolist() == [5.0]
    assert torch.equal(inputs[0, 1, 0], 100 + torch.arange(32.0))


def test_normalisation_by_hand():
    images = np.full((2, 32, 32, 3), 120, np.uint8)
    loader = BatchLoader(images, np.zeros(2), 2, mean=np.array([100.0, 120.0, 140.0]), std=np.array([10.0, 5.0, 40.0]))
    inputs, _ = next(iter(loader))
    assert torch.allclose(inputs[0, :, 0, 0], torch.tensor([2.0, 0.0, -0.5]), atol=1e-5)


def test_channel_statistics_match_numpy():
    images = np.random.RandomState(0).randint(0, 256, (7, 5, 6, 3)).astype(np.uint8)
    mean, std = channel_statistics(images)
    assert np.allclose(mean, images.reshape(-1, 3).mean(0)) and np.allclose(std, images.reshape(-1, 3).std(0))


def test_every_crop_is_a_shift_of_the_padded_image_and_flips_are_mirrored():
    images = numbered_images(200)
    padded = np.pad(images, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    seen = set()
    augmented = BatchLoader(images, np.arange(200), 50, mean=MEAN, std=STD, augment=True, shuffle=True)
    for inputs, targets in augmented:
        for crop, number in zip(inputs.permute(0, 2, 3, 1).numpy(), targets.tolist()):
            found = [(dy, dx, flip) for dy in range(9) for dx in range(9) for flip in (False, True)
                     if np.array_equal(crop, padded[number, dy:dy + 32, dx:dx + 32][:, ::-1 if flip else 1])]
            assert len(found) == 1
            seen.add(found[0])
    assert len({flip for _, _, flip in seen}) == 2 and len({dy for dy, _, _ in seen}) == 9


def test_a_shuffled_pass_holds_every_image_once_and_passes_differ():
    shuffled = loader(50, 16, shuffle=True)
    first, second = (torch.cat([t for _, t in shuffled]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(50)) and first != second


def test_same_seed_same_batches_and_state_continues_exactly():
    one, two, other = (loader(20, 8, shuffle=True, augment=True, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, two))
    state = one.state_dict()
    expected = [inputs for inputs, _ in one]
    two.load_state_dict(state)
    assert all(torch.equal(a, b) for a, (b, _) in zip(expected, two))
    assert not all(torch.equal(a, b) for a, (b, _) in zip(expected, other))


def test_a_single_left_over_image_is_dropped_only_when_shuffling():
    assert len(loader(9, 4)) == 3 and len(loader(9, 4, shuffle=True)) == 2
    assert len(list(loader(9, 4, shuffle=True))) == 2
    assert len(loader(1, 4, shuffle=True)) == 1


def test_other_batch_size_shares_memory_and_unaugmented_is_plain():
    augmented = loader(10, 4, augment=True, shuffle=True)
    other = augmented.with_batch_size(5)
    assert len(other) == 2 and other.images.data_ptr() == augmented.images.data_ptr()
    inputs, targets = next(iter(augmented.unaugmented(10)))
    assert targets.tolist() == list(range(10)) and inputs[3, 0].unique().tolist() == [4.0]


def test_split_is_seeded_disjoint_and_apart_from_the_training_seed(tiny_dataset):
    train, val = split_indices(100, 0.2, split_seed=3)
    assert len(val) == 20 and sorted([*train, *val]) == list(range(100))
    assert np.array_equal(val, split_indices(100, 0.2, split_seed=3)[1])
    assert not np.array_equal(val, split_indices(100, 0.2, split_seed=4)[1])
    one, two = (loaders_from(tiny_dataset, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(one.images, two.images)


@pytest.mark.parametrize("images, val_split, held_out", [(7, 0.25, 2), (9, 0.25, 2), (100, 0.29, 29)])
def test_the_held_out_part_is_rounded_to_the_nearest_number(images, val_split, held_out):
    """0.25 of 7 is 1.75 and of 9 2.25; 100 * 0.29 is just below 29 in floating point."""
    train, val = split_indices(images, val_split)
    assert (len(train), len(val)) == (images - held_out, held_out)


@pytest.mark.parametrize("val_split", [0.0, 1.0, 0.001])
def test_an_empty_part_of_the_split_is_a_user_error(val_split):
    with pytest.raises(UserError, match="--val_split"):
        split_indices(100, val_split)


def test_validation_and_test_are_never_augmented(tiny_dataset):
    train, val, test = loaders_from(tiny_dataset)
    assert train.augment and train.shuffle
    for part in (val, test):
        assert not part.augment and not part.shuffle
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(val, val))


def test_loaders_of_a_data_set_by_its_name(image_folder):
    train, val, test = data_loader(image_folder, val_split=0.5, batch_size=7)
    assert train.batch_size == 7 and train.num_images == val.num_images and test.num_images
    with pytest.raises(UserError, match="--image_size 16"):
        data_loader(image_folder, image_size=16)


def test_the_test_set_can_be_read_once_and_again_only_by_name(tiny_dataset):
    test = loaders_from(tiny_dataset)[2]
    assert isinstance(test, TestLoader)
    assert sum(len(targets) for _, targets in test) == 50
    with pytest.raises(TestSetReadTwice, match="final report"):
        iter(test)
    again = test.read_as("pruned model")
    assert sum(len(targets) for _, targets in again) == 50
    with pytest.raises(TestSetReadTwice):
        iter(again)
    with pytest.raises(TestSetReadTwice, match="pruned model"):
        test.read_as("pruned model")
    assert test.reads == ["final report", "pruned model"]


def test_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="as many images as targets"):
        BatchLoader(numbered_images(3), np.arange(2), 2, mean=MEAN, std=STD)


def test_padding_says_how_far_a_crop_may_move():
    """A bright pixel in the middle of every image: where it lands, in 500 crops, is every place within reach."""
    images = np.zeros((500, 21, 21, 3), dtype=np.uint8)
    images[:, 10, 10] = 255
    loader = BatchLoader(images, np.zeros(500, int), 500, mean=np.zeros(3), std=np.full(3, 255.0), augment=True)
    for padding in (0, 1, 4, 6):
        ((inputs, _),) = list(loader.with_padding(padding))
        _, rows, columns = inputs[:, 0].nonzero().T
        reach = set(range(10 - padding, 11 + padding))
        assert inputs.shape == (500, 3, 21, 21) and set(rows.tolist()) == set(columns.tolist()) == reach
    for padding in (0, 2, 4):  # at most the loader's own: the same memory
        assert np.may_share_memory(loader.with_padding(padding).windows, loader.windows)
        padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        assert np.array_equal(loader.with_padding(padding).windows[3, 0, -1], padded[3, :21, 2 * padding:])


def test_a_part_has_as_many_of_each_class_and_is_augmented_as_the_whole():
    images = np.arange(40, dtype=np.uint8).repeat(8 * 8 * 3).reshape(40, 8, 8, 3)
    targets = np.repeat([0, 1, 2], [25, 10, 5])  # sorted and unbalanced, as on disk
    whole = BatchLoader(images, targets, 4, mean=MEAN, std=STD, augment=True, shuffle=True)
    few = whole.part(12)
    assert few.num_images == 12 and np.bincount(few.targets).tolist() == [4, 4, 4] and few.batch_size == 4
    assert few.augment and few.shuffle and few.windows.shape[:3] == (12, *whole.windows.shape[1:3])
    assert sorted(np.asarray(few.images)[:, 0, 0, 0].tolist()) == sorted(
        np.asarray(few.windows)[:, 4, 4, 0, 0, 0].tolist())  # the crops are of the same images
    assert whole.part(None) is whole is whole.part(40) and len({*np.asarray(few.images)[:, 0, 0, 0].tolist()}) == 12
    again = whole.part(12)
    for loader in (few, again):
        loader.reseed(3)
    first, second = ([labels.tolist() for _, labels in loader] for loader in (few, again))
    assert first == second and sum(map(len, first)) == 12


def test_a_padding_wider_than_the_images_is_refused():
    loader = BatchLoader(numbered_images(4), np.zeros(4), 2, mean=MEAN, std=STD, augment=True)
    for padding in (32, 33):  # with as many as an image has, a corner crop misses it
        with pytest.raises(UserError, match="less, such as 4"):
            loader.with_padding(padding)
    assert loader.with_padding(31).windows.shape[1] == 63
