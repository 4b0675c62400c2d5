import math
import random

import pytest
import torch

from diffusion_core.noise import PURPOSES, _philox, derive_seeds, normal, uniform


def words(*values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter, key, expected):
    assert tuple(int(word) for word in _philox(words(*counter), words(*key))) == expected


def philox(counter, key):
    """Philox4x32-10 on Python's own integers, after the paper."""
    c, k, full = list(counter), list(key), 2**32
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second // full ^ c[1] ^ k[0], second % full, first // full ^ c[3] ^ k[1], first % full]
        k = [(k[0] + 0x9E3779B9) % full, (k[1] + 0xBB67AE85) % full]
    return c


def test_philox_equals_exact_integer_arithmetic_on_any_words():
    drawn = random.Random(0)
    for _ in range(50):
        numbers = [drawn.getrandbits(32) for _ in range(6)]
        ours = _philox(words(*numbers[:4]), words(*numbers[4:]))
        assert [int(word) for word in ours] == philox(numbers[:4], numbers[4:])


def test_normal_numbers_are_box_muller_of_philox_keyed_by_the_seed():
    seed, step, expected = 0x1234_5678_9ABC_DEF0, 2**33 + 5, []
    for block in range(2):
        drawn = philox((block, 5, 2, PURPOSES["sampler"]), (0x9ABC_DEF0, 0x1234_5678))
        u = [(word + 0.5) / 2**32 for word in drawn]
        for one, two in (u[:2], u[2:]):
            radius = math.sqrt(-2 * math.log(one))
            expected += [radius * math.cos(2 * math.pi * two), radius * math.sin(2 * math.pi * two)]
    found = normal(torch.tensor([seed]), "sampler", step, (2, 3), torch.float64)
    assert found.flatten().tolist() == pytest.approx(expected[:6], rel=1e-12)


def test_a_seed_has_the_same_noise_in_any_batch():
    seeds = torch.tensor([5, 2**61, 0, 5, 77])
    batch = normal(seeds, "start", 3, (3, 5, 7))
    for place, seed in enumerate(seeds):
        assert torch.equal(normal(seed[None], "start", 3, (3, 5, 7))[0], batch[place])
    assert torch.equal(batch[0], batch[3])
    assert not torch.equal(batch[0], batch[4])


def test_purposes_and_steps_share_no_draw():
    seed = torch.tensor([9])
    draws = [normal(seed, purpose, step, (2000,))[0] for purpose in list(PURPOSES)[:4] for step in (0, 1, 2**40)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 2000**0.5


def test_steps_may_differ_within_a_batch():
    both = normal(torch.tensor([4, 4]), "sampler", torch.tensor([7, 8]), (6,))
    assert torch.equal(both[0], normal(torch.tensor([4]), "sampler", 7, (6,))[0])
    assert torch.equal(both[1], normal(torch.tensor([4]), "sampler", 8, (6,))[0])


def test_noise_is_standard_normal():
    noise = normal(torch.arange(100), "start", 0, (1000,), torch.float64)
    assert abs(noise.mean()) < 5 / 1e5**0.5
    assert abs(noise.var() - 1) < 5 * (2 / 1e5) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / 1e5) ** 0.5
    inside = (noise.abs() < 1).double().mean()
    assert abs(inside - 0.6826895) < 5 * (0.22 / 1e5) ** 0.5


def test_uniform_numbers_fill_the_open_interval():
    numbers = uniform(torch.arange(10_000), "train_sigma", 0)
    assert 0 < numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 1e4) ** 0.5


def test_derived_seeds_are_distinct_and_do_not_depend_on_their_neighbours():
    seeds = derive_seeds(3, torch.arange(50_000))
    assert len(seeds.unique()) == 50_000
    assert seeds.min() >= 0
    assert seeds.max() < 2**62
    assert torch.equal(derive_seeds(3, torch.tensor([40_000, 7])), seeds[[40_000, 7]])
    assert not torch.equal(derive_seeds(4, torch.arange(9)), seeds[:9])


@pytest.mark.parametrize("size", [1, 7, 64])
def test_derived_seeds_are_the_same_however_the_index_is_sliced(size):
    parts = [derive_seeds(11, part) for part in torch.arange(100).split(size)]
    assert torch.equal(torch.cat(parts), derive_seeds(11, torch.arange(100)))


def test_neighbouring_and_distant_seeds_share_no_draw():
    noise = normal(torch.tensor([0, 1, 2, 2**31, 2**32, 2**62 - 1]), "start", 0, (4000,), torch.float64)
    assert (torch.corrcoef(noise) - torch.eye(6)).abs().max() < 5 / 4000**0.5


def test_the_type_asked_for_only_rounds():
    exact, rounded = (normal(torch.arange(3), "known", 1, (50,), kind) for kind in (torch.float64, torch.float32))
    assert torch.equal(exact.to(torch.float32), rounded)
