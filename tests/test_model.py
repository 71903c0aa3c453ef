"""The model's invariants (numbers are those of DESIGN's list): packed ≡ dense, vanilla ≡ LLaMA, ticks,
losses, FLOPs.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
import reference
from baselines import METHODS, build
from conftest import said, text
from conftest import uneven as make
from costs import counted, forward_flops, training_flops
from log import Cache
from model import Config

HUGGING_FACE = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
QWEN = {"head_dim": 12, "n_kv_head": 2, "qkv_bias": True, "qk_norm": True}  # what Qwen2 and Qwen3 have beside
FELT = {"weigh_values": True, "exit_loss": 0.5}  # thoughts that answer to more than their own token's mixture


# -------------------------------------------------------- 1: no latent step ≡ vanilla ≡ Hugging Face's LLaMA


@pytest.mark.parametrize("n_kv_head", [0, 2, 1])
def test_vanilla_is_llama(n_kv_head):
    model = make("vanilla", n_kv_head=n_kv_head)
    want = reference.vanilla(model.state_dict(), model.config, text())
    torch.testing.assert_close(model(text()).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"n_kv_head": 2}, {"tie_embeddings": True}])
def test_vanilla_is_hugging_face_llama(settings):
    transformers = pytest.importorskip("transformers")
    model, c = make("vanilla", **settings), make("vanilla", **settings).config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head or c.n_head, rope_theta=c.rope_theta,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings)).eval()
    state = {}
    for name, value in model.state_dict().items():
        state[".".join(HUGGING_FACE.get(part, part) for part in name.split("."))] = value
    theirs.load_state_dict(state)
    torch.testing.assert_close(model(text()).logits, theirs(text()).logits, atol=1e-5, rtol=1e-5)


def test_max_latent_0_is_vanilla():
    vanilla, adaptive = make("vanilla"), make(max_latent=0)
    adaptive.load_state_dict(vanilla.state_dict(), strict=False)
    assert torch.equal(adaptive(text()).logits, vanilla(text()).logits)
    assert said(adaptive, [[1, 2, 3], [4]], 8) == said(vanilla, [[1, 2, 3], [4]], 8)


# ----------------------------------------------------------- 2: packed ≡ dense masked, forward and gradients


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.0, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 2}, QWEN, FELT])
def test_packed_is_dense_masked(seed, tau, shape):
    model = make(seed=seed, tau=tau, lam=0.3, **shape).train()
    idx, targets = text(seed=seed), text(seed=seed + 50)
    out = model(idx, targets)
    out.loss.backward()
    state = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    exits = []
    logits, steps, reach, expected = reference.adaptive(state, model.config, idx, exits)
    loss = reference.loss(logits, expected, targets, model.config, exits)
    gradients = dict(zip(state, torch.autograd.grad(loss, list(state.values()))))
    assert torch.equal(out.steps, steps) and (0 < steps.mean() < 3 or tau in (0.0, 0.6))
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.reach, reach, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.expected_steps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    mine = dict(model.named_parameters())
    assert mine.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name].grad, gradient, atol=2e-5, rtol=1e-3)


# -------------------------------------------------------------- 3: parallel ≡ ticks ≡ any chunking: adaptive


@pytest.mark.parametrize("tau,shape", [(0.0, {}), (0.25, {}), (0.5, {}), (0.25, QWEN), (0.25, FELT)])
def test_ticks_are_parallel(tau, shape):
    """What decoding says of its own text, token by token, one forward says of the whole."""
    model = make(tau=tau, **shape)
    prompt = text(1, 20)[0].tolist()
    generated = list(model.generate([prompt], 30, temperature=0))
    whole = prompt + [g.token.item() for g in generated]
    with torch.no_grad():
        out = model(torch.tensor([whole]))
    at = slice(len(prompt) - 1, len(whole) - 1)
    assert out.logits[0, at].argmax(1).tolist() == whole[len(prompt) :]
    assert out.steps[0, at].tolist() == [g.steps.item() for g in generated]
    prob = out.logits[0, at].softmax(1).amax(1)
    torch.testing.assert_close(torch.cat([g.prob for g in generated]), prob, atol=1e-5, rtol=1e-4)
    expected = torch.cat([g.expected_steps for g in generated])
    torch.testing.assert_close(expected, out.expected_steps[0, at], atol=1e-5, rtol=1e-4)


def test_a_tick_is_one_state_for_each_row_and_nobody_waits():
    """Each row speaks after 1 + steps ticks of its own, whatever its neighbours do."""
    model = make()
    ticks = []
    plain = model.tick

    def counted(x, cache):
        ticks.append(len(x))
        return plain(x, cache)

    model.tick = counted
    spoke = {row: [] for row in range(3)}
    for g in model.generate([[1, 2, 3], [4], [5, 6]], 10, temperature=0):
        for row, steps in zip(g.row.tolist(), g.steps.tolist()):
            spoke[row].append((len(ticks), steps))
    for row in spoke.values():
        assert len(row) == 10
        began = 0
        for tick, steps in row:
            assert tick - began == 1 + steps
            began = tick
    assert len({tuple(steps for _, steps in row) for row in spoke.values()}) > 1
    assert len(ticks) == max(row[-1][0] for row in spoke.values())


# --------------------------------------------------------------- 5: exit mass, reach and the number of steps


def test_exit_mass_sums_to_one_and_reach_never_grows():
    """With the norm's output replaced by ones, h̄ is Σ_k p[t,k]."""
    model = make()
    model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    torch.nn.init.normal_(model.router.bias)
    with torch.no_grad():
        h, steps, reach = model.hidden(text(), Cache())
    torch.testing.assert_close(h, torch.ones_like(h))
    assert steps.max() <= model.max_latent
    assert (reach.diff(dim=1) <= 0).all() and (reach[:, 0] > 0).all() and (reach <= 1).all()
    assert torch.equal((reach >= model.tau).sum(1), steps), "a step is taken where reach is at least τ"


