"""Models of every supported architecture come in and go out the same; what is not supported is named."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import hf
from common import load_checkpoint, save_checkpoint
from conftest import said, text, uneven
from documents import encode
from tokenizer import END, GPT2_PATTERN, describe, get_tokenizer, make_tokenizer, to_json

transformers = pytest.importorskip("transformers")
SHAPE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, eos_token_id=256)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS = {  # name → model_type, what is special about it, what it becomes
    "llama": ("llama", {"num_key_value_heads": 4}, {"n_kv_head": 4}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, {"rope_scaling": [8, 1, 4, 16], "rope_theta": 500}),
    "linear": ("llama", {"rope_parameters": LINEAR}, {"rope_scaling": [4]}),
    "smollm": ("llama", {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 12}, {"head_dim": 12}),
    "narrow": ("mistral", {"sliding_window": 64}, {"block_size": 64}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True}),
    "qwen3": ("qwen3", {"head_dim": 24}, {"qk_norm": True, "head_dim": 24})}


def make(kind, **settings):
    """A small model of transformers, all of its weights random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model


def save(folder, model, **options):
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(to_json(get_tokenizer("bytes")), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    return save(tmp_path_factory.mktemp("hf"), make(*MODELS["smollm"][:1], **MODELS["smollm"][1]))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_comes_in_goes_out_and_comes_in(name, tmp_path, call, monkeypatch):
    kind, settings, fields = MODELS[name]
    model = make(kind, **settings)
    monkeypatch.setattr(hf, "SHARD", 30_000 if name == "llama" else hf.SHARD)
    folder = save(tmp_path / "hf", model, max_shard_size="20KB" if name == "qwen3" else "5GB")
    out, _ = call("hf", "import", folder, tmp_path / "run")
    assert "vanilla" in out and "context 64" in out
    ours, tokenizer, _ = load_checkpoint(tmp_path / "run")
    for field, value in fields.items():
        assert getattr(ours.config, field) == value
    want = model(text()).logits
    assert want.std() > 0.1
    torch.testing.assert_close(ours(text()).logits, want, atol=1e-4, rtol=1e-4)
    call("hf", "export", tmp_path / "run", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (name == "llama")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    scaling = json.loads((tmp_path / "back" / "config.json").read_text())["rope_scaling"] or {}
    assert back.dtype == torch.float32
    assert type(scaling.get(hf.LLAMA3[-1])) is (int if name == "llama3" else type(None))
    torch.testing.assert_close(back(text()).logits, want, atol=1e-4, rtol=1e-4)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert theirs("def é\n").input_ids == tokenizer.encode_ordinary("def é\n") and theirs.eos_token == END
    call("hf", "import", tmp_path / "back", tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")[0].state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in ours.state_dict().items())


@torch.no_grad()
def test_old_config_json_and_bfloat16_weights(tmp_path, call):
    """As transformers wrote it before version 5: rope_theta and rope_scaling apart, head_dim left out."""
    folder = save(tmp_path / "hf", make("llama", rope_parameters=LINEAR).bfloat16())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = json.loads((folder / "config.json").read_text())
    given.pop("rope_parameters")
    given.pop("head_dim")
    scaling = {"type": "linear", "factor": 4.0}
    given |= {"rope_theta": 10000.0, "rope_scaling": scaling, "eos_token_id": [256, 1]}
    (folder / "config.json").write_text(json.dumps(given))
    call("hf", "import", folder, tmp_path / "run", "--block_size=40")
    ours = load_checkpoint(tmp_path / "run")[0]
    assert ours.config.block_size == 40 and ours.config.rope_scaling == [4.0]
    torch.testing.assert_close(ours(text()).logits, model(text()).logits, atol=1e-4, rtol=1e-4)


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    given = SHAPE | {"model_type": "qwen3", "tie_word_embeddings": False}
    given.pop("rms_norm_eps")
    (tmp_path / "config.json").write_text(json.dumps(given))
    ours, end = hf.read_config(tmp_path, None)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (ours.head_dim, ours.norm_eps, ours.rope_theta, end) == (
        theirs.head_dim, theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"], 256)
    assert hf.sliding_window({"model_type": "mistral"}) == transformers.MistralConfig().sliding_window


def test_rope_by_type_of_layer_is_refused():
    with pytest.raises(ValueError, match="by type of layer"):
        hf.read_rope({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}})


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_scaled_embedding_goes_out_as_a_larger_one(tied, tmp_path, call):
    model = uneven("vanilla", vocab_size=257, tie_embeddings=tied, embed_scale=3.0)
    save_checkpoint(tmp_path / "ckpt.pt", model, get_tokenizer("bytes"))
    call("hf", "export", tmp_path, tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(back(text()).logits, model(text()).logits, atol=1e-4, rtol=1e-4)


def test_a_model_that_never_thinks_goes_out_without_its_router(tmp_path, call):
    model = uneven(max_latent=0, vocab_size=257)
    save_checkpoint(tmp_path / "ckpt.pt", model, get_tokenizer("bytes"))
    call("hf", "export", tmp_path, tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(back(text()).logits, model(text()).logits, atol=1e-4, rtol=1e-4)


def test_what_stands_in_front_of_a_text_is_spoken_of(smollm, tmp_path, call):
    """As <|begin_of_text|> of Llama 3, behind a step that adds none."""
    folder = tmp_path / "hf"
    shutil.copytree(smollm, folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    single = [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processors = [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]
    for kind, last in (("plain", None), ("bos", {"type": "Sequence", "processors": processors})):
        (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": last}), encoding="utf-8")
        out, _ = call("hf", "import", folder, tmp_path / kind)
        assert (f"a text begins with {END}" in out) == (kind == "bos")


def test_where_autotokenizer_takes_another_tokenizer_that_is_said(tmp_path, call):
    """That of Qwen2, for every model of its type."""
    ranks = {bytes([i]): i for i in range(256)} | {b"12": 256}
    tokenizer = make_tokenizer("mine", GPT2_PATTERN, ranks)
    model = uneven("vanilla", vocab_size=258, qkv_bias=True)
    save_checkpoint(tmp_path / "ckpt.pt", model, tokenizer)
    out, _ = call("hf", "export", tmp_path, tmp_path / "hf")
    assert "PreTrainedTokenizerFast" in out
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    assert theirs("a 12 é").input_ids == tokenizer.encode_ordinary("a 12 é")
    save_checkpoint(tmp_path / "own.pt", model, make_tokenizer("own", hf.QWEN2_PATTERN, ranks, nfc=True))
    out, _ = call("hf", "export", tmp_path / "own.pt", tmp_path / "own")
    assert "PreTrainedTokenizerFast" not in out
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    text = "it's 12 cafe\u0301\n\n  x"
    assert theirs(text).input_ids == encode(load_checkpoint(tmp_path / "own.pt")[1], [text])[0]


def test_an_imported_model_speaks(smollm, tmp_path, call):
    call("hf", "import", smollm, tmp_path / "run")
    out, err = call("sample", tmp_path / "run", "def ", "--max_new_tokens=5", "--device=cpu")
    assert out.startswith("def ") and "5 tokens" in err


def test_two_sayings_about_rope_may_agree():
    new, old = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}, {"type": "linear", "factor": 4}
    both = hf.read_rope({"rope_parameters": new, "rope_scaling": old, "rope_theta": 5e5})
    assert both == {"rope_theta": 5e5, "rope_scaling": [4.0]}


# -------------------------------------------------------------------------------------------------- bad input


def config(**settings):
    def change(folder):
        given = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(given | settings))
    return change


def weights(change):
    def rewrite(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return rewrite


def cut(name, keep):
    return lambda folder: os.truncate(folder / name, int(keep * (folder / name).stat().st_size))


def remove(name):
    return lambda folder: (folder / name).unlink()


def shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


NORM = "model.norm.weight"


@pytest.mark.parametrize("broken,words", [
    (remove("config.json"), ["config.json"]), (cut("config.json", 0.5), ["config.json"]),
    (write("config.json", "[]"), ["config.json"]), (write("config.json", "{}"), ["'model_type' is missing"]),
    (config(model_type="gemma"), ["gemma", "qwen3"]), (config(model_type="mixtral"), ["mixtral"]),
    (config(hidden_act="gelu"), ["gelu"]), (config(attention_bias=True), ["attention_bias"]),
    (config(mlp_bias=True), ["mlp_bias"]), (config(quantization_config={"quant_method": "gptq"}), ["gptq"]),
    (config(rope_parameters={"rope_type": "yarn", "factor": 2.0}), ["yarn"]),
    (config(rope_parameters={"rope_type": "linear"}), ["'factor' is missing"]),
    (config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), ["partial_rotary"]),
    (config(rope_parameters=LLAMA3 | {"high_freq_factor": 1.0}), ["rope_scaling"]),
    (config(model_type="mistral", sliding_window=16), ["sliding window of 16", "--block_size=16"]),
    (config(model_type="qwen2", sliding_window=16, use_sliding_window=True), ["sliding window of 16"]),
    (config(model_type="qwen2"), ["q_proj.bias"]), (config(num_attention_heads=5), ["head_dim|n_kv_head"]),
    (config(hidden_size=36), ["model.embed_tokens.weight", "[300, 32]", "[300, 36]"]),
    (config(num_hidden_layers=3), ["lacks the weight model.layers.2"]),
    (config(num_hidden_layers=1), ["model.layers.1"]), (config(num_hidden_layers="x"), ["config.json"]),
    (config(num_hidden_layers=0), ["config.json", "n_layer"]),
    (config(num_hidden_layers=2.0), ["config.json"]), (config(initializer_range=None), ["config.json"]),
    (config(rms_norm_eps=None), ["rms_norm_eps is None", "float"]),
    (config(max_position_embeddings=1.5), ["max_position_embeddings is 1.5", "int"]),
    (config(vocab_size="a"), ["vocab_size is 'a'"]), (config(hidden_size=True), ["hidden_size is True"]),
    (config(quantization_config="x"), ["quantization_config is 'x'"]),
    (config(rope_parameters=[1]), ["rope_parameters is [1]", "dict"]),
    (config(rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "linear", "factor": 4.0}),
     ["rope_parameters and rope_scaling differ"]),
    (weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
     ["lm_head.weight is not the table of the embedding", "tie_word_embeddings"]),
    (config(tie_word_embeddings="false"), ["tie_word_embeddings is 'false'", "bool"]),
    (write("config.json", "[" * 200_000), ["config.json cannot be used"]),
    (write("model.safetensors.index.json", "[" * 200_000), ["index.json cannot be used"]),
    (config(tie_word_embeddings=False), ["lacks the weight lm_head"]),
    (config(vocab_size=250), ["257 tokens"]),
    (remove("model.safetensors"), ["model.safetensors does not exist"]),
    (cut("model.safetensors", 0.5), ["model.safetensors is damaged"]),
    (cut("model.safetensors", 0), ["damaged"]),
    (shard, ["model-00002-of-00002.safetensors does not exist"]),
    (write("model.safetensors.index.json", "{}"), ["index.json cannot be used: 'weight_map' is missing"]),
    (write("model.safetensors.index.json", '{"weight_map": {"a": 1, "b": "c"}}'), ["index.json", "a part"]),
    (write("config.json", "[]"), ["config.json", "another kind"]),
    (write("tokenizer.json", "[]"), ["tokenizer.json", "another kind"]),
    (weights(lambda t: t.update({NORM: torch.ones(31)})), [NORM, "[31]", "[32]"]),
    (weights(lambda t: t.update({NORM: torch.ones(32).int()})), [NORM, "int32"]),
    (weights(lambda t: t.update({NORM: torch.full((32,), math.nan)})), [f"{NORM} is not finite"]),
    (weights(lambda t: t.update({"adapter": torch.ones(1)})), ["adapter"]),
    (remove("tokenizer.json"), ["tokenizer.json", "SentencePiece"]),
    (cut("tokenizer.json", 0.5), ["tokenizer.json"])])
def test_bad_folders_are_one_line_and_leave_nothing(broken, words, smollm, tmp_path, call):
    folder = tmp_path / "hf"
    shutil.copytree(smollm, folder)
    broken(folder)
    _, err = call("hf", "import", folder, tmp_path / "out" / "run", code=2)
    assert any(word in err for word in words[0].split("|")) and all(word in err for word in words[1:]), err
    assert "hf" in err.partition("hf.py: ")[2] and not (tmp_path / "out").exists()


def test_nothing_is_written_over(smollm, tmp_path, call):
    call("hf", "import", smollm, tmp_path / "run")
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    _, err = call("hf", "import", smollm, tmp_path / "run", code=2)
    assert "run holds a run already" in err and (tmp_path / "run" / "ckpt.pt").read_bytes() == before
    _, err = call("hf", "export", tmp_path / "run", smollm, code=2)
    assert "exists already" in err
    _, err = call("hf", "export", tmp_path / "run", tmp_path / "new", "--block_size=7", code=2)
    assert "--block_size=7" in err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("method", ["adaptive", "loop", "pause", "ponder", "ponder2", "mor"])
def test_what_hugging_face_cannot_compute_is_refused(method, tmp_path, call):
    save_checkpoint(tmp_path / "ckpt.pt", uneven(method, vocab_size=257), get_tokenizer("bytes"))
    _, err = call("hf", "export", tmp_path, tmp_path / "hf", code=2)
    assert f"of method {method}," in err and not (tmp_path / "hf").exists()


def test_a_full_disk_is_one_line(tmp_path, call, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")

    def full(*_, **__):
        raise RuntimeError("I/O error: No space left on device")

    save_checkpoint(tmp_path / "ckpt.pt", uneven("vanilla", vocab_size=257), get_tokenizer("bytes"))
    monkeypatch.setattr(safetensors, "save_file", full)
    _, err = call("hf", "export", tmp_path, tmp_path / "hf", code=2)
    assert "hf cannot be written: " in err and "No space left" in err and not (tmp_path / "hf").exists()


def test_biases_beside_normed_heads_cannot_go_out(tmp_path, call):
    model = uneven("vanilla", vocab_size=257, qkv_bias=True, qk_norm=True)
    save_checkpoint(tmp_path / "ckpt.pt", model, get_tokenizer("bytes"))
    _, err = call("hf", "export", tmp_path, tmp_path / "hf", code=2)
    assert "qk_norm together with qkv_bias" in err and [*tmp_path.iterdir()] == [tmp_path / "ckpt.pt"]


@pytest.mark.parametrize("arguments,words", [
    ([], "want: hf.py import"), (["push", "a", "b"], "want: hf.py import"), (["import", "a"], "want: hf.py"),
    (["import", "not/there", "b"], "not/there holds no config.json"),
    (["export", "not/there", "b"], "not/there does not exist")])
def test_wrong_arguments(arguments, words, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = call("hf", *arguments, code=2)
    assert words in err and not [*tmp_path.iterdir()]


# ------------------------------------------------------------------------------------------ by hand: SmolLM2


@pytest.mark.skipif("NANO_SMOLLM2" not in os.environ, reason="by hand: NANO_SMOLLM2 names its folder")
@torch.no_grad()
def test_smollm2(tmp_path, call):
    """SmolLM2-135M as an ordinary folder, text in NANO_TEXT: the tokens, the windows and the way back."""
    folder, path = Path(os.environ["NANO_SMOLLM2"]), Path(os.environ["NANO_TEXT"])
    call("hf", "import", folder, tmp_path / "run", "--block_size=512")
    ours, tokenizer, _ = load_checkpoint(tmp_path / "run")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    whole = path.read_text(encoding="utf-8")
    for sample in (whole, Path(__file__).read_text(), "👩‍👩‍👧 cafe\u0301 ½ 123 思考"):
        sample = sample.replace(END, "")
        assert theirs(sample, add_special_tokens=False).input_ids == tokenizer.encode_ordinary(sample)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.tensor(tokenizer.encode_ordinary(whole)[:2049])
    for window in idx[:2048].split(512):
        want = model(window[None]).logits
        torch.testing.assert_close(ours(window[None]).logits, want, atol=1e-3, rtol=1e-3)
    prompt = tokenizer.encode_ordinary("The capital of France is")
    want = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    assert prompt + [token for token, _, _ in said(ours, [prompt], 20)[0]] == want
    call("hf", "export", tmp_path / "run", tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(back(idx[None, :512]).logits, model(idx[None, :512]).logits)
    call("hf", "import", tmp_path / "back", tmp_path / "again")
    again, other, _ = load_checkpoint(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in ours.state_dict().items())
    assert describe(other) | {"name": ""} == describe(tokenizer) | {"name": ""}
