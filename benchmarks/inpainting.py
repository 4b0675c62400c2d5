"""Does inpainting draw from the right distribution? Each method beside exact posteriors, with exact denoisers.

usage: python benchmarks/inpainting.py [--quick] [--picture FILE.png]

Needs torch alone; matplotlib is imported for a picture alone. Three tables, all in float64:

A. Two correlated pixels, one of them known: squared Wasserstein-2 distance between the normal fit of the samples and
   the truth.
B. Random fields of 32x32 pixels with the spectrum of natural pictures and a smoother one, four masks: the mean and the
   variance of the samples against the posterior, solved densely. A sample mean is never exact: what chance alone adds
   (the floor) is subtracted from the error in quadrature, so that 0.000 reads "within chance".
C. Two modes in two dimensions, one coordinate known: the share of samples in the upper half.

"cost" counts forward passes of a network: a guided call is one pass and some vector-Jacobian products, whose price in
passes is measured here on the U-Net cpu-small. "one number" is the rule of Song et al. 2023 (PiGDM): sigma²·sd²/(sigma²
+ sd²), with sd the standard deviation of a pixel, in place of the covariance of the known pixels; the known region is
written into D, without which it diverges on smooth fields. "replacement" writes the known region, noised, into every
state; "RePaint" (Lugmayr et al. 2022) walks every 10 rows 10 times besides. The three walk log_snr, on which RePaint
comes nearer in B than on karras and arctan, by ddpm, as some other samplers make the one number diverge.

What a sampler does wrong by itself shows in B as the variance without any mask. In A the walk starts from N(0, 80²)
where N(E[x0 | known], …) would be exact: that moves the mean by −0.6·1.2/80 = −0.009.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, Inpainting, ModelConfig, SamplerConfig
from diffusion_core.denoiser import Denoiser
from diffusion_core.inpainting import KnownRegion, Product, repaint_plan, steered
from diffusion_core.noise import normal
from diffusion_core.samplers import Plan, new_state, start_noise, step
from diffusion_core.schedules import sigma_grid
from diffusion_core.unet import UNet

HIGH, LOW = 80.0, 0.002
SIDE, VARIANCE = 32, 0.25
REPAINT = Inpainting("replacement", jump=10, times=10)

# D(x) at noise levels [B], and its vector-Jacobian product
Exact = Callable[[Tensor, Tensor], tuple[Tensor, Product]]


def main() -> None:
    """Print the three tables, or draw the picture too."""
    parser = argparse.ArgumentParser(description="Does inpainting draw from the right distribution?")
    parser.add_argument("--quick", action="store_true", help="a few samples, to see that it runs")
    parser.add_argument("--picture", help="where to draw one random field for each mask")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    price = product_price(rounds=1 if options.quick else 7)
    print(f"one vector-Jacobian product of cpu-small (batch 8) costs {price:.2f} forward passes\n")
    two_pixels(price, 500 if options.quick else 20_000)
    random_fields(price, *((20, 10) if options.quick else (1000, 200)))
    two_modes(price, 500 if options.quick else 20_000)
    print(f"{time.perf_counter() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} thread")
    if options.picture:
        draw(options.picture, 20 if options.quick else 200)


# ---- Methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A way to inpaint: a sampler, what is done to D or to the state after it, and how often blocks are walked."""

    name: str
    config: SamplerConfig
    rule: Literal["replacement", "one number", "ours"]
    how: Inpainting = field(default_factory=Inpainting)

    @property
    def plan(self) -> Plan:
        """The table of coefficients."""
        return repaint_plan(self.config, sigma_grid(self.config.grid, self.config.steps, LOW, HIGH), self.how)

    @property
    def products(self) -> int:
        """Vector-Jacobian products of one call."""
        return {"replacement": 0, "one number": 1, "ours": self.how.solves + 1}[self.rule]

    def cost(self, price: float) -> float:
        """Forward passes that the whole walk is worth."""
        return len(self.plan) * (1 + self.products * price)


def ours(config: SamplerConfig, solves: int = 2, times: int = 1) -> Method:
    """Posterior guidance."""
    often = f", rows walked {times} times" if times > 1 else ""
    name = f"ours: {config.sampler}, {solves} solve{'s' if solves > 1 else ''}{often}"
    return Method(name, config, "ours", Inpainting(solves=solves, jump=10, times=times))


