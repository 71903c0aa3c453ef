"""The adapter for lm-evaluation-harness against plain forwards, Hugging Face's own, and other batch sizes."""

import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import score as engine
from common import BadInput, save_checkpoint
from costs import forward_flops
from tokenizer import get_tokenizer, make_tokenizer
from test_eval import BYTES, END, SAYING
from test_score import make, plain

pytest.importorskip("lm_eval")
from lm_eval.api.metrics import bootstrap_stderr, mean

from harness import Harness, find_tasks

ROOT = Path(__file__).parent.parent
QUESTIONS = [
    ("the cat", " sat"), ("the cat", " sat on the mat"), ("the cat ", "sat"), ("", "alone"), (" ", "space"),
    ("a" * 50, "left end lost"), ("short", "a continuation longer than the context"), ("the cat", "s")]


def ask(*args, task="task"):
    """A request as the harness sends it."""
    return SimpleNamespace(args=args, task_name=task)


def loglikelihood(model, context, continuation):
    """By its definition: spaces belong to the continuation, an empty context is the end of a text, and what
    is too long loses its left end."""
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
@pytest.mark.parametrize("share_from", [1, 10**9])
def test_loglikelihoods_equal_plain_forwards(method, share_from, monkeypatch):
    """… at any batch size, which also changes no tally."""
    monkeypatch.setattr(engine, "SHARED", share_from)
    model = make(method)
    expected = [loglikelihood(model, *question) for question in QUESTIONS]
    tallies = []
    for batch_size in (1, 3, 64):
        harness = Harness(model, BYTES, batch_size)
        questions = [ask(*question, task=f"task {i // 5}") for i, question in enumerate(QUESTIONS)]
        got = harness.loglikelihood(questions)
        assert [total for total, _ in got] == pytest.approx([total for total, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
        assert list(harness.tallies) == ["task 0", "task 1"]
        rolling = harness.loglikelihood_rolling([ask(SAYING), ask("x"), ask("")])
        texts = [loglikelihood(model, "", SAYING)[0], loglikelihood(model, "", "x")[0], 0.0]
        assert rolling == pytest.approx(texts, rel=1e-4)
        tallies.append(harness.tallies)
    assert tallies[0] == tallies[1] == tallies[2]


# A tokenizer with tokens that span the join of context and continuation
JOINED = make_tokenizer("joined", r"\w+|\W+", {bytes([i]): i for i in range(256)} | {
    b"An": 256, b"sw": 257, b"er": 258, b"Ans": 259, b"swer": 260, b"Answer": 261, b"el": 262})


SWALLOWED = [("Ans", "wer"), ("The Ans", "wer"), ("x", ""), ("", ""), ("Ans ", "")]


@pytest.mark.parametrize("context,continuation", SWALLOWED)
def test_a_continuation_is_never_certain_because_a_token_swallowed_it(context, continuation):
    """… or because there is none."""
    model = make(vocab_size=263 + 1)
    (total, greedy), = Harness(model, JOINED, 1).loglikelihood([ask(context, continuation)])
    assert -50 < total < -0.01 and not greedy


def test_a_swallowed_continuation_is_scored_by_itself_and_any_other_as_in_the_harness():
    model = make(vocab_size=263 + 1)
    harness = Harness(model, JOINED, 4)
    encode = JOINED.encode_ordinary
    assert len(encode("Answer")) == 1
    assert harness.encode_pair("Ans", "wer") == (encode("Ans"), encode("wer"))
    assert harness.encode_pair("Ans", "wers") == (encode("Ans"), encode("Answers")[1:])
    assert harness.encode_pair("x ", "Ans") == (encode("x"), encode(" Ans"))
    (total, _), = harness.loglikelihood([ask("Ans", "wer")])
    assert total == pytest.approx(-plain(model, encode("Ans"), encode("wer"))[0].sum().item(), rel=1e-5)


def greedy(model, prompt, n):
    """The text that n plain forwards say, each over all that was said before."""
    ids = [*prompt.encode()]
    for _ in range(n):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return bytes(ids[len(prompt) :])


def ascii_only(model):
    """It says ASCII only: each byte is a character."""
    with torch.no_grad():
        model.head.weight[128:] = 0
    return model


def test_greedy_is_what_decoding_says_and_it_stops_where_told():
    model = ascii_only(make())
    harness = Harness(model, BYTES, batch_size=3)
    prompts = ["the cat", "a dog", "b", "the mat"]
    said = [greedy(model, prompt, 12).decode("ascii") for prompt in prompts]
    for prompt, text in zip(prompts, said):
        assert harness.loglikelihood([ask(prompt, text)])[0][1], "the model's own continuation is greedy"
        other = text[:-1] + ("x" if text[-1] != "x" else "y")
        assert not harness.loglikelihood([ask(prompt, other)])[0][1], "one other token, and it is not"
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    free = harness.generate_until([ask(prompt, settings) for prompt in prompts])
    assert free == said
    tries = ("".join(random.Random(i).choices("abcdefgh .", k=40)) for i in range(100))
    long = next(text for text in tries if greedy(model, text[-32:], 1) != greedy(model, text[-31:], 1))
    endless = harness.generate_until([ask(long, {"until": [], "max_gen_toks": 40})])[0]
    assert len(endless) == 40, "an answer beyond the context leaves all of it to the prompt"
    assert endless[0].encode() == greedy(model, long[-32:], 1)
    stop = free[0][3:5]
    settings = {"until": [stop], "max_gen_toks": 12}
    stopped = harness.generate_until([ask(prompt, settings) for prompt in prompts])
    assert stopped == [text.split(stop)[0] for text in free]


def test_generation_takes_what_reading_prompt_and_answer_takes():
    model = ascii_only(make())
    text = greedy(model, "the cat", 12).decode()
    stop = text[5:7]
    for until, said in ([], 12), ([stop], text.index(stop) + 2):
        harness = Harness(model, BYTES, batch_size=3)
        harness.generate_until([ask("the cat", {"until": until, "max_gen_toks": 12})])
        tally = harness.tallies["task"]
        ids = [*b"the cat", *greedy(model, "the cat", said)]
        with torch.no_grad():
            steps = model(torch.tensor([ids[:-1]])).steps  # the last token is not fed
        assert (tally.said, tally.read) == (said, len(ids) - 1)
        assert tally.flops == sum(forward_flops(model, steps)).item()
        assert tally.steps == steps[0, len("the cat") - 1 :].sum().item()


@pytest.mark.parametrize("method,dials", [
    ("adaptive", {"do_sample": False}),
    ("adaptive", {"do_sample": True, "temperature": 0.8}),
    ("adaptive", {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9}),
    ("loop", {"do_sample": True, "temperature": 1.0, "top_k": 5}),
])
def test_an_answer_depends_on_its_request_alone(method, dials):
    """Not on the batch size, the other requests or their order; past the context's end, and when sampled."""
    model = ascii_only(make(method))
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcdefgh .", k=rng.randint(1, 60))) for _ in range(6)]
    long = dials | {"until": [], "max_gen_toks": 40}
    short = dials | {"until": ["q"], "max_gen_toks": 20}
    requests = [ask(prompt, long if i % 3 else short) for i, prompt in enumerate(prompts)]
    answers = Harness(model, BYTES, 1).generate_until(requests)
    assert max(map(len, answers)) > model.config.block_size
    for batch_size in (2, 64):
        assert Harness(model, BYTES, batch_size).generate_until(requests) == answers
    assert Harness(model, BYTES, 3).generate_until(requests[::-1]) == answers[::-1]


def test_a_sampled_request_that_is_repeated_draws_anew():
    settings = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0}
    answers = Harness(make(), BYTES, 2).generate_until([ask("the cat", settings)] * 3)
    assert len(set(answers)) == 3


def test_settings_that_make_no_sense_are_one_line():
    harness = Harness(make(), BYTES, 2)
    with pytest.raises(BadInput, match="odd.*top_p"):
        settings = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 7}
        harness.generate_until([ask("a", settings, task="odd")])


