"""The command line: config files of plain assignments, then --key=value, into one checked dataclass.

    config = configure(Train, default=Path("config/tiny.py"))

What is notable here:
* No code is executed: a config file holds literals only, each of its field's type.
* RANGES is the one place that says which values the fields of all scripts may have.
* An unknown setting is answered with the closest known one, a name of nanoGPT's with ours.
* --help is read from the source text: it answers at once, and shows the defaults that apply.
"""

import ast
import difflib
import errno
import importlib.util
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path

_FIELDS = {  # range → fields of any script that must lie in it, each item of a list; None is always allowed
    "in [0, 1]": "tau warmup course",
    "in (0, 1]": "norm_eps top_p",
    "in [0, 1)": "beta1 beta2",
    "in (0, 1)": "val_fraction",
    "in (0, 10]": "init_std",
    "in (0, inf)": "learning_rate rates rope_theta rope_scaling",
    "0 or in [2, 1e15]": "train_tokens",
    "in [0, inf)": "embed_scale lam beta exit_loss explore budget budgets weight_decay grad_clip mean_latent",
    "in [-100, 100]": "router_bias",
    "0 or in [0.001, 100]": "temperature",
    "in [0, 1000]": "max_latent num_fewshot ks",
    "in [0, 4294967295]": "seed",
    "in [1, 1000]": "n_layer jobs depths",
    "in [1, 1048576]": "block_size n_head n_embd n_ff",
    "in [16, 1048576]": "contexts",
    "in [2, 1e9]": "max_tokens",
    "in [0, 1e9]": "vocab_size n_kv_head head_dim micro_batch_size top_k keep_every rate_steps",
    "in [1, 1e9]": "max_steps global_batch_size eval_every eval_windows save_every log_every rounds seeds "
                   "lengths documents stride batch world batch_size limit max_new_tokens num_samples",
    "not empty": "input text out data run runs results tokenizer key file",
}
RANGES = {name: text for text, names in _FIELDS.items() for name in names.split()}
NANOGPT = {  # nanoGPT's name → the closest of ours; empty: nothing here does that
    "batch_size": "micro_batch_size", "gradient_accumulation_steps": "global_batch_size",
    "lr": "learning_rate", "max_iters": "max_steps", "lr_decay_iters": "max_steps", "out_dir": "out",
    "eval_iters": "eval_windows", "eval_interval": "eval_every", "log_interval": "log_every",
    "warmup_iters": "warmup", "dataset": "data", "start": "prompt",
    "dropout": "", "bias": "", "min_lr": "",
}


class BadInput(ValueError):
    """What the user gave cannot be used. One line: the file or flag, what is wrong, what would be right."""


def reason(error: BaseException) -> str:
    """What an exception says, as part of a line."""
    text = getattr(error, "strerror", None) or str(error) + " is missing" * isinstance(error, KeyError)
    return textwrap.shorten(text, 160, placeholder=" …") or type(error).__name__


def misfit(error: BaseException) -> str:
    """The same of what a file of JSON holds, where Python speaks of indices and attributes."""
    other = isinstance(error, (AttributeError, IndexError, TypeError))
    return f"a part of it is of another kind than it should be ({reason(error)})" if other else reason(error)


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, the system's, or PyTorch's, of which it says so in words alone."""
    words = "out of memory", "allocate memory", "not enough memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def unusable(error: BaseException, otherwise: str) -> str:
    """What is wrong with a file that could not be taken in: not always the file."""
    if isinstance(error, PermissionError):
        return "may not be read"
    return "does not fit into memory" if lacks_memory(error) else otherwise


def read_json(path: Path):
    """What a file of JSON holds. Raises OSError, or ValueError where it is none or nested too deeply."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(reason(error)) from None


def _uncaught(kind, error, trace) -> None:
    """What Python does with an exception that nobody caught: of Ctrl-C in the imports it shows a line."""
    if kind is KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # one of our scripts runs
    sys.excepthook = _uncaught


