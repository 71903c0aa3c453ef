"""Config files of plain assignments and --key=value, into one checked dataclass: `configure(Train, positional=("config",))`.

What is notable here: nothing is executed and nothing is global. A config file may hold literals only, a value must be of its
field's type, and an unknown key is answered with the closest known one. `--help` prints every field with its default and
the comment that stands behind it in the source.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import types
import typing
from pathlib import Path


class BadInput(ValueError):
    """What the user gave cannot be used. Its one line names the file or flag, what is wrong and what would be right."""


def run(main) -> None:
    """Calls main(); on BadInput prints its line to stderr and exits with code 2."""
    try:
        main()
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(1)


def configure(cls, argv: list[str] | None = None, positional: tuple[str, ...] = (), default: Path | None = None):
    """An instance of the dataclass cls from the command line (default: sys.argv).

    A bare argument that ends in .py is a config file; other bare arguments fill the fields named in `positional`, in order.
    `default` is the config file where none is named. Later settings win. Raises BadInput. `--help` prints and exits.
    """
    argv, values, free = list(sys.argv[1:] if argv is None else argv), {}, list(positional)
    fields = typing.get_type_hints(cls)
    if "--help" in argv or "-h" in argv:
        print(_help(cls, positional))
        sys.exit(0)
    if default and not any(argument.endswith(".py") and not argument.startswith("--") for argument in argv):
        argv.insert(0, str(default))
    while argv:
        argument = argv.pop(0)
        if not argument.startswith("--"):
            if argument.endswith(".py") and not (free and not Path(argument).exists()):  # where there is none, it may be a prompt
                values.update(_read(argument, fields))
            elif free:
                name = free.pop(0)
                values[name] = _parse(argument, fields[name], name)
            else:
                raise BadInput(f"{argument!r} is neither a config file (.py) nor --key=value")
            continue
        key, equals, text = argument[2:].partition("=")
        key = key.replace("-", "_")
        _known(key, fields, argument)
        if typing.get_origin(fields[key]) is list:
            words = [text] if equals else []
            while not equals and argv and not argv[0].startswith("--"):
                words.append(argv.pop(0))
            if not words:
                raise BadInput(f"--{key} wants at least one value")
            values[key] = [_parse(word, typing.get_args(fields[key])[0], f"--{key}") for word in words]
            continue
        if not equals:
            if bool in (fields[key], *typing.get_args(fields[key])) and (not argv or argv[0].lower() not in ("true", "false", "none")):
                text = "true"
            elif not argv:
                raise BadInput(f"--{key} wants a value, such as --{key}={_default(cls.__dataclass_fields__[key])}")
            else:
                text = argv.pop(0)
        values[key] = _parse(text, fields[key], f"--{key}")
    try:
        return cls(**values)
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(str(error)) from None


def _read(path: str, fields: dict) -> dict:
    try:
        source = Path(path).read_text(encoding="utf-8")
        body = ast.parse(source).body
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except SyntaxError as error:
        raise BadInput(f"{path}, line {error.lineno}: {error.msg}; a config file holds assignments such as n_layer = 4") from None
    values = {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        where = f"{path}, line {node.lineno}"
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
            raise BadInput(f"{where}: a config file holds plain assignments only, such as n_layer = 4")
        key = node.targets[0].id
        _known(key, fields, where)
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            raise BadInput(f"{where}: {key} must be a plain number, string, True or False") from None
        values[key] = _parse(value if isinstance(value, str) else repr(value), fields[key], f"{where}: {key}")
    return values


def _known(key: str, fields: dict, where: str) -> None:
    if key not in fields:
        close = difflib.get_close_matches(key, fields, 1, 0)
        raise BadInput(f"{where}: there is no setting {key!r}; did you mean {close[0]!r}? --help lists all")


def _parse(text: str, kind, where: str):
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and text in ("None", "none"):
        return None
    for kind in kinds:
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    names = {int: "a whole number", float: "a number", bool: "True or False"}
    raise BadInput(f"{where} is {text!r}, but must be {' or '.join(names[k] for k in kinds if k in names)}")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "" if field.default_factory is dataclasses.MISSING else " ".join(map(str, field.default_factory()))


def _help(cls, positional: tuple[str, ...]) -> str:
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        for name, comment in re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(base), re.M):
            comments[name] = comment
    module = sys.modules[cls.__module__]
    lines = [(module.__doc__ or cls.__doc__ or "").strip(), "", f"usage: {Path(sys.argv[0]).name} "
             + " ".join([*(f"[{name}]" for name in positional), "[config.py …]", "[--key=value …]"]), ""]
    for field in dataclasses.fields(cls):
        lines.append(f"  --{field.name}={_default(field)}".ljust(34) + comments.get(field.name, ""))
    return "\n".join(lines)
