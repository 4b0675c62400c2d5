import dataclasses
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_core.config import PRESETS, Inpainting, ModelConfig, SamplerConfig
from diffusion_core.denoiser import Denoiser, guidance, guided
from diffusion_core.engine import Engine
from diffusion_core.inpainting import KnownRegion, repaint_plan
from diffusion_core.samplers import make_plan, model_grid, sample, start_noise
from diffusion_core.tasks import Request
from diffusion_core.unet import UNet
from diffusion_core.widths import agreeing_widths, measure_lanes

SHAPE = (3, 8, 8)
MODEL = ModelConfig(dataclasses.replace(PRESETS["tiny"], classes=3), class_names=("a", "b", "c"))


@pytest.fixture(scope="module")
def denoiser():
    """A U-Net of random weights, whose last layers (zero at the start of training) are random too."""
    torch.manual_seed(0)
    network = UNet(MODEL.unet).eval().requires_grad_(False)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 0.08)
    return Denoiser(network.to(memory_format=torch.channels_last), MODEL)


@pytest.fixture(scope="module")
def widths(denoiser):
    return agreeing_widths(denoiser, SHAPE)


@pytest.fixture(scope="module")
def exact_denoiser(denoiser):
    """The same network in float64."""
    network = UNet(MODEL.unet).eval().requires_grad_(False)
    network.load_state_dict(denoiser.network.state_dict())
    return Denoiser(network.double(), MODEL)


class ByHand:
    """Denoises by a function of x, sigma and label."""

    config = MODEL

    def __init__(self, denoise):
        self.denoise = denoise

    def __call__(self, x, sigma, label):
        return self.denoise(x, sigma, label)


class Sum:
    """Denoises to x/2, and to NaN for label 1 below sigma 10; counts the inputs of every call."""

    config = MODEL

    def __init__(self):
        self.batches = []

    def __call__(self, x, sigma, label):
        self.batches.append(len(x))
        broken = (label == 1) & (sigma < 10)
        return torch.where(broken[:, None, None, None], torch.nan, x / 2)


