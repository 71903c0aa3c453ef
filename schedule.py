"""What steers a training: its settings, learning rate, optimizer, and the budget of latent steps.

`config` is train.py's Train; is_adaptive and most_latent take a model's Config, too.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from baselines import METHODS, build
from model import AdaptiveLatentCoT, Config, LLaMA

ADAPTIVE = [name for name, method in METHODS.items() if issubclass(method, AdaptiveLatentCoT)]
OF_ADAPTIVE = "explore", "exit_loss", "weigh_values"  # settings that nothing else reads, off by default
STEERING = {"budget", "course", "lam", "beta", "tau", "router_bias"}  # likewise; configs set some of them
ROUTED = "--method=adaptive with a max_latent of 1 or more"  # what reads both


@dataclass
class Recipe(Config):
    """The settings of a training run: train.py makes one, compare.py several of every method."""

    vocab_size: int = 0  # rows of the embedding and of the head; 0: the vocabulary of the data
    data: str = "data/python"  # folder that prepare.py wrote
    out: str = "out/tiny"  # folder of this run
    train_tokens: int = 0  # read only the first so many tokens of the training text, again and again; 0: all
    seed: int = 1337  # of the weights and of the batches
    max_steps: int = 1000  # optimizer steps
    global_batch_size: int = 16  # sequences in one optimizer step, over all processes
    micro_batch_size: int = 0  # sequences in one forward; 0: all that fall to a process
    learning_rate: float = 1e-3  # peak; cosine to a tenth of it
    warmup: float = 0.02  # share of the steps in which the learning rate rises
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: off
    budget: float | None = None  # mean latent steps per token, met by moving τ; None: τ stays
    explore: float = 0.0  # logistic noise on the logits of reach, at the start; falls to 0 over 80 % of steps
    course: float = 0.5  # share of the steps in which the aim comes to the budget; 0: it starts there
    eval_windows: int = 128  # windows of validation text, the same for every method and seed
    device: str = ""  # cpu, cuda, cuda:N or mps; empty: cuda where there is one
    dtype: str = ""  # of matrix products, bfloat16 or float32; empty: what the device does well
    compile: bool | None = None  # torch.compile each block; None: on CUDA only
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time

    def model_config(self, vocab_size: int) -> Config:
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)} | {"vocab_size": vocab_size})

    def try_to_build(self, **other) -> None:
        """Raises ValueError where there is no model of this shape, but for what is `other`. Costs nothing."""
        with torch.device("meta"):
            build(replace(self.model_config(self.vocab_size or 1), **other))


def is_adaptive(config) -> bool:
    """Whether reach decides who takes a latent step."""
    return config.method in ADAPTIVE and config.max_latent > 0


def most_latent(config) -> int:
    """The latent steps that a token may take: of vanilla none, whatever its max_latent."""
    return 0 if config.method == "vanilla" else config.max_latent


def unread(config) -> dict[str, str]:
    """The settings that have no effect in this run → what they belong to."""
    if not is_adaptive(config):
        return dict.fromkeys((*OF_ADAPTIVE, *STEERING), ROUTED)
    return {"course": "--budget"} if config.budget is None else {}


def learning_rate(config, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak."""
    rise = max(1, round(config.warmup * config.max_steps))
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    progress = (step - rise) / max(1, config.max_steps - rise)
    return config.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def router_rate(config, step: int, start: float = 0.0) -> float:
    """Steady: in a step Adam moves w · h by at most about d times the rate, so by 40 in all.

    A new router in a model that starts trained waits until the aim has come to the budget: thoughts that no
    training has reached yet only harm, and a router that learns this gives them no weight for good.
    """
    if config.init_from and config.budget and not start and step < config.course * config.max_steps:
        return 0.0
    return 40 / (config.n_embd * config.max_steps)


