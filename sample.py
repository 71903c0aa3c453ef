"""Text from a checkpoint, and how long the model thought about each token.

    python sample.py out/tiny "def main"
    python sample.py out/tiny --prompt_file=notes.txt --num_samples=3 --html=thoughts.html
    echo -n "import " | python sample.py out/tiny

What is notable here:
* Text streams as it is made, each token on the colour of the latent steps that were executed before it was
  said. A character that spans several tokens is held back until it is whole. The prompt is dim.
* What goes into a pipe or a file has no colours, and none has any where NO_COLOR is set.
* Several texts are made in one batch, each as if alone: text i of a seed is the first text of seed + i.
"""

from common import answer_help

answer_help(__file__)

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from common import (BadInput, autocast, check_apart, check_output, check_predictions, check_read, configure,
                    load_checkpoint, pick_device, precision, reason, run, turn, write_whole)
from configurator import mute
from documents import cut, encode
from fast import compile_ticks, compiles, lay_out
from model import LLaMA
from page import (Piece, bar, bytes_of, dials, explain, html_page, legend, painted, wants_colour,
                  whole_characters)


@dataclass
class Sample:
    run: str = "out/tiny"  # folder of a run, or a checkpoint
    prompt: str | None = None  # the text to go on from; without one, --prompt_file or standard input
    prompt_file: str = ""  # file that holds the prompt
    num_samples: int = 1  # texts to write, all from the same prompt
    max_new_tokens: int = 400  # tokens to write at most; a text may end by itself before
    temperature: float = 0.8  # 0 takes the likeliest token
    top_k: int | None = None  # sample among the k likeliest; 0 or None: among all
    top_p: float | None = 0.95  # sample among the likeliest that hold this mass
    seed: int = 1337  # of the first text; the others draw with the seeds that follow
    tau: float | None = None  # τ at test time: higher halts sooner
    max_latent: int | None = None  # most latent steps at test time
    method: str | None = None  # checked against the checkpoint's, if given
    compile: bool = False  # torch.compile decoding: the first tokens wait for it, the others come faster
    plain: bool = False  # no colours
    html: str = ""  # also write a page: its thoughts, and what it would have said without
    device: str = ""  # cpu, cuda, cuda:N or mps; empty: cuda where there is one
    dtype: str = ""  # bfloat16 or float32; empty: what the device does well

    def __post_init__(self) -> None:
        chance = "a --temperature above 0"
        check_read(self, {chance: "top_k top_p seed"}, [chance] if self.temperature else [], "")
        check_apart(self, "run", "prompt_file", "html")


def say(text: str) -> None:
    print(f"sample.py: {text}", file=sys.stderr)


def read_prompt(config: Sample) -> str:
    """The prompt from where the settings say. Raises BadInput."""
    if config.prompt is not None:
        if config.prompt_file:
            raise BadInput("give a prompt or --prompt_file, not both")
        return config.prompt
    where = config.prompt_file or "standard input"
    try:
        if config.prompt_file:
            content = Path(config.prompt_file).read_bytes()
        else:
            content = b"" if sys.stdin.isatty() else read_standard_input()
        return content.decode("utf-8-sig")  # with its ends of lines as they are
    except OSError as error:
        raise BadInput(f"{where} cannot be read: {reason(error)}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{where} is not UTF-8 text, as prompts are") from None


def read_standard_input() -> bytes:
    """All of it; where that takes time, it says what it waits for."""
    waiting = threading.Timer(1, say, ["waits for the end of standard input, which is to hold the prompt"])
    waiting.daemon = True
    waiting.start()
    try:
        return sys.stdin.buffer.read()
    finally:
        waiting.cancel()


def prompt_tokens(text: str, tokenizer, context: int) -> list[int]:
    """At least one, and no more than the context holds. Raises BadInput."""
    parts = encode(tokenizer, cut(text))
    if None in parts:
        raise BadInput("the prompt cannot be encoded: the tokenizer gives up on it")
    ids = [token for part in parts for token in part]
    if not ids:
        say("the prompt is empty: a text begins, as after <|endoftext|>")
    if len(ids) > context:
        say(f"the prompt has {len(ids):,} tokens, the context {context:,}: only its end is read")
    return ids[-context:] or [tokenizer.eot_token]


