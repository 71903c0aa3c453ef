import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in what it starts with &
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on small tensors threads only wait for each other

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from baselines import build
from common import run
from model import Config


@pytest.fixture(autouse=True)
def plain_signals():
    """A training in this process, that of a fixture too, leaves its answer to Ctrl-C behind."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script in this process, which is quicker than one of its own → what it wrote to stdout and
    stderr.

    Its exit code must be `code`; with 2, it must have said why in one line.
    """
    def call(script, *arguments, code=0):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        got = 0
        try:
            run(importlib.import_module(script).main)
        except SystemExit as stopped:
            got = stopped.code
        out, err = capsys.readouterr()
        assert got == code, err
        assert code != 2 or len(err.splitlines()) == 1 and err.startswith(f"{script}.py: "), err
        return out, err
    return call


def unread(command, **settings):
    """Runs a command whose output nobody reads → the finished process, with what it said on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, **settings)
    os.close(writer)
    return done


def uneven(method="adaptive", seed=0, **settings):
    """A small model with weights large enough that tokens differ, and a router that halts them unevenly."""
    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=4, n_embd=32, n_ff=48, vocab_size=61, block_size=64)
    shape |= dict(router_bias=0.5, tau=0.25)
    model = build(Config(method=method, **(shape | settings))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
        for name, parameter in model.blocks.named_parameters():
            if name.endswith("bias") or "q_norm" in name or "k_norm" in name:
                parameter.uniform_(0.5, 1.5)
        if method == "adaptive":
            model.router.weight.normal_(std=0.3)
    return model


def text(B=3, T=40, seed=1):
    """Random tokens (B, T) for `uneven`."""
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


class Near(float):
    """A number that equals all that are within a thousandth of it."""

    def __eq__(self, other):
        return abs(self - other) < 1e-3


def said(model, prompts, n, temperature=0, **settings):
    """What each prompt generates: a list of (token, steps, probability, nearly) for each."""
    rows = [[] for _ in prompts]
    for g in model.generate(prompts, n, temperature, **settings):
        numbers = g.row.tolist(), g.token.tolist(), g.steps.tolist(), g.prob.tolist()
        for row, token, steps, prob in zip(*numbers):
            rows[row].append((token, steps, Near(prob)))
    return rows


def flat(record):
    """A line of log.jsonl with its lists laid out, for pytest.approx."""
    laid_out = {}
    for name, value in record.items():
        if isinstance(value, list):
            laid_out |= {f"{name} {i}": part for i, part in enumerate(value)}
        else:
            laid_out[name] = value
    return laid_out
