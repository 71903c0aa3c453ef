"""Counted FLOPs are those of the formula, forced routers have their mean, a pass reads weights once."""

import weakref
from pathlib import Path

import pytest
import torch

from baselines import METHODS
from common import BadInput, configure
from conftest import uneven
from costs import (bytes_read, costs, counted, forward_flops, going_on, kept_bytes, made_up_steps, make,
                   memory, training_flops)
from log import Cache
from model import Config, LLaMA
from train import Train

SHAPE = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_ff": 24, "block_size": 32, "vocab_size": 67}
T = SHAPE["block_size"]
CONFIGS = Path(__file__).parent.parent / "config"


@pytest.mark.parametrize("other", [
    {}, {"n_kv_head": 1, "tie_embeddings": True}, {"head_dim": 12, "qkv_bias": True, "qk_norm": True}])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_a_forced_router_costs_what_the_formula_says(K, other):
    """Exactly, forward and backward, row by row; of all methods with routers of their own: test_model.py."""
    model = make(Config(max_latent=K, **SHAPE | other), "cpu", 0.5 * K).eval()
    idx, targets = torch.randint(0, 67, (2, 3, T))
    total, steps = counted(model, idx, targets)
    assert total == float(training_flops(*forward_flops(model, steps)))
    if K == 3:
        assert len(set(steps.sum(1).tolist())) > 1, "rows differ"
        assert steps.max() > 1, "some tokens take several steps"


def test_a_trained_router_costs_what_the_formula_says():
    """The same with the model's own router, whose halting depends on the token."""
    model = uneven()
    idx, targets = torch.randint(0, 61, (2, 4, 48))
    total, steps = counted(model, idx, targets)
    assert 0 < steps.mean() < 3 and total == float(training_flops(*forward_flops(model, steps)))
    assert total < float(training_flops(*forward_flops(model, torch.full_like(steps, 3))))


def test_a_router_of_two_layers_costs_what_the_formula_says():
    model = uneven()
    model.router = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    total, steps = counted(model, *torch.randint(0, 61, (2, 4, 48)))
    assert total == float(training_flops(*forward_flops(model, steps)))


def test_a_method_must_say_what_it_costs():
    class Twice(LLaMA):
        def think(self, x, states, cache):
            return super().think(super().think(x, states, cache)[0], states, cache)

    with pytest.raises(NotImplementedError, match="Twice"):
        forward_flops(Twice(Config(method="vanilla", **SHAPE)), torch.zeros(1, T))


@pytest.mark.parametrize("rounds", [2, 3])
def test_what_ponder2_draws_is_counted(rounds):
    model = make(Config(method="ponder2", max_latent=2, **SHAPE), "cpu").train()
    for seed in range(20):
        model.draw(seed)
        if model.rounds == rounds:
            break
    total, steps = counted(model, *torch.randint(0, 67, (2, 1, T)))
    assert total == float(training_flops(*forward_flops(model, steps)))


@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_a_forced_router_has_its_mean(mean):
    model = make(Config(max_latent=3, **SHAPE), "cpu", mean)
    with torch.no_grad():
        steps = model(torch.randint(0, 67, (32, T))).steps
        alone = [model.router(torch.zeros(1, 16)).item() > 0 for _ in range(2000)]
    assert steps.mean().item() == pytest.approx(mean, abs=0.01)
    q = going_on(mean, 3)
    assert q + q**2 + q**3 == pytest.approx(mean, abs=1e-6)
    assert sum(alone) / 2000 == pytest.approx(q, abs=0.04), "one token at a time, as in decoding"


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_a_forced_router_does_not_depend_on_tau(tau):
    model = make(Config(max_latent=3, tau=tau, **SHAPE), "cpu", 1.5)
    assert model(torch.randint(0, 67, (32, T))).steps.mean().item() == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_made_up_steps_stand_for_executed_ones(method):
    """What is said of a model that is too big to execute is what is counted on one that is not."""
    config = Config(method=method, max_latent=3, **SHAPE | {"block_size": 256})
    model = make(config, "cpu", 1.5).eval()
    with torch.no_grad():
        executed = model(torch.randint(0, 67, (4, 256))).steps
    made_up = made_up_steps(config, 4, 256, 1.5)
    assert made_up.shape == (4, 256) and len(set(made_up.sum(1).tolist())) == 1, "each row has its share"
    if method == "mor":  # which is not balanced before it is trained
        assert made_up.mean() == 1.5 and [(made_up == k).sum() for k in range(4)] == [256] * 4
        return
    assert made_up.mean().item() == pytest.approx(executed.mean().item(), abs=0.03)
    own, others = costs(model, made_up), costs(model, executed)
    assert own == pytest.approx(others, rel=0.02)
    assert own["decode"] == own["prefill"] or method == "ponder2" and own["decode"] < own["prefill"]


