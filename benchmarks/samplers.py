"""Which sampler and grid has the smallest error for its denoiser calls? Ours beside diffusers', on exact problems.

usage: python benchmarks/samplers.py [PLOT.png] [--model FOLDER]

Needs torch alone; rows of diffusers' schedulers are added where it is installed, and matplotlib is imported for a
plot alone. The error is the root mean square over samples and values against the exact probability flow from sigma 80,
solved in float64 on mixtures of Gaussians whose denoiser is known in closed form; a row for a group of problems is
the geometric mean of theirs. With --model the problem is a published network, solved finely.

A sampler may stop at sigma 0 or at 0.002, whichever serves it better, and is compared with the exact solution at the
level where it stopped. Each sampler is shown on the grid that serves it best, chosen anew for each number of calls.
diffusers walks the very same levels: `trained_betas` is made of them, so that "linspace" timesteps visit them all and
final_sigmas_type="sigma_min" spends no call at the end; and its own Karras, exponential and Lu grids over the same
range, down to 0. Its schedulers get eps of the exact denoiser at the level in their own table. Mixed rows tell what
half of our default does: its grid arctan under the other samplers, its sampler angular_3 on the other grids.
"""

import argparse
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import GridName, SamplerConfig, SamplerName, ScheduleName
from diffusion_core.samplers import Plan, make_plan, sample
from diffusion_core.schedules import sigma_grid

HIGH, LOW = 80.0, 0.002
CALLS = (5, 8, 10, 16, 32)
SAMPLERS: tuple[SamplerName, ...] = ("ddim", "heun", "dpmpp_2m", "ipndm_4", "exponential_3", "exponential_4")
# The last three are uniform_t of a schedule; that of edm is karras over this range
GRIDS = ("karras", "log_snr", "linear", "cosine", "flow")
SCHEDULES: dict[str, ScheduleName] = {"linear": "linear", "cosine": "cosine", "flow": "flow"}
NAMED: dict[str, GridName] = {"karras": "karras", "log_snr": "log_snr", "arctan": "arctan"}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM++ 2": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "DPM++ 3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC 2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "DEIS 3": ("DEISMultistepScheduler", {"solver_order": 3}),
}
OWN_GRIDS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "log_snr", "use_lu_lambdas": "lu"}

Denoise = Callable[[Tensor, float], Tensor]


def main() -> None:
    """Print a table for each number of calls, and draw the best rows."""
    parser = argparse.ArgumentParser(description="Which sampler has the smallest error for its calls?")
    parser.add_argument("plot", nargs="?", help="where to draw error against calls")
    parser.add_argument("--model", help="folder of a published model to solve instead of the mixtures")
    options = parser.parse_args()
    torch.set_num_threads(torch.get_num_threads() if options.model else 1)  # the mixtures are small
    began = time.perf_counter()
    problems = list(network_problems(options.model) if options.model else mixture_problems())
    groups = list(dict.fromkeys(problem.group for problem in problems))
    check = max(problem.doubt for problem in problems)
    print(f"{len(problems)} problems; halving the steps of the exact solutions moved them by {check:.0e} at most")
    diffusers = optional_diffusers()
    curves: dict[int, list[Result]] = {}
    for calls in CALLS[: 3 if options.model else None]:
        runners = [*our_runners(calls), *(their_runners(diffusers, calls) if diffusers else [])]
        results = [measure(runner, problems) for runner in runners]
        curves[calls] = best_of_each(results)
        print_table(calls, groups, curves[calls])
        print_ratios(groups, results)
    print(f"{time.perf_counter() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads")
    if options.plot:
        draw(options.plot, curves)


# ---- Problems -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Start values [B, d] at sigma 80 and where the exact flow takes them: to sigma 0.002 and to 0."""

    group: str
    denoise: Denoise
    start: Tensor
    at_low: Tensor
    at_zero: Tensor
    doubt: float

    def error(self, x: Tensor, sigma: float) -> float:
        """Root mean square error of an `x` that stopped at `sigma`."""
        exact = self.at_zero if sigma == 0 else self.at_low
        return float(torch.sqrt(((x - exact) ** 2).mean()))


