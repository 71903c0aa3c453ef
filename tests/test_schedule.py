"""The budget is met: on simulated routers of any scale, drift and length, and after a collapse."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from schedule import BudgetController, budget_at, exploration, router_rate
from train import Train


class Router:
    """Reach of 2,048 tokens as a router in training gives it: tokens come to differ, gates drift together.

    drift: logits that all gates move by over the training. A step is asked for where the last was taken.
    """

    def __init__(self, length, drift, spread=2.0, most=3):
        self.length, self.drift, self.spread, self.most = length, drift, spread, most
        self.dice = torch.Generator().manual_seed(0)

    def reach(self, step, tau, noise=0.0):
        share = step / self.length
        hard = torch.randn(2048, 1, generator=self.dice)
        logits = 2 + self.drift * share + self.spread * share * hard
        logits = logits + 0.3 * torch.randn(2048, self.most, generator=self.dice)
        reach = logits.sigmoid().cumprod(1)
        taken = torch.logit(reach) + noise >= torch.logit(torch.tensor(tau))
        taken = taken.int().cumprod(1).bool()  # a step needs those before it
        asked = torch.cat((torch.ones(2048, 1, dtype=torch.bool), taken[:, :-1]), 1)
        return reach * asked, taken.sum(1).float().mean().item()


@pytest.mark.parametrize("budget", [0.3, 1.0, 1.4, 2.5])
@pytest.mark.parametrize("length", [50, 100, 1000])
@pytest.mark.parametrize("drift", [-4.0, 0.0, 2.0])
def test_the_budget_is_met(budget, length, drift):
    router, controller, tau, course = Router(length, drift), BudgetController(), 0.1, []
    for step in range(length):
        reach, mean = router.reach(step, tau)
        course.append(mean)
        tau = controller.update(controller.count(reach), budget * len(reach))
    allowed = 0.2 if length < 100 else 0.1
    ends = sum(router.reach(length, tau)[1] for _ in range(8)) / 8  # as on a validation text
    assert abs(ends / budget - 1) < allowed
    assert abs(sum(course[10:]) / len(course[10:]) / budget - 1) < allowed, "in training too"


@pytest.mark.parametrize("budget", [0.5, 1.4])
def test_the_budget_is_met_where_a_training_explores(budget):
    """The noise is a function of seed and step, and gone before the end; the mean is the budget then, too."""
    config = Train(explore=2.0, max_steps=300, block_size=2048, seed=7)
    router, controller, tau, course = Router(300, -2.0), BudgetController(), 0.1, []
    for step in range(300):
        noise = exploration(config, step, torch.device("cpu"))
        assert (noise is None) == (step >= 240)
        reach, mean = router.reach(step, tau, 0.0 if noise is None else noise[:, :3])
        course.append(mean)
        tau = controller.update(controller.count(reach, noise), budget * len(reach))
    assert abs(router.reach(300, tau)[1] / budget - 1) < 0.1
    assert abs(sum(course[10:]) / len(course[10:]) / budget - 1) < 0.1
    first, second = (exploration(config, step, torch.device("cpu")) for step in (0, 1))
    assert first.std() > 3  # 2 π / √3 is that of the logistic, here 3.63
    assert not torch.equal(first > 0, second > 0)
    assert torch.equal(first, exploration(config, 0, torch.device("cpu")))


@pytest.mark.parametrize("budget,tau,most", [(0.0, 0.1, 0.02), (3.0, 0.99, 3.0), (1.0, 0.999999, 1.1)])
def test_the_ends_and_a_collapse(budget, tau, most):
    """No steps, all steps, and from a threshold that took none: nothing is pruned for good."""
    router, controller = Router(200, 0.0), BudgetController()
    controller.state = (13.0, 0.0)
    for step in range(60):
        reach, mean = router.reach(step, tau)
        tau = controller.update(controller.count(reach), budget * len(reach))
    assert most * 0.9 - 0.02 <= mean <= most


def test_counts_add_up_over_micro_batches():
    router, controller = Router(100, 0.0), BudgetController()
    reach, _ = router.reach(60, 0.3)
    parts = sum(controller.count(part) for part in reach.split(500))
    assert torch.equal(parts, controller.count(reach)) and parts.sum() == (reach > 0).sum()


def test_the_threshold_passes_what_the_budget_allows():
    """At once: three of these reaches are at least τ, for two tokens and a budget of 1.5."""
    reach = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.2, 0.0]])
    controller = BudgetController()
    tau = controller.update(controller.count(reach), 3)
    assert (reach >= tau).sum() == 3


def test_the_course_of_a_budget():
    """From all steps down, so that each is learnt; a trained model from none up; or the budget throughout."""
    config = Train(budget=1.5, max_steps=100)
    course = [budget_at(config, step) for step in range(100)]
    assert course[0] == pytest.approx(2.97) and course[24] == 2.25 and set(course[49:]) == {1.5}
    config.init_from = "out/vanilla"
    course = [budget_at(config, step) for step in range(100)]
    assert course[0] == pytest.approx(0.03) and course[24] == 0.75 and set(course[49:]) == {1.5}
    assert budget_at(config, 24, 2.5) == 2.0, "from what a model that thinks does already"
    rates = [router_rate(config, step) for step in range(100)]
    assert set(rates[:50]) == {0.0} and set(rates[50:]) == {40 / (128 * 100)}, "a new router waits for it"
    assert router_rate(config, 0, 2.5) > 0, "a trained one does not"
    config.course = 0.0
    assert {budget_at(config, step) for step in range(100)} == {1.5}


def test_reach_that_vanishes_is_below_every_threshold():
    controller = BudgetController()
    assert 0 < controller.update(controller.count(torch.zeros(4, 3)), 2.0) < 1e-5


DERIVED = """
import baselines, model
class Quiet(model.AdaptiveLatentCoT):
    pass
baselines.METHODS["quiet"] = Quiet
from common import turn
from compare import Compare, plain_run
from costs import made_up_steps
from train import Train
config = Train(method="quiet", budget=1.0, lam=0.5)
assert (config.budget, config.lam) == (1.0, 0.5)
run = plain_run("quiet", Compare(methods=["quiet"], budget=1.0, lam=0.5))
assert (run.who, run.budget, run.lam) == ("quiet", 1.0, 0.5), run
assert made_up_steps(config, 4, 100, 1.0).mean() < 2
quiet = baselines.build(config.model_config(61))
turn(quiet, "out/quiet", tau=0.5, max_latent=None)
assert quiet.tau == 0.5
"""


def test_what_is_derived_from_the_method_is_steered_as_it_is():
    subprocess.run([sys.executable, "-c", DERIVED], check=True, cwd=Path(__file__).parent.parent)