def make_optimizer(model: LLaMA, config) -> torch.optim.AdamW:
    """Groups: matrices, which decay; vectors and biases; the router's weights, which have their own rate."""
    named = dict(model.named_parameters())
    names = [name for name in named if name.startswith("router.") and name.endswith("weight")]
    router = [named.pop(name) for name in names] if isinstance(model, AdaptiveLatentCoT) else []
    matrices = [p for p in named.values() if p.dim() >= 2]
    vectors = [p for p in named.values() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}]
    if router:
        groups.append({"params": router, "of_router": True})
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, weight_decay=0.0, fused=True)


def budget_at(config, step: int, start: float = 0.0) -> float:
    """Latent steps per token to aim for. They come to the budget over the share `course` of the training.

    From ℓ_max, so that every step is learnt before any is pruned; where a model starts trained, from `start`,
    what it does as it comes: none with a new router.
    """
    start = start if config.init_from else config.max_latent
    progress = min(1.0, (step + 1) / max(1.0, config.course * config.max_steps))
    return start + (config.budget - start) * progress


def seed_of(config, step: int) -> int:
    """The seed of what a step of training draws at random: a function of the step, the same everywhere."""
    return config.seed + 1_000_003 * (step + 1)


def exploration(config, step: int, device: torch.device) -> Tensor | None:
    """What is added to the logits of r[t,k+1] where a step of training decides who thinks (METHOD.md §8).

    (block_size, ℓ_max + 1), by position and column: the same for all sequences, so that it does not matter
    who computes which. None: nothing.
    """
    scale = config.explore * (1 - step / (0.8 * config.max_steps))
    if scale <= 0 or not is_adaptive(config):
        return None
    dice = torch.Generator().manual_seed(seed_of(config, step))
    u = torch.rand(config.block_size, config.max_latent + 1, generator=dice)
    return scale * torch.logit(u, 1e-6).to(device)


class BudgetController:
    """Moves the threshold τ so that the mean of executed latent steps is the budget.

    After every step of training it looks at the reach that all tokens had, of the steps they took and of the
    first that they were refused: τ*, the threshold that as many of these pass as the budget allows. τ follows
    τ* in logits, as a level with a trend (Holt), so that it does not lag where all reach drifts. So the
    budget is met from the first steps on, in short runs as in long ones, whatever the scale of reach, and
    nothing is ever pruned for good: what the router learns is the order of the tokens alone.
    """

    rate = 0.4  # the trend takes rate² / 4 of an error, the level that and rate: it does not oscillate
    span = 12.0  # logits of reach beyond it are counted with it
    bins = 2400

    def __init__(self) -> None:
        self.state = None  # logit of τ, and its change in a step; None: before the first step of training

    def count(self, reach: Tensor, noise: Tensor | None = None) -> Tensor:
        """A histogram of the logits of reach (…, ℓ_max) as an Output has it: (bins,), to be summed over
        micro-batches and processes. noise: what `exploration` adds to them.
        """
        logits = torch.logit(reach.float())
        if noise is not None:
            logits = logits + noise[:, : reach.size(-1)]
        logits = logits.clamp(-self.span, self.span).where(reach > 0, 2 * self.span)  # out of the range
        return torch.histc(logits, self.bins, -self.span, self.span)

    def update(self, counts: Tensor, wanted: float) -> float:
        """What `count` found, and how many of it are to be taken → τ of the next step."""
        counts = counts.flip(0)  # the highest first
        above = counts.cumsum(0)  # at the lower end of each bin
        width = 2 * self.span / self.bins
        i = int(torch.searchsorted(above, wanted, right=True))
        if i < self.bins:
            aim = self.span - width * (i + float(1 - (above[i] - wanted) / counts[i]))
        else:  # even all that were asked for are no more: below the lowest
            lowest = int(counts.nonzero()[-1]) if counts.any() else self.bins - 1
            aim = self.span - width * (lowest + 1) - 1
        level, trend = self.state or (aim, 0.0)
        error = aim - (level + trend)
        trend += self.rate**2 / 4 * error
        level += trend + self.rate * error
        self.state = (level, trend)
        return 1 / (1 + math.exp(-level))