# ------------------------------------------------------------------------------------- Hugging Face's own


def hugging_face(model, tokenizer):
    """The vanilla weights in Hugging Face's LLaMA, inside the harness's own model, with the same tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    names = {
        "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj", "w3": "mlp.up_proj", "w2": "mlp.down_proj", "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "embed": "embed_tokens", "norm": "norm"}
    state = {}
    for name, weight in model.state_dict().items():
        *block, part, _ = name.split(".")
        layer = f"layers.{block[1]}." if block else ""
        state["lm_head.weight" if part == "head" else f"model.{layer}{names[part]}.weight"] = weight
    c = model.config
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, tie_word_embeddings=False))
    theirs.load_state_dict(state)

    # GPT-2's names of the bytes: itself, or 256 and up in order
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    printable = {i: chr(i) for i in range(256) if chr(i) in alphabet}
    spare = iter(sorted(set(alphabet) - set(printable.values())))
    name = [printable.get(i) or next(spare) for i in range(256)]
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    vocabulary = {"".join(name[byte] for byte in token): rank for token, rank in ranks}
    merges = []
    for token, _ in ranks:
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [half for half in halves if all(part in tokenizer._mergeable_ranks for part in half)]
        merges += [tuple("".join(name[byte] for byte in part) for part in half) for half in known[:1]]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    for text in ("naïve\n", "Answers", "Ans wer", "The Answer"):
        assert wrapped.encode(text, add_special_tokens=False) == tokenizer.encode_ordinary(text)
    assert wrapped.eos_token_id == tokenizer.eot_token
    # without its cache of logits, which mistakes ("Ans", "wers") and ("Answ", "er!") for one another
    settings = {"max_length": c.block_size, "batch_size": 4, "device": "cpu", "logits_cache": False}
    return HFLM(pretrained=theirs.eval(), tokenizer=wrapped, **settings)


# one piece for all words, so that it merges across the join, as a tokenizer without a pattern does
SPANNING = make_tokenizer("spanning", r"[\s\S]+", JOINED._mergeable_ranks)


@pytest.mark.parametrize("tokenizer", [BYTES, SPANNING], ids=["bytes", "spanning"])
def test_it_equals_hugging_faces_on_the_same_vanilla_weights(tokenizer, monkeypatch):
    monkeypatch.setattr(engine, "SHARED", 1)
    model = make("vanilla", vocab_size=tokenizer.n_vocab)
    ours, theirs = Harness(model, tokenizer, batch_size=4), hugging_face(model, tokenizer)
    taken = [question for question in QUESTIONS if len(question[1]) <= 32 and question[0] != " "]  # by theirs
    questions = [ask(*question) for question in taken]
    for pair in (("Ans", "wers"), ("The Ans", "wers and"), ("sw", "el"), ("An ", "swer"), ("Answ", "er! el")):
        questions.append(ask(*pair))
    a, b = ours.loglikelihood(questions), theirs.loglikelihood(questions, disable_tqdm=True)
    assert [total for total, _ in a] == pytest.approx([total for total, _ in b], rel=1e-5)
    assert [likeliest for _, likeliest in a] == [likeliest for _, likeliest in b]
    passages = [ask(SAYING), ask("x"), ask(SAYING[:33])]
    rolling = theirs.loglikelihood_rolling(passages, disable_tqdm=True)
    assert ours.loglikelihood_rolling(passages) == pytest.approx(rolling, rel=1e-5)
    settings = {"until": ["\n"], "max_gen_toks": 9, "do_sample": False}
    prompts = [ask(prompt, settings) for prompt in ("the cat", "b", "Answer", SAYING)]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)


# -------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    for name, model in {"small": make(), "wide": make(block_size=1024)}.items():
        (root / name).mkdir()
        save_checkpoint(root / name / "ckpt.pt", model, get_tokenizer("bytes"))
    return root


def command(folder, *words):
    """eval.py in its own process, offline, its caches in the folder: exit code, stdout, stderr."""
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    script = [sys.executable, str(ROOT / "eval.py"), *map(str, words)]
    environment = os.environ | offline | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def lines_of(name):
    return [json.loads(line) for line in (ROOT / "tests" / "tasks" / name).read_text().splitlines()]


def test_standard_errors_are_found_without_another_process(monkeypatch):
    """One that is forked beside PyTorch's threads may wait for ever for a lock that none of its own holds."""
    monkeypatch.setattr(multiprocessing, "Pool", None)
    assert bootstrap_stderr(mean, [1.0, 2.0, 4.0], 10) > 0