def rivals(steps: int) -> list[Method]:
    """The other methods: `steps` steps for those that replace, 50 for the one number."""
    ddpm = SamplerConfig("ddpm", steps, "log_snr")
    return [
        Method("replacement: ddpm", ddpm, "replacement"),
        Method("RePaint: ddpm", ddpm, "replacement", REPAINT),
        Method("one number: ddpm", replace(ddpm, steps=50), "one number"),
    ]


def inpaint(method: Method, exact: Exact, known: KnownRegion, deviation: float) -> Tensor:
    """Pictures [B, C, H, W] by `method`; `deviation` is that of a pixel, which the one number wants.

    They are walked in parts that fit the processor's cache: their noise is their own, so that nothing changes.
    """
    size = max(1, 100_000 // known.picture[0].numel())
    parts = zip(*(each.split(size) for each in (known.picture, known.mask, known.seeds)), strict=True)
    return torch.cat([walk(method, exact, KnownRegion(*part), deviation) for part in parts])


def walk(method: Method, exact: Exact, known: KnownRegion, deviation: float) -> Tensor:
    """All of `inpaint` at once."""
    plan, seeds, shape = method.plan, known.seeds, known.picture.shape[1:]
    state = new_state(start_noise(plan, seeds, shape, torch.float64), plan.memory)
    pull = torch.zeros_like(state.x)
    for row in range(len(plan)):
        sigma, sigma_next = (level[row].expand(len(seeds)) for level in (plan.sigma, plan.sigma_next))
        denoised, product = exact(state.x, sigma)
        if method.rule == "ours":
            denoised, pull = steered(denoised, product, sigma, known, pull, method.how.solves)
        elif method.rule == "one number":
            denoised = by_one_number(denoised, product, sigma, known, deviation)
        z = normal(seeds, "sampler", row, shape, torch.float64) if plan.s[row] != 0 else None
        state = step(state, plan.row(row), denoised, z)
        if method.rule == "replacement":
            state = state._replace(x=known(state.x, sigma_next, row))
    return known(state.x, torch.zeros(len(seeds), dtype=torch.float64), len(plan))


def by_one_number(denoised: Tensor, product: Product, sigma: Tensor, known: KnownRegion, deviation: float) -> Tensor:
    """D + Jᵀz with z = sigma²/r²·W·(picture − D), r² = sigma²·sd²/(sigma² + sd²), and the known region written in."""
    gain = (1 + sigma**2 / deviation**2)[:, None, None, None]
    moved = denoised + product(gain * (1 - known.mask) * (known.picture - denoised))
    return torch.where(known.mask == 0, known.picture, moved)


def region(picture: Tensor, mask: Tensor, count: int) -> KnownRegion:
    """The known region of `count` samples of one picture [1, H, W] with one mask [1, H, W]."""
    return KnownRegion(picture.expand(count, -1, -1, -1), mask.expand(count, -1, -1, -1), torch.arange(count))


def product_price(rounds: int) -> float:
    """What a vector-Jacobian product of the U-Net cpu-small costs, in forward passes without gradient: the median.

    The call that keeps what the products need is dearer than one that does not; three products share that.
    """
    unet = PRESETS["cpu-small"]
    network = UNet(unet).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    denoiser, sigma = Denoiser(network, ModelConfig(unet)), torch.ones(8)
    x = torch.zeros(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ratios = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        with torch.no_grad():
            denoiser(x, sigma, None)
        middle = time.perf_counter()
        at = x.clone().requires_grad_()
        denoised = denoiser(at, sigma, None)
        for _ in range(3):
            torch.autograd.grad(denoised, at, x, retain_graph=True)
        forward = middle - began
        ratios.append((time.perf_counter() - middle - forward) / 3 / forward)
    return statistics.median(ratios[1:])


# ---- A: two pixels --------------------------------------------------------------------------------------------------

RHO, SEEN = 0.8, 1.5


def two_pixels(price: float, count: int) -> None:
    """Table A."""
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
    vectors_of = torch.linalg.eigh(covariance)

    def exact(x: Tensor, sigma: Tensor) -> tuple[Tensor, Product]:
        values, vectors = vectors_of
        gain = vectors @ torch.diag(values / (values + sigma[0] ** 2)) @ vectors.T
        return x @ gain, lambda vector: vector @ gain

    known = region(torch.tensor([[[SEEN, 0.0]]]).double(), torch.tensor([[[0.0, 1.0]]]).double(), count)
    mean, deviation = RHO * SEEN, (1 - RHO**2) ** 0.5
    fifty = SamplerConfig("dpmpp_2m", 50, "karras")
    methods = [*rivals(250), *(ours(config, solves) for config in (SamplerConfig(), fifty) for solves in (1, 2))]
    chance = deviation**2 / count * 1.5
    print(f"A. Two pixels of correlation {RHO}, the first is {SEEN}: the second is N({mean:g}, {deviation:g}²)")
    print(f"   {count} samples a row; exact samples would have W2² {chance:.1e} by chance; goal for ours: 0.006")
    print(f"   {'':44}{'calls':>6}{'cost':>7}{'mean':>9}{'std':>9}{'W2²':>11}")
    for method in methods:
        second = inpaint(method, exact, known, 1.0)[..., 1]
        found, spread = float(second.mean()), float(second.std())
        distance = (found - mean) ** 2 + (spread - deviation) ** 2
        told = verdict(distance <= 0.006) if method.rule == "ours" else ""
        print(f"   {method.name:44}{costs(method, price)}{found:9.4f}{spread:9.4f}{distance:11.6f}{told}", flush=True)
    print()


def costs(method: Method, price: float) -> str:
    """Two cells: calls and cost."""
    return f"{len(method.plan):6}{method.cost(price):7.0f}"


def verdict(met: bool) -> str:
    """The last cell of our rows."""
    return "   goal met" if met else "   GOAL MISSED"


# ---- B: random fields -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomField:
    """A Gaussian random field on a torus, by its power spectrum [SIDE, SIDE]; calling it denoises."""

    power: Tensor

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Product]:
        """D(x) and its product: one filter, as the field is Gaussian and the same everywhere."""
        gain = self.power / (self.power + sigma[0] ** 2)
        return filtered(x, gain), lambda vector: filtered(vector, gain)

    def draw(self, seed: int) -> Tensor:
        """A picture [1, SIDE, SIDE]."""
        noise = normal(torch.tensor([seed]), "start", 0, (1, SIDE, SIDE), torch.float64)[0]
        return filtered(noise, self.power.sqrt())

    def posterior(self, picture: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the unknown pixels [n] of `picture` given the others, by a dense solve."""
        places = torch.arange(SIDE**2)
        down, right = places // SIDE, places % SIDE
        row = torch.fft.ifft2(self.power).real
        covariance = row[(down[:, None] - down) % SIDE, (right[:, None] - right) % SIDE]
        unknown = mask.flatten() == 1
        factor = torch.linalg.cholesky(covariance[~unknown][:, ~unknown])
        across = covariance[~unknown][:, unknown]
        solved = torch.cholesky_solve(across, factor)
        mean = solved.T @ picture.flatten()[~unknown]
        return mean, covariance[unknown][:, unknown].diagonal() - (across * solved).sum(dim=0)


def random_field(alpha: float) -> RandomField:
    """Power 1/(k² + 1)^(alpha/2), scaled to the variance of a pixel."""
    k = torch.fft.fftfreq(SIDE, dtype=torch.float64) * SIDE
    power = (k[:, None] ** 2 + k**2 + 1) ** (-alpha / 2)
    return RandomField(power / power.mean() * VARIANCE)


def filtered(x: Tensor, gain: Tensor) -> Tensor:
    """x [..., SIDE, SIDE] with its frequencies times `gain`, which is the same for opposite ones."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain[:, : SIDE // 2 + 1], s=x.shape[-2:])


def masks() -> dict[str, Tensor]:
    """Masks [1, SIDE, SIDE] by name; 1 is to be painted."""
    made = {
        name: torch.zeros(1, SIDE, SIDE, dtype=torch.float64)
        for name in ("box", "half", "strokes", "every second line")
    }
    quarter = SIDE // 4
    made["box"][:, quarter:-quarter, quarter:-quarter] = 1.0
    made["half"][:, :, SIDE // 2 :] = 1.0
    made["every second line"][:, 1::2] = 1.0
    strokes = made["strokes"][0]
    strokes[6:9, 3:28] = 1.0
    strokes[4:30, 21:24] = 1.0
    for row in range(2, 30):
        left = max(row - 2, 0)
        strokes[row, left : left + 3] = 1.0
        strokes[row, max(26 - row, 0) : max(29 - row, 0)] = 1.0
    return made


def random_fields(price: float, count: int, fewer: int) -> None:
    """Table B: `count` samples a row, and `fewer` for RePaint, which is slow."""
    fifty = SamplerConfig("dpmpp_2m", 50, "karras")
    stochastic = SamplerConfig("dpmpp_2m_sde", 18, "log_snr", eta=1.0)
    methods = [*rivals(50), ours(SamplerConfig()), ours(SamplerConfig(), 6), ours(fifty), ours(stochastic)]
    print(f"B. Random fields of {SIDE}x{SIDE}, variance {VARIANCE} a pixel: samples against the exact posterior")
    print(
        f"   {count} samples a row, {fewer} of RePaint. mean: relative error of the posterior mean, chance (the floor"
    )
    print("   behind it) subtracted; variance: of all unknown pixels over the exact one; pixel variance: rms of the")
    print("   relative error, with its floor √(2/n). Goals for ours: mean within 0.10, variance 0.90 to 1.10")
    print(f"   {'':42}{'calls':>6}{'cost':>7}{'mean':>9}  floor {'variance':>9}{'pixel variance':>17} floor")
    for alpha, told in ((2.0, "natural pictures (alpha 2)"), (3.0, "smoother (alpha 3)")):
        source = random_field(alpha)
        alone = (f"{each.config.sampler} {each.config.steps} {without_mask(each, source):.2f}" for each in methods[2:])
        print(f"   {told}; variance without a mask: {', '.join(dict.fromkeys(alone))}")
        for name, mask in masks().items():
            print(f"   {name}")
            for method in methods:
                number = fewer if method.how.times > 1 else count
                print(field_line(method, source, mask, number, price), flush=True)
    print()


def without_mask(method: Method, source: RandomField) -> float:
    """Variance of pictures from nothing by a method's sampler, over the exact one."""
    nothing = torch.ones(1, SIDE, SIDE, dtype=torch.float64)
    alone = Method("", method.config, "replacement")
    return float(inpaint(alone, source, region(nothing, nothing, 50), 1.0).var() / VARIANCE)


def field_line(method: Method, source: RandomField, mask: Tensor, count: int, price: float) -> str:
    """One method on one mask."""
    picture = source.draw(3)
    mean, variance = source.posterior(picture, mask)
    drawn = inpaint(method, source, region(picture, mask, count), VARIANCE**0.5)
    unknown = drawn.flatten(1)[:, mask.flatten() == 1]
    floor = float((variance.sum() / count).sqrt() / mean.norm())
    error = float((unknown.mean(dim=0) - mean).norm() / mean.norm())
    beyond = math.sqrt(max(error**2 - floor**2, 0.0))
    found = unknown.var(dim=0)
    ratio = float(found.mean() / variance.mean())
    pixels = float(((found / variance - 1) ** 2).mean().sqrt())
    told = verdict(beyond <= 0.1 and 0.9 <= ratio <= 1.1) if method.rule == "ours" else ""
    cells = f"{beyond:9.3f} ({floor:.3f}){ratio:9.3f}{pixels:12.3f} ({math.sqrt(2 / count):.3f})"
    return f"     {method.name:40}{costs(method, price)}{cells}{told}"


# ---- C: two modes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoModes:
    """Gaussians of standard deviation `spread` at `means` [2, 2] with `weights` [2], the first coordinate `seen`."""

    name: str
    means: Tensor
    weights: Tensor
    spread: float
    seen: float
    exact: bool

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Product]:
        """D(x) and its product."""
        at = x.detach().requires_grad_()
        level = sigma[0] ** 2
        total = self.spread**2 + level
        apart = at.flatten(1)[:, None] - self.means
        share = torch.softmax(self.weights.log() - (apart**2).sum(dim=2) / (2 * total), dim=1)
        denoised = (self.spread**2 * at + level * (share @ self.means).reshape(x.shape)) / total

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(denoised, at, vector, retain_graph=True)[0]

        return denoised.detach(), product

    def upper(self) -> float:
        """The exact share of the second coordinate above 0 given the first."""
        likely = self.weights * torch.exp(-((self.seen - self.means[:, 0]) ** 2) / (2 * self.spread**2))
        above = 0.5 * (1 + torch.erf(self.means[:, 1] / self.spread / 2**0.5))
        return float((likely * above).sum() / likely.sum())


def mixtures() -> list[TwoModes]:
    """What the known coordinate may tell of the mode; ours is `exact` where that is nothing."""

    def made(name: str, apart: float, upper: float, spread: float, seen: float, exact: bool = False) -> TwoModes:
        means = torch.tensor([[-apart, -1.0], [apart, 1.0]], dtype=torch.float64)
        return TwoModes(name, means, torch.tensor([1 - upper, upper], dtype=torch.float64), spread, seen, exact)

    return [
        made("tells nothing", 0.0, 0.7, 0.2, 0.1, exact=True),
        made("overlapping", 0.5, 0.6, 0.5, 0.1),
        made("between", 1.0, 0.6, 0.6, -0.1),
        made("tells which", 1.0, 0.6, 0.4, 1.0),
    ]


def two_modes(price: float, count: int) -> None:
    """Table C."""
    problems = mixtures()
    fifty = SamplerConfig("dpmpp_2m", 50, "karras")
    stochastic, ddpm = SamplerConfig("dpmpp_2m_sde", 50, "log_snr", eta=1.0), SamplerConfig("ddpm", 50, "log_snr")
    methods = [*rivals(50), ours(SamplerConfig()), ours(fifty), ours(stochastic), ours(ddpm, times=4)]
    print(
        f"C. Two modes, one coordinate known: the share of {count} samples in the upper mode, by what the known tells."
    )
    print(
        "   Goal for ours: within 3 sampling errors where it tells nothing. Elsewhere ours is not exact, as x0 given x"
    )
    print("   is no Gaussian while both modes are open: goal within 0.08")
    print(f"   {'':57}" + "".join(f"{problem.name:>16}" for problem in problems))
    truths = [problem.upper() for problem in problems]
    errors = [math.sqrt(truth * (1 - truth) / count) for truth in truths]
    print(
        f"   {'exact, ± sampling error':57}"
        + "".join(f"{t:9.3f} ±{e:.3f}" for t, e in zip(truths, errors, strict=True))
    )
    print(f"   {'':44}{'calls':>6}{'cost':>7}")
    for method in methods:
        cells, met = "", True
        for problem, truth, error in zip(problems, truths, errors, strict=True):
            known = region(torch.tensor([[[problem.seen, 0.0]]]).double(), torch.tensor([[[0.0, 1.0]]]).double(), count)
            found = float((inpaint(method, problem, known, 1.0)[..., 1] > 0).double().mean())
            met &= abs(found - truth) <= (3 * error if problem.exact else 0.08)
            cells += f"{found:16.3f}"
        told = verdict(met) if method.rule == "ours" else ""
        print(f"   {method.name:44}{costs(method, price)}{cells}{told}", flush=True)
    print()


# ---- Picture --------------------------------------------------------------------------------------------------------


def draw(path: str, count: int) -> None:
    """One random field for each mask: the known, the truth, a sample by each, the mean of ours and the exact one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(4, 7, figsize=(10.5, 6.6), dpi=100, layout="constrained")
    source = random_field(3.0)
    picture = source.draw(3)
    for axes, (name, mask) in zip(grid, masks().items(), strict=True):
        for one, shown in zip(axes, shown_for(source, picture, mask, count), strict=True):
            show(one, shown[0])
        axes[0].set_ylabel(name.replace("every ", "every\n"), fontsize=12)
    calls = [f"{len(method.plan)} calls" for method in (*rivals(50)[:2], ours(SamplerConfig()))]
    samples = [f"{name}\n{each}" for name, each in zip(("replacement", "RePaint", "ours"), calls, strict=True)]
    titles = ("known", "truth", *samples, f"ours, mean\nof {count}", "exact mean")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=12)
    figure.savefig(path)


def shown_for(source: RandomField, picture: Tensor, mask: Tensor, count: int) -> list[Tensor]:
    """The seven pictures [1, SIDE, SIDE] of a row."""
    mean = picture.clone()
    mean[mask == 1] = source.posterior(picture, mask)[0]
    replacement, resampled, _ = rivals(50)
    samples = [
        inpaint(method, source, region(picture, mask, 1), VARIANCE**0.5)[0] for method in (replacement, resampled)
    ]
    drawn = inpaint(ours(SamplerConfig()), source, region(picture, mask, count), VARIANCE**0.5)
    return [picture.masked_fill(mask == 1, math.nan), picture, *samples, drawn[0], drawn.mean(dim=0), mean]


def show(axes: Any, picture: Tensor) -> None:
    """One grey picture on light red, which shows where nothing is known."""
    axes.imshow(picture, cmap="gray", vmin=-1.2, vmax=1.2)
    axes.set_facecolor("#e8a598")
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main()
