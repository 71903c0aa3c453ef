"""The baselines, where they differ from what the other files hold of all methods."""

import copy

import pytest
import torch

import reference
from baselines import METHODS, build
from conftest import text
from conftest import uneven as make
from model import Block, Config
from test_log import in_chunks


def test_mor_is_dense_masked():
    model, idx = make("mor", n_layer=4), text()
    logits, depth = reference.mor(model.state_dict(), model.config, idx)
    out = model(idx)
    assert torch.equal(out.steps, depth.float()) and len(depth.unique()) > 1
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)


def test_mor_needs_three_layers():
    with pytest.raises(ValueError, match="n_layer is 2"):
        build(Config(method="mor", n_layer=2))


def test_mor_can_be_copied_after_any_forward_and_uses_a_block_that_is_added():
    model = build(Config(method="mor", n_layer=3, n_embd=32, n_ff=48, vocab_size=61))
    model(text(), text(seed=5)).loss.backward()
    copy.deepcopy(model)(text())
    before = model(text()).logits
    copy.deepcopy(model)
    model.blocks.append(Block(model.config))
    assert (model(text()).logits - before).abs().max() > 1e-4


def test_ponder2_jacobi_approaches_its_decoding():
    """With weights of a normal size the approximation is close, and it is exact for the first two tokens."""
    torch.manual_seed(0)
    model = build(Config(method="ponder2", n_layer=3, n_embd=32, n_ff=48, vocab_size=61, max_latent=1)).eval()
    with torch.no_grad():
        parallel = model(text()).logits
    decoded, _, _ = in_chunks(model, text(), [1])
    torch.testing.assert_close(parallel[:, :2], decoded[:, :2], atol=1e-5, rtol=1e-5)
    assert (parallel - decoded).abs().max() < 0.05 * decoded.std()


def test_ponder2_draws_its_rounds_once_for_a_step_and_only_in_training():
    model = make("ponder2").train()
    drawn = []
    for seed in range(20):
        model.draw(seed)
        drawn.append(model.rounds)
    assert set(drawn) == {2, 3}
    model.rounds = 2
    two = model(text()).logits
    model.eval()
    three = model(text()).logits
    model.rounds = 3
    assert torch.equal(model(text()).logits, three) and not torch.allclose(two, three)


def test_ponder2_keeps_only_its_last_pass():
    model = make("ponder2")
    with torch.no_grad():
        log = model(text()).cache.logs[0]
    assert log.size == log.capacity() == 40 * 4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_more_or_fewer_steps_than_it_was_trained_with(method):
    model = make(method)
    for max_latent in (0, 1, 5):
        model.max_latent = max_latent
        with torch.no_grad():
            out = model(text(), text(seed=5))
        assert torch.isfinite(out.loss) and out.steps.max() <= max_latent
