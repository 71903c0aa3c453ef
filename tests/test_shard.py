"""Sharded training: the numbers of one process, whoever halts first; checkpoints of any number; no hang."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

import runs
import shard
import train as train_module
from baselines import MoR, build
from common import BadInput, load_checkpoint, run
from conftest import said, text, uneven
from costs import memory
from fast import compile_training, fuse_norms
from model import AdaptiveLatentCoT, Config
from test_train import (  # noqa: F401
    ENV, ROOT, SMALL, TORCHRUN, Killed, close, data, flags, kill_step, loopback, losses, one_thread, records,
    script, summary, weights)
from tokenizer import get_tokenizer
from train import Train, train

pytestmark = pytest.mark.skipif(not loopback(), reason="no loopback interface")
SHORT = dict(max_steps=3, eval_windows=3, micro_batch_size=1)  # of four processes one has no windows
CASES = {
    "adaptive": dict(budget=1.0, grad_clip=0.5, n_kv_head=1, tie_embeddings=True),
    "loop": dict(method="loop", max_steps=3),
    "uneven": SHORT | dict(checkpointing=True, learning_rate=0.03),
    "uneven mor": SHORT | dict(method="mor", n_layer=3),
}


def contents(folder):
    return {path.name for path in folder.iterdir()}


def force(monkeypatch):
    """In forwards of one sequence: the first of a batch halts at once, the last goes on to the end, the
    others as they like. Of a validation window the same, by its number.
    """
    done = {True: 0, False: 0}  # forwards in training, and in the evaluation that is on
    batch, world = SMALL["global_batch_size"], runs.WORLD

    def forced(think):
        def call(self, x, states, cache):
            own = done[self.training]
            done[False] *= not self.training
            done[self.training] += 1
            place = own * world + runs.RANK
            if self.training:
                place = runs.RANK * (batch // world) + own % (batch // world)
            push = {0: -50.0, batch - 1: 50.0}.get(place % batch, 0.0)
            outputs = self.router.out_features
            last = torch.arange(outputs) == outputs - 1  # of mor, the deepest
            handle = self.router.register_forward_hook(lambda router, inputs, logits: logits + push * last)
            try:
                return think(self, x, states, cache)
            finally:
                handle.remove()
        return call

    for method in (AdaptiveLatentCoT, MoR):
        monkeypatch.setattr(method, "think", forced(method.think))


def run_case(name, out, data, **settings):
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("uneven"):
            force(patch)
        train(Train(out=str(out), data=str(data), **SMALL | CASES[name] | settings))


def in_processes(world, data, folder):
    """Forks processes that train together: each would import torch for seconds."""
    sys.stdout.flush()
    children = set()
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                for module in (runs, train_module):
                    module.RANK, module.WORLD = rank, world
                meeting = f"file://{folder}/meeting{world}"
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
                runs.dist.init_process_group = lambda backend: None
                work(world, data, folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


def work(world, data, folder):
    """What each of two processes does, and then each of four."""
    def killed(at, name, out, **settings):
        with pytest.MonkeyPatch.context() as patch:
            kill_step(patch, at)
            with pytest.raises(Killed):
                run_case(name, folder / out, data, shard=True, **settings)

    if world == 2:
        for name in ("loop", "uneven", "uneven mor"):
            run_case(name, folder / f"{name} in 2", data, shard=True)
        killed(3, "adaptive", "whole")  # saved after two steps
        shard.WHOLE = 0
        killed(3, "adaptive", "parts")
    else:
        run_case("uneven", folder / "uneven in 4", data, shard=True)
        run_case("adaptive", folder / "whole", data, shard=True, resume=True)
        shard.WHOLE = 0
        killed(3, "adaptive", "parts", resume=True)  # saved after four


def test_any_number_of_processes_is_one(data, tmp_path, monkeypatch):
    """Losses to rounding, latent steps and FLOPs exactly, also where some ranks have no live tokens while
    others have, and where a run is resumed with another number, from one file or from parts.
    """
    for name in CASES:
        run_case(name, tmp_path / f"{name} in 1", data)
    script("tests/test_shard.py", data, tmp_path)
    left = contents(tmp_path / "parts")
    assert {"ckpt.pt", "ckpt.b"} <= left and "ckpt.a" not in left
    assert load_checkpoint(tmp_path / "parts")[2]["step"] == 4
    shutil.copytree(tmp_path / "parts", tmp_path / "moved", ignore=shutil.ignore_patterns("ckpt.b"))
    assert get_tokenizer(str(tmp_path / "moved")).n_vocab == 257  # which needs no weights
    run_case("adaptive", tmp_path / "parts", data, resume=True)
    for name, other in [("loop", "loop in 2"), ("uneven", "uneven in 2"), ("uneven mor", "uneven mor in 2"),
                        ("uneven", "uneven in 4"), ("adaptive", "whole"), ("adaptive", "parts")]:
        one, two = tmp_path / f"{name} in 1", tmp_path / other
        assert close(records(one), records(two)) and summary(one)["flops"] == summary(two)["flops"], other
        here, there = weights(one), weights(two)
        assert all(torch.allclose(here[key], there[key], atol=1e-4) for key in here)
    lost = [json.loads(line).get("waiting", 0.5) for line in open(tmp_path / "uneven in 4" / "log.jsonl")]
    assert all(0.1 < share < 0.75 for share in lost), lost


def fail(how, *arguments):
    """What each process does in the test below: the second one fails at the third step."""
    original = torch.optim.AdamW.step
    done = []

    def step(self, *arguments, **named):
        done.append(1)
        if len(done) == 3 and runs.RANK == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("out of luck")
        return original(self, *arguments, **named)

    torch.optim.AdamW.step = step
    sys.argv = ["train.py", *arguments, "--shard"]
    run(train_module.main)


@pytest.mark.parametrize("how,words", [("raises", "process 1 of 2"), ("killed", "process 0 of 2")])
def test_where_one_process_fails_all_end_in_one_line(how, words, data, tmp_path):
    worker = [str(ROOT / "tests" / "test_shard.py"), how, *flags(data, tmp_path)]
    began = time.monotonic()
    command = [sys.executable, *TORCHRUN, *worker]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert result.returncode and time.monotonic() - began < 60
    ours = [line for line in result.stderr.splitlines() if line.startswith("train.py:")]
    assert len(ours) == 1 and words in ours[0], ours
    assert "Connection closed" not in result.stderr.replace(ours[0], "")  # what the others meet with
    assert load_checkpoint(tmp_path)[2]["step"] == 2
    train(Train(out=str(tmp_path), data=str(data), resume=True, **SMALL))
    assert [*losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


# ------------------------------------------------------------------------------------- checkpoints in parts


@pytest.fixture
def alone(monkeypatch):
    """A group of one process, whose checkpoints all lie in parts."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(shard, "WHOLE", 0)
    yield
    dist.destroy_process_group()