def picture(seed, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def some_mask(seed, shape=SHAPE):
    generator = random.Random(seed)
    mask = torch.zeros(1, *shape[1:])
    top, left = generator.randrange(4), generator.randrange(4)
    mask[:, top : top + 4, left : left + 3] = 1.0
    mask[:, top, left] = 0.5
    return mask


def any_request(number):
    """One of many requests: every task, sampler family, length, guidance and mask."""
    pick = random.Random(number).choice
    task = pick(["generate", "generate", "inpaint", "inpaint", "denoise", "image_to_image", "vary"])
    shape = pick([SHAPE, SHAPE, (3, 16, 8)])
    fields = {
        "seed": number,
        "task": task,
        "sampler": SamplerConfig(
            pick(["angular_3", "ddpm", "heun", "dpmpp_2m_sde", "exponential_4"]), pick([1, 2, 5]), eta=0.5, churn=2.0
        ),
        "label": pick([None, 0, 1, 2]),
        "guidance_scale": pick([1.0, 1.5, 3.0]),
        "guidance_high": pick([4.0, float("inf")]),
        "guidance_rescale": pick([0.0, 0.7]),
    }
    if task in ("inpaint", "denoise", "image_to_image"):
        fields["picture"] = picture(number, shape)
    if task in ("image_to_image", "vary"):
        fields["strength"] = pick([0.0, 0.4, 1.0])
    if task in ("generate", "vary"):
        fields["size"] = shape[1:]
    if task == "inpaint":
        fields["mask"] = some_mask(number, shape)
        fields["inpainting"] = Inpainting(pick(["posterior", "replacement"]), pick([1, 2]), 2, pick([1, 2]))
    if task == "denoise":
        fields["noise_level"] = pick([None, 0.7])
    if task == "vary":
        fields["parent"] = 5
    if fields["label"] is not None:
        fields["negative"] = pick([None, None, 0, 2])
    return Request(**fields)


def bytes_of(x):
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def play(engine, requests, choices):
    """Submit requests at the ticks that `choices` (a random.Random) draws, cancel some; pictures by their place."""
    pictures, tickets, waiting = {}, {}, list(enumerate(requests))
    cancelled = set()
    while waiting or not engine.idle:
        for _ in range(choices.choice([0, 0, 1, 4])):
            if waiting:
                place, request = waiting.pop(choices.randrange(len(waiting)))
                tickets[engine.submit(request, choices.choice(["interactive", "bulk"]))] = place
        if tickets and choices.random() < 0.1:
            ticket = choices.choice(sorted(tickets))
            if engine.cancel(ticket):
                cancelled.add(tickets[ticket])
        for end in engine.tick():
            assert end.error is None
            pictures[tickets[end.ticket]] = end.picture
    assert set(pictures) | cancelled == set(range(len(requests)))
    assert not set(pictures) & cancelled
    return pictures


@pytest.fixture(scope="module")
def alone(denoiser, exact_denoiser):
    """The picture of request `number` made alone, in float32 or float64."""
    known = {}

    def make(number, dtype, lanes=32):
        key = number, dtype, lanes
        if key not in known:
            of = denoiser if dtype == torch.float32 else exact_denoiser
            known[key] = Engine(of, lanes=lanes, dtype=dtype).run([any_request(number)])[0]
        return known[key]

    return make


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(numbers=st.lists(st.integers(0, 60), min_size=1, max_size=14), seed=st.integers(0, 10**6))
def test_any_crowd_gives_every_request_the_bytes_it_has_alone(denoiser, alone, numbers, seed):
    choices = random.Random(seed)
    lanes = choices.choice([8, 16, 32])
    engine = Engine(denoiser, lanes=lanes, patience=choices.choice([2, 8]))
    for place, made in play(engine, [any_request(number) for number in numbers], choices).items():
        assert torch.equal(made, alone(numbers[place], torch.float32, lanes)), "not one bit differs, so no byte does"


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(numbers=st.lists(st.integers(0, 60), min_size=1, max_size=14), seed=st.integers(0, 10**6))
def test_any_crowd_gives_every_request_its_numbers_in_float64(exact_denoiser, alone, numbers, seed):
    choices = random.Random(seed)
    engine = Engine(exact_denoiser, choices.choice([(1, 2, 3, 5), (2,), (7, 11)]), dtype=torch.float64)
    for place, made in play(engine, [any_request(number) for number in numbers], choices).items():
        assert torch.allclose(made, alone(numbers[place], torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["angular_3", "heun", "dpmpp_2m_sde"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_engine_walks_as_the_bare_loop_does(exact_denoiser, sampler, scale):
    config = SamplerConfig(sampler, 6, eta=0.5)
    seeds, labels = torch.tensor([7, 8]), torch.tensor([0, 2])
    plan = make_plan(config, model_grid(config, MODEL))
    how = guidance(torch.full((2,), scale, dtype=torch.float64), high=20.0)
    with torch.no_grad():
        expected = sample(
            lambda x, sigma: guided(exact_denoiser, x, sigma, labels, how),
            plan, start_noise(plan, seeds, SHAPE, torch.float64), seeds,
        )  # fmt: skip
    made = Engine(exact_denoiser, (4,), dtype=torch.float64).run(
        [
            Request(int(seed), sampler=config, label=int(label), guidance_scale=scale, guidance_high=20.0)
            for seed, label in zip(seeds, labels, strict=True)
        ]
    )
    assert torch.allclose(torch.stack(made), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", ["generate", "inpaint"])
def test_guidance_leads_away_from_a_negative_class(exact_denoiser, task):
    config, scale = SamplerConfig("dpmpp_2m", 6), 1.7
    more = {"picture": picture(1).double(), "mask": some_mask(1).double()} if task == "inpaint" else {}
    more |= {"inpainting": Inpainting("replacement")} if more else {}

    def made(denoiser, label, negative, scale):
        request = Request(5, task, config, label=label, negative=negative, guidance_scale=scale, **more)
        return Engine(denoiser, (4,), dtype=torch.float64).run([request])[0]

    def by_hand(x, sigma, label):
        towards, away = (exact_denoiser(x, sigma, torch.full_like(label, own)) for own in (0, 2))
        return away + scale * (towards - away)

    led = made(exact_denoiser, 0, 2, scale)
    plain = made(ByHand(by_hand), 1, None, 1.0)
    assert torch.allclose(led, plain, rtol=0, atol=1e-12)
    assert not torch.allclose(led, made(exact_denoiser, 0, None, scale), atol=1e-3)
    assert torch.equal(made(exact_denoiser, 2, 2, scale), made(exact_denoiser, 2, None, 1.0)), "one pass is enough"


def test_replacement_with_resampling_is_that_of_the_bare_loop(exact_denoiser):
    config, how = SamplerConfig("ddpm", 6), Inpainting("replacement", jump=2, times=3)
    seeds, x0, mask = torch.tensor([9]), picture(1).double(), some_mask(1).double()
    plan = repaint_plan(config, model_grid(config, MODEL), how)
    known = KnownRegion(x0[None], mask[None], seeds)
    with torch.no_grad():
        expected = sample(
            lambda x, sigma: exact_denoiser(x, sigma, torch.tensor([3])),
            plan, start_noise(plan, seeds, SHAPE, torch.float64), seeds, known,
        )  # fmt: skip
    request = Request(9, "inpaint", config, picture=x0, mask=mask, inpainting=how)
    made = Engine(exact_denoiser, (4,), dtype=torch.float64).run([request])[0]
    assert torch.allclose(made, expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("inpainting", [Inpainting(), Inpainting("replacement"), Inpainting(times=2, jump=1)], ids=str)
@pytest.mark.parametrize("grid", ["arctan", "karras"])
def test_inpainting_returns_the_known_pixels_bit_for_bit_and_mixes_soft_ones(denoiser, widths, inpainting, grid):
    x0, mask = picture(3), some_mask(3)
    sampler = SamplerConfig("dpmpp_2m", 3, grid)
    made = Engine(denoiser, widths).run([Request(1, "inpaint", sampler, picture=x0, mask=mask, inpainting=inpainting)])[
        0
    ]
    kept = (mask == 0).expand_as(x0)
    assert torch.equal(made[kept], x0[kept])
    assert not torch.equal(made[~kept], x0[~kept])


def test_a_request_that_breaks_fails_alone():
    requests = [Request(seed, sampler=SamplerConfig(steps=6), label=seed % 3) for seed in range(9)]
    engine = Engine(Sum(), (4, 16))
    tickets = {engine.submit(request): request for request in requests}
    ends = []
    while not engine.idle:
        ends += engine.tick()
    assert len(ends) == 9
    for end in ends:
        broken = tickets[end.ticket].label == 1
        assert (end.picture is None) == broken
        assert (end.error is None) == (not broken)
        if broken:
            assert "of 6: the picture has values that are NaN or infinite" in end.error
        else:
            assert torch.isfinite(end.picture).all()
    with pytest.raises(ValueError, match="request 1: row"):
        engine.run(requests[:3])
    assert engine.idle
    assert len(engine.run(requests[:1])) == 1, "the engine goes on"


def test_a_tick_that_raises_loses_nothing():
    class Flaky(Sum):
        """Runs out of memory once."""

        def __call__(self, x, sigma, label):
            out = super().__call__(x, sigma, label)
            if len(self.batches) == 2:
                raise RuntimeError("out of memory")
            return out

    engine, steps = Engine(Flaky(), (2, 4)), SamplerConfig(steps=3)
    requests = [Request(1, sampler=steps, label=0), Request(2, "image_to_image", picture=picture(1), strength=0.0)]
    expected = Engine(Sum(), (2, 4)).run(requests)
    engine.submit(requests[0])
    engine.tick()
    engine.submit(requests[1])
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.tick()
    ends = []
    while not engine.idle:
        ends += engine.tick()
    made = {end.ticket: end.picture for end in ends}
    assert torch.equal(made[1], expected[0])
    assert torch.equal(made[2], expected[1])


def test_cancelling_frees_the_lanes_at_the_next_tick():
    denoiser = Sum()
    engine = Engine(denoiser, (1, 2, 4))
    first = [engine.submit(Request(seed, label=0)) for seed in range(4)]
    late = engine.submit(Request(9, sampler=SamplerConfig(steps=1), label=0))
    assert engine.tick() == []
    assert engine.cancel(first[1])
    assert not engine.cancel(first[1])
    assert not engine.cancel(12345)
    assert [end.ticket for end in engine.tick()] == [late], "it took the lane that was left"
    with pytest.raises(KeyError):
        engine.progress(first[1])


def test_a_guided_request_takes_two_lanes_and_only_within_its_interval():
    denoiser = Sum()
    engine = Engine(denoiser, (1, 2, 4))
    for seed in range(4):
        engine.submit(Request(seed, sampler=SamplerConfig(steps=8), label=0, guidance_scale=2.0, guidance_high=5.0))
    while not engine.idle:
        engine.tick()
    assert max(denoiser.batches) == 4
    sigmas = model_grid(SamplerConfig(steps=8), MODEL)[:-1]
    assert sum(denoiser.batches) == 4 * (8 + int((sigmas <= 5.0).sum()))


def test_interactive_requests_go_first_and_bulk_never_starves():
    engine = Engine(Sum(), (2, 4), patience=5)
    bulk = [engine.submit(Request(seed, sampler=SamplerConfig(steps=4), label=0), "bulk") for seed in range(4)]
    served, newest = [], 100
    for _ in range(40):
        while sum(priority == "interactive" for priority, _ in engine._where.values()) < 4:
            engine.submit(Request(newest, sampler=SamplerConfig(steps=3), label=0))
            newest += 1
        served += [end.ticket for end in engine.tick()]
    done = [ticket for ticket in served if ticket in bulk]
    assert done == bulk, "four rows, one of them every fifth tick"
    assert served.index(bulk[0]) > 10, "others came first"


def test_sizes_and_posterior_guidance_take_fair_turns(denoiser):
    engine, steps = Engine(denoiser, (4,)), SamplerConfig(steps=60)
    kinds = {
        "small": lambda seed: Request(seed, sampler=steps),
        "large": lambda seed: Request(seed, sampler=steps, size=(16, 16)),
        "steered": lambda seed: Request(seed, "inpaint", steps, picture=picture(1), mask=some_mask(1)),
    }
    tickets = {name: [engine.submit(make(seed)) for seed in range(4)] for name, make in kinds.items()}
    for _ in range(38):
        engine.tick()
    rows = {name: sum(engine.progress(ticket).done for ticket in which) / 4 for name, which in tickets.items()}
    # a large row costs four small ones, a steered row (its call and two solves) three
    assert rows["small"] == pytest.approx(24, abs=2)
    assert rows["large"] == pytest.approx(6, abs=2)
    assert rows["steered"] == pytest.approx(8, abs=2)


def test_progress_and_previews_show_the_estimate_of_x0(denoiser, widths):
    engine = Engine(denoiser, widths)
    ticket = engine.submit(Request(3, sampler=SamplerConfig(steps=5), label=1))
    assert engine.progress(ticket) == (0, 5, None)
    previews = []
    for row in range(4):
        engine.tick()
        done, calls, preview = engine.progress(ticket)
        assert (done, calls) == (row + 1, 5)
        previews.append(preview)
    last = engine.tick()[0].picture
    far = [float((preview - last).square().mean()) for preview in previews]
    assert far == sorted(far, reverse=True), "they come closer"
    assert engine.pending_calls == 0


def test_varying_leads_from_the_parent_to_another_picture(denoiser, widths):
    for sampler in (SamplerConfig(steps=6), SamplerConfig("ddpm", 6)):
        parent = Request(5, sampler=sampler, label=1)
        near = [Request(8, "vary", sampler, 1, parent=5, strength=strength) for strength in (0.0, 0.05, 0.3, 1.0)]
        made = Engine(denoiser, widths).run([parent, *near, Request(8, sampler=sampler, label=1)])
        assert torch.equal(made[1], made[0]), "strength 0 is the parent"
        assert torch.equal(bytes_of(made[4]), bytes_of(made[5])), "strength 1 is the other seed's own picture"
        distance = [float((each - made[0]).square().mean()) for each in made[1:5]]
        assert distance == sorted(distance)
        assert distance[1] > 0


def test_image_to_image_leads_from_the_picture_to_any(denoiser, widths):
    x0 = picture(2)
    requests = [
        Request(1, "image_to_image", SamplerConfig(steps=10), 0, picture=x0, strength=strength)
        for strength in (0.0, 0.2, 0.5, 1.0)
    ]
    engine = Engine(denoiser, widths)
    tickets = [engine.submit(request) for request in requests]
    assert [engine.progress(ticket).calls for ticket in tickets[1:]] == [2, 5, 10]
    made = {}
    while not engine.idle:
        made.update((end.ticket, end.picture) for end in engine.tick())
    assert torch.equal(made[tickets[0]], x0), "strength 0 is the picture"
    distance = [float((made[ticket] - x0).square().mean()) for ticket in tickets]
    assert distance == sorted(distance)


def test_bad_requests_are_refused_at_admission_and_disturb_nobody(denoiser, alone):
    engine = Engine(denoiser)
    ticket = engine.submit(any_request(4))
    engine.tick()
    for bad in (
        lambda: Request(1, "paint"),
        lambda: Request(1, "inpaint", picture=picture(1), mask=torch.zeros(1, 8, 8)),
        lambda: Request(1, label=7),
    ):
        with pytest.raises(ValueError, match=r"task: 'paint'|mask: all of it is 0|label: 7"):
            engine.submit(bad())
    with pytest.raises(ValueError, match="priority: 'high'"):
        engine.submit(any_request(4), "high")
    with pytest.raises(ValueError, match="engine: busy with 1 requests"):
        engine.run([any_request(1)])
    made = None
    while not engine.idle:
        for end in engine.tick():
            assert end.ticket == ticket
            made = end.picture
    assert torch.equal(made, alone(4, torch.float32))
    with pytest.raises(ValueError, match="label: 7"):
        engine.run([any_request(1), Request(1, label=7)])
    assert engine.idle


@pytest.mark.parametrize(
    "settings", [{"widths": ()}, {"widths": (1,)}, {"widths": (0, 4)}, {"lanes": 1}, {"patience": 1}], ids=str
)
def test_an_engine_that_could_not_run_is_refused(denoiser, settings):
    with pytest.raises(ValueError, match="need lanes and patience of 2 or more"):
        Engine(denoiser, **settings)


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_bits_agree_for_any_number_of_threads(denoiser, threads):
    """With three threads, the tiny network's batches of 16 give other bits at other places."""
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = (3, 16, 16)
        requests = [
            Request(seed, sampler=SamplerConfig(steps=2), label=seed % 3, size=shape[1:], guidance_scale=1 + seed % 2)
            for seed in range(24)
        ]
        together = Engine(denoiser).run(requests)
        for place in (0, 9, 23):
            assert torch.equal(Engine(denoiser).run([requests[place]])[0], together[place])
    finally:
        torch.set_num_threads(usual)


def test_agreeing_widths_are_those_whose_places_and_sizes_do_not_change_a_bit():
    class Fussy(Sum):
        """Adds 1e-6 in batches of 2 and 6, and at the third place of 8."""

        def __call__(self, x, sigma, label):
            shift = torch.zeros(len(x), 1, 1, 1)
            if len(x) in (2, 6):
                shift += 1e-6
            if len(x) == 8:
                shift[2] = 1e-6
            return x * 0.5 + shift

    assert set(agreeing_widths(Fussy(), SHAPE, most=16)) & {1, 2, 4, 6, 8, 12, 16} == {1, 4, 12, 16}


def test_where_no_batch_agrees_the_engine_says_so():
    class Placed(Sum):
        """Adds 1e-6 at the first place of every batch of more than one."""

        def __call__(self, x, sigma, label):
            shift = torch.zeros(len(x), 1, 1, 1)
            shift[0] = 1e-6 * (len(x) > 1)
            return x * 0.5 + shift

    with pytest.raises(ValueError, match=r"widths: no batch of pictures \[3, 8, 8\] has the same bits"):
        Engine(Placed()).submit(Request(1, label=0))


def test_lanes_are_measured(denoiser, widths):
    assert measure_lanes(denoiser, SHAPE, widths) in widths
