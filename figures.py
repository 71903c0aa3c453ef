"""Figures of training: the curves of any runs, and the loss that each method gets for its FLOPs.

    python compare.py plot out/tiny out/vanilla              curves.png, also while the runs go on
    python compare.py plot out/tiny/log.jsonl --file=curves.svg

What is notable here:
* Curves need nothing but the log.jsonl that train.py writes; its last line may be half there.
* FLOPs are those that were counted as the run trained; validation stands at the FLOPs spent until then.
* matplotlib is not required by anything else, and is imported where a figure is drawn.
"""

from common import answer_help

answer_help(__file__)

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from common import BadInput, check_apart, check_output, configure, optional, run, whole
from configurator import misfit

KINDS = (".png", ".svg", ".pdf")


@dataclass
class Plot:
    runs: list[str] = field(default_factory=list)  # folders of runs of train.py, or their log.jsonl
    file: str = "curves.png"  # where the figure goes (.png, .svg or .pdf)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name the folders of runs, as in: python compare.py plot out/tiny out/vanilla")
        check_apart(self, "runs", "file")


def log_of(name: str) -> Path:
    """The log of a run, which is named by its folder or by the log itself."""
    return Path(name) / "log.jsonl" if Path(name).is_dir() else Path(name)


def read_log(name: str) -> list[dict]:
    """The records of a run's log.jsonl; a last line that is not whole yet is left out. Raises BadInput."""
    path = log_of(name)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]  # what follows the last line break is not whole
        steps = [row["step"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not the log.jsonl of a run of train.py: {misfit(error)}") from None
    if not any("flops" in row for row in rows):
        raise BadInput(f"{path} holds no step of training yet")
    if steps != sorted(steps):
        raise BadInput(f"{path} has its steps out of order, as if two runs had written it")
    return rows


def curves(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """The lines of a run, each a list of points (x, y): loss by tokens and by FLOPs, the others by tokens.

    A record of an evaluation has neither tokens nor FLOPs: they are those of the training until its step.
    """
    trained = [row for row in rows if "flops" in row]
    lines = {"loss by tokens": [], "loss by FLOPs": [], "val_steps": []}
    for name in ("latent_steps", "tau", "lr"):
        lines[name] = [(row["tokens"], row[name]) for row in trained if name in row]
    for row in rows:
        if "val_loss" in row:
            before = min(trained, key=lambda other: abs(other["step"] - row["step"]))
            done = row["step"] / before["step"]  # not 1 only where --log_every left the step out
            lines["loss by tokens"].append((before["tokens"] * done, row["val_loss"]))
            lines["loss by FLOPs"].append((before["flops"] * done, row["val_loss"]))
            lines["val_steps"].append((before["tokens"] * done, row["val_steps"]))
    return lines


def read_curves(name: str) -> dict[str, list[tuple[float, float]]]:
    """The curves of a run's log. Raises BadInput, also where a row lacks what it should have."""
    try:
        return curves(read_log(name))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{log_of(name)} is not the log.jsonl of a run of train.py: {misfit(error)}") from None


def draw_curves(runs: list[str]):
    """A figure of all runs: validation loss by tokens and by FLOPs, latent steps, τ, learning rate."""
    figure = optional("matplotlib.figure", "plot").Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3).ravel()

    def xy(points: list) -> tuple:
        return tuple(zip(*points)) or ((), ())

    panels = {"loss by tokens": "validation loss, nats per token", "loss by FLOPs": "validation loss",
              "latent_steps": "latent steps per token", "tau": "τ", "lr": "learning rate"}
    for i, (name, label) in enumerate(zip(runs, labels_of(runs))):
        lines = read_curves(name)
        for axis, panel in zip(axes, panels):
            style = ".-" if panel.startswith("loss") else "-"
            axis.plot(*xy(lines[panel]), style, color=f"C{i}", linewidth=1.2, label=label)
        axes[2].plot(*xy(lines["val_steps"]), "o", color=f"C{i}", markersize=4)
    for axis, (name, label) in zip(axes, panels.items()):
        axis.set(xlabel="training FLOPs (counted)" if "FLOPs" in name else "training tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log")
    axes[2].set_title("line: in training; points: in validation", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].axis("off")
    axes[-1].legend(handles, labels, loc="center left", frameon=False).set_in_layout(False)
    return figure


def labels_of(runs: list[str]) -> list[str]:
    """The names of runs, of compare.py's without the settings that all of them share."""
    settings = [re.split(r"-(?=\w+=)", name) for name in runs]
    shared = {part for part in set.intersection(*map(set, settings)) if "=" in part} if runs[1:] else set()
    labels = ["-".join(part for part in own if part not in shared) for own in settings]
    return [(label or name).replace("$", r"\$") for label, name in zip(labels, runs)]  # or it is a formula


def lines_of(finished: dict) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """The runs of compare.py, {Run: result}, by tokens of text (0: all), then by method: the points (FLOPs,
    validation loss) of all their evaluations, means over seeds. Models of more layers are a method apart.

    Left out: kinds that have fewer seeds than others on the same text, and those with a run that diverged.
    """
    groups = defaultdict(list)
    for run, result in finished.items():
        groups[replace(run, seed=0)].append(result["curve"] if result["flops"] else [])
    panels = defaultdict(lambda: defaultdict(list))
    fewest = min((kind.n_layer for kind in groups), default=0)
    for kind, curves in groups.items():
        name = kind.who if kind.n_layer == fewest else f"{kind.who}, more layers"
        seeds = max(len(groups[other]) for other in groups if other.train_tokens == kind.train_tokens)
        if len(curves) == seeds and all(curves):
            panels[kind.train_tokens][name] += [mean_point(points) for points in zip(*curves)]
    return panels


def mean_point(points: tuple) -> tuple[float, float]:
    """Of each seed (step, FLOPs, validation loss) at the same step → mean FLOPs, mean loss."""
    _, flops, losses = zip(*points)
    return mean(flops), mean(losses)


def loss_against_flops(panels: dict[int, dict[str, list[tuple[float, float]]]]):
    """A figure of what lines_of found, a panel for each text: a line goes through what no cheaper equals."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    wide = max(1, len(panels))
    figure = optional("matplotlib.figure", "--plot").Figure(figsize=(2 + 6 * wide, 5), layout="constrained")
    axes = figure.subplots(1, wide, squeeze=False)[0]
    for axis, (tokens, lines) in zip(axes, sorted(panels.items())):
        for name, points in lines.items():
            look = {"color": f"C{names.index(name)}", "marker": "o", "markersize": 5, "linewidth": 1.3}
            if name == "adaptive":
                look = {"color": "black", "marker": "*", "markersize": 11, "linewidth": 2.2}
            axis.plot(*zip(*points), **look | {"linewidth": 0, "alpha": 0.25})
            axis.plot(*zip(*frontier(points)), **look, label=name)
        text = f"{tokens:,} tokens of text, read again and again" if tokens else "all of the text"
        axis.set(title=text if wide > 1 else "", xscale="log", xlabel="training FLOPs (counted)")
        axis.set(ylabel="validation loss, nats per token")
        axis.tick_params(axis="x", which="minor", labelsize=7, labelrotation=45)
        axis.legend(frameon=False)
        axis.grid(alpha=0.3, which="both")
    return figure


def steps_against_hops(rows: list[dict]):
    """A figure of what tasks.py found: accuracy, and mean latent steps, by the number of hops."""
    figure = optional("matplotlib.figure", "--plot").Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(row["hops"] or "other tokens") for row in rows]
    left.bar(names[:-1], [row["accuracy"] for row in rows[:-1]], color="C0")
    left.set(xlabel="hops", ylabel="share of right answers", ylim=(0, 1.05))
    right.bar(names, [row["steps"] for row in rows], color=["C1"] * (len(rows) - 1) + ["lightgrey"])
    right.set(xlabel="hops", ylabel="mean latent steps")
    return figure


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points (FLOPs, loss) that no cheaper one equals, by FLOPs."""
    best = math.inf
    found = []
    for flops, loss in sorted(points):
        if loss < best:
            best = loss
            found.append((flops, loss))
    return found


def check_figure(path: str, flag: str) -> None:
    """Raises BadInput, which names flag, where no figure can be drawn and written at path."""
    if Path(path).suffix not in KINDS:
        raise BadInput(f"{flag}={path}: want a name in {', '.join(KINDS)}")
    check_output(path, flag)
    optional("matplotlib.figure", flag)


def save(figure, path: str | Path) -> None:
    """Writes a figure, whole or not at all, in the format that the name says. Raises BadInput."""
    with whole(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=150)


def save_comparison(finished: dict, path: Path) -> None:
    """Loss against FLOPs of the runs of compare.py, as SVG and PNG beside their results file."""
    figure = loss_against_flops(lines_of(finished))
    for suffix in (".svg", ".png"):
        save(figure, path.with_suffix(suffix))
        print(f"written: {path.with_suffix(suffix)}")


def main(argv: list[str] | None = None) -> None:
    config = configure(Plot, argv, positional=("runs",))
    check_figure(config.file, "--file")
    save(draw_curves(config.runs), config.file)
    print(f"written: {config.file}")


if __name__ == "__main__":
    run(main)