@pytest.mark.parametrize("tau,max_latent", [(0.0, 3), (1.0, 3), (0.0, 5), (0.0, 1), (0.4, 3)])
def test_dials(tau, max_latent):
    model = make()
    model.tau, model.max_latent = tau, max_latent
    with torch.no_grad():
        out = model(text())
    assert out.steps.max() <= max_latent
    if tau in (0.0, 1.0):
        assert (out.steps == (max_latent if tau == 0 else 0)).all()


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.9}])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_alone_is_the_row_in_any_batch_past_the_end_of_the_context_too(method, settings):
    """Invariant 6 for generation."""
    model = make(method, block_size=16)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8], text(1, 16)[0].tolist(), text(1, 40, seed=3)[0].tolist()]
    together = said(model, prompts, 30, seed=7, **settings)
    for row, prompt in enumerate(prompts):
        assert said(model, [prompt], 30, seed=7 + row, **settings) == [together[row]]
    backwards = said(model, prompts[::-1], 30, seed=[7 + row for row in (3, 2, 1, 0)], **settings)
    assert backwards == together[::-1]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ponder2"])  # exact only in decoding
@torch.no_grad()
def test_a_context_is_used_to_its_end_and_goes_on_from_its_last_half(method):
    model = make(method, block_size=16)
    context = text(1, 12)[0].tolist()
    for token, _, _ in said(model, [context], 30)[0]:
        assert token == model(torch.tensor([context])).logits[0, -1].argmax()
        context.append(token)
        if len(context) > 16:
            context = context[-8:]


def test_a_long_prompt_keeps_its_end():
    model, prompt = make(block_size=16), text(1, 50)[0].tolist()
    assert said(model, [prompt], 30) == said(model, [prompt[-16:]], 30)


def test_a_row_ends_at_its_stop_token_and_leaves_the_batch():
    model = make()
    stop = said(model, [[1, 2, 3]], 5)[0][4][0]
    alone = [said(model, [prompt], 12, stop=stop)[0] for prompt in ([1, 2, 3], [5, 6])]
    assert said(model, [[1, 2, 3], [5, 6]], 12, stop=stop) == alone
    assert alone[0][-1][0] == stop and len(alone[0]) <= 5
    assert said(model, [[1, 2, 3]], 4.5) == said(model, [[1, 2, 3]], 5)  # as half of a number may be
    sizes = []
    plain = model.tick
    model.tick = lambda x, cache: sizes.append(len(x)) or plain(x, cache)
    said(model, [[1, 2, 3], [5, 6]], 12, stop=stop)
    assert sizes[0] == 2 and sizes[-1] == 1


