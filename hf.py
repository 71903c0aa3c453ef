"""Pretrained models of the LLaMA family: in from a Hugging Face folder, and out as one.

    python hf.py import path/to/SmolLM2-135M out/smollm2      config.json, *.safetensors and tokenizer.json
    python hf.py export out/vanilla path/to/folder            for AutoModelForCausalLM and AutoTokenizer

What is notable here:
* An imported model is a checkpoint as train.py writes it: sample.py, eval.py, train.py --init_from read it.
* LLaMA 1 to 3, SmolLM, TinyLlama, Mistral, Qwen2 and Qwen3 differ in a few fields of Config. What a model has
  beyond them is refused by its name: nothing is left out in silence. Its tokenizer must be byte-level BPE:
  LLaMA 1 and 2 and TinyLlama, as they were published, do not come in.
* Weights are copied tensor by tensor from mapped files: it takes no more than the model and one tensor.
"""

from common import answer_help

answer_help(__file__)

import json
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baselines import build
from common import (BadInput, check_no_run, configure, load_checkpoint, optional, read_json, reason,
                    run, save_checkpoint, unusable)
from configurator import misfit
from model import Config, LLaMA
from tokenizer import END, from_json, in_front, to_json

SHARD = 5 * 10**9  # bytes of a file of weights, at most
KINDS = {  # of config.json: what a field may be
    (bool, type(None)): "tie_word_embeddings",
    (float,): "rms_norm_eps initializer_range",
    (float, int): "rope_theta",
    (int,): "vocab_size num_hidden_layers num_attention_heads hidden_size intermediate_size "
            "max_position_embeddings",
    (int, type(None)): "num_key_value_heads head_dim sliding_window",
    (dict, type(None)): "rope_parameters rope_scaling quantization_config"}
NAMES = {  # ours → Hugging Face's, part by part
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                 r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class HF:
    what: str = ""  # import or export
    source: str = ""  # the folder to import, or the run to export
    target: str = ""  # the folder to write: a run, or a Hugging Face folder
    block_size: int | None = None  # import: the context; None: as long as the model's

    def __post_init__(self) -> None:
        if self.what not in ("import", "export") or not self.source or not self.target:
            raise ValueError("want: hf.py import FOLDER out/NAME, or hf.py export out/NAME FOLDER")
        if self.what == "export" and self.block_size is not None:
            raise ValueError(f"--block_size={self.block_size} is of an import: a model is exported as it is")


def theirs(name: str) -> str:
    """The name of a weight in Hugging Face's LLaMA."""
    return ".".join(NAMES.get(part, part) for part in name.split("."))


# ---------------------------------------------------------------------------------------------------- import


def read_config(folder: Path, block_size: int | None) -> tuple[Config, int | None]:
    """config.json → the Config of the same model, and the number of the token that ends a text.

    Raises BadInput for what is missing, or not supported.
    """
    path = folder / "config.json"
    try:
        given = read_json(path)
        for kinds, names in KINDS.items():
            for name in names.split():
                if name in given and type(given[name]) not in kinds:
                    raise ValueError(f"{name} is {given[name]!r}, but must be {kinds[0].__name__}")
        refuse_unsupported(given)
        config = Config(
            method="vanilla", vocab_size=given["vocab_size"], n_layer=given["num_hidden_layers"],
            n_head=given["num_attention_heads"], n_embd=given["hidden_size"], n_ff=given["intermediate_size"],
            n_kv_head=given.get("num_key_value_heads") or 0,
            head_dim=given.get("head_dim") or (128 if given["model_type"] == "qwen3" else 0),
            tie_embeddings=bool(given.get("tie_word_embeddings")),
            qkv_bias=given["model_type"] == "qwen2", qk_norm=given["model_type"] == "qwen3",
            norm_eps=given.get("rms_norm_eps", 1e-6), init_std=given.get("initializer_range", 0.02),
            block_size=block_size or given["max_position_embeddings"], max_latent=0, **read_rope(given))
        window = sliding_window(given)
        if window and window < config.block_size:
            raise ValueError(f"a sliding window of {window} tokens is not supported; with "
                             f"--block_size={window} or less it would see the whole context")
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be used: {misfit(error)}") from None
    end = given.get("eos_token_id")
    return config, end[0] if isinstance(end, list) and end else end


def refuse_unsupported(given: dict) -> None:
    """Raises ValueError for what config.json asks for and no field of Config can say."""
    kind = given["model_type"]
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"model_type {kind} is not supported: want llama, mistral, qwen2 or qwen3")
    if given.get("quantization_config"):
        method = given["quantization_config"].get("quant_method", "")
        raise ValueError(f"its weights are quantised ({method}), which is not supported")
    if given.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {given['hidden_act']} is not supported: want silu")
    for bias in ("attention_bias", "mlp_bias"):
        if given.get(bias):
            raise ValueError(f"{bias} is not supported: of biases, those of Qwen2 are")


