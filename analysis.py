"""Where the thinking goes: tables and figures from what score.py says of every token of a text.

What is notable here: nothing needs the model. A text is ids (n,), an array of tokens. What is said of it is a
tensor `said` (3, n − 1), for each token but the first: −log q in nats, whether it was the likeliest, and the
latent steps behind it. A table is a list of rows, each a dict of plain values, as it goes into a JSON file.
"""

import math
import re

import numpy as np
import torch
from torch import Tensor

from common import optional, table

ENOUGH = 20  # a token that occurs less often is not ranked by its mean steps
CLASSES = {  # of a token: the first that its bytes match, spaces before them apart
    "newline": rb"\s*\n\s*$",
    "space": rb"\s*$",
    "name": rb"[A-Za-z_]",
    "digit": rb"\d",
    "quote": rb"[\"'`]",
    "bracket": rb"[()\[\]{}]",
    "operator": rb"[-+*/%=<>!&|^~@]",
    "punctuation": rb"[.,:;?#$\\]",
    "not ASCII": rb"[\x80-\xff]",
    "control": rb"",
}
TITLES = {
    "sweep": "perplexity against mean latent steps; best: no other setting has less of both",
    "deciles": "by decile of the probability q that the token was given, least likely first",
    "word_positions": "by the token's place in its word",
    "classes": "by class of the token",
    "longest": f"tokens thought about longest, of those that occur {ENOUGH} times or more",
    "shortest": f"tokens thought about shortest, of those that occur {ENOUGH} times or more",
    "further_steps": "what step k brings to tokens that took it: loss and share right, without and with it",
}


def ranks(x: Tensor) -> Tensor:
    """The rank of each value (n,), from 1; equal values share the mean of their ranks."""
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1).double() / 2)[which]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's rank correlation of x and y (n,); None where either is constant."""
    both = torch.stack((ranks(x), ranks(y))).double()
    if (both.amax(1) == both.amin(1)).any():
        return None
    return torch.corrcoef(both)[0, 1].item()


def token_class(token: bytes) -> str:
    """The first of CLASSES that the token matches."""
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, token.lstrip(b" ")))


def word_positions(texts: list[bytes], which: np.ndarray) -> np.ndarray:
    """For the tokens texts[which] (n,): which of its word each one is, from 1; 0 for one that is in none.

    A word is a run of letters, digits, _ and bytes that are not ASCII.
    """
    letter = re.compile(rb"[\w\x80-\xff]")
    begins = np.array([bool(letter.match(text.lstrip(b" "))) for text in texts])[which]  # with a letter
    ends = np.array([bool(letter.match(text[-1:])) for text in texts])[which]
    spaced = np.array([text.startswith(b" ") for text in texts])[which]  # " the" does not go on with a word
    after_word = np.concatenate(([False], ends[:-1]))
    number = np.arange(len(which))
    starts = begins & ~(after_word & ~spaced)
    start = np.maximum.accumulate(np.where(starts, number, 0))  # where the word of each token began
    return np.where(begins, number - start + 1, 0)


def analyze(tokenizer, ids: np.ndarray, said: Tensor) -> dict:
    """Tables: deciles, word_positions, classes, longest, shortest. Rank correlation of −log q and steps."""
    nats, _, steps = said.double()
    vocabulary, which, count = np.unique(ids[1:], return_inverse=True, return_counts=True)
    texts = [tokenizer.decode_single_token_bytes(int(i)) for i in vocabulary]
    ends = vocabulary == tokenizer.eot_token
    kinds = ["end of text" if end else token_class(text) for end, text in zip(ends, texts)]
    places = word_positions([b"" if end else text for end, text in zip(ends, texts)], which).clip(max=8)
    place_names = {0: "none", 8: "8 or later"}

    def mean(rows: Tensor, **label) -> dict:
        loss, thought = nats[rows], steps[rows]
        means = {"loss": loss.mean().item(), "latent_steps": thought.mean().item()}
        return {**label, "tokens": len(loss), **means}

    deciles = []
    for rows in nats.argsort(descending=True).tensor_split(10):
        if len(rows):
            most, least = math.exp(-nats[rows[0]]), math.exp(-nats[rows[-1]])
            deciles.append(mean(rows, q_from=most, q_to=least))
    positions = []
    for place in np.unique(places).tolist():
        positions.append(mean(torch.from_numpy(places == place), place=place_names.get(place, str(place))))
    classes = []
    for kind in sorted(set(kinds)):
        of_kind = np.array([other == kind for other in kinds])
        classes.append(mean(torch.from_numpy(of_kind[which]), kind=kind))
    average = np.bincount(which, steps.numpy()) / count
    tokens = []
    for i in sorted(np.flatnonzero(count >= ENOUGH), key=lambda i: -average[i]):
        row = {"token": repr(texts[i])[1:], "tokens": int(count[i]), "latent_steps": float(average[i])}
        tokens.append(row)
    return {
        "rank_correlation": spearman(nats, steps),
        "deciles": deciles,
        "word_positions": positions,
        "classes": sorted(classes, key=lambda row: -row["latent_steps"]),
        "longest": tokens[:20],
        "shortest": tokens[::-1][:20],
    }