@contextmanager
def enough_memory(advice: str = "") -> Iterator[None]:
    """Raises BadInput, with the advice, where memory runs out."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise BadInput(f"too little memory: {advice or reason(error)}") from None


def mute() -> None:
    """Drops all that is printed from now on, as its reader has gone or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def on_end(answer) -> None:
    """Has answer(number, frame) called on SIGTERM, and when the terminal is closed, unless nohup ignores it.
    """
    signal.signal(signal.SIGTERM, answer)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, answer)


def run(main) -> None:
    """Calls main(). BadInput, a lack of memory and a file that the system refuses become a line on stderr and
    exit code 2; Ctrl-C a line and exit code 130, SIGTERM 143 (unless main says otherwise), after what is half
    written has been removed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed where we were started
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the encoding lacks, such as λ in cp1252, becomes a "?"
            stream.reconfigure(errors="replace")
    script = Path(sys.argv[0]).name

    def end(number: int, frame) -> None:
        with suppress(OSError):  # nobody may read it
            os.write(2, f"{script}: terminated\n".encode())  # print may be what the signal interrupts
        sys.exit(128 + number)

    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if not torchrun:  # whose signal only says that another process has failed
        on_end(end)
    try:
        if torchrun and script != "train.py" and os.environ.get("WORLD_SIZE") != "1":
            raise BadInput("runs in one process: start it with python in place of torchrun")
        with enough_memory():
            main()
        sys.stdout.flush()
    except BadInput as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        what = repr(error.filename)
        if error.filename is None:  # no file that was named to us
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            what = "what is printed cannot be written"
            mute()  # what is left of it at exit
        print(f"{script}: {what}: {reason(error)}", file=sys.stderr)
        sys.exit(2)


def check_range(name: str, value, where: str) -> None:
    """Raises BadInput where the value of field `name` is not in its range; `where` begins the message."""
    text = RANGES.get(name, "")
    for item in value if isinstance(value, list) else []:
        check_range(name, item, where)
    if text == "not empty":
        allowed = value != ""
    elif value is None or isinstance(value, list) or not text or (text.startswith("0 or ") and value == 0):
        allowed = True
    else:
        interval = text.split("in ")[1]
        low, high = map(float, interval[1:-1].split(","))
        ends = [low] * (interval[0] == "[") + [high] * (interval[-1] == "]")
        allowed = low < value < high or value in ends
    if not allowed:
        raise BadInput(f"{where} is {value!r}, but must be {text}")


def check_items(name: str, items: list[str], known: Iterable[str]) -> None:
    """Raises BadInput where an item of the list in field `name` is not one of those that are known."""
    for item in items:
        if item not in known:
            raise BadInput(f"--{name} holds {item!r}, but must hold some of {', '.join(known)}")


def check_read(settings, readers: dict[str, str], chosen: list[str], flag: str) -> None:
    """Raises BadInput where a field was typed, or does not stand at its default, and nothing reads it that is
    chosen with `flag`. readers: all that can be chosen → the fields that it reads and not all others do.
    """
    read = " ".join(readers[name] for name in chosen).split()
    for own in fields(settings):
        by = [name for name, names in readers.items() if own.name in names.split()]
        plain = own.default if own.default is not MISSING else own.default_factory()
        if by and own.name not in read and (getattr(settings, own.name) != plain or own.name in typed()):
            raise BadInput(f"{own.name} is not read here, but by {flag}{' or '.join(by)}")


PREPARED = "train.bin", "val.bin", "meta.json", "ranks.tiktoken"  # what prepare.py writes into a folder


def is_ours(path: Path) -> bool:
    """Whether a file is one of a run or of prepared text, which nothing else may replace."""
    beside = {name for name in ("ckpt.pt", "train.bin", "meta.json") if path.with_name(name).exists()}
    of_run = path.name in ("log.jsonl", "summary.json") and "ckpt.pt" in beside
    of_text = path.name in PREPARED and {"train.bin", "meta.json"} <= beside
    return path.suffix == ".pt" or of_run or of_text


def check_no_run(folder: Path, advice: str) -> None:
    """Raises BadInput where a folder holds prepared text or, with the advice, a run or a part of one."""
    for name in ("ckpt.pt", "best.pt", "log.jsonl", "summary.json", "ckpt-*.pt", *PREPARED):
        for path in folder.glob(name):
            what, way = ("prepared text", "choose another folder") if name in PREPARED else ("a run", advice)
            raise BadInput(f"{folder} holds {what} already ({path.name}): {way}")


def check_apart(settings, *names: str) -> None:
    """Raises BadInput where two of these fields, each a path or a list of paths, name the same file.

    Also where a later field names a file that belongs to an earlier one, such as --json=out/tiny/log.jsonl
    beside --run=out/tiny: all files in its folder, or of `run`, `runs` and `data` those that train.py and
    prepare.py write there. The folder of a checkpoint is that of its run.
    """
    taken, folders = {}, {}  # path → its field
    for name in names:
        value = getattr(settings, name)
        for path in filter(None, value if isinstance(value, list) else [value]):
            real = Path(os.path.realpath(path))
            for folder in real.parents if real.is_file() else ():
                owner = folders.get(folder, name)
                if owner != name and _written(owner, real.relative_to(folder)):
                    raise BadInput(f"--{name}={path} is a file of --{owner}: want another name")
            other = taken.setdefault(real, name)
            if other != name:
                raise BadInput(f"--{other} and --{name} are both {path}, but must be two files")
            folders.setdefault(real.parent if name == "run" and real.is_file() else real, name)


def _written(owner: str, name: Path) -> bool:
    """Whether a file in the folder of a field is train.py's or prepare.py's, where the folder is theirs."""
    if owner in ("run", "runs"):
        return name.suffix == ".pt" or str(name) in ("log.jsonl", "summary.json")
    return owner != "data" or str(name) in PREPARED


# ------------------------------------------------------------------------------------------------- settings


def configure(cls, argv: list[str] | None = None, positional: tuple[str, ...] = (),
              default: Path | None = None, also: str = ""):
    """An instance of the dataclass cls from the command line (default: sys.argv). Later settings win.

    A bare argument that ends in .py is a config file; other bare arguments fill the fields that `positional`
    names, in order, and a list takes all. `default` is the config file where none is named. `also`: a script,
    such as train.py, whose settings in a config file are passed over. Raises BadInput. --help prints, exits.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        print(_help(Path(inspect.getsourcefile(cls)), cls.__name__, positional, words, default))
        sys.exit(0)
    kinds = typing.get_type_hints(cls)
    free = list(positional)
    values = {}
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            _check_known(key, kinds, word, free)
            texts = [text] if equals else _take(words, kinds[key])
            values[key] = _parse(texts, kinds[key], key, f"--{key}")
        elif word.endswith(".py") and (os.path.exists(word) or not free):  # else a prompt
            values |= _settings(word, kinds, also)
            default = None
        elif free:
            key = free.pop(0)
            more = _take(words, kinds[key]) if typing.get_origin(kinds[key]) is list else []
            values[key] = _parse([word, *more], kinds[key], key, key)
        else:
            raise BadInput(f"{word!r} is neither a config file (.py) nor --key=value")
    if default:
        values = _settings(default, kinds, also) | values
    for own in fields(cls):
        if values.get(own.name) == [] and own.default_factory is not list:
            raise BadInput(f"--{own.name} is empty, but must hold something")
    try:
        return cls(**values)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _settings(path: str | Path, kinds: dict, also: str) -> dict:
    """What a config file says of fields of these kinds: name → value. `also` as in `configure`."""
    others = _fields(Path(__file__).with_name(also), Path(also).stem.title()) if also else {}
    values = {}
    for key, value, where in _read(path):
        if key in others and key not in kinds:
            if key == "init_from" and value:  # passed over, another model would be measured
                raise BadInput(f"{where}: init_from is not read here, but by {also} alone: "
                               "take a copy of the file without it, and with the shape")
            continue
        _check_known(key, kinds, where)
        values[key] = None
        if value is not None or type(None) not in typing.get_args(kinds[key]):
            texts = _texts(value, kinds[key], f"{where}: {key}")
            values[key] = _parse(texts, kinds[key], key, f"{where}: {key}")
    return values


