"""Evaluation: perplexity against plain forwards, the harness against plain forwards and Hugging Face's, and what the analysis counts."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from baselines import METHODS
from conftest import uneven
from eval import Eval, Tally, analyze, harness_model, perplexity, ranks, read_text, score, spearman, sweep, token_class, windows, word_positions
from prepare import Prepare, describe, get_tokenizer, make_tokenizer, prepare, ranks_to_text
from train import save_checkpoint

ROOT = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
END = BYTES.eot_token
SAYING = "The cat sat on the mat. " * 3 + "A dog, 42 birds\nand naïve `code += 1`.\n"


def make(method="adaptive", **settings):
    return uneven(method, **dict(n_head=2, vocab_size=257, block_size=32) | settings)


def plain(model, context, continuation):
    """−log q of each token of the continuation, whether it is the likeliest, and the steps behind it: one forward, one row, nothing else."""
    whole = [*context, *continuation]
    with torch.no_grad():
        out = model(torch.tensor([whole[:-1]]))
    logits, n = out.logits[0, -len(continuation) :], len(continuation)
    targets = torch.tensor(continuation)
    return torch.stack((F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(1) == targets).float(), out.steps[0, -n:]))


def random_pairs(lengths, seed=0):
    """Pairs of random token arrays of the given lengths; equal context lengths share one context."""
    rng, contexts = np.random.default_rng(seed), {}
    for n, _ in lengths:
        contexts.setdefault(n, rng.integers(0, 256, n).astype(np.uint32))
    return [(contexts[n], rng.integers(0, 256, m).astype(np.uint32)) for n, m in lengths]


# --------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share_from", [2, 10**9])
def test_scores_equal_a_plain_forward_one_at_a_time(method, share_from, monkeypatch):
    """… whether or not pairs with one context have it read once, at any batch size, for contexts and continuations of any length."""
    monkeypatch.setattr(evaluation, "SHARED", share_from)
    model = make(method)
    pairs = random_pairs([(9, 5), (9, 1), (9, 12), (1, 3), (1, 7), (20, 2), (20, 12), (20, 13), (17, 4), (5, 28), (32, 1), (32, 1), (30, 1)])
    expected = [plain(model, context.tolist(), continuation.tolist()) for context, continuation in pairs]
    if method == "adaptive":
        assert len({step for part in expected for step in part[2].tolist()}) > 2, "the test wants a model that thinks unevenly"
    fed = set()
    for batch_size in (1, 3, 64):
        tally = Tally()
        for got, want in zip(score(model, pairs, batch_size, tally), expected):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        assert tally.said == sum(len(continuation) for _, continuation in pairs)
        assert tally.steps == sum(part[2].sum().item() for part in expected)
        fed.add(tally.fed)
    whole = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    if share_from == 2 and method != "ponder2":
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


def test_flops_and_steps_are_those_of_a_forward():
    """For one window: FLOPs per token are what the model counts in a forward with logits everywhere, divided by its tokens."""
    model, ids = make(block_size=64), np.frombuffer(SAYING[:65].encode(), np.uint8).astype(np.uint32)
    _, result = perplexity(model, BYTES, ids, Eval())
    model.matmul_flops = model.attention_flops = 0
    with torch.no_grad():
        out = model(torch.from_numpy(ids[:-1].astype(np.int64))[None])
    assert result["flops_per_token"] == round((model.matmul_flops + model.attention_flops) / (len(ids) - 1))
    assert result["latent_steps"] == pytest.approx(out.steps.mean().item())


# ----------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("method", ["vanilla", "adaptive"])
@pytest.mark.parametrize("stride", [None, 1, 10, 32])
def test_perplexity_equals_an_independent_computation(method, stride, tmp_path):
    """Token by token, each from its own window; per word and byte from the text itself."""
    model, path = make(method), tmp_path / "text.txt"
    path.write_text(SAYING, encoding="utf-8")
    raw, context, step = SAYING.encode(), 32, stride or 16
    ids = [*raw, END]
    nats = 0.0
    for t in range(1, len(ids)):
        end = min(len(ids), 1 + context + max(0, math.ceil((t - context) / step)) * step)  # of the window that counts t
        begin = max(0, end - 1 - context)
        nats += plain(model, ids[begin:t], ids[t : t + 1])[0].item()
    results = [perplexity(model, BYTES, read_text([str(path)], BYTES), Eval(stride=stride, batch_size=size))[1] for size in (1, 3, 50)]
    for result in results:
        assert (result["tokens"], result["words"], result["bytes"]) == (len(ids), len(SAYING.split()), len(raw))
        assert result["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
        assert math.log(result["word_perplexity"]) == pytest.approx(nats / len(SAYING.split()), rel=1e-5)
        assert math.log(result["byte_perplexity"]) == pytest.approx(nats / len(raw), rel=1e-5)
        assert result["bits_per_byte"] == pytest.approx(nats / len(raw) / math.log(2), rel=1e-5)
    assert [result["loss"] for result in results[1:]] == pytest.approx([results[0]["loss"]] * 2, rel=1e-6)


def test_text_is_read_as_prepare_reads_it(tmp_path):
    """Files, a .jsonl and the .bin of the same documents give the same tokens; empty documents and bytes that are no text are left out."""
    documents = [f"document {i}\n" * 9 for i in range(40)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, " "]))
    (tmp_path / "files").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / "files" / f"{i:02}.txt").write_text(text)
    (tmp_path / "files" / "zz.txt").write_bytes(b"\xff\xfe")
    records = read_text([str(tmp_path / "all.jsonl")], BYTES)
    assert bytes(records[records != END].astype(np.uint8)).decode() == "".join(documents) and (records == END).sum() == len(documents)
    assert np.array_equal(records, read_text([str(tmp_path / "files")], BYTES))
    folder = prepare(Prepare(input=[str(tmp_path / "all.jsonl")], out=str(tmp_path), name="data", val_fraction=0.3))
    prepared = np.concatenate([read_text([str(folder / f"{split}.bin")], BYTES) for split in ("train", "val")])
    parts = np.split(prepared, np.flatnonzero(prepared == END) + 1)[:-1]
    assert sorted(bytes(part[:-1].astype(np.uint8)).decode() for part in parts) == sorted(documents)
    assert np.array_equal(read_text([str(tmp_path / "all.jsonl")], BYTES, most=7), records[:7])


def test_sweep_spans_the_dials_and_leaves_them_as_they_were():
    model, ids = make(), np.frombuffer(SAYING.encode(), np.uint8).astype(np.uint32)
    points = sweep(model, ids, Eval(sweep=True))
    steps = [point["latent_steps"] for point in points]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 3, "from no thoughts to all of them"
    assert (model.tau, model.max_latent) == (0.25, 3)
    own = next(point for point in points if (point["tau"], point["max_latent"]) == (0.25, 3))
    assert own["loss"] == pytest.approx(perplexity(model, BYTES, ids, Eval())[1]["loss"])
    for point in points:
        assert point["best"] == (not any(o["latent_steps"] <= point["latent_steps"] and o["loss"] <= point["loss"] for o in points if o is not point))
    assert {point["tau"] for point in sweep(model, ids, Eval(sweep=True, tau=0.25))} == {None, 0.25}


# ------------------------------------------------------------------------------------------------- analysis


def test_ranks_and_correlation_share_ties():
    """Against Spearman's definition by pairwise comparison, on values with many ties; undefined for a constant."""
    x, y = (torch.randint(0, n, (200,), generator=torch.Generator().manual_seed(n)).float() for n in (4, 9))
    y = y + x
    by_hand = [((v[:, None] > v).sum(1) + ((v[:, None] == v).sum(1) + 1) / 2).double() for v in (x, y)]
    assert torch.equal(ranks(x), by_hand[0])
    a, b = (r - r.mean() for r in by_hand)
    assert spearman(x, y) == pytest.approx(((a * b).sum() / (a.norm() * b.norm())).item())
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(200)) is None


