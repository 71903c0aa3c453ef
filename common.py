"""What all scripts share: files that are never half written, devices, checkpoints.

What is notable here:
* A file is written beside its place and renamed: what was there stays whole if the disk is full.
* A checkpoint runs no code when it is loaded, and is checked before it is used.
* torch is imported inside functions, so that --help answers at once. The command line is in configurator.py.
"""

import importlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import zipfile
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from configurator import (BadInput, answer_help, check_apart, check_items, check_no_run,  # noqa: F401
                          check_range, check_read, check_typed, configure, enough_memory, is_ours, read_json,
                          reason, run, unusable)

FORMAT = "nanoLatentCoT 1"
TINY = Path(__file__).parent / "config" / "tiny.py"  # the config file where none is named


def optional(module: str, purpose: str):
    """The module, which not everyone has. Raises BadInput where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise BadInput(f"{purpose} needs {package}: pip install {package} ({reason(error)})") from None


def table(head: list[str], rows: list[list]) -> str:
    """A Markdown table: the first column aligned to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        aligned = [first.ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(others, widths[1:])]
        lines.append("| " + " | ".join(aligned) + " |")
    rule = ["-" * (widths[0] + 2)] + ["-" * (w + 1) + ":" for w in widths[1:]]
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


@contextmanager
def whole(path: str | Path):
    """A binary file beside path that takes its place when the block ends. Raises BadInput on a full disk."""
    path = Path(path).resolve()  # so that a link stays a link
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        raise BadInput(f"{path} cannot be written: {reason(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Writes a file whole or not at all. Raises BadInput where it cannot be written."""
    with whole(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def check_output(path: str | Path, flag: str, make: bool = False) -> None:
    """Raises BadInput, which names flag, where no file can be written at path, or a file of train.py or
    prepare.py is there, of whatever run or data. `make` makes its folder."""
    try:
        real = Path(path).resolve()
        half = real.with_name(f".{real.name}.tmp")  # of `whole`: a name that is too long raises here
        if half.is_dir() or real.exists() and not real.is_file():
            raise BadInput(f"{flag}={path} is a folder or a device; want the name of a file")
        if real.exists() and is_ours(real):
            raise BadInput(f"{flag}={path} is a file that train.py or prepare.py wrote: want another name")
        if make:
            real.parent.mkdir(parents=True, exist_ok=True)
        if not real.parent.is_dir():
            raise BadInput(f"{flag}={path}: its folder does not exist")
        tempfile.TemporaryFile(dir=real.parent).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise BadInput(f"{flag}={path} cannot be written: {reason(error)}") from None


def about(device: str = "") -> dict:
    """Machine (the GPU where --device means one of CUDA's, else the CPU), versions and commit of a result."""
    import torch
    code = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    dirty = f"-dirty-{code:08x}" if git("status", "--porcelain", "--", ":(glob)*.py") else ""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    cpu = f"{[*names, platform.processor()][0]}, {torch.get_num_threads()} threads"
    gpu = torch.cuda.is_available() and device[:4] in ("", "cuda") and torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"machine": gpu or cpu, **versions, "commit": git("rev-parse", "--short", "HEAD") + dirty}


def git(*words: str) -> str:
    """What a git command prints about this folder; empty where there is no git."""
    words = ["git", "-C", str(Path(__file__).parent), *words]
    there = shutil.which("git")
    return subprocess.run(words, capture_output=True, encoding="latin-1").stdout.strip() if there else ""


# --------------------------------------------------------------------------------------------------- devices


def pick_device(name: str, local_rank: int = 0):
    """The torch.device that --device names; empty: cuda where there is one, else cpu. Raises BadInput."""
    import torch
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and 0 < (count := torch.cuda.device_count()) <= local_rank:
        raise BadInput(f"process {local_rank} here has no GPU: want --nproc_per_node={count} at most")
    try:
        device = torch.device("cuda", local_rank) if name == "cuda" else torch.device(name)
        usable = device.type in ("cpu", "cuda", "mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        usable = False
    if not usable:
        here = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise BadInput(f"--device={name} cannot be used here; want {' or '.join(here)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def precision(device, dtype: str = ""):
    """The torch.dtype that a --dtype flag names; empty: bfloat16 on a CUDA GPU that has it, else float32."""
    import torch
    if dtype not in ("", "bfloat16", "float32"):
        raise BadInput(f"--dtype={dtype}: want bfloat16 or float32; float16 would need its loss scaled")
    if not dtype:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if fast else "float32"
    return getattr(torch, dtype)


def autocast(device, dtype: str = ""):
    """The context in which a model's forward runs: matrix products in precision(device, dtype)."""
    import torch
    wanted = precision(device, dtype)
    return nullcontext() if wanted is torch.float32 else torch.autocast(device.type, wanted)


def timed(f, device) -> float:
    """Seconds that f() takes, with all that it starts on the device."""
    import torch
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    f()
    synchronize()
    return time.perf_counter() - start


def measure_roof(device, dtype: str = "") -> float:
    """FLOP/s of a large matrix product, in the precision that training uses: what MFU is a share of."""
    import torch
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=precision(device, dtype))
    return 2 * n**3 / min(timed(lambda: torch.matmul(a, a), device) for _ in range(8))


# ----------------------------------------------------------------------------------------------- checkpoints


def check_tensor(where: str, tensor, like) -> None:
    """Raises BadInput where `tensor` has not the shape and dtype of `like`, or holds a NaN or an infinity."""
    import torch
    found = type(tensor).__name__
    wanted = f"{like.dtype} {[*like.shape]}"
    if isinstance(tensor, torch.Tensor):
        found = f"{tensor.dtype} {[*tensor.shape]}" if tensor.layout == torch.strided else str(tensor.layout)
    if found != wanted:
        raise BadInput(f"{where} is {found}, but must be {wanted}")
    if not torch.isfinite(tensor).all():
        raise BadInput(f"{where} is not finite: it holds a NaN or an infinity")


def check_predictions(numbers) -> None:
    """Raises BadInput where a model's logits, or what was made of them, are not finite."""
    if not numbers.isfinite().all():
        raise BadInput("the model's predictions are not finite (NaN or infinity): its training has diverged")


def turn(model, run: str, tau: float | None, max_latent: int | None) -> None:
    """Sets τ and ℓ_max of a loaded model, where they are given. Raises BadInput where they turn nothing."""
    from schedule import is_adaptive, most_latent
    config = model.config
    most = most_latent(config)
    if tau is not None and not is_adaptive(config):
        raise BadInput(f"--tau={tau:g} turns nothing: {run} holds a model of method {config.method} with at "
                       f"most {most} latent steps, which no threshold ends")
    if max_latent is not None and not most:
        raise BadInput(f"--max_latent={max_latent} turns nothing: {run} holds a model without latent steps")
    if config.method == "mor" and (max_latent or 0) > config.max_latent:
        raise BadInput(f"--max_latent={max_latent}: the router of {run} knows at most {config.max_latent}")
    model.tau = model.tau if tau is None else tau
    model.max_latent = most if max_latent is None else max_latent


def save_checkpoint(path: str | Path, model, tokenizer, weights=None, **rest) -> None:
    """Writes the model, its tokenizer and `rest` (plain values and tensors). weights: instead of the model's.

    Raises BadInput, and leaves an older file alone, where a weight is not finite or the disk is full.
    """
    import torch
    from tokenizer import describe, ranks_to_text
    weights = model.state_dict() if weights is None else weights
    for name, tensor in weights.items():
        check_tensor(f"{path} is not written: {name}", tensor, tensor)
    ranks = torch.frombuffer(bytearray(ranks_to_text(tokenizer)), dtype=torch.uint8)
    wide = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}  # as it is loaded
    about_model = {"format": FORMAT, "config": asdict(model.config) | {"tau": model.tau}, "model": wide}
    older = Path(path).parent.glob(Path(path).name.replace(".pt", ".[ab]")) if Path(path).exists() else ()
    with whole(path) as file:
        torch.save(about_model | {"tokenizer": describe(tokenizer), "ranks": ranks} | rest, file)
    for folder in older:  # the parts of the file that stood there
        if folder.name != rest.get("parts") and (folder / ".metadata").exists():
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(path: str | Path, device="cpu", parts: bool = True):
    """path: a run's folder or a file → model (in eval mode), tokenizer, checkpoint (a dict).

    parts: whether to read a model that lies in parts beside the file (shard.py); if not, it is None.
    Runs no code that it may hold. Raises BadInput where it is missing, damaged, too large or not ours.
    """
    import torch
    from baselines import build
    from model import Config
    from tokenizer import restore_tokenizer
    path = Path(path) / "ckpt.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; want the folder of a run of train.py, or its ckpt.pt")
    try:
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch.load does not compare the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # no GPU holds moments
    except Exception as error:  # of any kind, as the bytes may be any
        why = "it holds code" if "weights_only" in str(error) else reason(error)
        raise BadInput(f"{path} {unusable(error, 'is corrupt or no checkpoint')}: {why}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise BadInput(f"{path} was not written by this project's train.py (format {FORMAT!r})")
    try:
        for name, value in checkpoint["config"].items():
            check_range(name, value, f"{path}: {name}")
        config = Config(**checkpoint["config"])
        with torch.device("meta"):  # allocates nothing, whatever sizes the file names
            expected = build(config).state_dict()
        tokenizer = restore_tokenizer(checkpoint["tokenizer"], bytes(checkpoint["ranks"].numpy()))
        if "parts" in checkpoint and not parts:
            return None, tokenizer, checkpoint
        if "parts" in checkpoint:
            from shard import load_parts
            tensors = {f"model.{name}": torch.empty_like(t, device=device) for name, t in expected.items()}
            load_parts(path.with_name(Path(checkpoint["parts"]).name), tensors, together=False)
            checkpoint["model"] = {name.removeprefix("model."): t for name, t in tensors.items()}
        if expected.keys() != checkpoint["model"].keys():
            raise ValueError(f"its weights are not those of {config.method}")
        for name, tensor in checkpoint["model"].items():
            check_tensor(f"{path}: {name}", tensor, expected[name])
        model = build(config).to(device)
        model.load_state_dict(checkpoint["model"])
    except BadInput:
        raise
    except (RuntimeError, MemoryError, AttributeError, KeyError, TypeError, ValueError) as error:
        what = unusable(error, "does not fit the model that it describes")
        raise BadInput(f"{path} {what}: {reason(error)}") from None
    return model.eval(), tokenizer, checkpoint