@dataclass(frozen=True)
class Mixture:
    """Gaussians of `weights` [K] and `means` [K, d]; variance `along` [K, r] `axes` [K, r, d], `across` [K] them."""

    weights: Tensor
    means: Tensor
    axes: Tensor
    along: Tensor
    across: Tensor

    @cached_property
    def centres(self) -> Tensor:
        """Where the means lie along the axes, [K, r]."""
        return (self.axes @ self.means[:, :, None])[:, :, 0]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """E[x0 | x0 + sigma·eps = x] for x [B, d]."""
        modes, rank, dim = self.axes.shape
        flat = self.axes.flatten(0, 1)
        places = (x @ flat.T).reshape(-1, modes, rank) - self.centres
        square = (x**2).sum(1, keepdim=True) - 2 * x @ self.means.T + (self.means**2).sum(1)
        across, along = self.across + sigma**2, self.along + sigma**2
        rest = (square - (places**2).sum(2)).clamp(min=0)
        spread = (dim - rank) * torch.log(across) + torch.log(along).sum(1)
        logits = torch.log(self.weights) - 0.5 * (rest / across + (places**2 / along).sum(2) + spread)
        share = torch.softmax(logits, dim=1)
        kept = self.across / across
        turned = share[:, :, None] * (self.along / along - kept[:, None]) * places
        pull = share * kept
        return (share - pull) @ self.means + pull.sum(1, keepdim=True) * x + turned.flatten(1) @ flat


def mixture_problems() -> Iterator[Problem]:
    """Pictures that the numbers of arctan and angular_3 were searched on, and problems that the search never saw."""
    searched = [(31, 3, 16, 20, 10, 1.5, 0.5), (32, 1, 32, 40, 6, 1.2, 0.7), (33, 1, 16, 60, 8, 1.8, 0.4)]
    pictures = [(51, 3, 8, 30, 8, 1.3, 0.6), (52, 3, 24, 12, 12, 1.6, 0.5), (53, 1, 24, 80, 5, 1.0, 0.8)]
    pictures.append((54, 3, 32, 10, 24, 1.5, 0.3))
    points = [(61, 2, 5, 2, 0.8), (62, 6, 15, 5, 0.5), (63, 24, 18, 10, 0.6), (64, 64, 20, 8, 0.7)]
    for shape in searched:
        yield solved("searched", picture_mixture(*shape), 32, shape[0], 120)
    for shape in pictures:
        yield solved("pictures", picture_mixture(*shape), 32, shape[0], 120)
    for spot in points:
        yield solved("points", point_mixture(*spot), 256, spot[0], 200)
    two = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    yield solved("two modes", Mixture(ones / 2, two, ones[:, None, None], ones[:, None] / 16, ones / 16), 1024, 71, 200)


def picture_mixture(
    seed: int, channels: int, side: int, modes: int, rank: int, falloff: float, spread: float
) -> Mixture:
    """Modes that are smooth random pictures, each with smooth variations; values of standard deviation 0.5."""
    rng = torch.Generator().manual_seed(seed)
    dim = channels * side * side
    means = smooth_pictures(rng, modes, channels, side, falloff)
    weights = 0.3 + torch.rand(modes, generator=rng, dtype=torch.float64)
    weights = weights / weights.sum()
    means = means - weights @ means
    means = means * torch.sqrt(0.25 * spread / ((weights @ means**2).sum() / dim))
    variations = smooth_pictures(rng, modes * rank, channels, side, falloff).reshape(modes, rank, dim)
    axes = torch.linalg.qr(variations.transpose(1, 2))[0].transpose(1, 2).contiguous()
    noise = torch.randn(modes, rank, generator=rng, dtype=torch.float64)
    along = torch.arange(1, rank + 1, dtype=torch.float64) ** -1.4 * torch.exp(0.5 * noise)
    along = along * 0.25 * (1 - spread) * dim / (weights @ along.sum(1))
    rough = 0.03 * torch.exp(0.3 * torch.randn(modes, generator=rng, dtype=torch.float64))
    return Mixture(weights, means, axes, along, rough**2)