def sliding_window(given: dict) -> int | None:
    """How many tokens attention sees at most; None: all."""
    kind = given["model_type"]
    if kind == "mistral" or kind.startswith("qwen") and given.get("use_sliding_window"):
        return given.get("sliding_window", 4096)
    return None


def read_rope(given: dict) -> dict:
    """rope_theta and rope_scaling; transformers keeps both in rope_parameters from version 5 on."""
    found = [rope_of(given[name], given) for name in ("rope_parameters", "rope_scaling") if given.get(name)]
    if found[1:] and found[0] != found[1]:
        raise ValueError("rope_parameters and rope_scaling differ: want one of them")
    return found[0] if found else rope_of({}, given)


def rope_of(rope: dict, given: dict) -> dict:
    """What one of the two says, in our words. Raises ValueError for what is not supported."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters by type of layer are not supported: want the same for all")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", given.get("rope_theta", 10000.0))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type {kind} is not supported: want default, linear or llama3")
    if rope.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not supported: a head is rotated as a whole")
    names = {"default": (), "linear": LLAMA3[:1], "llama3": LLAMA3}[kind]
    return {"rope_theta": float(theta), "rope_scaling": [float(rope[name]) for name in names]}


def open_weights(folder: Path) -> dict:
    """Name → a mapped file of the folder that holds this tensor. Raises BadInput."""
    safe_open = optional("safetensors", "hf.py").safe_open
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    try:
        if index.exists():
            listed = read_json(index)["weight_map"]
            files = [folder / name for name in sorted({*listed.values()})]
    except (OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInput(f"{index} cannot be used: {misfit(error)}") from None
    where = {}
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file} does not exist; want the weights as .safetensors, all files of them")
        try:
            opened = safe_open(file, framework="pt")
        except Exception as error:  # safetensors has its own, of no common class
            what = unusable(error, "is damaged, or no .safetensors")
            raise BadInput(f"{file} {what}: {reason(error)}") from None
        where |= {name: opened for name in opened.keys()}
    return where


@torch.no_grad()
def copy_weights(model: LLaMA, folder: Path) -> None:
    """Fills the model from the folder's .safetensors. Raises BadInput where names, shapes or types differ."""
    where = open_weights(folder)
    own = dict(model.named_parameters())  # a tied head is not among them
    wanted = {theirs(name): parameter for name, parameter in own.items()}
    ignored = {"lm_head.weight"} if model.config.tie_embeddings else set()
    for name in where:
        if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq"):
            raise BadInput(f"{folder} holds {name}, a weight that its model_type has not, or not here")
    for name, parameter in wanted.items():
        if name not in where:
            raise BadInput(f"{folder} lacks the weight {name}")
        tensor = where[name].get_tensor(name)
        if tensor.shape != parameter.shape:
            raise BadInput(f"{folder}: {name} has the shape {[*tensor.shape]}, but config.json says "
                           f"{[*parameter.shape]}")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise BadInput(f"{folder}: {name} is {tensor.dtype}; want float32, bfloat16 or float16")
        if not tensor.isfinite().all():
            raise BadInput(f"{folder}: {name} is not finite: it holds a NaN or an infinity")
        parameter.copy_(tensor)
    for name in ignored & where.keys():
        if not torch.equal(where[name].get_tensor(name).float(), model.embed.weight):
            raise BadInput(f"{folder}: {name} is not the table of the embedding, but config.json says "
                           "tie_word_embeddings: set it to false there, or take the weight away")


def import_model(config: HF) -> None:
    source, target = Path(config.source), Path(config.target)
    if not (source / "config.json").is_file():
        raise BadInput(f"{source} holds no config.json; want the folder of a Hugging Face model")
    check_no_run(target, "choose another name")
    shape, end = read_config(source, config.block_size)
    if not (source / "tokenizer.json").is_file():
        raise BadInput(f"{source} holds no tokenizer.json; want byte-level BPE, and not SentencePiece")
    tokenizer = from_json(source / "tokenizer.json", end)
    first = " ".join(in_front(source / "tokenizer.json"))
    note = f"\nin transformers a text begins with {first}, which nothing puts there here" if first else ""
    if tokenizer.n_vocab > shape.vocab_size:
        raise BadInput(f"{source}/tokenizer.json has {tokenizer.n_vocab} tokens, more than vocab_size "
                       f"{shape.vocab_size} of config.json")
    try:
        model = build(shape)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{source}/config.json: {reason(error)}") from None
    copy_weights(model, source)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{target} cannot be written: {reason(error)}") from None
    save_checkpoint(target / "ckpt.pt", model, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}/ckpt.pt: vanilla, {parameters / 1e6:.1f}M parameters, {shape.n_layer} layers of width "
          f"{shape.n_embd}, context {shape.block_size}; tokenizer {tokenizer.name}, {tokenizer.n_vocab} "
          f"tokens, of which {tokenizer.eot_token} ends a text{note}\n"
          f"next: python sample.py {shlex.quote(str(target))} \"The capital of France is\"")


