"""The log: chunks, empty seats, the one rule as a dense and as a block mask, copies of rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import log as log_module
import model as model_module
from baselines import METHODS
from conftest import text
from conftest import uneven as make
from log import (FAR, FLEX, Cache, Log, States, additive_mask, attend, block_mask, flex_attention,
                 make_mask)

ROOT = Path(__file__).parent.parent
EXACT = [name for name in METHODS if name != "ponder2"]  # which in parallel approximates its decoding


@torch.no_grad()
def in_chunks(model, idx, sizes):
    """idx (B, T) fed in chunks of the given sizes, over and over → logits, steps, and the cache."""
    cache, logits, steps, t = None, [], [], 0
    while t < idx.size(1):
        n = sizes[len(logits) % len(sizes)]
        out = model(idx[:, t : t + n], cache=cache)
        cache = out.cache
        logits.append(out.logits)
        steps.append(out.steps)
        t += n
    return torch.cat(logits, 1), torch.cat(steps, 1), cache


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("sizes", [[1], [7], [13, 1, 2, 5]])
def test_any_chunking_is_parallel(method, sizes):
    """Invariant 3."""
    model, idx = make(method), text()
    with torch.no_grad():
        whole = model(idx)
    logits, steps, _ = in_chunks(model, idx, sizes)
    torch.testing.assert_close(logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(steps, whole.steps)


def test_a_cache_may_go_on_with_gradients():
    model, idx = make(), text()
    with torch.no_grad():
        cache = model(idx[:, :20]).cache
        cache = model(idx[:, 20:25], cache=cache).cache  # now it lies in a buffer with room to spare
    out = model(idx[:, 25:], cache=cache)
    out.logits.sum().backward()
    torch.testing.assert_close(out.logits, model(idx).logits[:, 25:], atol=1e-5, rtol=1e-5)
    assert model.embed.weight.grad.any()


def test_the_log_holds_no_entry_of_halted_tokens():
    model, idx = make(), text()
    _, steps, cache = in_chunks(model, idx, [3, 1])
    order = cache.logs[0].entries["order"].held[:, : cache.logs[0].size, 0, 0]
    column = cache.logs[0].entries["column"].held[:, : cache.logs[0].size, 0, 0]
    for row in range(3):
        held = {(int(t), int(k)) for t, k in zip(order[row], column[row]) if t < FAR}
        assert held == {(t, k) for t in range(40) for k in range(int(steps[row, t]) + 1)}
        assert len(held) == (order[row] < FAR).sum()


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_nothing_before_them(method):
    """Invariant 4."""
    model, idx = make(method), text()
    other = idx.clone()
    other[:, 20:] = text(seed=9)[:, 20:]
    with torch.no_grad():
        a, b = model(idx), model(other)
    torch.testing.assert_close(a.logits[:, :20], b.logits[:, :20], atol=1e-5, rtol=1e-5)
    assert torch.equal(a.steps[:, :20], b.steps[:, :20])
    assert not torch.allclose(a.logits[:, 20:], b.logits[:, 20:], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_independent_of_neighbours_and_padding(method):
    """Invariant 6 for forward."""
    model, idx = make(method), text()
    live = torch.ones(3, 40, dtype=torch.bool)
    live[0, 25:], live[2, 11:] = False, False
    with torch.no_grad():
        together = model(idx, live=live)
        for row, n in enumerate(live.sum(1).tolist()):
            alone = model(idx[row : row + 1, :n])
            torch.testing.assert_close(together.logits[row, :n], alone.logits[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(together.steps[row, :n], alone.steps[0]) and not together.logits[row, n:].any()


@pytest.mark.parametrize("method", EXACT)
@torch.no_grad()
def test_rows_of_a_cache_go_on_apart(method):
    model, idx = make(method), text(2, 12)
    copies = model(idx).cache.rows([1, 0, 1])
    onward = text(3, 5, seed=4)
    got = model(onward, cache=copies).logits
    whole = torch.cat((idx[[1, 0, 1]], onward), 1)
    torch.testing.assert_close(got, model(whole).logits[:, 12:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_row_that_is_replaced_brings_passes_along_that_no_other_row_has_made():
    """As of mor, where another depth is reached when a context is read again."""
    model = make("mor")
    first, second = torch.cat((text(1, 12, seed=0), text(1, 12, seed=1))), text(1, 12, seed=2)
    cache, other = model(first).cache, model(second).cache
    assert cache.logs.keys() < other.logs.keys()
    onward = text(2, 5, seed=4)
    got = model(onward, cache=cache.replace([1], other)).logits[1]
    whole = torch.cat((second[0], onward[1]))[None]
    torch.testing.assert_close(got, model(whole).logits[0, 12:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_squeezing_keeps_what_is_seen():
    """Empty seats go, addresses keep their keys, and the order of a row's entries stays."""
    log = Log()
    torch.manual_seed(0)
    seen = [{}, {}]
    for step in range(30):
        live = torch.tensor([True, step % 3 == 0])
        states, index, _ = States.tick(torch.full((2,), step), torch.full((2,), step % 2), 1).select(live)
        seats = log.open(states)
        key = torch.randn(len(index), 1, 1)
        log.entries["k0"].append(seats, states.grid(key))
        for i, row in enumerate(index.tolist()):
            seen[row][step, step % 2] = key[i].item()
        if step % 10 == 9:
            log.make_room(5)
    order, column, keys = (log.entries[name].held[:, : log.size, 0, 0] for name in ("order", "column", "k0"))
    for row in range(2):
        held = {}
        for t, k, key in zip(order[row].tolist(), column[row].tolist(), keys[row].tolist()):
            if t < FAR:
                held[t, k] = key
        assert held == seen[row]
    assert log.size == 30 and (log.entries["order"].held[:, log.size :] == FAR).all()