def test_token_classes_and_places_in_words():
    classes = {"space": (b" ", b"   ", b"\t"), "newline": (b"\n", b"  \n"), "name": (b" the", b"x1", b"_"), "digit": (b"7", b" 42"), "operator": (b" =", b"->"),
               "bracket": (b"()", b" ["), "quote": (b"'s", b'"'), "punctuation": (b".", b" #"), "not ASCII": (b"\xc3",), "control": (b"\x01",)}
    assert {kind: {token_class(token) for token in tokens} for kind, tokens in classes.items()} == {kind: {kind} for kind in classes}
    texts = [b"he", b"llo", b" the", b"re", b"(", b"x", b"_1", b" ", b"y", b""]
    assert word_positions(texts, np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 1])).tolist() == [1, 2, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]


def test_analysis_counts_what_plain_forwards_say():
    model = make(block_size=512)
    ids = np.array([*(SAYING * 4).encode(), END], np.uint32)
    config = Eval(analyze=True)
    said, _ = perplexity(model, BYTES, ids, config)
    found = analyze(model, BYTES, ids, said, config)

    def forward(most):
        with model.dials(max_latent=most):
            return plain(model, ids[:1].tolist(), ids[1:].astype(np.int64).tolist())

    nats, _, steps = forward(3)
    assert found["rank_correlation"] == pytest.approx(spearman(nats, steps), abs=1e-3)
    deciles = found["deciles"]
    assert len(deciles) == 10 and sum(row["tokens"] for row in deciles) == len(nats)
    assert sum(row["tokens"] * row["latent_steps"] for row in deciles) == pytest.approx(steps.sum().item())
    assert all(a["q_from"] <= a["q_to"] <= b["q_from"] for a, b in zip(deciles, deciles[1:]))
    hardest = nats.argsort(descending=True)[: deciles[0]["tokens"]]
    assert deciles[0]["loss"] == pytest.approx(nats[hardest].mean().item(), rel=1e-4)
    digits = torch.from_numpy(np.isin(ids[1:], list(b"0123456789")))
    row = next(row for row in found["classes"] if row["kind"] == "digit")
    assert row["tokens"] == digits.sum() and row["latent_steps"] == pytest.approx(steps[digits].mean().item())
    assert next(row for row in found["classes"] if row["kind"] == "end of text")["tokens"] == 1
    assert sum(row["tokens"] for row in found["word_positions"]) == len(nats)
    t = torch.from_numpy(ids[1:] == ord("t"))
    assert next(row for row in found["longest"] + found["shortest"] if row["token"] == "'t'") == {
        "token": "'t'", "tokens": int(t.sum()), "latent_steps": pytest.approx(steps[t].mean().item())}
    assert found["longest"][0]["latent_steps"] >= found["longest"][-1]["latent_steps"]
    assert [row["step"] for row in found["further_steps"]] == list(range(1, int(steps.max()) + 1))
    for row in found["further_steps"]:
        took = steps >= row["step"]
        without, with_it = (forward(most)[:, took] for most in (row["step"] - 1, row["step"]))
        assert row["tokens"] == took.sum()
        assert (row["loss_without"], row["loss_with"]) == pytest.approx((without[0].mean().item(), with_it[0].mean().item()), rel=1e-4)
        assert (row["right_without"], row["right_with"]) == pytest.approx((without[1].mean().item(), with_it[1].mean().item()))
        assert row["only_with"] == pytest.approx(((with_it[1] == 1) & (without[1] == 0)).float().mean().item())