def test_tasks_end_to_end_with_and_without_examples(folder):
    words = ["--tasks", "tiny_keyword,tiny_last_word", "--num_fewshot", "0", "5",
             "--include_path", ROOT / "tests" / "tasks", f"--json={folder / 'tasks.json'}"]
    code, printed, complaint = command(folder, folder / "wide", *words)
    assert code == 0, complaint
    found = json.loads((folder / "tasks.json").read_text())["accuracy"]
    model = make(block_size=1024)
    for shots in ("0", "5"):
        assert f"{shots}-shot" in printed and set(found[shots]["n-shot"].values()) == {int(shots)}
        for row in found[shots]["results"].values():
            assert row["flops_per_token,none"] > 0 and 0 < row["latent_steps,none"] < 3
    results = found["0"]["results"]
    with_examples = found["5"]["results"]["tiny_last_word"]
    assert results["tiny_last_word"]["perplexity,none"] != with_examples["perplexity,none"]
    right = []
    for question in lines_of("keyword.jsonl"):
        context = f"# {question['question']}\n"
        totals = [loglikelihood(model, context, choice)[0] for choice in question["choices"]]
        right.append(int(np.argmax(totals)) == question["answer"])
    assert results["tiny_keyword"]["acc,none"] == pytest.approx(np.mean(right))
    nats = []
    for passage in lines_of("last_word.jsonl"):
        before, _, word = passage["text"].rpartition(" ")
        nats.append(-loglikelihood(model, before, " " + word)[0])
    assert results["tiny_last_word"]["perplexity,none"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-3)