def _read(path: str | Path) -> list[tuple]:
    """The settings of a config file: (name, value, where it stands). Raises BadInput."""
    try:
        body = ast.parse(Path(path).read_text(encoding="utf-8-sig")).body
    except SyntaxError as error:
        where = f"{path}, line {error.lineno}" if error.lineno else path  # none where a byte is 0
        raise BadInput(f"{where}: {error.msg}; want lines such as n_layer = 4") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise BadInput(f"{path} cannot be read: {reason(error)}") from None
    settings = []
    for node in body:
        where = f"{path}, line {node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name) or node.targets[1:]:
            raise BadInput(f"{where}: a config file holds plain assignments only, such as n_layer = 4")
        name = node.targets[0].id
        try:
            value = ast.literal_eval(node.value)
            if not isinstance(value, (int, float, str, list, type(None))):
                raise ValueError
        except (ValueError, TypeError, RecursionError, MemoryError):
            raise BadInput(f"{where}: {name} must be a plain number, string, True, False, None or "
                           "list") from None
        settings.append((name, value, where))
    return settings


def _texts(value, kind, where: str) -> list[str]:
    """A value of a config file as `_parse` takes it: as it is typed behind --name=. Brackets and quotes that
    a field of this kind cannot have stay, so that `_parse` refuses them. Raises BadInput.
    """
    several = typing.get_origin(kind) is list
    items = value if several and isinstance(value, list) else [value]
    if str not in (kind, *typing.get_args(kind)):
        return [repr(item) for item in items] or [""]
    if not all(isinstance(item, str) for item in items):
        example = "a list of texts, as in ['a']" if several else "one text, as in 'a'"
        raise BadInput(f"{where} must be {example}")
    return items or [""]