def further_steps(at_most: list[Tensor]) -> list[dict]:
    """What each further step brings, by what was said with at most 0, 1, 2, … steps: a list of `said`.

    Row k is about the tokens that execute k steps if they may: what k steps give them, what k − 1 would give.
    """
    rows = []
    for k in range(1, len(at_most)):
        took = at_most[-1][2] >= k
        loss, right = at_most[k - 1][:2, took].double()
        loss_now, right_now = at_most[k][:2, took].double()
        rows.append({
            "step": k,
            "tokens": len(loss),
            "loss_without": loss.mean().item(),
            "loss_with": loss_now.mean().item(),
            "right_without": right.mean().item(),
            "right_with": right_now.mean().item(),
            "only_with": (right_now > right).double().mean().item(),
            "only_without": (right_now < right).double().mean().item(),
        })
    return rows


def print_numbers(found: dict) -> None:
    """The perplexity in found, ρ, and the tables that TITLES knows: keys as heads, floats to four digits."""
    if "perplexity" in found:
        p = found["perplexity"]
        print(f"{p['tokens']:,} tokens, {p['words']:,} words, {p['bytes']:,} bytes\n"
              f"loss {p['loss']:.4f} nats per token, {p['bits_per_byte']:.4f} bits per byte\n"
              f"perplexity {p['perplexity']:.4f} per token, {p['word_perplexity']:.6g} per word, "
              f"{p['byte_perplexity']:.4f} per byte\n"
              f"{p['latent_steps']:.3f} latent steps and {p['flops_per_token']:.4e} forward FLOPs per token; "
              f"{p['tokens_per_second']:,.0f} tokens/s")
    if "rank_correlation" in found:
        rho = found["rank_correlation"]
        rho = "none, as all tokens took as many" if rho is None else f"{rho:.3f}"
        print(f"\nrank correlation (Spearman) of −log q and latent steps: {rho}")
    for name, title in TITLES.items():
        if found.get(name):
            head = [key.replace("_", " ") for key in found[name][0]]
            rows = []
            for row in found[name]:
                rows.append([f"{x:.4f}" if isinstance(x, float) else x for x in row.values()])
            print(f"\n{title}\n\n{table(head, rows)}")


def draw(found: dict, title: str):
    """The tables of found side by side in one matplotlib figure."""
    names = [name for name in TITLES if found.get(name) and name not in ("longest", "shortest")]
    matplotlib = optional("matplotlib.figure", "--plot")
    figure = matplotlib.Figure(figsize=(4.5 * len(names), 4), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"))  # or matplotlib would read a formula
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        rows = found[name]
        if name == "sweep":
            for most in sorted({row["max_latent"] for row in rows}):
                line = [row for row in rows if row["max_latent"] == most]
                steps = [row["latent_steps"] for row in line]
                axis.plot(steps, [row["perplexity"] for row in line], "o-", label=f"ℓ_max {most}")
            axis.set(xlabel="mean latent steps", ylabel="perplexity")
            axis.legend()
        elif name == "further_steps":
            steps = [str(row["step"]) for row in rows]
            axis.plot(steps, [row["loss_without"] for row in rows], "o-", label="loss without")
            axis.plot(steps, [row["loss_with"] for row in rows], "o-", label="loss with")
            axis.set(xlabel="step", ylabel="loss of the tokens that took it")
            axis.legend()
        else:
            labels = [next(iter(row.values())) for row in rows]
            if name == "deciles":
                labels = [str(i) for i in range(1, len(rows) + 1)]
            axis.bar(labels, [row["latent_steps"] for row in rows])
            axis.tick_params("x", rotation=60)
            xlabel = "deciles of q, least likely first" if name == "deciles" else name.replace("_", " ")
            axis.set(xlabel=xlabel, ylabel="mean latent steps")
    return figure
