"""Text from a checkpoint, and how long the model thought about each token.

    python sample.py out/tiny "def main"
    python sample.py out/tiny --prompt_file=notes.txt --html=thoughts.html
    echo -n "import " | python sample.py out/tiny

What is notable here: text streams as it is made, each token coloured by the latent steps that were executed before it was
said; a character that spans several tokens is held back until it is whole. The prompt is coloured too, from the same prefill.
"""

import codecs
import html
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import BadInput, configure, run
from model import LLaMA
from train import autocast, compiles, load_checkpoint, pick_device

ANSI = (0, 114, 220, 208, 203, 199, 165, 129, 93)  # 256-colour codes for 0, 1, 2, … latent steps; 0: the terminal's own
CSS = ("transparent", "#d9f2d9", "#fff3b0", "#ffd6a5", "#ffadad", "#ff9bd2", "#e3a5ff", "#c4a5ff", "#a5a8ff")


@dataclass
class Sample:
    run: str = "out/tiny"  # folder of a run, or a checkpoint
    prompt: str | None = None  # the text to go on from; without one, --prompt_file or standard input
    prompt_file: str = ""  # file that holds the prompt
    max_new_tokens: int = 400  # tokens to write
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # sample among the k likeliest
    top_p: float | None = 0.95  # sample among the likeliest that hold this mass
    seed: int = 1337
    tau: float | None = None  # τ at test time: higher halts sooner
    max_latent: int | None = None  # most latent steps at test time
    method: str | None = None  # checked against the checkpoint's, if given
    compile: bool = False  # torch.compile the decoding of a token: the first ones wait for it, the others come faster
    plain: bool = False  # no colours
    html: str = ""  # also write a page with the colours, and numbers on hover
    device: str = ""  # cpu, cuda or cuda:N; empty: cuda where there is one

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau is {self.tau}, but must lie in [0, 1]")
        if (self.max_latent or 0) < 0 or self.max_new_tokens < 1:
            raise ValueError(f"max_latent {self.max_latent} must be 0 or more, max_new_tokens {self.max_new_tokens} at least 1")


@dataclass
class Piece:
    """One token of a text: its bytes, and what it took to say it."""

    text: bytes
    steps: int | None  # executed latent steps behind it; None: the first token, which nobody predicted
    reach: float  # expected latent steps, Σ_{k≥1} r[t,k]
    prob: float  # the probability that the model gave it