def test_the_memory_of_long_generations_is_bounded():
    """Dead seats are squeezed out: never more than twice what the live entries of the longest row need."""
    model = make(block_size=32)
    most_live, most_held = 0, 0
    plain = model.tick

    def watched(x, cache):
        nonlocal most_live, most_held
        result = plain(x, cache)
        order = cache.logs[0].entries["order"].held
        most_live = max(most_live, int((order < 2**30).sum(1).max()))
        most_held = max(most_held, order.size(1))
        return result

    model.tick = watched
    for _ in model.generate([[1], [2, 3], [4, 5, 6], list(range(30))], 400, temperature=1, seed=0):
        pass
    assert 32 <= most_live <= 4 * 32 and most_held <= 2 * most_live


def test_sampling():
    model = make()
    with torch.no_grad():
        prob = model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(0)
    likely = set(prob.topk(5).indices.tolist())
    ordered = prob.argsort(descending=True)
    nucleus = set(ordered[: int((prob[ordered].cumsum(0) < 0.6).sum()) + 1].tolist())

    def draws(**settings):
        rows = said(model, [[1, 2, 3]] * 60, 1, seed=0, **{"temperature": 1, **settings})
        return [row[0][0] for row in rows]

    assert draws() == draws() and len(set(draws())) > 5
    assert set(draws(top_k=5)) <= likely and len(set(draws(top_k=5))) > 1
    assert set(draws(top_p=0.6)) <= nucleus
    assert set(draws(top_k=1)) == set(draws(temperature=1e-30)) == {prob.argmax().item()}
    assert draws(top_k=0) == draws(top_k=None) == draws(top_p=1.0)


def test_sampled_tokens_follow_their_probabilities():
    model = make()
    with torch.no_grad():
        prob = (model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 0.7).softmax(0)
    rows = said(model, [[1, 2, 3]] * 4000, 1, seed=0, temperature=0.7)
    share = torch.bincount(torch.tensor([row[0][0] for row in rows]), minlength=61) / 4000
    assert (share - prob).abs().max() < 0.03


@pytest.mark.parametrize("arguments", [
    dict(prompts=[[]]), dict(prompts=[]), dict(prompts=[[1]], temperature=-1), dict(prompts=[[1]], top_k=-1),
    dict(prompts=[[1]], temperature=math.nan), dict(prompts=[[1]], top_p=0.0)])
def test_generation_refuses(arguments):
    with pytest.raises(ValueError):
        list(make().generate(max_new_tokens=2, **arguments))


def test_no_new_tokens_are_none():
    assert list(make().generate([[1]], 0)) == []


# ----------------------------------------------------------------------- 9: FLOPs by formula ≡ FLOPs counted


@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1, "tie_embeddings": True}, QWEN])
@pytest.mark.parametrize("method,more", [*((method, {}) for method in METHODS), ("adaptive", FELT)])
@pytest.mark.parametrize("max_latent", [0, 1, 3])
def test_counted_flops_are_the_formula(method, more, shape, max_latent):
    """Forward and backward, row by row, where no seat is empty; a batch is the sum of its rows."""
    model = make(method, max_latent=max_latent, **shape, **more).train()
    steps, total = [], 0
    for idx, targets in zip(text().split(1), text(seed=2).split(1)):
        flops, executed = counted(model, idx, targets)
        assert training_flops(*forward_flops(model, executed)).item() == flops
        steps.append(executed)
        total += flops
    assert training_flops(*forward_flops(model, torch.cat(steps))).item() == total


def test_flops_leave_out_padding_and_what_the_cache_holds():
    model, idx = make(), text()
    with torch.no_grad():
        steps = model(idx).steps
    live = torch.ones(3, 40, dtype=torch.bool)
    live[:, 30:] = False
    short = forward_flops(model, steps[:, :30])
    assert forward_flops(model, steps, live) == short
    fed = torch.arange(40).expand(3, 40) >= 30
    whole, rest = forward_flops(model, steps), forward_flops(model, steps, fed=fed)
    assert rest[0] + short[0] == whole[0] and short[1] + rest[1] < whole[1] and rest[1] > 0