def smooth_pictures(rng: torch.Generator, count: int, channels: int, side: int, falloff: float) -> Tensor:
    """Random pictures [count, channels·side²] whose amplitudes fall with frequency; channels resemble one another."""
    places = torch.fft.fftfreq(side, dtype=torch.float64) * side
    amplitude = (1 + torch.hypot(places[:, None], places)) ** -falloff
    noise = torch.randn(count, channels, side, side, generator=rng, dtype=torch.float64)
    if channels > 1:
        noise = 0.6 * channels**0.5 * noise.mean(1, keepdim=True) + 0.4 * noise
    smooth: Tensor = torch.fft.ifft2(torch.fft.fft2(noise) * amplitude).real
    return smooth.reshape(count, -1)


def point_mixture(seed: int, dim: int, modes: int, rank: int, spread: float) -> Mixture:
    """Modes anywhere, each flat in some directions and long in others; coordinates of standard deviation 0.5."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.randn(modes, dim, generator=rng, dtype=torch.float64)
    weights = 0.3 + torch.rand(modes, generator=rng, dtype=torch.float64)
    weights = weights / weights.sum()
    means = means - weights @ means
    axes = torch.linalg.qr(torch.randn(modes, dim, rank, generator=rng, dtype=torch.float64))[0].transpose(1, 2)
    along = 0.0004 * 400 ** torch.rand(modes, rank, generator=rng, dtype=torch.float64)
    across = 0.0004 * (1 + torch.rand(modes, generator=rng, dtype=torch.float64)) ** 2
    within = weights @ (along.sum(1) + (dim - rank) * across) / dim
    means = means * torch.sqrt(0.25 * spread / ((weights @ means**2).sum() / dim))
    narrow = 0.25 * (1 - spread) / within
    return Mixture(weights, means, axes, along * narrow, across * narrow)


def network_problems(folder: str) -> Iterator[Problem]:
    """Eight pictures of a published model, one label after the other, without guidance and at guidance 2."""
    from diffusion_core.denoiser import guidance, guided
    from pipelines.model import load_model

    denoiser = load_model(folder).denoiser
    unet = denoiser.config.unet
    label = torch.arange(8) % unet.classes if unet.classes else None
    shape = (8, unet.channels, unet.resolution, unet.resolution)
    for scale in (1.0, 2.0) if unet.classes else (1.0,):

        @torch.inference_mode()
        def denoise(x: Tensor, sigma: float, scale: float = scale) -> Tensor:
            levels = torch.full((8,), sigma)
            how = guidance(torch.full((8,), scale))
            return guided(denoiser, x.float().reshape(shape), levels, label, how).double().flatten(1)

        start = HIGH * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).flatten(1)
        at_low = solve(denoise, start, HIGH, LOW, 80)
        doubt = float(torch.sqrt(((solve(denoise, start, HIGH, LOW, 40) - at_low) ** 2).mean()))
        yield Problem(f"guidance {scale:g}", denoise, start, at_low, denoise(at_low, LOW), doubt)


def solved(group: str, mixture: Mixture, samples: int, seed: int, steps: int) -> Problem:
    """The problem of a mixture, with its exact solution and how far half the steps are from it."""
    rng = torch.Generator().manual_seed(1000 + seed)
    start = HIGH * torch.randn(samples, mixture.means.shape[1], generator=rng, dtype=torch.float64)
    at_low = solve(mixture, start, HIGH, LOW, steps)
    doubt = float(torch.sqrt(((solve(mixture, start, HIGH, LOW, steps // 2) - at_low) ** 2).mean()))
    lowest = LOW / 20
    at_zero = mixture(solve(mixture, at_low, LOW, lowest, 20), lowest)
    return Problem(group, mixture, start, at_low, at_zero, doubt)


def solve(denoise: Denoise, x: Tensor, high: float, low: float, steps: int) -> Tensor:
    """dx/d ln(sigma) = x − D by the classical Runge-Kutta method of fourth order."""

    def slope(x: Tensor, log_sigma: float) -> Tensor:
        return x - denoise(x, math.exp(log_sigma))

    h = math.log(low / high) / steps
    for step in range(steps):
        u = math.log(high) + step * h
        first = slope(x, u)
        second = slope(x + h / 2 * first, u + h / 2)
        third = slope(x + h / 2 * second, u + h / 2)
        x = x + h / 6 * (first + 2 * second + 2 * third + slope(x + h * third, u + h))
    return x


# ---- Samplers -------------------------------------------------------------------------------------------------------


class Runner(NamedTuple):
    """A sampler on a grid: `run(problem)` gives the last x and the sigma where it stopped."""

    kind: str
    sampler: str
    grid: str
    run: Callable[[Problem], tuple[Tensor, float]]


class Result(NamedTuple):
    """Errors of a runner by group of problems, and over all that the search never saw."""

    runner: Runner
    groups: dict[str, float]
    overall: float


def levels(grid: str, steps: int, to_zero: bool) -> Tensor:
    """Levels [steps + 1] of a grid or of a schedule's uniform steps, down to 0 or to 0.002."""
    if grid == "arctan":
        sigmas = sigma_grid("arctan", steps, LOW, HIGH)
        return sigmas if to_zero else torch.cat((sigmas[:-1], torch.tensor([LOW], dtype=torch.float64)))
    count = steps if to_zero else steps + 1
    if grid in NAMED:
        sigmas = sigma_grid(NAMED[grid], count, LOW, HIGH)
    else:
        sigmas = sigma_grid("uniform_t", count, LOW, HIGH, SCHEDULES[grid])
    return sigmas if to_zero else sigmas[:-1]


