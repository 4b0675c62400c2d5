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
