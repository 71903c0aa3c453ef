"""Fast paths change no number: compiled blocks, compiled ticks, another layout of the weights."""

import copy
import itertools
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fast
from baselines import METHODS
from common import BadInput
from conftest import said, text
from conftest import uneven as make
from fast import compile_ticks, compile_training, compiles, fuse_norms, lay_out
from log import Log, broken_compiler
from model import Block

QWEN = {"head_dim": 12, "n_kv_head": 2, "qkv_bias": True, "qk_norm": True}
SHAPES = [*((method, {}) for method in METHODS), ("adaptive", QWEN), ("adaptive", {"weigh_values": True})]


def test_a_compiler_that_cannot_compile_is_one_line(monkeypatch):
    def broken(f):
        def call(*_):
            raise RuntimeError("backend='inductor' raised:\nCppCompileError: C++ error\n" + "line\n" * 100)
        return call

    broken_compiler.cache_clear()
    assert compiles(None, torch.device("cpu")) is False and compiles(False, torch.device("cuda")) is False
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(BadInput, match="--compile=False: .*CppCompileError") as error:
        compiles(True, torch.device("cpu"))
    assert len(str(error.value)) < 300
    monkeypatch.setattr(torch, "compile", lambda f: f)
    broken_compiler.cache_clear()
    assert compiles(True, torch.device("cpu")) is True
    broken_compiler.cache_clear()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_training_changes_no_number_and_is_compiled_once(monkeypatch, checkpointing):
    torch._dynamo.reset()
    model, idx, targets = make(), text(), text(seed=3)
    model.checkpointing = checkpointing
    out = model(idx, targets)
    out.loss.backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend=counter, **options))
    compile_training(model)
    model(idx, targets).loss.backward()
    for a, p in zip(eager, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-4)
    frames = [counter.frame_count]
    for T in (11, 23, 39):  # other numbers of live tokens
        model(idx[:, :T], targets[:, :T]).loss.backward()
        frames.append(counter.frame_count)
    first = 4 + checkpointing  # a first pass, a second, later ones, the loss; a block that is made again
    assert frames == [first] + 3 * [first + 1]  # the loss for any number
    with torch.no_grad():  # what comes before attention, and after it
        torch.testing.assert_close(model(idx).logits, out.logits, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= frames[-1] + 3 and set(model.state_dict()) == set(make().state_dict())


@pytest.mark.parametrize("method,shape", SHAPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_norms_change_no_number_but_rounding(method, shape, checkpointing):
    results = []
    for fused in (False, True):
        model = make(method, **shape).train()
        model.checkpointing = checkpointing
        for module in model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        if fused:
            fuse_norms(model)
        out = model(text(), text(seed=5))
        out.loss.backward()
        results.append([out.logits.detach(), out.steps, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method,shape", SHAPES)
def test_compiled_ticks_change_no_number_and_are_compiled_once(method, shape):
    torch._dynamo.reset()  # what other models left behind would be compiled beside
    model = make(method, n_layer=3 if method == "mor" else 1, **shape)
    prompts = [text(1, 40)[0].tolist(), [4], [5, 6]]
    eager = [said(model, prompts, 40), said(model, prompts[:1], 40)]
    counter = CompileCounterWithBackend("eager")
    compile_ticks(model, backend=counter)
    assert said(model, prompts, 40) == eager[0] and said(model, prompts[:1], 40) == eager[1]
    frames = counter.frame_count
    assert said(model, prompts, 40) == eager[0] and said(model, prompts[:1], 40) == eager[1]
    few = 5 if shape else 4  # one row or several
    assert counter.frame_count == frames <= few * (3 if method == "mor" else 1)
    assert (frames > 0) == (method != "pause")  # which feeds several states at once: nothing to compile


@torch.no_grad()
def test_compiled_ticks_go_on_after_a_chunk_and_side_by_side():
    model, idx = make(), text(1, 13)
    compile_ticks(model, backend="eager")
    cache, logits = None, []
    for part in idx.split([5, 1, 1, 3, 1, 1, 1], 1):
        out = model(part, cache=cache)
        cache = out.cache
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), make()(idx).logits, atol=1e-5, rtol=1e-4)
    alone = [said(model, [prompt], 8)[0] for prompt in ([1, 2, 3], [4])]
    streams = [model.generate([prompt], 8, temperature=0) for prompt in ([1, 2, 3], [4])]
    both = list(zip(*streams))
    for row in (0, 1):
        assert [pair[row].token.item() for pair in both] == [token for token, _, _ in alone[row]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method,shape", SHAPES)
def test_another_layout_gives_the_same_tokens_and_loads_elsewhere(method, shape, packed, monkeypatch):
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]  # enough rows for another product than one row's
    model = make(method, **shape)
    before, logits, state = said(model, prompts, 8), model(text()).logits, copy.deepcopy(model.state_dict())
    monkeypatch.setattr(fast, "PACKED", 0 if packed else 2**16)
    lay_out(model)
    assert packed == ("forward" in vars(model.head)) == ("forward" in vars(model.blocks[0].w1))
    with torch.no_grad():
        torch.testing.assert_close(model(text()).logits, logits)
    assert said(model, prompts, 8) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = make(method, **shape)
    other.load_state_dict(model.state_dict())
    assert all(p.is_contiguous() for p in other.parameters())


@pytest.mark.parametrize("fast_path", ["compile_training", "lay_out", "compile_ticks", "fuse_norms"])
def test_a_copy_computes_with_its_own_weights(fast_path, monkeypatch):
    """And the model with those that it has now: an average of weights is made of a copy."""
    torch._dynamo.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="eager", **options))
    monkeypatch.setattr(fast, "PACKED", 0)
    monkeypatch.setattr(fast, "ALONE", 0)
    model, prompts = make(), text(2, 9).tolist()
    wanted, other = said(model, prompts, 6), make(seed=1)
    getattr(fast, fast_path)(model)
    assert said(model, prompts, 6) == wanted
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    assert said(copied, prompts, 6) == wanted
    assert said(model, prompts, 6) == said(other, prompts, 6) != wanted
    copied.load_state_dict(other.state_dict())
    assert said(copied, prompts, 6) == said(other, prompts, 6)