def test_passes_and_ponder2s_rounds():
    """The mean passes of the README's table: K + 1, and for ponder2 1 + 2.5 · 2 + 2 at K = 1."""
    wanted = (("vanilla", 3, 1), ("loop", 3, 4), ("pause", 3, 4), ("ponder", 3, 4), ("ponder2", 1, 8))
    for method, K, passes in wanted:
        model = make(Config(method=method, max_latent=K, **SHAPE), "meta")
        assert costs(model, made_up_steps(model.config, 2, T, 0))["passes"] == pytest.approx(passes)


def test_the_loss_of_every_exit_costs_flops_but_no_pass():
    model = make(Config(exit_loss=0.5, **SHAPE), "meta")
    plain = make(Config(**SHAPE), "meta")
    steps = made_up_steps(model.config, 2, T, 1.5)
    own, others = costs(model, steps), costs(plain, steps)
    assert own["training"] > others["training"] and own["passes"] == pytest.approx(others["passes"])


def test_bytes_that_decoding_reads():
    """Weights once a pass, keys and values of what is visible; pause's tokens share a pass."""
    def read(method, steps):
        model = make(Config(method=method, max_latent=3, **SHAPE), "cpu")
        return bytes_read(model, torch.tensor([steps]).float()) / 4
    d, f, L, V = 16, 24, 3, 67
    weights, entry, head = L * (4 * d * d + 3 * d * f), L * 2 * d, d * V
    assert read("vanilla", [0] * 10) == weights + 10 * entry + head
    assert read("loop", [3] * 10) == 4 * (weights + 10 * entry) + head
    assert read("pause", [3] * 10) == weights + 40 * entry + head
    assert read("ponder", [3] * 10) == 4 * (weights + 10 * entry) + 7 * head
    router = d
    assert read("adaptive", [2, 0, 1, 0]) == weights + 4 * entry + head + router
    assert read("adaptive", [2, 0, 1, 1]) == 2 * (weights + router) + (4 + 7) * entry + head


def test_a_grouped_model_reads_fewer_keys():
    steps = torch.zeros(1, 20)
    whole = bytes_read(make(Config(method="vanilla", **SHAPE), "cpu"), steps)
    grouped = bytes_read(make(Config(method="vanilla", **SHAPE, n_kv_head=1), "cpu"), steps)
    less_weights, less_entries = 3 * 2 * 16 * 8, 3 * 20 * 16
    assert whole - grouped == 4 * (less_weights + less_entries)


@pytest.mark.parametrize("method", ["vanilla", "adaptive", "loop", "pause", "ponder", "mor"])
def test_a_prefill_in_two_parts_costs_what_one_does(method):
    """`fed`: what the cache held before costs nothing again, and its keys count."""
    model = make(Config(method=method, max_latent=3, **SHAPE), "cpu", 1.5).eval()
    cache, idx = Cache(), torch.randint(0, 67, (2, T))
    with torch.no_grad():
        steps = torch.cat([model(part, cache=cache).steps for part in idx.split(T // 2, 1)], 1)
    first = torch.zeros(2, T, dtype=torch.bool)
    first[:, : T // 2] = True
    parts = [forward_flops(model, steps[:, : T // 2]), forward_flops(model, steps, fed=~first)]
    whole = forward_flops(model, steps)
    assert parts[0][0] + parts[1][0] == whole[0]
    assert parts[0][1] + parts[1][1] < whole[1], "half the queries do not meet the keys of the other half"


@pytest.mark.parametrize("name", ["70m", "410m", "1.4b", "2.8b", "7b"])
def test_the_papers_models_fit_80_gb(name):
    """With the micro-batch of their config, on 8 GPUs, all steps of all tokens taken."""
    config = configure(Train, [str(CONFIGS / f"{name}.py")])
    model = make(config.model_config(config.vocab_size), "meta")
    share = {"world": 8 if config.shard else 1, "checkpointing": config.checkpointing}
    assert sum(memory(model, config.micro_batch_size, **share).values()) < 0.9 * 80e9


def test_a_shape_that_a_method_cannot_have():
    with pytest.raises(BadInput, match="mor"):
        make(Config(method="mor", **SHAPE | {"n_layer": 2}), "meta")


def test_kept_bytes_are_those_of_autograd():
    """Weights once, and as much again for each pass of a loop; all of it is given back."""
    given_back = []

    def kept(K):
        model = make(Config(method="loop", max_latent=K, **SHAPE), "cpu")
        model.norm.register_forward_hook(lambda *call: given_back.append(weakref.ref(call[2])))
        return kept_bytes(model, *torch.randint(0, 67, (2, 2, 32)))
    weights = sum(p.nbytes for p in make(Config(method="loop", **SHAPE), "cpu").blocks.parameters())
    assert weights < kept(0) < kept(1) and kept(2) - kept(1) == kept(3) - kept(2) > 0
    assert given_back and not any(output() is not None for output in given_back)
