"""Scores of pairs against plain forwards, one row at a time; windows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import score as engine
from baselines import METHODS
from conftest import uneven
from costs import forward_flops
from score import Tally, score, windows


def make(method="adaptive", **settings):
    return uneven(method, **dict(n_head=2, vocab_size=257, block_size=32) | settings)


def plain(model, context, continuation):
    """−log q of each token of the continuation, whether it is the likeliest, and the steps behind it.

    One forward, one row, nothing else.
    """
    whole = [*context, *continuation]
    with torch.no_grad():
        out = model(torch.tensor([whole[:-1]]))
    n = len(continuation)
    logits = out.logits[0, -n:]
    targets = torch.tensor(continuation)
    nats = F.cross_entropy(logits, targets, reduction="none")
    return torch.stack((nats, (logits.argmax(1) == targets).float(), out.steps[0, -n:]))


def random_pairs(lengths, seed=0):
    """Pairs of random token arrays of the given lengths; equal context lengths share one context."""
    rng, contexts = np.random.default_rng(seed), {}
    for n, _ in lengths:
        contexts.setdefault(n, rng.integers(0, 256, n).astype(np.uint32))
    return [(contexts[n], rng.integers(0, 256, m).astype(np.uint32)) for n, m in lengths]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share_from", [1, 10**9])
def test_scores_equal_a_plain_forward_one_at_a_time(method, share_from, monkeypatch):
    """… whether or not pairs with one context have it read once, at any batch size, for pairs of any lengths.

    So are steps and FLOPs, which are those of reading each pair by itself.
    """
    monkeypatch.setattr(engine, "SHARED", share_from)
    read, feed = [], engine.feed

    def counted(model, rows, cache):
        read.extend(map(len, rows))
        return feed(model, rows, cache)

    monkeypatch.setattr(engine, "feed", counted)
    model = make(method)
    lengths = [(9, 5), (9, 1), (9, 12), (1, 3), (1, 7), (20, 2), (20, 12), (20, 13), (17, 4), (5, 28)]
    pairs = random_pairs([*lengths, (32, 1), (32, 1), (30, 1), (1, 1)])
    expected = [plain(model, context.tolist(), continuation.tolist()) for context, continuation in pairs]
    whole = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    flops = 0
    for context, continuation in pairs:
        ids = torch.tensor(np.concatenate((context, continuation))[None, :-1].astype(np.int64))
        with torch.no_grad():
            flops += sum(forward_flops(model, model(ids).steps)).item()
    if method == "adaptive":
        steps = {step for part in expected for step in part[2].tolist()}
        assert len(steps) > 2, "the test wants a model that thinks unevenly"
    fed = set()
    for batch_size in (1, 3, 64):
        tally = Tally()
        read.clear()
        for got, want in zip(score(model, pairs, batch_size, tally), expected):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        assert tally.said == sum(len(continuation) for _, continuation in pairs)
        assert tally.steps == sum(part[2].sum().item() for part in expected)
        assert (tally.read, tally.flops) == (whole, flops)
        fed.add(sum(read))
    if share_from == 1 and method != "ponder2":
        assert min(fed) < whole, "contexts that pairs share are read once"
    else:
        assert fed == {whole}


def test_windows_predict_every_token_once_and_with_enough_context():
    ids = np.arange(100)
    for context, stride in ((10, 10), (10, 5), (10, 1), (7, 3), (200, 100), (99, 50), (98, 1)):
        pairs = list(windows(ids, 1, context, stride))
        assert np.array_equal(np.concatenate([after for _, after in pairs]), ids[1:])
        for i, (before, after) in enumerate(pairs):
            assert np.array_equal(np.concatenate((before, after)), ids[before[0] : after[-1] + 1])
            assert len(before) + len(after) - 1 <= context
            assert i == 0 or (len(before) >= context - stride and len(after) <= stride)