def typed(argv: list[str] | None = None) -> set[str]:
    """The settings that stand on the command line (default: sys.argv), as --key=value or --key value."""
    words = sys.argv[1:] if argv is None else argv
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def flags_of(settings: dict) -> list[str]:
    """The words of a command line that say these settings, of which an empty one is not said."""
    words = []
    for name, value in settings.items():
        if value not in ("", []):
            words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words


def check_typed(readers: dict[str, str]) -> None:
    """Raises BadInput where a setting that nothing reads here stands on the command line; a config file may
    hold it. readers: such settings → what reads them.
    """
    for name, reader in readers.items():
        if name in typed():
            raise BadInput(f"--{name} is not read here, but by {reader}")


def _check_known(key: str, kinds: dict, where: str, free: list[str] | None = None) -> None:
    """free: the fields that bare arguments still fill, as a text that begins with -- cannot."""
    if key in kinds:
        return
    close = difflib.get_close_matches(key, kinds, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if NANOGPT.get(key) in kinds:
        hint = f"closest to it is {NANOGPT[key]!r} here, maybe in another unit; "
    elif NANOGPT.get(key) == "":
        hint = "nothing here corresponds to nanoGPT's; "
    if free and not key.isidentifier():
        hint = f"a {free[-1]} that begins with -- is given as --{free[-1]}=…; "
    raise BadInput(f"{where}: there is no setting {key!r}; {hint}--help lists all")


def _take(words: list[str], kind) -> list[str]:
    """Removes and returns the words that belong to a flag without =."""
    if bool in (kind, *typing.get_args(kind)):
        said = words and words[0].lower() in ("true", "false", "none")
        return [words.pop(0)] if said else ["true"]
    most = len(words) if typing.get_origin(kind) is list else 1
    taken = []
    while words and len(taken) < most and not words[0].startswith("--"):
        taken.append(words.pop(0))
    return taken


def _parse(texts: list[str], kind, key: str, where: str):
    """The value of a field of type `kind`, a list of all texts where that is one. Raises BadInput."""
    if not texts:
        raise BadInput(f"{where} wants a value, as in {where}=…")
    if typing.get_origin(kind) is list:
        if texts == [""] and RANGES.get(key) != "not empty":
            return []
        return [_parse([text], typing.get_args(kind)[0], key, where) for text in texts]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and kinds[0] is not str and texts[0] in ("None", "none"):
        return None  # a text may be that word
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "one text"}[kinds[0]]
    try:
        if len(texts) > 1:
            raise ValueError
        value = {"true": True, "false": False}[texts[0].lower()] if kinds[0] is bool else kinds[0](texts[0])
    except (ValueError, KeyError):
        raise BadInput(f"{where} is {' '.join(texts)!r}, but must be {wanted}") from None
    if kinds[0] is str and key not in ("prompt", "separator"):
        if "\0" in value:
            raise BadInput(f"{where} is {value!r}, but no name holds a zero byte")
        if value.startswith("~/"):
            value = os.path.expanduser(value)  # no shell does so behind a =
    check_range(key, value, where)
    return value


