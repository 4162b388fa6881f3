"""Distorted handwriting: the same for the same number, still the digit it was, and never of the writers held out."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

from models.tasks.digits import (
    CELLS,
    NUM_COPIES,
    NUM_DIGITS,
    NUM_TRAINING_DIGITS,
    SIDE,
    UNDISTORTED_FRACTION,
    _copy,
    digit_images,
    digit_labels,
    digit_masks,
    distorted,
    handwriting,
)


def test_copies_are_of_training_images_alone(rng):
    images = rng.integers(0, NUM_TRAINING_DIGITS, 4000)
    copies = distorted(images, rng)
    assert copies.max() < len(digit_labels()) == NUM_DIGITS + NUM_COPIES * NUM_TRAINING_DIGITS
    is_copy = copies >= NUM_DIGITS
    np.testing.assert_array_equal((copies[is_copy] - NUM_DIGITS) % NUM_TRAINING_DIGITS, images[is_copy])
    np.testing.assert_array_equal(copies[~is_copy], images[~is_copy])
    np.testing.assert_array_equal(digit_labels()[copies], digit_labels()[images])
    assert abs((~is_copy).mean() - UNDISTORTED_FRACTION) < 0.02
    assert digit_images(3, is_held_out=False).max() < NUM_TRAINING_DIGITS <= digit_images(3, is_held_out=True).min()


def test_a_number_is_one_image_whatever_is_drawn_beside_it(rng):
    numbers = np.concatenate([rng.integers(0, NUM_DIGITS, 8), rng.integers(NUM_DIGITS, len(digit_labels()), 8)])
    ink, corners = handwriting(numbers)
    for number, one_ink, corner in zip(numbers, ink, corners, strict=True):
        alone = handwriting(np.array([number]))
        np.testing.assert_array_equal(one_ink, alone[0][0])
        np.testing.assert_array_equal(corner, alone[1][0])
    _copy.cache_clear()
    np.testing.assert_array_equal(handwriting(numbers)[0], ink)


def test_a_mask_is_ink_in_its_square():
    ink, corners = handwriting(np.array([5, NUM_DIGITS + 5]))
    for mask, one_ink, (row, column) in zip(digit_masks(ink, corners), ink, corners, strict=True):
        square = mask[row : row + 7 * CELLS, column : column + 7 * CELLS]
        np.testing.assert_array_equal(square, one_ink.repeat(7, axis=0).repeat(7, axis=1))
        assert (mask == 255).sum() == SIDE**2 - square.size


@pytest.mark.slow
def test_what_is_learnt_from_copies_holds_for_other_writers():
    copies = np.arange(NUM_DIGITS, NUM_DIGITS + 20 * NUM_TRAINING_DIGITS)
    ink = handwriting(np.arange(copies[-1] + 1))[0].reshape(-1, CELLS**2) / 16
    training, held_out = np.arange(NUM_TRAINING_DIGITS), np.arange(NUM_TRAINING_DIGITS, NUM_DIGITS)
    assert (ink[copies[:NUM_TRAINING_DIGITS]] != ink[training]).any(axis=1).all()

    def accuracy(learnt, num_rounds):
        reader = MLPClassifier((256,), max_iter=num_rounds, random_state=0)
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            reader.fit(ink[learnt], digit_labels()[learnt])
        return reader.score(ink[held_out], digit_labels()[held_out])

    with threadpool_limits(1):  # threads wait for each other more than they work on matrices this small
        assert accuracy(copies, 10) > accuracy(training, 10 * 20) + 0.01  # as many updates of both