def whole_characters(pieces: Iterator[Piece]) -> Iterator[tuple[str, list[Piece]]]:
    """Joins pieces until their bytes are whole UTF-8 characters: (text, the pieces behind it)."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), []
    for piece in pieces:
        held.append(piece)
        text = decoder.decode(piece.text)
        if text and not decoder.getstate()[0]:
            yield text, held
            held = []
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest, held


def html_page(title: str, note: str, pieces: list[Piece]) -> str:
    """A self-contained page: the text, each token on the colour of its latent steps, its numbers on hover."""
    spans = []
    for text, group in whole_characters(iter(pieces)):
        steps = max((piece.steps or 0 for piece in group), default=0)
        hover = "; ".join("start of the text" if p.steps is None else f"{p.steps} latent steps, expected {p.reach:.2f}, probability {p.prob:.4f}" for p in group)
        spans.append(f'<span style="background:{colour(CSS, steps)}" title="{hover}">{html.escape(text)}</span>')
    most = max((piece.steps or 0 for piece in pieces), default=0)
    legend = " ".join(f'<span style="background:{colour(CSS, k)}">&nbsp;{k}&nbsp;</span>' for k in range(most + 1))
    return (f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            "<style>body{max-width:60em;margin:2em auto;font-family:sans-serif;color:#111;background:#fff}"
            "pre{white-space:pre-wrap;font:15px/1.5 monospace}span{border-radius:2px}pre span:hover{outline:1px solid #333}</style>\n"
            f"<h1>{html.escape(title)}</h1><p>{html.escape(note)}</p><p>Latent steps before a token was said: {legend}</p>\n<pre>{''.join(spans)}</pre>\n")


def colour(palette: tuple, steps: int):
    return palette[min(steps, len(palette) - 1)]


@torch.no_grad()
def explain(model: LLaMA, tokenizer, ids: list[int]) -> list[Piece]:
    """The pieces of a given text, from one parallel forward: each token with the thinking done at the token before it."""
    device = model.embed.weight.device
    out = model(torch.tensor([ids], device=device))
    prob = out.logits[0, :-1].float().softmax(1).gather(1, torch.tensor(ids[1:], device=device)[:, None]).squeeze(1)
    numbers = zip(out.steps[0].tolist(), out.expected_steps[0].tolist(), prob.tolist())
    return [Piece(tokenizer.decode_single_token_bytes(ids[0]), None, 0.0, 1.0)] + [
        Piece(tokenizer.decode_single_token_bytes(i), int(steps), reach, p) for i, (steps, reach, p) in zip(ids[1:], numbers)]


def read_prompt(config: Sample) -> str:
    if config.prompt is not None and config.prompt_file:
        raise BadInput("give a prompt or --prompt_file, not both")
    if config.prompt is not None:
        return config.prompt
    try:
        if config.prompt_file:
            return Path(config.prompt_file).read_text(encoding="utf-8")
        return "\n" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8")
    except OSError as error:
        raise BadInput(f"--prompt_file {config.prompt_file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{config.prompt_file or 'standard input'} is not UTF-8 text, which a prompt must be") from None


def main() -> None:
    config = configure(Sample, positional=("run", "prompt"))
    device = pick_device(config.device)
    model, tokenizer, _ = load_checkpoint(config.run, device)
    if config.method not in (None, model.config.method):
        raise BadInput(f"{config.run} holds a model of method {model.config.method}, not {config.method}")
    ids, context = tokenizer.encode_ordinary(read_prompt(config)), model.config.block_size
    if not ids:
        raise BadInput("the prompt encodes to no token; give at least one character")
    if len(ids) > context:
        print(f"sample.py: the prompt has {len(ids):,} tokens, the context {context:,}: only its end is read", file=sys.stderr)
        ids = ids[-context:]
    if config.html and not Path(config.html).resolve().parent.is_dir():
        raise BadInput(f"--html={config.html}: its folder does not exist")
    model.for_decoding()
    if compiles(config.compile, device):
        print("sample.py: compiling; the first tokens take a while", file=sys.stderr)
        model.compile_decoding()
    colours = sys.stdout.isatty() and not config.plain
    most = model.max_latent if config.max_latent is None else config.max_latent
    if colours:
        print("latent steps: " + " ".join(f"\x1b[38;5;{colour(ANSI, k)}m{k}\x1b[0m" if k else "0" for k in range(most + 1)) + "\n")
    with autocast(device), model.dials(config.tau, config.max_latent):
        pieces = explain(model, tokenizer, ids)
    written, began = len(pieces), time.perf_counter()

    def stream() -> Iterator[Piece]:
        yield from list(pieces)
        try:
            new = model.generate([ids], config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed, config.tau, config.max_latent,
                                 stop=tokenizer.eot_token)
            for g in new:
                if g.token.item() == tokenizer.eot_token:
                    return
                text = tokenizer.decode_single_token_bytes(g.token.item()) if g.token.item() < tokenizer.n_vocab else b""  # a padded vocabulary
                pieces.append(Piece(text, int(g.steps.item()), g.expected_steps.item(), g.prob.item()))
                yield pieces[-1]
        except ValueError as error:
            raise BadInput(str(error)) from None

    with autocast(device):
        for text, group in whole_characters(stream()):
            steps = max(piece.steps or 0 for piece in group)
            sys.stdout.write(f"\x1b[38;5;{colour(ANSI, steps)}m{text}\x1b[0m" if colours and steps else text)
            sys.stdout.flush()
    took, new = time.perf_counter() - began, pieces[written:]
    mean = sum(piece.steps for piece in new) / max(1, len(new))
    print(f"\n\n{len(new)} tokens, {len(new) / took:.1f} tokens/s, {mean:.2f} latent steps per token of at most {most}", file=sys.stderr)
    if config.html:
        note = f"{config.run}, τ {model.tau if config.tau is None else config.tau}, ℓ_max {most}; {mean:.2f} latent steps per new token"
        Path(config.html).write_text(html_page("What the model thought about", note, pieces), encoding="utf-8")
        print(f"written: {config.html}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
