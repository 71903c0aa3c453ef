"""The invariants of the model: gathered ≡ dense, decoding ≡ parallel ≡ chunked, causality, independence of rows, vanilla ≡ LLaMA."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import model as model_module
from baselines import METHODS, build
from conftest import uneven as make
from model import FAR, Cache, Config, block_mask, flex_attention

EXACT = [name for name in METHODS if name != "ponder2"]  # ponder2 in parallel is Jacobi's approximation of its decoding


def text(B=3, T=40, seed=1):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------- an independent LLaMA of a few lines, from a state dict


def reference_stack(state, config, z, pos, see, past=()):
    """z (B, T, d) through the blocks; see (B, T, S) masks the keys of past passes and of this one. Returns h and this pass's keys."""
    B, T, d = z.shape
    hd = d // config.n_head
    angle = pos[:, None] / config.rope_theta ** (torch.arange(0, hd, 2) / hd)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[name]

    def turn(x):
        return x * cos[:, None] + torch.cat((-x[..., hd // 2 :], x[..., : hd // 2]), -1) * sin[:, None]

    kept = []
    for i in range(config.n_layer):
        w = {name: state[f"blocks.{i}.{name}.weight"] for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}
        x = norm(z, f"blocks.{i}.attn_norm.weight")
        q, k, v = (t(x @ w[name].T.contiguous()) for t, name in ((lambda y: turn(y.view(B, T, -1, hd)), "wq"), (lambda y: turn(y.view(B, T, -1, hd)), "wk"), (lambda y: y.view(B, T, -1, hd), "wv")))
        kept.append((k, v))
        k, v = (torch.cat([*(p[i][j] for p in past), (k, v)[j]], 1) for j in (0, 1))
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(hd)
        share = score.masked_fill(~see[:, None], -math.inf).softmax(-1)
        z = z + torch.einsum("bhqk,bkhd->bqhd", share, v).reshape(B, T, d) @ w["wo"].T
        x = norm(z, f"blocks.{i}.ffn_norm.weight")
        z = z + (F.silu(x @ w["w1"].T) * (x @ w["w3"].T)) @ w["w2"].T
    return (z if state["norm.weight"] is None else norm(z, "norm.weight")), kept


def reference_adaptive(model, state, idx, tau):
    """Every (t, k) is computed; the mask alone says who was executed. Returns logits, steps and expected steps."""
    c, (B, T) = model.config, idx.shape
    pos, causal = torch.arange(T), torch.ones(T, T, dtype=torch.bool).tril()
    z, reach, executed = model.scale * state["embed.weight"][idx], torch.ones(B, T), torch.ones(B, T, dtype=torch.bool)
    mixture, steps, expected, past, seen = 0, torch.zeros(B, T), torch.zeros(B, T), [], []
    for k in range(c.max_latent + 1):
        mine = executed[:, None, :] & causal | torch.eye(T, dtype=torch.bool)  # a halted query sees itself, so that nothing is NaN
        seen.append(executed[:, None, :] & causal)
        h, kept = reference_stack(state, c, z, pos, torch.cat([*seen[:-1], mine], 2), past)
        past.append(kept)
        onward = reach * torch.sigmoid(h @ state["router.weight"][0] + state["router.bias"])
        further = executed & (onward >= tau) & (k < c.max_latent)
        mass = torch.where(executed, torch.where(further, reach - onward, reach), 0.0)
        mixture = mixture + mass[..., None] * h
        reach, executed, z = torch.where(further, onward, 0.0), further, h
        steps, expected = steps + further, expected + reach
    return mixture @ state["head.weight"].T, steps, expected


def test_vanilla_is_llama():
    model, idx = make("vanilla"), text()
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(3, 40, 40)
    state = model.state_dict()
    h, _ = reference_stack(state, model.config, state["embed.weight"][idx], torch.arange(40), causal)
    torch.testing.assert_close(model(idx).logits, h @ state["head.weight"].T, atol=1e-5, rtol=1e-5)


def test_vanilla_is_hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    model, idx = make("vanilla"), text()
    c = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False)).eval()
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers", "attn_norm": "input_layernorm",
             "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
             "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    theirs.load_state_dict({".".join(names.get(part, part) for part in name.split(".")): value for name, value in model.state_dict().items()})
    torch.testing.assert_close(model(idx).logits, theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_max_latent_0_is_vanilla():
    vanilla, adaptive = make("vanilla"), make(max_latent=0)
    adaptive.load_state_dict(vanilla.state_dict(), strict=False)
    torch.testing.assert_close(adaptive(text()).logits, vanilla(text()).logits)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tau", [0.0, 0.2, 0.4, 0.6])
def test_gathered_is_dense_masked(seed, tau):
    """Forward, loss and every gradient, against an implementation that computes all states and only masks."""
    model, idx, targets = make(seed=seed, tau=tau, lam=0.3), text(seed=seed), text(seed=seed + 50)
    out = model(idx, targets)
    out.loss.backward()
    state = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    logits, steps, expected = reference_adaptive(model, state, idx, tau)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = nats.mean() + 0.3 * (torch.exp(-nats.detach()) * expected.flatten()).mean()
    grads = dict(zip(state, torch.autograd.grad(loss, list(state.values()))))
    assert torch.equal(out.steps, steps) and 0 < steps.mean() < 3 or tau == 0
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.expected_steps, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    mine = dict(model.named_parameters())
    for i in range(3):
        torch.testing.assert_close(mine[f"blocks.{i}.wqkv.weight"].grad, torch.cat([grads[f"blocks.{i}.w{n}.weight"] for n in "qkv"]), atol=2e-5, rtol=1e-3)
        torch.testing.assert_close(mine[f"blocks.{i}.w13.weight"].grad, torch.cat([grads[f"blocks.{i}.w{n}.weight"] for n in "13"]), atol=2e-5, rtol=1e-3)
    for name in set(mine) & set(grads):
        torch.testing.assert_close(mine[name].grad, grads[name], atol=2e-5, rtol=1e-3, msg=lambda m: f"{name}: {m}")


# -------------------------------------------------------------------------------------- one forward for everything


@torch.no_grad()
def in_chunks(model, idx, sizes, cache=None):
    cache, outs, t = cache or Cache(), [], 0
    while t < idx.size(1):
        n = sizes[len(outs) % len(sizes)]
        outs.append(model(idx[:, t : t + n], cache=cache))
        t += n
    return torch.cat([o.logits for o in outs], 1), torch.cat([o.steps for o in outs], 1), cache


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("sizes", [[1], [7], [13, 1, 2, 5]])
def test_decoding_is_parallel(method, sizes):
    model, idx = make(method), text()
    with torch.no_grad():
        whole = model(idx)
    logits, steps, _ = in_chunks(model, idx, sizes)
    torch.testing.assert_close(logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(steps, whole.steps)


def test_mor_is_dense_masked():
    """Each recursion for all tokens, from an independent stack of the middle blocks; the chosen depth alone says what counts."""
    model, idx = make("mor", n_layer=4), text()
    state, c, causal, pos = model.state_dict(), model.config, torch.ones(40, 40, dtype=torch.bool).tril(), torch.arange(40)

    def stack(z, layers, see):  # without the final norm
        part = {f"blocks.{i}.{name.split('.', 2)[2]}": w for i, layer in enumerate(layers) for name, w in state.items() if name.startswith(f"blocks.{layer}.")}
        config = Config(**{**vars(c), "n_layer": len(layers)})
        part["norm.weight"] = None
        return reference_stack(part, config, z, pos, see)[0]

    first = stack(state["embed.weight"][idx], [0], causal.expand(3, 40, 40))
    g = (first @ state["router.weight"].T).softmax(-1)
    depth, h, done = g.argmax(-1), first, torch.zeros_like(first)
    for r in range(c.max_latent + 1):
        see = (depth >= r)[:, None, :] & causal | torch.eye(40, dtype=torch.bool)
        h = g[..., r : r + 1] * stack(h, [1, 2], see)
        done = torch.where((depth == r)[..., None], h + first, done)
    last = stack(done, [3], causal.expand(3, 40, 40))
    want = last / (last.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * state["norm.weight"] @ state["head.weight"].T
    out = model(idx)
    assert torch.equal(out.steps, depth.float()) and len(depth.unique()) > 1
    torch.testing.assert_close(out.logits, want, atol=1e-5, rtol=1e-4)


def test_ponder2_jacobi_approaches_its_decoding():
    """With weights of a normal size the approximation is close, and it is exact for the first two tokens."""
    torch.manual_seed(0)
    model, idx = build(Config(method="ponder2", n_layer=3, n_embd=32, n_ff=48, vocab_size=61, max_latent=1)).eval(), text()
    with torch.no_grad():
        parallel = model(idx).logits
    decoded, _, _ = in_chunks(model, idx, [1])
    torch.testing.assert_close(parallel[:, :2], decoded[:, :2], atol=1e-5, rtol=1e-5)
    assert (parallel - decoded).abs().max() < 0.05 * decoded.std()


def test_cache_holds_no_key_of_halted_tokens():
    model, idx = make(), text()
    _, steps, cache = in_chunks(model, idx, [1])
    for k, column in enumerate(cache.columns):
        held = (column.order < FAR).sum(1)
        assert torch.equal(held, (steps >= k).sum(1))
        for row in range(3):  # in order, and at the front
            assert torch.equal(column.order[row, : held[row]], (steps[row] >= k).nonzero().squeeze(1))


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_nothing_before_them(method):
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
    model, idx = make(method), text()
    live = torch.ones(3, 40, dtype=torch.bool)
    live[0, 25:], live[2, 11:] = False, False
    with torch.no_grad():
        together = model(idx, live=live)
        for row, n in enumerate(live.sum(1).tolist()):
            alone = model(idx[row : row + 1, :n])
            torch.testing.assert_close(together.logits[row, :n], alone.logits[0], atol=1e-5, rtol=1e-5)
            assert torch.equal(together.steps[row, :n], alone.steps[0]) and not together.logits[row, n:].any()


def test_exit_mass_sums_to_one_and_reach_never_grows(monkeypatch):
    """With the norm's output replaced by ones, h̄ is Σ_k p[t,k]; every pass's reach is read off the router."""
    model, idx, gates = make(), text(), []
    hook = model.router.register_forward_hook(lambda module, inputs, output: gates.append(torch.sigmoid(output)))
    model.norm.register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    torch.nn.init.normal_(model.router.bias)
    with torch.no_grad():
        h, steps, expected, _ = model.hidden(idx, Cache())
    torch.testing.assert_close(h, torch.ones_like(h))
    assert steps.max() <= model.max_latent and (expected <= steps + 1e-6).all() and all(((g > 0) & (g < 1)).all() for g in gates)
    hook.remove()


@pytest.mark.parametrize("tau,max_latent", [(0.0, 3), (1.0, 3), (0.0, 5), (0.0, 1), (0.4, 3)])
def test_dials(tau, max_latent):
    model, idx = make(), text()
    with torch.no_grad(), model.dials(tau, max_latent):
        out = model(idx)
    assert out.steps.max() <= max_latent and model.tau == 0.25 and model.max_latent == 3
    if tau in (0.0, 1.0):
        assert (out.steps == (max_latent if tau == 0 else 0)).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_more_or_fewer_steps_than_it_was_trained_with(method):
    model = make(method)
    for max_latent in (0, 1, 5):
        with torch.no_grad(), model.dials(max_latent=max_latent):
            out = model(text(), text(seed=5))
        assert torch.isfinite(out.loss) and out.steps.max() <= max_latent


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_unequal_prompts_generates_what_each_prompt_would(method):
    model, prompts = make(method), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    if method == "ponder2":  # so that prefill is decoding, too
        prompts = [[1], [8], [9]]
    together = list(model.generate(prompts, 12, temperature=0))
    for row, prompt in enumerate(prompts):
        for a, b in zip(together, model.generate([prompt], 12, temperature=0)):
            assert a.token[row] == b.token[0] and a.steps[row] == b.steps[0]
            torch.testing.assert_close(a.prob[row], b.prob[0], atol=1e-5, rtol=1e-4)


def test_a_row_ends_at_its_stop_token_and_costs_nothing_more():
    model = make()
    stop = next(iter(model.generate([[1, 2, 3]], 1, temperature=0))).token.item()
    tokens = list(model.generate([[1, 2, 3], [5, 6]], 8, temperature=0, stop=stop))
    assert tokens[0].live.tolist() == [True, True] and not any(g.live[0] or g.token[0] or g.steps[0] for g in tokens[1:])
    alone = [g.token.item() for g in model.generate([[5, 6]], 8, temperature=0, stop=stop)]
    assert [g.token[1].item() for g in tokens] == alone


def test_generation_outlives_the_context_and_keeps_the_end_of_a_long_prompt():
    model, prompt = make(block_size=16), text(1, 50)[0].tolist()
    assert [g.token.item() for g in model.generate([prompt], 30, temperature=0)] == [g.token.item() for g in model.generate([prompt[-16:]], 30, temperature=0)]


def test_sampling():
    model = make()
    with torch.no_grad():
        prob = model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(0)
    likely = set(prob.topk(5).indices.tolist())
    nucleus = set(prob.argsort(descending=True)[: int((prob.sort(descending=True).values.cumsum(0) < 0.6).sum()) + 1].tolist())
    draws = lambda **kw: [next(iter(model.generate([[1, 2, 3]], 1, seed=s, **kw))).token.item() for s in range(60)]
    assert draws() == draws() and len(set(draws())) > 5
    assert set(draws(top_k=5)) <= likely and set(draws(top_p=0.6)) <= nucleus and len(set(draws(top_k=5))) > 1
    assert set(draws(top_k=1)) == {prob.argmax().item()}


@pytest.mark.parametrize("arguments", [dict(idx=[[]]), dict(idx=[]), dict(idx=[[1]], temperature=-1), dict(idx=[[1]], top_p=0.0), dict(idx=[[1]], top_k=0)])
def test_generation_refuses(arguments):
    with pytest.raises(ValueError):
        list(make().generate(max_new_tokens=2, **arguments))


# ------------------------------------------------------------------------------------ what changes no number, and shape


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_changes_no_number(method):
    results = []
    for checkpointing in (False, True):
        model = make(method).train()
        model.checkpointing = checkpointing
        torch.manual_seed(0)
        model(text(), text(seed=5)).loss.backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_loss_in_chunks_is_the_loss(monkeypatch):
    model, idx, targets = make(), text(), text(seed=2)
    targets[0, :7] = -1
    whole = model(idx, targets)
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(model_module, "CHUNK", 17 * 61)  # 120 tokens: seven chunks of 17, and one
    chunked = model(idx, targets)
    chunked.loss.backward()
    assert whole.logits is not None and chunked.logits is None
    torch.testing.assert_close([chunked.loss, chunked.ada], [whole.loss, whole.ada])
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_block_mask_is_the_dense_mask():
    """FlexAttention's mask, on CPU, against the boolean one that SDPA gets, and the kernels' results on real queries."""
    model, idx = make(), text(2, 40)
    seen = []
    original = model_module.make_mask
    try:
        model_module.make_mask = lambda tokens, columns: seen.append((tokens, list(columns), original(tokens, columns))) or seen[-1][2]
        with torch.no_grad():
            model(idx)
    finally:
        model_module.make_mask = original
    assert len(seen) > 2
    for tokens, columns, mask in seen[1:]:
        query, key = tokens.grid_order(), torch.cat([c.order[:, : c.size] for c in columns], 1)
        q, k, v = torch.randn(2, 4, query.size(1), 8), torch.randn(2, 4, key.size(1), 8), torch.randn(2, 4, key.size(1), 8)
        flex = flex_attention(q, k, v, block_mask=block_mask(query, key))
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        real = (query < FAR)[:, None, :, None].expand_as(flex)
        torch.testing.assert_close(flex[real], dense[real], atol=1e-5, rtol=1e-5)
        assert not flex[~real].any()


def test_flex_attention_is_compiled_once_for_all_lengths():
    mask_counter, counter = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    make_mask = torch.compile(block_mask, dynamic=True, backend=mask_counter)
    attention = torch.compile(flex_attention, dynamic=True, backend=counter)
    for A, S in ((140, 200), (150, 431), (270, 300), (300, 1000)):
        query, key = torch.arange(A).expand(2, A) + S - A, torch.arange(S).expand(2, S)
        q, k, v = (torch.randn(2, 2, n, 16) for n in (A, S, S))
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=(key[:, None, :] <= query[:, :, None])[:, None])
        torch.testing.assert_close(attention(q, k, v, block_mask=make_mask(query, key)), dense, atol=1e-5, rtol=1e-5)
    assert mask_counter.frame_count == counter.frame_count == 1


def test_state_dict_has_metas_names_and_round_trips():
    model, other = make(), make(seed=7)
    names = set(model.state_dict())
    assert names == {"embed.weight", "norm.weight", "head.weight", "router.weight", "router.bias"} | {
        f"blocks.{i}.{n}.weight" for i in range(3) for n in ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")}
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(text()).logits, other(text()).logits)
    with pytest.raises(RuntimeError):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "wk" not in k})


@pytest.mark.parametrize("settings", [dict(n_embd=30), dict(tau=1.5), dict(tau=-0.1), dict(n_layer=0), dict(max_latent=-1), dict(lam=-1.0), dict(tau=math.nan)])
def test_config_refuses(settings):
    with pytest.raises(ValueError):
        Config(**settings)


def test_a_method_that_does_not_exist():
    with pytest.raises(ValueError, match="vanilla, adaptive"):
        build(Config(method="vanila"))


def test_longer_than_the_context():
    with pytest.raises(ValueError, match="block_size 64"):
        make()(text(1, 65))
    cache = Cache()
    with torch.no_grad():
        make()(text(1, 60), cache=cache)
        with pytest.raises(ValueError, match="60 \\+ 5"):
            make()(text(1, 5), cache=cache)


def test_padding_targets_do_not_count():
    model, idx, targets = make(), text(), text(seed=3)
    targets[:, 30:] = -1
    with torch.no_grad():
        out = model(idx, targets)
    want = F.cross_entropy(out.logits[:, :30].flatten(0, 1), targets[:, :30].flatten())
    torch.testing.assert_close(out.ce, want)


def test_compiled_blocks_change_no_number_and_are_compiled_once():
    model, idx, targets = make(), text(), text(seed=3)
    model(idx, targets).loss.backward()
    eager = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter)
    model(idx, targets).loss.backward()
    for a, p in zip(eager, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-5, rtol=1e-4)
    first = counter.frame_count  # `before`, and `after` on a full and on a ragged batch, forward and backward
    for T in (11, 23, 39):  # other numbers of live tokens
        model(idx[:, :T], targets[:, :T]).loss.backward()
    assert counter.frame_count == first <= 6
    for _ in range(2):
        list(model.generate([[1, 2, 3], [4]], 12, temperature=0))
        list(model.generate([[1, 2, 3]], 12, temperature=0))
    assert counter.frame_count <= first + 4  # both without gradients, and again for a single token
    assert set(model.state_dict()) == set(make().state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_compiled_decoding_changes_no_number_and_is_compiled_once(method):
    model = make(method, n_layer=3 if method == "mor" else 1, block_size=128)
    prompts = [text(1, 58)[0].tolist(), [4], [5, 6]]  # the columns grow on the way from 64 seats to 128
    want = [list(model.generate(some, 12, temperature=0)) for some in (prompts, prompts[:1])]
    counter, frames, addresses = CompileCounterWithBackend("eager"), [], []
    model.compile_decoding(backend=counter)
    for _ in range(2):
        for some, eager in zip((prompts, prompts[:1]), want):
            list(model.generate(some, 12, temperature=0, tau=0.0))  # leaves buffers full of longer thoughts
            for a, b in zip(eager, model.generate(some, 12, temperature=0), strict=True):
                assert torch.equal(a.token, b.token) and torch.equal(a.steps, b.steps)
                torch.testing.assert_close(a.prob, b.prob, atol=1e-5, rtol=1e-4)
        frames.append(counter.frame_count)
        addresses.append({t.data_ptr() for column in model.idle[0].columns for t in column.buffers.values()})
    assert frames[0] == frames[1] <= 12 and addresses[0] == addresses[1] and len(model.idle) == 1
    assert (frames[0] > 0) == (method != "pause")  # which feeds several tokens a pass: no decoding of this kind


def test_two_compiled_generations_at_once_do_not_share_a_cache():
    model = make()
    model.compile_decoding(backend="eager")
    alone = [[g.token.item() for g in model.generate([prompt], 8, temperature=0)] for prompt in ([1, 2, 3], [4])]
    both = zip(model.generate([[1, 2, 3]], 8, temperature=0), model.generate([[4]], 8, temperature=0))
    assert [[g.token.item() for g in row] for row in zip(*both)] == alone


@torch.no_grad()
def test_copies_of_a_cache_decode_apart_when_compiled():
    logits = []
    for model in (make(block_size=128), make(block_size=128)):
        if logits:
            model.compile_decoding(backend="eager")
        cache = Cache()
        model(text(1, 62), cache=cache)
        model(torch.tensor([[3]]), cache=cache)
        copies = [cache.rows([0]), cache.rows([0])]
        for token in (5, 6, 7):  # they grow from 64 seats to 128
            logits += [model(torch.tensor([[token * (i + 1)]]), cache=copy).logits for i, copy in enumerate(copies)]
    torch.testing.assert_close(logits[:6], logits[6:])


@torch.no_grad()
def test_compiled_decoding_goes_on_after_a_chunk():
    model, cached, idx = make(), Cache(), text(1, 13)
    model.compile_decoding(backend="eager")
    logits = [model(part, cache=cached).logits for part in idx.split([5, 1, 1, 3, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(logits, 1), make()(idx).logits, atol=1e-5, rtol=1e-4)


def test_compiled_decoding_in_and_out_of_inference_mode():
    model = make()
    model.compile_decoding(backend="eager")
    with torch.inference_mode():
        inside = [g.token.item() for g in model.generate([[1, 2, 3]], 6, temperature=0)]
    assert [g.token.item() for g in model.generate([[1, 2, 3]], 6, temperature=0)] == inside


def test_models_of_several_methods_are_compiled_side_by_side():
    for method in ("ponder2", "vanilla", "mor"):
        model = make(method, max_latent=1)
        model.compile_decoding(backend="eager")
        assert len(list(model.generate([[1, 2, 3]], 6, temperature=0))) == 6


@pytest.mark.parametrize("method", METHODS)
def test_weights_laid_out_for_decoding_give_the_same_tokens_and_load_elsewhere(method):
    model, prompts = make(method), [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]  # enough rows for another product than one row's
    before, logits, state = list(model.generate(prompts, 8, temperature=0)), model(text()).logits, copy.deepcopy(model.state_dict())
    model.for_decoding()
    torch.testing.assert_close(model(text()).logits, logits)
    for a, b in zip(before, model.generate(prompts, 8, temperature=0)):
        assert torch.equal(a.token, b.token) and torch.equal(a.steps, b.steps)
        torch.testing.assert_close(a.prob, b.prob)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    other = make(method)
    other.load_state_dict(model.state_dict())
    assert all(p.is_contiguous() for p in other.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_is_near_and_bf16_weights_change_nothing_under_it(method):
    model, idx, targets = make(method), text(), text(seed=5)
    exact = model(idx, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        out = model(idx, targets)
        out.loss.backward()
        assert out.loss.dtype == out.expected_steps.dtype == torch.float32 and out.logits.dtype == torch.bfloat16
        torch.testing.assert_close(out.loss, exact, atol=0.03, rtol=0)
        assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        before = list(model.generate([[1, 2, 3], [4]], 8, temperature=0))
        model.for_decoding(torch.bfloat16)
        assert torch.equal(model(idx, targets).logits, out.logits)
        for a, b in zip(before, model.generate([[1, 2, 3], [4]], 8, temperature=0)):
            assert torch.equal(a.token, b.token) and torch.equal(a.prob, b.prob) and torch.equal(a.steps, b.steps)