def read_by(model: LLaMA, tokenizer, ids: list[int]) -> list[Piece]:
    """The pieces of a prompt, and the thinking behind each. Raises BadInput where a prediction is no number.
    """
    out = model(torch.tensor([ids], device=model.embed.weight.device))
    check_predictions(out.logits)
    steps = [0, *out.steps[0, :-1].int().tolist()]
    start = ids == [tokenizer.eot_token]  # of a text, which shows nothing
    return [Piece(b"" if start else bytes_of(tokenizer, i), k, i) for i, k in zip(ids, steps)]


def generate(model: LLaMA, tokenizer, ids: list[int], config: Sample) -> Iterator[tuple[int, Piece]]:
    """(which text, its next piece), in the order in which they are said; <|endoftext|> is no piece."""
    settings = config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.seed
    for new in model.generate([ids] * config.num_samples, *settings, stop=tokenizer.eot_token):
        for row, token, steps in zip(*(t.tolist() for t in (new.row, new.token, new.steps))):
            if token != tokenizer.eot_token:
                yield row, Piece(bytes_of(tokenizer, token), int(steps), token)


def first_of(said: Iterator[tuple[int, Piece]], texts: list[list[Piece]]) -> Iterator[Piece]:
    """The pieces of the first text as they come; appends all to their texts meanwhile."""
    for row, piece in said:
        texts[row].append(piece)
        if row == 0:
            yield piece


def show(pieces: Iterable[Piece], colours: bool, dim: bool = False) -> None:
    """Writes a text as its pieces come."""
    for text, group in whole_characters(pieces):
        steps = max(piece.steps for piece in group)
        sys.stdout.write(painted(text, steps, dim) if colours else text)
        sys.stdout.flush()


def main() -> None:
    config = configure(Sample, positional=("run", "prompt"))
    device = pick_device(config.device)
    if config.html:
        check_output(config.html, "--html")
    model, tokenizer, _ = load_checkpoint(config.run, device)
    if config.method not in (None, model.config.method):
        raise BadInput(f"{config.run} holds a model of method {model.config.method}, not {config.method}")
    ids = prompt_tokens(read_prompt(config), tokenizer, model.config.block_size)
    turn(model, config.run, config.tau, config.max_latent)
    lay_out(model, precision(device, config.dtype))
    if compiles(config.compile, device):
        say("compiling; the first tokens take a while")
        compile_ticks(model)

    with torch.inference_mode(), autocast(device, config.dtype):
        prompt = read_by(model, tokenizer, ids)
        colours = wants_colour(sys.stdout) and not config.plain
        if colours:
            print(legend(model.max_latent) + "\n")
        texts = [[] for _ in range(config.num_samples)]
        began = time.perf_counter()
        streams = [first_of(generate(model, tokenizer, ids, config), texts), *texts[1:]]
        try:
            for i, pieces in enumerate(streams, 1):
                if config.num_samples > 1:
                    print("\n\n" * (i > 1) + f"--- text {i} of {config.num_samples} ---")
                show(prompt, colours, dim=True)
                show(pieces, colours)
        except BrokenPipeError:
            if not config.html:
                raise
            mute()
            deque(streams[0], maxlen=0)  # what is still to be said, for the page
        took = time.perf_counter() - began

        steps = [piece.steps for pieces in texts for piece in pieces]
        mean = sum(steps) / max(1, len(steps))
        ended = sum(len(pieces) < config.max_new_tokens for pieces in texts)
        amounts = bar(steps, wants_colour(sys.stderr) and not config.plain)
        print(f"\n\n{len(steps)} tokens, {len(steps) / took:.1f} tokens/s, {mean:.2f} latent steps per token "
              f"{amounts}; ended by themselves: {ended} of {len(texts)} texts", file=sys.stderr)
        if config.html:
            note = f"{config.run}{dials(model)}, temperature {config.temperature:g}, seed {config.seed}"
            explained = [explain(model, tokenizer, ids + [piece.token for piece in text]) for text in texts]
            for text in explained:
                text[0].text = prompt[0].text
            page = html_page(note, model, tokenizer, explained, len(ids))
            write_whole(config.html, page)
            print(f"written: {config.html}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