def sharded(seed=0):
    model = uneven(seed=seed, vocab_size=257)
    shard.shard(model, torch.device("cpu"), torch.float32)
    return model


def test_a_kill_while_parts_are_written_costs_nothing(alone, tmp_path, monkeypatch):
    """Before and after each write, renaming and removal: what is read is one checkpoint, or the other."""
    tokenizer = get_tokenizer("bytes")
    path = tmp_path / "ckpt.pt"
    moment, killed, found = 0, True, set()
    while killed:
        moment += 1
        shard.save_shared(path, sharded(0), tokenizer, step=0)
        with monkeypatch.context() as patch:
            count = iter(range(1, 100))

            def dying(function, count=count, moment=moment):
                def call(*arguments, **named):
                    if next(count) == moment:
                        raise Killed
                    result = function(*arguments, **named)
                    if next(count) == moment:
                        raise Killed
                    return result
                return call

            for module, name in [(shard.dcp, "save"), (os, "replace"), (shutil, "rmtree")]:
                patch.setattr(module, name, dying(getattr(module, name)))
            killed = False
            try:
                shard.save_shared(path, sharded(1), tokenizer, step=1)
            except Killed:
                killed = True
        model, _, checkpoint = load_checkpoint(path)
        step = checkpoint["step"]
        found.add(step)
        saved = uneven(seed=step, vocab_size=257)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters()))
        assert killed or step == 1 and len([*tmp_path.glob("ckpt.?")]) == 1
    assert moment > 6 and found == {0, 1}


