"""What holds on a CPU holds on a GPU too, where there is one: FlexAttention, causal SDPA, bf16, CUDA graphs.

The dense reference is computed on the CPU. Without a GPU these tests hold the CPU to itself.
"""

import json

import pytest
import torch

import log
import reference
from baselines import METHODS
from common import autocast
from conftest import said, text
from conftest import uneven as make
from costs import forward_flops
from fast import compile_ticks, compile_training, compiles, lay_out

DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]
EXACT = [method for method in METHODS if method != "ponder2"]  # whose parallel mode approximates
PROMPTS = [text(1, 150)[0].tolist(), [4], [5, 6, 7]]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def long(method="adaptive", **settings):
    """A model for passes of more than 128 states, from which on FlexAttention may be taken."""
    return make(method, **{"n_embd": 64, "block_size": 320} | settings)


@pytest.mark.parametrize("tau,shape", [(0.0, {}), (0.25, {"n_kv_head": 2}), (0.4, {"n_head": 8})])
@pytest.mark.parametrize("flex", [False, True])
def test_packed_is_dense_masked(device, tau, shape, flex, monkeypatch):
    """With masks written out, as for small passes, and as large ones go: FlexAttention, compiled blocks."""
    monkeypatch.setattr(log, "WRITTEN_OUT", 0 if flex else 2**30)
    model = long(tau=tau, lam=0.3, **shape)
    idx, targets = text(3, 300), text(3, 300, seed=5)
    state = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    logits, steps, _, expected = reference.adaptive(state, model.config, idx)
    reference.loss(logits, expected, targets, model.config).backward()
    model.to(device)
    if flex and compiles(None, torch.device(device)):
        compile_training(model)
    out = model(idx.to(device), targets.to(device))
    out.loss.backward()
    assert torch.equal(out.steps.cpu(), steps) and out.steps.mean() > 0.3
    torch.testing.assert_close(out.logits.cpu(), logits, atol=1e-4, rtol=1e-3)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), state[name].grad, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_there_what_it_says_on_a_cpu(device, method):
    model, idx, targets = long(method), text(2, 200), text(2, 200, seed=5)
    live = torch.ones(2, 200, dtype=torch.bool)
    live[1, 150:] = False
    model.draw(1)
    want = model(idx, targets, live=live)
    want.loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model = long(method).to(device)
    model.draw(1)
    out = model(idx.to(device), targets.to(device), live=live.to(device))
    out.loss.backward()
    assert torch.equal(out.steps.cpu(), want.steps)
    torch.testing.assert_close(out.logits.cpu(), want.logits, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close([p.grad.cpu() for p in model.parameters()], gradients, atol=1e-4, rtol=1e-2)
    FLOPs = [float(sum(forward_flops(model, o.steps, live.to(o.steps.device)))) for o in (out, want)]
    assert FLOPs[0] == FLOPs[1]


@pytest.mark.parametrize("method", EXACT)
@torch.no_grad()
def test_any_chunking_is_parallel(device, method):
    model, idx = long(method).to(device), text(2, 300).to(device)
    cache, logits = None, []
    for part in idx.split([140, 1, 2, 149, 8], 1):
        out = model(part, cache=cache)
        cache = out.cache
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(idx).logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_decoding_says_there_what_it_says_on_a_cpu(device, method):
    """Greedy and sampled, alone and in a batch, past the end of the context; compiled ticks, too."""
    want = said(long(method, block_size=160), PROMPTS, 24)
    model = long(method, block_size=160).to(device)
    found = said(model, PROMPTS, 24)
    alone = [said(model, [prompt], 24, temperature=1, seed=7 + i)[0] for i, prompt in enumerate(PROMPTS)]
    together = said(model, PROMPTS, 24, temperature=1, seed=7)
    tokens = [[[token for token, *_ in row] for row in rows] for rows in (want, found, alone, together)]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3]
    if compiles(None, torch.device(device)):
        compile_ticks(model)
        for _ in range(2):  # the second time all graphs are there
            again = said(model, PROMPTS, 24)
            assert [[token for token, *_ in row] for row in again] == tokens[1]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_near(device, method):
    model, idx = long(method, tau=0.0).to(device), text(2, 200).to(device)
    with torch.no_grad():
        exact = model(idx).logits
        with autocast(torch.device(device), "bfloat16"):
            low = model(idx).logits.float()
            lay_out(model, torch.bfloat16)
            laid_out = model(idx).logits.float()
    for logits in (low, laid_out):  # of most, as a token near τ may halt elsewhere
        assert (logits - exact).abs().median() < 0.05 * exact.std()


def test_a_run_from_text_to_sample(device, call, tmp_path):
    """prepare, train, resume, evaluate, sample, measure: the resumed run ends where the other did."""
    source = tmp_path / "text.txt"
    source.write_text("".join(f"line {i} says {i * i}\n" for i in range(4000)))
    call("prepare", "--input", source, "--name=t", f"--out={tmp_path}")
    shape = ("--n_layer=2", "--n_embd=32", "--n_ff=48", "--n_head=2", "--block_size=160",
             f"--device={device}")
    flags = (f"--data={tmp_path / 't'}", *shape, "--global_batch_size=4", "--eval_windows=8",
             "--eval_every=3", "--save_every=3")
    for out, steps in (("whole", (6,)), ("parts", (3, 6))):
        for last in steps:
            resume = ("--resume",) if last > steps[0] else ()
            call("train", *flags, f"--out={tmp_path / out}", f"--max_steps={last}", *resume)
    whole, parts = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("whole", "parts"))
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=0.02) and whole["val_loss"] < 6
    told, _ = call("sample", tmp_path / "whole", "line 7", "--max_new_tokens=40", f"--device={device}",
                   "--seed=1", "--plain")
    assert "line 7" in told
    call("eval", tmp_path / "whole", "--max_tokens=600", f"--device={device}")
    told, _ = call("bench", "speed", *shape, "--batch=2", "--rounds=1", f"--results={tmp_path}", "--methods",
                   "vanilla", "adaptive")
    assert "MFU" in told