def test_capacities_are_few():
    """Each is a CUDA graph of its own; and none is more than an eighth, or 64, above what was wanted."""
    found = set()
    for size in range(1, 4000):
        log = Log()
        log.size = size
        log.entries["order"].held = torch.zeros(1, size, 1, 1, dtype=torch.long)
        log.make_room(1)
        wanted = size + max(1, size // 2, 64)
        assert wanted <= log.capacity() <= wanted + max(64, wanted // 8)
        found.add(log.capacity())
    assert len(found) < 40


# ---------------------------------------------------------------------------------------------- the one rule


def test_the_rule_entry_by_entry():
    order, column = torch.tensor([[3, 5, FAR]]), torch.tensor([[0, 1, FAR]])
    key_order, key_column = torch.tensor([[3, 4, 5, 5, FAR]]), torch.tensor([[0, 0, 1, 2, FAR]])
    mask = additive_mask(order, column, key_order, key_column)[0, 0]
    assert (mask == 0).tolist() == [
        [True, False, False, False, False],
        [True, True, True, False, False],
        [True] * 5]


def test_the_mask_has_the_type_of_the_scores():
    """So that no layer makes a copy of it, which autograd would keep."""
    address = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 0, 1]])
    exact = additive_mask(*address, *address)
    with torch.autocast("cpu", torch.bfloat16):
        low = additive_mask(*address, *address)
    assert exact.dtype is torch.float32 and low.dtype is torch.bfloat16
    assert torch.equal(low.float(), exact)


def test_the_block_mask_is_the_dense_mask(monkeypatch):
    """FlexAttention's mask on CPU against the additive one, by the kernels' results on real queries."""
    model, seen = make(), []

    def watched(states, log):
        seen.append((states, log.last, log.order, log.column, make_mask(states, log)))
        return seen[-1][-1]

    monkeypatch.setattr(model_module, "make_mask", watched)
    with torch.no_grad():
        model(text(2, 40))
    assert len(seen) > 2
    for states, last, key_order, key_column, mask in seen[1:]:
        order, column = key_order[:, last:], key_column[:, last:]
        q, k, v = torch.randn(2, 4, states.A, 8), *torch.randn(2, 2, 2, key_order.size(1), 8)
        blocks = block_mask(order, column, key_order, key_column)
        flex = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        real = (order < FAR)[:, None, :, None].expand_as(flex)
        torch.testing.assert_close(flex[real], dense[real], atol=1e-5, rtol=1e-5)
        assert not flex[~real].any()


def test_flex_attention_is_compiled_once_for_all_lengths():
    mask_counter, counter = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    make_blocks = torch.compile(block_mask, dynamic=True, backend=mask_counter)
    attention = torch.compile(flex_attention, dynamic=True, backend=counter)
    for A, S in ((140, 200), (150, 431), (270, 300), (300, 1000)):
        key_order = torch.arange(S).expand(2, S)
        order = key_order[:, S - A :]
        q, k, v = (torch.randn(2, 2, n, 16) for n in (A, S, S))
        blocks = make_blocks(order, torch.zeros_like(order), key_order, torch.zeros_like(key_order))
        seen = key_order[:, None, None] <= order[:, None, :, None]
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        out = attention(q, k, v, block_mask=blocks, kernel_options=FLEX)
        torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
    assert mask_counter.frame_count == counter.frame_count == 1


@torch.no_grad()
def test_attend_takes_flex_attention_alone_and_within_a_compiled_block(monkeypatch):
    order = torch.arange(150).expand(2, 150)
    zero = torch.zeros_like(order)
    q, k, v = torch.randn(2, 150, 4, 16), *torch.randn(2, 2, 150, 2, 16)
    want = attend(q, k, v, additive_mask(order, zero, order, zero))
    mask = block_mask(order, zero, order, zero)
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(attend, dynamic=True, fullgraph=True, backend=counter)
    torch.testing.assert_close(whole(q, k, v, mask), want)
    assert counter.frame_count == 1
    asked = []
    monkeypatch.setattr(log_module, "compiled", lambda function: asked.append(function) or function)
    torch.testing.assert_close(attend(q, k, v, mask), want)
    assert asked == [flex_attention]


def test_the_compiler_is_not_imported_before_it_is_asked_for():
    """It takes longer than all else that a script imports."""
    code = "import sys, eval, sample, compare, bench; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("method", METHODS)
def test_more_seats_than_states_change_no_number(method, monkeypatch):
    """As on a GPU, where a pass has a multiple of 128 for each row."""
    idx, targets = text(), text(seed=5)
    live = torch.ones(3, 40, dtype=torch.bool)
    live[0, 25:], live[2, 11:] = False, False
    found = []
    for unit in (1, 16):
        monkeypatch.setitem(log_module.SEATS, "cpu", unit)
        model = make(method)
        out = model(idx, targets, live=live)
        out.loss.backward()
        onward = model(idx[:, :1], cache=model(idx[:, :20], live=live[:, :20]).cache)
        found.append([out.logits, out.steps, onward.logits, *(p.grad for p in model.parameters())])
        sizes = [log.order.size(1) for log in out.cache.logs.values()]
        assert all(size % unit == 0 for size in sizes)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_plain_pass_needs_no_mask():
    """A fresh log, and single new tokens of rows without an empty seat: causal attention says the same."""
    model = make("vanilla")
    cache = Cache()
    log = cache.logs[0]
    model.hidden(text(2, 9), cache)
    states = States.tick(cache.at["pos"], torch.zeros(2, dtype=torch.long))
    log.open(states)
    assert make_mask(states, log) is None
    log.plain = False
    assert not make_mask(states, log).any()  # and the mask that is spared adds nothing