def test_more_examples_than_there_are_are_refused_in_one_line(folder):
    words = ["--tasks=tiny_keyword", "--num_fewshot=1000", f"--include_path={ROOT}/tests/tasks"]
    code, _, complaint = command(folder, folder / "wide", *words, "--limit=1")
    last = complaint.splitlines()[-1]
    assert code == 2 and "eval.py: --num_fewshot=1000: a task has fewer examples" in last


def test_a_task_that_cannot_be_loaded_is_one_line(folder, tmp_path):
    (tmp_path / "hub.yaml").write_text("task: on_the_hub\ndataset_path: no-one/nothing\ntest_split: test\n"
                                       "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_target: 0\n")
    words = ["--tasks=on_the_hub", f"--include_path={tmp_path}"]
    code, _, complaint = command(folder, folder / "small", *words)
    assert code == 2 and complaint.count("\n") == 1, complaint
    assert "on_the_hub cannot be loaded" in complaint and "without network" in complaint


BROKEN = {
    "no YAML": "task: mine\n  dataset_path: [json\n",
    "no text": b"task: mine\xff\xfe\n",
    "an include that is not there": "task: mine\ninclude: missing.yaml\n",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_task_file_is_named_as_such(what, tmp_path):
    """… and not taken for a task that does not exist, nor for one of the harness's own of that name."""
    content = BROKEN[what]
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "base.yaml").write_text("dataset_path: json\n")  # what others include is not broken
    for name in ("mine", "sciq"):
        with pytest.raises(BadInput, match="mine.yaml is not a task file"):
            find_tasks([name], str(tmp_path))
    (tmp_path / "good.yaml").write_text("task: good\ndataset_path: json\n")
    assert "good" in find_tasks(["good"], str(tmp_path)).all_tasks


def test_include_path_must_be_a_folder():
    with pytest.raises(BadInput, match="is not a folder"):
        find_tasks(["mine"], "no/such/folder")


def test_without_lm_eval_tasks_say_what_to_install(folder, call, monkeypatch):
    monkeypatch.delitem(sys.modules, "harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm" in call("eval", folder / "small", "--tasks=sciq", code=2)[1]