# ---------------------------------------------------------------------- what changes no number, and refusals


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_number(method):
    results = []
    for checkpointing in (False, True):
        model = make(method).train()
        model.checkpointing = checkpointing
        model(text(), text(seed=5)).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_nothing_that_it_makes_again(method):
    """Or the log would hold the graph of it, layer by layer, until the next forward."""
    model = make(method).train()
    model.checkpointing = True
    out = model(text(), text(seed=5))
    before = [entries.held for log in out.cache.logs.values() for entries in log.entries.values()]
    out.loss.backward()
    after = [entries.held for log in out.cache.logs.values() for entries in log.entries.values()]
    assert len(before) > 3 and all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpointed_forward_has_as_many_backward_passes_as_one_likes(method):
    model = make(method).train()
    model.checkpointing = True
    out = model(text(), text(seed=5))
    out.loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    out.loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], [2 * grad for grad in once])


def test_a_loss_in_chunks_is_the_loss(monkeypatch):
    model, idx, targets = make(), text(), text(seed=2)
    targets[0, :7] = -1
    whole = model(idx, targets)
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr(model_module, "CHUNK", 17 * 61)  # of 120 tokens: too many to keep
    for chunk in (17 * 61, 2**27):  # seven chunks of 17, and one; or all at once
        model.chunk = chunk
        model.zero_grad()
        chunked = model(idx, targets)
        chunked.loss.backward()
        assert whole.logits is not None and chunked.logits is None
        torch.testing.assert_close([chunked.loss, chunked.ada], [whole.loss, whole.ada])
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_padding_targets_do_not_count():
    model, targets = make(), text(seed=3)
    targets[:, 30:] = -1
    with torch.no_grad():
        out = model(text(), targets)
    want = F.cross_entropy(out.logits[:, :30].flatten(0, 1), targets[:, :30].flatten())
    torch.testing.assert_close(out.ce, want)


@pytest.mark.parametrize("method,shape", [
    *((method, {}) for method in METHODS), ("adaptive", QWEN), ("adaptive", FELT)])
def test_bf16_autocast_is_near(method, shape):
    model, idx, targets = make(method, **shape).train(), text(), text(seed=5)
    exact = model(idx, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(idx, targets)
        out.loss.backward()
    assert out.loss.dtype == out.expected_steps.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss, exact, atol=0.03, rtol=0)
    for p in model.parameters():
        assert p.grad is None or (p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all())


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_has_metas_names_and_round_trips(tied):
    model, other = make(tie_embeddings=tied), make(seed=7, tie_embeddings=tied)
    layers = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
    names = {"embed.weight", "norm.weight", "head.weight", "router.weight", "router.bias"}
    names |= {f"blocks.{i}.{name}.weight" for i in range(3) for name in layers}
    assert set(model.state_dict()) == names
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(text()).logits, other(text()).logits)
    assert (other.head.weight is other.embed.weight) == tied
    with pytest.raises(RuntimeError):
        other.load_state_dict({name: value for name, value in model.state_dict().items() if "wk" not in name})


@pytest.mark.parametrize("settings", [
    dict(n_embd=30), dict(tau=1.5), dict(tau=-0.1), dict(n_layer=0), dict(max_latent=-1), dict(lam=-1.0),
    dict(tau=math.nan), dict(n_kv_head=3), dict(n_kv_head=-1), dict(head_dim=5), dict(n_embd=126),
    dict(vocab_size=0)])
def test_config_refuses(settings):
    with pytest.raises(ValueError):
        Config(**settings)


@pytest.mark.parametrize("scaling", [[2.0, 1.0], [8.0, 4.0, 4.0, 8192.0]])
def test_a_rope_scaling_that_cannot_be(scaling):
    with pytest.raises(ValueError, match="rope_scaling"):
        build(Config(rope_scaling=scaling))


def test_a_scale_that_is_given_takes_the_place_of_the_methods_own():
    assert build(Config(embed_scale=3.0)).scale == 3.0
    assert build(Config()).scale == math.sqrt(2.5 * 128) and build(Config(method="vanilla")).scale == 1.0


def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="vanilla, adaptive"):
        build(Config(method="vanila"))


@torch.no_grad()
def test_longer_than_the_context():
    with pytest.raises(ValueError, match="block_size 64"):
        make()(text(1, 65))
    model = make()
    cache = model(text(1, 60)).cache
    with pytest.raises(ValueError, match="60 \\+ 5"):
        model(text(1, 5), cache=cache)