class Doubling(Block):
    def after(self, x, y):
        return 2 * super().after(x, y)


def test_a_block_of_ones_own_is_compiled_as_it_is(monkeypatch):
    torch._dynamo.reset()
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: plain(f, backend="eager", **options))
    model = make()
    for block in model.blocks[1:]:
        block.__class__ = Doubling
    wanted, grad_free = model(text(), text(seed=3)).loss, said(model, [[1, 2]], 4)
    compile_training(model)
    torch.testing.assert_close(model(text(), text(seed=3)).loss, wanted)
    assert said(model, [[1, 2]], 4) == grad_free


def test_weights_of_inference_are_laid_out_and_others_noticed(monkeypatch):
    monkeypatch.setattr(fast, "PACKED", 0)
    monkeypatch.setattr(fast, "ALONE", 0)
    with torch.inference_mode():
        model = make()
        wanted = said(model, [[1, 2], [3]], 4)
        lay_out(model)
        assert said(model, [[1, 2], [3]], 4) == wanted
    model = make()
    lay_out(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.8
    other = make()
    for parameter in other.parameters():
        parameter.data = parameter.data * 0.8
    with torch.no_grad():
        torch.testing.assert_close(model(text()).logits, other(text()).logits)


def test_fused_norms_can_be_sent_to_a_process():
    model = make()
    fuse_norms(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(text()).logits, model(text()).logits)


def test_a_quick_norm_is_a_norm():
    """Also where eps is most of it, and where gradients are wanted after all."""
    norm = torch.nn.RMSNorm(48, 1e-5)
    torch.nn.init.normal_(norm.weight)
    for shape, size in itertools.product(((1, 48), (65, 48), (3, 2, 48), (0, 48)), (1e-6, 1e-3, 1.0, 1e4)):
        x = size * torch.randn(shape, requires_grad=True)
        y = fast.quick_norm(norm, torch.tensor(norm.eps), x)
        torch.testing.assert_close(y, norm(x), rtol=1e-5, atol=1e-6 * size)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(norm(x).sum(), x))


def test_a_packed_product_is_that_of_one_row_and_of_many():
    """With a bias and without, small and large."""
    for bias, wide, high in itertools.product((False, True), (48, fast.ALONE), (32, fast.ALONE + 1)):
        linear = torch.nn.Linear(wide, high, bias=bias)
        plain = linear.forward
        fast.pack(linear)
        assert "forward" in vars(linear)
        for shape in ((1, wide), (2, wide), (1, 7, wide), (65, wide), (0, wide)):
            with torch.no_grad():
                x = torch.randn(shape)
                torch.testing.assert_close(linear(x), plain(x))
        by_plain = []
        linear.forward = partial(linear.forward.func, linear, lambda x: by_plain.append(x) or plain(x))
        linear(torch.randn(1, wide))
        assert bool(by_plain) == (min(wide, high) < fast.ALONE), "a single row of a small one goes to MKL"


def test_buffers_are_idle_once_a_log_has_left_all_of_them():
    """A row that is replaced moves order and column elsewhere: keys and values still lie there."""
    log = Log()
    names = "order", "column", "k0", "v0"
    for name in names:
        log.entries[name].held = torch.zeros(2, 8, 1, 1)
    tape = object.__new__(fast.Tape)
    tape.owner, tape.held = None, {name: log.entries[name].held for name in names}
    assert tape.idle()
    tape.owner = weakref.ref(log)
    assert not tape.idle()
    for name in names:
        assert not tape.idle()
        log.entries[name].held = log.entries[name].held.clone()
    assert tape.idle()
    tape.held = {name: log.entries[name].held for name in names}
    assert not tape.idle()
    del log
    assert tape.idle()


def test_where_nothing_can_be_packed_nothing_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linear = torch.nn.Linear(48, 32)
    fast.pack(linear)
    assert "forward" not in vars(linear)


@pytest.mark.parametrize("tied", [False, True])
def test_what_the_layout_touches(tied, monkeypatch):
    monkeypatch.setattr(fast, "PACKED", 0)
    model = make(tie_embeddings=tied)
    lay_out(model)
    for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
        assert getattr(model.blocks[0], name).weight.T.is_contiguous()
    assert model.head.weight.T.is_contiguous() and model.embed.weight.is_contiguous()
    lay_out(model, torch.bfloat16)
    assert model.head.weight.dtype is torch.bfloat16 and model.embed.weight.dtype is torch.float32
    assert model.head.weight.is_contiguous() and model.blocks[0].w1.weight.is_contiguous()  # as oneDNN wants
    assert "forward" not in vars(model.head), "what was packed is not these numbers"


@pytest.mark.parametrize("method,shape", SHAPES)
def test_bf16_weights_change_nothing_under_bf16_autocast(method, shape):
    model = make(method, **shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits, before = model(text()).logits, said(model, [[1, 2, 3], [4]], 8)
        lay_out(model, torch.bfloat16)
        assert torch.equal(model(text()).logits, logits)
        assert said(model, [[1, 2, 3], [4]], 8) == before