# ---------------------------------------------------------------------------------------------------- export


def describe_model(model: LLaMA, end: int, tied: bool) -> dict:
    """config.json, in words that old and new versions of transformers read. Raises ValueError."""
    c = model.config
    if c.qk_norm and c.qkv_bias:
        raise ValueError("qk_norm together with qkv_bias: no model of Hugging Face's LLaMA family has both")
    kind, name = ("qwen3", "Qwen3") if c.qk_norm else ("qwen2", "Qwen2") if c.qkv_bias else ("llama", "Llama")
    scaling = None
    if c.rope_scaling:
        scaling = {"rope_type": "linear" if len(c.rope_scaling) == 1 else "llama3"}
        scaling |= dict(zip(LLAMA3, (*c.rope_scaling[:3], *map(int, c.rope_scaling[3:]))))
    return {
        "architectures": [f"{name}ForCausalLM"], "model_type": kind, "vocab_size": c.vocab_size,
        "hidden_size": c.n_embd, "intermediate_size": c.n_ff, "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head or c.n_head,
        "head_dim": c.head_width, "max_position_embeddings": c.block_size, "rope_theta": c.rope_theta,
        "rope_scaling": scaling, "rms_norm_eps": c.norm_eps, "initializer_range": c.init_std,
        "hidden_act": "silu", "tie_word_embeddings": tied, "torch_dtype": "float32", "bos_token_id": None,
        "eos_token_id": end, "use_sliding_window": False}


def exported(model: LLaMA) -> tuple[dict[str, Tensor], bool]:
    """The weights by Hugging Face's names, and whether its head is the embedding's table.

    Its LLaMA does not scale embeddings: a scale goes into the table, which a tied head then cannot share.
    """
    weights = {theirs(name): p.detach() for name, p in model.named_parameters() if "router" not in name}
    tied = model.config.tie_embeddings and model.scale == 1.0
    if not tied:
        weights["lm_head.weight"] = model.head.weight.detach()
    weights["model.embed_tokens.weight"] = model.scale * model.embed.weight.detach()
    return weights, tied


def write_weights(weights: dict[str, Tensor], folder: Path, most: int) -> None:
    """model.safetensors, or several files of at most `most` bytes, a larger tensor apart, and their index."""
    shards = [{}]
    room = most
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        write_shard(shards[0], folder / "model.safetensors")
        return
    listed = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(shard, folder / file)
        listed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_shard(weights: dict[str, Tensor], path: Path) -> None:
    """Raises OSError where it cannot be written; safetensors has an error of its own for a full disk."""
    save = optional("safetensors.torch", "hf.py").save_file
    try:
        save(weights, path, metadata={"format": "pt"})
    except Exception as error:
        raise OSError(reason(error)) from None


def export_model(config: HF) -> None:
    target = Path(config.target)
    if os.path.lexists(target):
        raise BadInput(f"{target} exists already: choose another name")
    model, tokenizer, _ = load_checkpoint(config.source)
    method = model.config.method
    if not (method == "vanilla" or method == "adaptive" and model.config.max_latent == 0):
        raise BadInput(f"{config.source} is a model of method {method}, which Hugging Face's LLaMA cannot "
                       "compute: want vanilla, or adaptive with max_latent 0")
    weights, tied = exported(model)
    try:
        about = describe_model(model, tokenizer.eot_token, tied)
        tokens = to_json(tokenizer)
    except ValueError as error:
        raise BadInput(f"{config.source} cannot be exported: {error}") from None
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END,
                    "model_max_length": model.config.block_size, "clean_up_tokenization_spaces": False}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            new = Path(temporary) / target.name
            new.mkdir()
            write_weights(weights, new, SHARD)
            (new / "config.json").write_text(json.dumps(about, indent=1) + "\n")
            (new / "tokenizer.json").write_text(tokens + "\n", encoding="utf-8")
            (new / "tokenizer_config.json").write_text(json.dumps(of_tokenizer, indent=1) + "\n")
            os.rename(new, target)
    except OSError as error:
        raise BadInput(f"{target} cannot be written: {reason(error)}") from None
    print(f"{target}: {about['architectures'][0]} in float32; AutoModelForCausalLM and AutoTokenizer load it")
    own = tokenizer._pat_str == QWEN2_PATTERN and getattr(tokenizer, "nfc", False)
    if about["model_type"] == "qwen2" and not own:  # whatever tokenizer.json and its class say
        print("but AutoTokenizer of transformers 5 cuts text as Qwen2 does: take PreTrainedTokenizerFast")


def main() -> None:
    config = configure(HF, positional=("what", "source", "target"))
    if config.what == "import":
        import_model(config)
    else:
        export_model(config)


if __name__ == "__main__":
    run(main)