def test_weights_that_stand_still_have_no_moments_to_resume(alone, tmp_path):
    model = sharded()
    model.blocks[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(text(), text(seed=3)).loss.backward()
    optimizer.step()
    shard.save_shared(tmp_path / "ckpt.pt", model, get_tokenizer("bytes"), optimizer, step=1)
    other = sharded(1)
    other.blocks[0].requires_grad_(False)
    again = torch.optim.AdamW(other.parameters(), lr=1e-3)
    shard.resume_parts(tmp_path / "ckpt.a", other, again, begun=True)
    assert len(again.state) == len(optimizer.state) < len([*model.parameters()])
    for a, b in zip(shard.named_tensors(model, optimizer).items(), shard.named_tensors(other, again).items()):
        assert a[0] == b[0] and torch.equal(shard.local(a[1]), shard.local(b[1]))


def test_damaged_parts_are_refused_and_run_no_code(alone, tmp_path):
    shard.save_shared(tmp_path / "ckpt.pt", sharded(), get_tokenizer("bytes"))
    index, part = tmp_path / "ckpt.a" / ".metadata", tmp_path / "ckpt.a" / "__0_0.distcp"
    good = index.read_bytes(), part.read_bytes()
    weight = good[1].index(uneven(vocab_size=257).embed.weight.detach().numpy().tobytes())
    flipped = bytes([good[1][weight] ^ 1])  # the lowest bit of a number, which stays one
    for path, content in [(index, pickle.dumps(Evil())), (index, good[0][:-20]), (part, good[1][:-2000]),
                          (part, bytes(len(good[1]))), (index, b""),
                          (part, good[1][:weight] + flipped + good[1][weight + 1 :])]:
        path.write_bytes(content)
        with pytest.raises(BadInput, match="ckpt.a"):
            load_checkpoint(tmp_path)
        index.write_bytes(good[0])
        part.write_bytes(good[1])
    load_checkpoint(tmp_path)


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code was run",)


def test_parts_become_one_file(alone, tmp_path, call):
    model = sharded()
    shard.save_shared(tmp_path / "ckpt.pt", model, get_tokenizer("bytes"), step=3)
    call("shard", tmp_path, tmp_path / "ckpt.single")  # not in the place of what it is made of
    call("shard", tmp_path, tmp_path / "model.pt")
    whole, _, checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert checkpoint["step"] == 3 and "parts" not in checkpoint
    assert said(whole, [[1, 2]], 5) == said(uneven(vocab_size=257).eval(), [[1, 2]], 5)
    assert "exists" in call("shard", tmp_path, tmp_path / "model.pt", code=2)[1]
    (tmp_path / "ckpt.pt").rename(tmp_path / "moved.pt")
    call("shard", tmp_path / "moved.pt", tmp_path / "ckpt.pt")  # beside parts of that stem, which stay
    assert load_checkpoint(tmp_path / "moved.pt")[2]["step"] == 3
    assert "want" in call("shard", code=2)[1]


# --------------------------------------------------------------------------------------------------- memory


class Peak(TorchDispatchMode):
    """The most bytes that tensors held at once."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.bytes = 0

    def note(self, value):
        if isinstance(value, torch.Tensor):
            self.storages[shard.local(value).untyped_storage()] = True

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        tree_map(self.note, (arguments, named, result))
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in list(self.storages)))
        return result


@pytest.mark.parametrize("checkpointing,low,shape", [
    (False, False, dict(n_embd=64, n_ff=64, max_latent=6)),
    (True, False, dict(n_embd=64, n_ff=64, max_latent=6)),
    (False, True, dict(n_embd=64, n_ff=172)),
    (False, True, dict(n_embd=64, n_ff=172, block_size=512)),  # much of it masks
    (True, True, dict(n_embd=128, n_ff=344, n_kv_head=2, vocab_size=2000)),
    (False, False, dict(n_embd=64, n_ff=172, vocab_size=2000, exit_loss=1.0)),
    (False, True, dict(n_embd=64, n_ff=172, vocab_size=2000, exit_loss=1.0)),
])
def test_memory_is_the_formula(alone, checkpointing, low, shape):
    """Within 10 %: the second micro-batch of a step, in the share of one process that holds all."""
    shape = dict(n_layer=4, n_head=4, block_size=64, vocab_size=257, tau=0.0) | shape
    torch.manual_seed(0)
    model = build(Config(**shape))
    shard.shard(model, torch.device("cpu"), torch.bfloat16 if low else torch.float32)
    if not low:
        fuse_norms(model)
    model.checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    idx, targets = torch.randint(0, 257, (2, 2, shape["block_size"]))

    def forward_and_backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = model(idx, targets)
        output.loss.backward()

    forward_and_backward()
    optimizer.step()
    with Peak() as peak:
        for moments in optimizer.state.values():
            tree_map(peak.note, moments)
        for parameter in model.parameters():
            peak.note(parameter)
            peak.note(parameter.grad)
        forward_and_backward()
    with torch.device("meta"):
        formula = memory(build(Config(**shape)), 2, 1, checkpointing, low, masks=True)
    assert peak.bytes == pytest.approx(sum(formula.values()), rel=0.1)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_compiled_block_stays_whole(alone, sharded, monkeypatch):
    """Where DDP would have it cut at its buckets, too, the first of which holds 1 MB."""
    torch._dynamo.reset()
    model, idx, targets = uneven(n_layer=2, n_embd=256, n_ff=512), text(), text(seed=3)
    model(idx, targets).loss.backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend=counter, **options))
    if sharded:
        shard.shard(model, torch.device("cpu"), torch.float32)
    outer = model if sharded else torch.nn.parallel.DistributedDataParallel(model)
    compile_training(model)
    outer(idx, targets).loss.backward()
    for a, p in zip(eager, model.parameters()):
        torch.testing.assert_close(shard.local(p.grad), a, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 4  # a first pass, a second, later ones, the loss


if __name__ == "__main__":
    if len(sys.argv) == 3:
        torch.set_num_threads(1)
        for world in (2, 4):
            in_processes(world, Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        fail(*sys.argv[1:])