# --------------------------------------------------------------------------------------------------- --help


def answer_help(file: str, default: Path | None = None) -> None:
    """Prints the help of a script and exits, if the script is the one that runs and --help was asked for.
    Ends it with one line, too, where a package is missing.

    To be called above the imports that take long. `default`: the config file where none is named.
    The class and the positional arguments are read where the script says `configure(Class, positional=(…))`.
    """
    words = sys.argv[1:]
    if Path(sys.argv[0]).resolve() != Path(file).resolve():
        return
    source = Path(file).read_text(encoding="utf-8")
    if {"--help", "-h"} & set(words):
        call = re.search(r"\bconfigure\((\w+)(?:[^()]*positional=(\([^)]*\)))?", source)
        positional = ast.literal_eval(call[2] or "()")
        run(lambda: print(_help(Path(file), call[1], positional, words, default)))
        sys.exit(0)
    run(lambda: _check_installed(source))


def _check_installed(source: str) -> None:
    """Raises BadInput where a package is missing: torch only where a script imports it at its head."""
    for package in ("torch", "numpy", "tiktoken", "tqdm"):
        if package == "torch" and not re.search("^import torch", source, re.MULTILINE):
            continue
        if not importlib.util.find_spec(package):
            raise BadInput(f"{package} is not installed for {sys.executable}: there, or in an environment of "
                           "your own, pip install -r requirements.txt")


def _help(file: Path, cls: str, positional: tuple[str, ...], words: list[str], default: Path | None) -> str:
    fields = _fields(file, cls)
    named = []
    for before, word in zip(["", *words], words):
        shown, _ = fields.get(before[2:].replace("-", "_"), ("True", ""))  # of the flag that takes the word
        if word.endswith(".py") and not word.startswith("--") and shown in ("True", "False"):
            named.append(word)
    for path in named or filter(None, [default]):
        with suppress(BadInput):  # it may be a value, such as that of --input
            for name, value, _ in _read(path):
                if name in fields:
                    fields[name] = (_as_typed(value), fields[name][1])
    bare = [f"[{name}]" for name in positional]
    usage = ["usage:", file.name, *bare, "[config.py …] [--key=value …]"]
    lines = [ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "", "", " ".join(usage), ""]
    for name, (value, comment) in fields.items():
        bounds = f"; {RANGES[name]}" if "in " in RANGES.get(name, "") else ""
        lines.append(f"  --{name}={value} ".ljust(34) + comment + bounds)
    return "\n".join(lines)


def _fields(file: Path, cls: str) -> dict[str, tuple[str, str]]:
    """Field → (default as text, comment behind it) of a dataclass in a source file, base classes first."""
    source = file.read_text(encoding="utf-8")
    fields = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and cls in [alias.name for alias in node.names]:
            return _fields(file.with_name(f"{node.module}.py"), cls)
        if isinstance(node, ast.ClassDef) and node.name == cls:
            for base in node.bases:
                fields |= _fields(file, base.id)
            for line in filter(lambda line: isinstance(line, ast.AnnAssign), node.body):
                comment = source.splitlines()[line.end_lineno - 1].partition("  # ")[2]
                fields[line.target.id] = (_shown(line.value), comment)
    return fields


def _shown(value: ast.expr) -> str:
    """A default as one would type it: field(default_factory=lambda: ["a", "b"]) as `a b`."""
    if isinstance(value, ast.Call):
        factory = value.keywords[0].value
        value = factory.body if isinstance(factory, ast.Lambda) else ast.Constant("")
    try:
        plain = ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)
    return _as_typed(plain)


def _as_typed(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