def our_runners(calls: int) -> Iterator[Runner]:
    """Our default; every other deterministic sampler on every grid, to 0 and to 0.002; angular_3 on other grids."""
    for grid in ("arctan", "karras", "log_snr"):
        plan = make_plan(SamplerConfig("angular_3", calls), levels(grid, calls, to_zero=grid == "arctan"))
        yield Runner("default" if grid == "arctan" else "mixed", "angular_3", grid, walk(plan))
    for grid in (*GRIDS, "arctan"):
        for to_zero in (True, False):
            for name in SAMPLERS:
                steps = (calls + to_zero) // 2 if name == "heun" else calls
                plan = make_plan(SamplerConfig(name, steps), levels(grid, steps, to_zero))
                yield Runner("mixed" if grid == "arctan" else "ours", name, grid, walk(plan))


def walk(plan: Plan) -> Callable[[Problem], tuple[Tensor, float]]:
    """Run a table of the core."""

    def run(problem: Problem) -> tuple[Tensor, float]:
        seeds = torch.zeros(len(problem.start), dtype=torch.int64)
        x = sample(lambda x, sigma: problem.denoise(x, float(sigma[0])), plan, problem.start, seeds)
        return x, float(plan.sigma_next[-1])

    return run


def optional_diffusers() -> Any:
    """The module diffusers, or None where it is not installed."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        print("diffusers is not installed: its rows are missing")
        return None
    diffusers.logging.set_verbosity_error()
    return diffusers


def their_runners(diffusers: Any, calls: int) -> Iterator[Runner]:
    """Every scheduler on our levels down to 0.002, and on its own grids down to 0."""
    for name, (kind, settings) in THEIRS.items():
        scheduler = getattr(diffusers, kind)
        stop = {} if name.startswith("DEIS") else {"final_sigmas_type": "sigma_min"}
        for grid in (*GRIDS, "arctan"):
            betas = betas_of(levels(grid, calls, to_zero=False))
            arguments = {**settings, **stop, "trained_betas": betas, "num_train_timesteps": len(betas)}
            yield Runner("mixed" if grid == "arctan" else "theirs", name, grid, drive(scheduler, arguments, calls))
        betas = betas_of(levels("log_snr", 999, to_zero=False))
        for option, grid in OWN_GRIDS.items():
            if option != "use_lu_lambdas" or name.startswith("DPM"):
                arguments = {**settings, "trained_betas": betas, option: True}
                yield Runner("theirs", name, f"own {grid}", drive(scheduler, arguments, calls))


def betas_of(sigmas: Tensor) -> list[float]:
    """Betas whose noise levels are `sigmas`, which decrease."""
    alphas = torch.cat((torch.ones(1, dtype=torch.float64), 1 / (1 + sigmas.flip(0) ** 2)))
    betas: list[float] = (1 - alphas[1:] / alphas[:-1]).tolist()
    return betas


def drive(scheduler: Any, arguments: dict[str, Any], calls: int) -> Callable[[Problem], tuple[Tensor, float]]:
    """Run one of diffusers' schedulers, which hold x/sqrt(1 + sigma²) and ask for eps."""

    def run(problem: Problem) -> tuple[Tensor, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mutable = scheduler(**arguments)
            mutable.set_timesteps(calls)
            sigmas = mutable.sigmas.double()
            x = problem.start / (1 + sigmas[0] ** 2) ** 0.5
            for step, timestep in enumerate(mutable.timesteps):
                sigma = sigmas[step]
                plain = x * (1 + sigma**2) ** 0.5
                eps = (plain - problem.denoise(plain, float(sigma))) / sigma
                x = mutable.step(eps, timestep, x, return_dict=False)[0]
        return x.double() * (1 + sigmas[-1] ** 2) ** 0.5, float(sigmas[-1])

    return run


# ---- Results --------------------------------------------------------------------------------------------------------


def measure(runner: Runner, problems: list[Problem]) -> Result:
    """Errors of one runner on all problems."""
    errors: dict[str, list[float]] = {}
    for problem in problems:
        errors.setdefault(problem.group, []).append(problem.error(*runner.run(problem)))
    unseen = [error for group, values in errors.items() if group != "searched" for error in values]
    return Result(runner, {group: mean(values) for group, values in errors.items()}, mean(unseen))


def mean(errors: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(math.log(error) for error in errors) / len(errors))


def best_of_each(results: list[Result]) -> list[Result]:
    """Each sampler of each kind on its best grid, the best sampler first within its kind."""
    best: dict[tuple[str, str], Result] = {}
    for result in sorted(results, key=lambda result: result.overall):
        best.setdefault((result.runner.kind, result.runner.sampler), result)
    kinds = ["default", "ours", "theirs", "mixed"]
    return sorted(best.values(), key=lambda result: kinds.index(result.runner.kind))


def print_table(calls: int, groups: list[str], best: list[Result]) -> None:
    """One line a sampler, with the best of a kind marked."""
    print(f"\n{f'{calls} calls':34}{'grid':12}" + "".join(f"{group:>12}" for group in (*groups, "unseen")))
    kinds = {"mixed"}
    for result in best:
        kind = result.runner.kind
        mark = "" if kind in kinds else "  <- best"
        kinds.add(kind)
        cells = "".join(f"{result.groups[group]:12.4f}" for group in groups)
        print(f"  {kind:10}{result.runner.sampler:22}{result.runner.grid:12}{cells}{result.overall:12.4f}{mark}")


def print_ratios(groups: list[str], results: list[Result]) -> None:
    """How many times the error of the default the others have: the best sampler and grid of each column by itself."""
    default = next(result for result in results if result.runner.kind == "default")
    for kind in ("ours", "theirs"):
        rivals = [result for result in results if result.runner.kind == kind]
        if rivals:
            ratios = [min(rival.groups[group] for rival in rivals) / default.groups[group] for group in groups]
            ratios.append(min(rival.overall for rival in rivals) / default.overall)
            print(
                f"  {f'best of {kind} here / default':44}" + "".join(f"{ratio:12.2f}" for ratio in ratios), flush=True
            )


def draw(path: str, curves: dict[int, list[Result]]) -> None:
    """Error against calls, both logarithmic: our default, and the best four of ours and of theirs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[tuple[str, str], list[float]] = {}
    for results in curves.values():
        for result in results:
            lines.setdefault((result.runner.kind, result.runner.sampler), []).append(result.overall)
    figure, axes = pyplot.subplots(figsize=(10, 6.2), dpi=100, layout="constrained")
    styles = {"default": ("-", "o", 3.0), "ours": ("--", "s", 1.5), "theirs": ("-", "^", 1.5)}
    for kind, (line, marker, width) in styles.items():
        chosen = sorted((errors[1], name, errors) for (own, name), errors in lines.items() if own == kind)[:4]
        for _, name, errors in chosen:
            label = name if kind == "ours" else f"{name} ({'our default' if kind == 'default' else 'diffusers'})"
            axes.loglog(list(curves), errors, line, marker=marker, linewidth=width, label=label)
    axes.set_xticks(list(curves), [str(calls) for calls in curves])
    axes.minorticks_off()
    axes.set_xlabel("denoiser calls", fontsize=13)
    axes.set_ylabel("error against the exact flow (RMS)", fontsize=13)
    axes.set_title("Each sampler on its best grid, on mixtures that no search has seen", fontsize=13)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=12)
    figure.savefig(path)


if __name__ == "__main__":
    main()
