"""Trained weights taken over: all that both models have, and a router that holds its thoughts back."""

import copy

import pytest
import torch

from conftest import uneven
from init_from import take_weights
from log import States


@pytest.mark.parametrize("source,target,fresh", [
    ("vanilla", "adaptive", ["router.weight", "router.bias"]), ("adaptive", "vanilla", []),
    ("pause", "pause", []), ("vanilla", "pause", ["pause"]), ("adaptive", "mor", ["router.weight"]),
    ("mor", "mor", []),
    ("adaptive", "adaptive", [])])
def test_what_is_taken_over_and_what_is_new(source, target, fresh):
    old, new = uneven(source, seed=1), uneven(target, seed=2)
    said = take_weights(new, old, True)
    for name, weight in new.state_dict().items():
        assert name in said if name in fresh else torch.equal(weight, old.state_dict()[name]), name
    assert ("new: " in said) == bool(fresh)


def test_a_router_of_another_number_of_depths_is_new():
    old, new = uneven("mor", max_latent=2), uneven("mor", max_latent=3)
    assert "new: router.weight" in take_weights(new, old, True)


@pytest.mark.parametrize("bias", [-100.0, 0.0, 2.0, 100.0])
def test_a_new_router_holds_every_step_back(bias):
    """Whatever the state: also the one along which it reaches furthest."""
    old, new = uneven("vanilla", seed=1), uneven(router_bias=bias, tau=0.0)
    old.norm.weight.data.uniform_(0.1, 30)
    assert "no latent step at the start" in take_weights(new, old, True)
    gamma = new.norm.weight
    h = torch.nn.functional.normalize(new.router.weight * gamma) * gamma * 32**0.5
    column = torch.zeros(2, dtype=torch.long)
    ahead, live = new.onward(torch.cat((h, -h)), torch.ones(2), States.tick(column, column))
    assert not live.any() and 0.9 * new.tau < ahead[0] < new.tau and ahead[1] < ahead[0]


def test_without_a_budget_a_router_starts_as_it_is_set():
    new = uneven(router_bias=0.5, seed=3)
    before = copy.deepcopy(new.router.state_dict())
    said = take_weights(new, uneven("vanilla"), False)
    assert "no latent step" not in said and torch.equal(new.router.weight, before["weight"])


def test_the_threshold_of_a_router_is_taken_over_with_it():
    old, new = uneven(tau=0.25), uneven(tau=0.1)
    old.tau = 0.37
    take_weights(new, old, True)
    assert new.tau == 0.37 and torch.equal(new.router.bias, old.router.bias)
    new.tau = 0.2
    assert "τ is 0.2, was 0.37" in take_weights(new, old, False)
    assert new.tau == 0.2, "without a budget it stays as it was set"