# -------------------------------------------------------------------------------------------------- harness


def ask(*args, task="task"):
    """A request as the harness sends it."""
    return SimpleNamespace(args=args, task_name=task)


QUESTIONS = [("the cat", " sat"), ("the cat", " sat on the mat"), ("the cat ", "sat"), ("", "alone"), ("a" * 50, "left end lost"),
             ("short", "a continuation longer than the context"), ("the cat", "s")]


def loglikelihood(model, context, continuation):
    """By its definition: spaces belong to the continuation, an empty context is the end of a text, what is too long loses its left end."""
    split = len(context.rstrip())
    before, after = [*context[:split].encode()] or [END], [*(context[split:] + continuation).encode()]
    total, greedy = 0.0, True
    context = model.config.block_size
    for i in range(0, len(after), context):  # a continuation beyond the context goes in pieces
        piece = after[i : i + context]
        nats, right, _ = plain(model, [*before, *after[:i]][-(context + 1 - len(piece)) :], piece)
        total, greedy = total - nats.sum().item(), greedy and bool(right.all())
    return total, greedy


@pytest.mark.parametrize("method", ["vanilla", "adaptive"])
@pytest.mark.parametrize("share_from", [2, 10**9])
def test_harness_loglikelihoods_equal_plain_forwards(method, share_from, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluation, "SHARED", share_from)
    model = make(method)
    harness = harness_model(model, BYTES, batch_size=4)
    expected = [loglikelihood(model, *question) for question in QUESTIONS]
    got = harness.loglikelihood([ask(*question, task=f"task {i // 4}") for i, question in enumerate(QUESTIONS)])
    assert [total for total, _ in got] == pytest.approx([total for total, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert list(harness.tallies) == ["task 0", "task 1"]
    rolling = harness.loglikelihood_rolling([ask(SAYING), ask("x"), ask("")])
    assert rolling == pytest.approx([loglikelihood(model, "", SAYING)[0], loglikelihood(model, "", "x")[0], 0.0], rel=1e-4)


def greedy(model, prompt, n):
    """The text that n plain forwards say, each over all that was said before."""
    ids = [*prompt.encode()]
    for _ in range(n):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return bytes(ids[len(prompt) :])


def test_harness_calls_greedy_what_decoding_says_and_stops_where_told():
    pytest.importorskip("lm_eval")
    model = make()
    with torch.no_grad():
        model.head.weight[128:] = 0  # it says ASCII only: each byte is a character
    harness = harness_model(model, BYTES, batch_size=3)
    prompts = ["the cat", "a dog", "b", "the mat"]
    said = [greedy(model, prompt, 12).decode("ascii") for prompt in prompts]
    for prompt, text in zip(prompts, said):
        assert harness.loglikelihood([ask(prompt, text)])[0][1], "the model's own greedy continuation is greedy"
        other = text[:-1] + ("x" if text[-1] != "x" else "y")
        assert not harness.loglikelihood([ask(prompt, other)])[0][1], "one other token, and it is not"
    free = harness.generate_until([ask(prompt, {"until": [], "max_gen_toks": 12, "do_sample": False}) for prompt in prompts])
    assert free == said
    tries = ("".join(random.Random(i).choices("abcdefgh .", k=40)) for i in range(100))
    long = next(text for text in tries if greedy(model, text[-32:], 1) != greedy(model, text[-31:], 1))
    endless = harness.generate_until([ask(long, {"until": [], "max_gen_toks": 40})])[0]
    assert len(endless) == 40 and endless[0].encode() == greedy(model, long[-32:], 1), "an answer beyond the context leaves all of it to the prompt"
    stop = free[0][3:5]
    stopped = harness.generate_until([ask(prompt, {"until": [stop], "max_gen_toks": 12}) for prompt in prompts])
    assert stopped == [text.split(stop)[0] for text in free]
    model.matmul_flops = model.attention_flops = 0
    harness.generate_until([ask("the cat", {"until": [], "max_gen_toks": 12}, task="count")])
    tally = harness.tallies["count"]
    assert (tally.said, tally.fed) == (12, len("the cat") + 11), "the last token is not fed"
    assert tally.flops == model.matmul_flops + model.attention_flops - 12 * 2 * 32 * 257, "all but the head"
    with torch.no_grad():
        steps = model(torch.tensor([[*("the cat" + said[0]).encode()]])).steps[0, len("the cat") - 1 : -1]
    assert tally.steps == steps.sum().item()


def hugging_face(model):
    """The vanilla weights in Hugging Face's LLaMA, inside the harness's own model, with a tokenizer of bytes."""
    transformers, tokenizers, _ = (pytest.importorskip(name) for name in ("transformers", "tokenizers", "accelerate"))
    from lm_eval.models.huggingface import HFLM

    names = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w3": "mlp.up_proj",
             "w2": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "embed": "embed_tokens", "norm": "norm"}
    state = {}
    for name, weight in model.state_dict().items():
        *block, part, _ = name.split(".")
        state["lm_head.weight" if part == "head" else f"model.{f'layers.{block[1]}.' if block else ''}{names[part]}.weight"] = weight
    c = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False))
    theirs.load_state_dict(state)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = {bytes([i]): chr(i) for i in range(256) if chr(i) in alphabet}  # GPT-2's names of the bytes: itself, or 256 and up in order
    spare = iter(sorted(set(alphabet) - set(printable.values())))
    vocabulary = {printable.get(bytes([i])) or next(spare): i for i in range(256)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    core.pre_tokenizer, core.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    assert tokenizer.encode("naïve\n", add_special_tokens=False) == [*"naïve\n".encode()] and tokenizer.eos_token_id == END
    return HFLM(pretrained=theirs.eval(), tokenizer=tokenizer, max_length=c.block_size, batch_size=4, device="cpu")


def test_harness_equals_hugging_faces_on_the_same_vanilla_weights(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluation, "SHARED", 2)
    model = make("vanilla")
    ours, theirs = harness_model(model, BYTES, batch_size=4), hugging_face(model)
    questions = [ask(*question) for question in QUESTIONS if len(question[1]) <= 32]  # theirs refuses a longer one
    a, b = ours.loglikelihood(questions), theirs.loglikelihood(questions, disable_tqdm=True)
    assert [total for total, _ in a] == pytest.approx([total for total, _ in b], rel=1e-5)
    assert [likeliest for _, likeliest in a] == [likeliest for _, likeliest in b]
    passages = [ask(SAYING), ask("x"), ask(SAYING[:33])]
    assert ours.loglikelihood_rolling(passages) == pytest.approx(theirs.loglikelihood_rolling(passages, disable_tqdm=True), rel=1e-5)
    prompts = [ask(prompt, {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}) for prompt in ("the cat", "b", SAYING)]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


# -------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run's folder, its prepared data, and a data folder of another tokenizer."""
    root = tmp_path_factory.mktemp("eval")
    (root / "in.jsonl").write_text("".join(json.dumps({"text": f"{SAYING} {i}"}) + "\n" for i in range(30)))
    data = prepare(Prepare(input=[str(root / "in.jsonl")], out=str(root), name="data", val_fraction=0.2))
    for name, model in {"adaptive": make(), "vanilla": make("vanilla"), "wide": make(block_size=1024)}.items():
        (root / name).mkdir()
        save_checkpoint(root / name / "ckpt.pt", model, BYTES, train={"data": str(data)}, step=7)
    (root / "alone").mkdir()
    save_checkpoint(root / "alone" / "ckpt.pt", make(), BYTES, train={"data": str(root / "gone")})
    other = make_tokenizer("other", r"\S+|\s+", {bytes([i]): 255 - i for i in range(256)})
    (root / "other").mkdir()
    meta = json.loads((data / "meta.json").read_text())
    for name in ("train.bin", "val.bin", "ranks.tiktoken"):
        (root / "other" / name).write_bytes((data / name).read_bytes())
    (root / "other" / "ranks.tiktoken").write_bytes(ranks_to_text(other))
    (root / "other" / "meta.json").write_text(json.dumps(meta | {"tokenizer": describe(other)}))
    (root / "one.txt").write_text("a")
    return root


def command(folder, *words):
    """eval.py in its own process, offline, with its caches in the folder: exit code, what it prints, and what it complains of."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_run_alone_is_measured_on_its_own_validation_text(folder, call):
    out, _ = call("eval", folder / "adaptive", f"--json={folder / 'a.json'}")
    call("eval", folder / "adaptive", "--text", folder / "data" / "val.bin", "--batch_size=3", f"--json={folder / 'b.json'}")
    a, b = (json.loads((folder / name).read_text()) for name in ("a.json", "b.json"))
    assert a["perplexity"]["loss"] == pytest.approx(b["perplexity"]["loss"], rel=1e-6)
    assert a["step"] == 7 and f"{a['perplexity']['perplexity']:.4f} per token" in out


def test_dials_analysis_page_and_figure_from_the_command_line(folder, call):
    out, _ = call("eval", folder / "adaptive", "--max_latent=1", "--tau=0", "--max_tokens=200", "--analyze", "--sweep",
         f"--html={folder / 'page.html'}", f"--json={folder / 'c.json'}")
    found = json.loads((folder / "c.json").read_text())
    assert found["perplexity"]["latent_steps"] == 1 and found["perplexity"]["tokens"] == 200 and found["rank_correlation"] is None
    assert [point["latent_steps"] for point in found["sweep"]] == [0, 1]
    assert "1 latent steps, expected" in (folder / "page.html").read_text() and "what step k brings" in out
    pytest.importorskip("matplotlib")
    call("eval", folder / "adaptive", "--max_tokens=200", "--analyze", f"--plot={folder / 'figure.png'}")
    assert (folder / "figure.png").read_bytes()[1:4] == b"PNG"


WRONG = {
    "{root}/nowhere": "does not exist",
    "{root}/alone": "name a text with --text",
    "{root}/adaptive --text {root}/nothing.txt": "nothing.txt does not exist",
    "{root}/adaptive --text {root}/one.txt": "fewer than two tokens",
    "{root}/adaptive --text {root}/other/val.bin": "another tokenizer",
    "{root}/adaptive --stride=33": "beyond the context of 32",
    "{root}/adaptive --stride=0": "stride is 0",
    "{root}/adaptive --tau=2": "tau is 2.0",
    "{root}/adaptive --plot=figure.png": "--analyze or --sweep",
    "{root}/adaptive --json={root}/no/where.json": "folder does not exist",
    "{root}/vanilla --sweep": "no latent steps",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_answered_with_one_line_and_exit_code_2(words, folder, call):
    assert WRONG[words] in call("eval", *words.format(root=folder).split(), code=2)[1]


def test_without_lm_eval_tasks_say_what_to_install(folder, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert "pip install lm-eval" in call("eval", folder / "adaptive", "--tasks=sciq", code=2)[1]


def test_tasks_end_to_end_with_and_without_examples(folder):
    pytest.importorskip("lm_eval")
    code, printed, complaint = command(folder, folder / "wide", "--tasks", "tiny_keyword,tiny_last_word", "--num_fewshot", "0", "5",
                                       "--include_path", ROOT / "tests" / "tasks", f"--json={folder / 'tasks.json'}")
    assert code == 0, complaint
    found = json.loads((folder / "tasks.json").read_text())["accuracy"]
    model = make(block_size=1024)
    for shots in ("0", "5"):
        assert f"{shots}-shot" in printed and set(found[shots]["n-shot"].values()) == {int(shots)}
        for row in found[shots]["results"].values():
            assert row["flops_per_token,none"] > 0 and 0 < row["latent_steps,none"] < 3
    assert found["0"]["results"]["tiny_last_word"]["perplexity,none"] != found["5"]["results"]["tiny_last_word"]["perplexity,none"]
    questions = [json.loads(line) for line in (ROOT / "tests" / "tasks" / "keyword.jsonl").read_text().splitlines()]
    right = [max(range(len(q["choices"])), key=lambda i: loglikelihood(model, f"# {q['question']}\n", q["choices"][i])[0]) == q["answer"] for q in questions]
    assert found["0"]["results"]["tiny_keyword"]["acc,none"] == pytest.approx(np.mean(right))
    passages = [json.loads(line)["text"].rpartition(" ") for line in (ROOT / "tests" / "tasks" / "last_word.jsonl").read_text().splitlines()]
    nats = -np.mean([loglikelihood(model, before, " " + word)[0] for before, _, word in passages])
    assert found["0"]["results"]["tiny_last_word"]["perplexity,none"] == pytest.approx(math.exp(nats), rel=1e-3)


def test_a_task_that_cannot_be_loaded_is_one_line(folder, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "hub.yaml").write_text("task: on_the_hub\ndataset_path: no-one/nothing\ntest_split: test\n"
                                       "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_target: 0\n")
    code, _, complaint = command(folder, folder / "adaptive", "--tasks=on_the_hub", f"--include_path={tmp_path}")
    assert code == 2 and complaint.count("\n") == 1 and "on_the_hub cannot be loaded" in complaint and "without network" in complaint
