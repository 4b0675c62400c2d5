"""Time of our U-Net and of diffusers' UNet2DModel of like size to the same held-out loss on the cartoons.

usage: python benchmarks/learning.py [STEPS [CURVES.json]]     needs the project's environment with diffusers

Three learners see the same pictures in the same order, a few steps each in turn: our preset as the train stage
trains it; UNet2DModel with its default blocks, head size and conditioning, narrowed to like size, on the classic eps
loss; and the same network on our loss. All have our optimiser, warm-up, batch and average. The common loss is the
error of the denoised held-out pictures under EDM's weighting, at fixed noise. CPU time of the training steps alone.
"""

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion_core.config import PRESETS, ModelConfig, Timesteps
from diffusion_core.denoiser import Denoiser
from diffusion_core.ema import Profile
from diffusion_core.losses import per_sample_loss
from diffusion_core.noise import normal
from diffusion_core.schedules import SigmaDistribution
from diffusion_core.training import Batch, Optimisation, TrainState, new_state, train_step
from diffusion_core.unet import UNet

PICTURES, HELDOUT, BATCH, TURN, EVERY = 4000, 256, 32, 10, 20
CLASSES = 8


@dataclass
class Learner:
    """A network on its way: state, the seconds that its steps took, and [step, seconds, held-out loss] rows."""

    state: TrainState
    settings: Optimisation
    seconds: float = 0.0
    curve: list[tuple[int, float, float]] = field(default_factory=list)


class Theirs(nn.Module):
    """UNet2DModel behind our networks' signature."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.net = UNet2DModel(
            sample_size=32, block_out_channels=(32, 32, 32, 32), layers_per_block=2, num_class_embeds=classes + 1
        )

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """The network's answer."""
        out: Tensor = self.net(x, c_noise, label).sample
        return out


def main(arguments: list[str]) -> None:
    """Train all learners in turn and print the times."""
    steps = int(arguments[0]) if arguments else 600
    x0, label = cartoons()
    sigma_data = float(x0.std())
    learners = new_learners(steps, sigma_data)
    for name, learner in learners.items():
        count = sum(parameter.numel() for parameter in learner.state.network.parameters())
        print(f"{name}: {count / 1e6:.2f} M parameters")
    for first in range(0, steps, TURN):
        for learner in learners.values():
            for step in range(first, min(first + TURN, steps)):
                advance(learner, x0, label, step)
            if (first + TURN) % EVERY == 0:
                loss = heldout_loss(learner, x0[-HELDOUT:], label[-HELDOUT:], sigma_data)
                learner.curve.append((learner.state.step, learner.seconds, loss))
        print("  ".join(f"{n} {each.curve[-1][2]:.4f}" for n, each in learners.items() if each.curve), flush=True)
    report(learners)
    if len(arguments) > 1:
        Path(arguments[1]).write_text(json.dumps({name: each.curve for name, each in learners.items()}))


def cartoons() -> tuple[Tensor, Tensor]:
    """The demo's pictures [N, 3, 32, 32] in [-1, 1] and their labels [N]; the last are held out."""
    from pipelines.cartoons import cartoon, draw

    drawn = [cartoon(0, index) for index in range(PICTURES)]
    names = sorted({each.character for each in drawn})
    pixels = np.stack([np.asarray(draw(each, 32).convert("RGB")) for each in drawn])
    x0 = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x0, torch.tensor([names.index(each.character) for each in drawn])


def new_learners(steps: int, sigma_data: float) -> dict[str, Learner]:
    """Our preset, and UNet2DModel's default on either loss."""
    unet = replace(PRESETS["cpu-small"], classes=CLASSES)
    names = tuple(f"class {number}" for number in range(CLASSES))
    edm = ModelConfig(unet, "edm", sigma_data, class_names=names)
    eps = ModelConfig(
        unet, "eps", sigma_data, 0.01, 157.0, names, "linear", Timesteps()
    )  # the levels of 1,000 betas from 1e-4 to 0.02
    ours = UNet(unet).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    classic = SigmaDistribution("uniform_t", schedule="linear", low=0.01, high=157.0)
    return {
        "ours": learner(ours, edm, steps, SigmaDistribution(), stratified=True),
        "UNet2DModel, eps": learner(Theirs(CLASSES), eps, steps, classic, stratified=False),
        "UNet2DModel, our loss": learner(Theirs(CLASSES), edm, steps, SigmaDistribution(), stratified=True),
    }


def learner(network: nn.Module, config: ModelConfig, steps: int, sigma: SigmaDistribution, stratified: bool) -> Learner:
    """A learner with the optimiser of the train stage, at a constant rate after its warm-up."""
    settings = Optimisation(
        steps=100 * steps, learning_rate=2e-3, warmup=50, clip=1.0, weight_decay=0.0, label_dropout=0.1,
        ema=(Profile("power", 0.1),), seed=0, global_batch_size=BATCH, sigma=sigma, stratified=stratified,
    )  # fmt: skip
    return Learner(new_state(Denoiser(network, config), network, settings), settings)


def advance(learner: Learner, x0: Tensor, label: Tensor, step: int) -> None:
    """One timed step on the pictures that every learner sees at it."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(PICTURES - HELDOUT, (BATCH,), generator=generator)
    pictures = x0[ids]
    if isinstance(learner.state.network, UNet):
        pictures = pictures.contiguous(memory_format=torch.channels_last)
    batch = Batch(pictures, label[ids], ids, torch.arange(BATCH))
    began = time.process_time()
    learner.state, _ = train_step(learner.state, batch, learner.settings)
    learner.seconds += time.process_time() - began


@torch.no_grad()
def heldout_loss(learner: Learner, x0: Tensor, label: Tensor, sigma_data: float) -> float:
    """Error of the averaged network's denoised pictures under EDM's weighting, at fixed sigmas and noise."""
    network, config = learner.state.network, learner.state.denoiser.config
    trained = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(learner.state.ema[0])
    places = (torch.arange(len(x0), dtype=torch.float64) + 0.5) / len(x0)
    sigma = SigmaDistribution().sigma(places[torch.randperm(len(x0), generator=torch.Generator().manual_seed(0))])
    noise = normal(torch.arange(len(x0)), "known", 0, x0.shape[1:])
    loss = per_sample_loss(learner.state.denoiser, x0, sigma.float(), noise, label, "edm").mean()
    assert config.sigma_data == sigma_data
    network.load_state_dict(trained)
    return float(loss)


def report(learners: dict[str, Learner]) -> None:
    """Our time to the loss that each of the others ends with, over its time."""
    ours = learners["ours"]
    for name, other in learners.items():
        step, seconds, loss = other.curve[-1]
        print(f"{name}: {step} steps, {seconds:.1f} s of CPU, held-out loss {loss:.4f}")
        reached = next((row for row in ours.curve if row[2] <= loss), None)
        if other is ours or reached is None:
            continue
        print(f"  ours: step {reached[0]}, {reached[1]:.1f} s, ratio {reached[1] / seconds:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
