"""Arguments and options that several commands share, and how a command tells what it made."""

from collections.abc import Callable, Iterable
from functools import reduce

from click import argument, command, option

from ..errors import StudyError


def options(told: str = "", **defaults: object) -> Callable:
    """An option for each of these names, with its default (whose type it has) and a help."""

    def add(command: Callable) -> Callable:
        for name, default in reversed(defaults.items()):
            flag = name.replace("_", "-")
            flags = f"--{flag}/--no-{flag}" if isinstance(default, bool) else f"--{flag}"
            command = option(flags, default=default, help=told, show_default=default != "")(command)
        return command

    return add


def several(name: str, told: str, *default: int | str, kind: type = str) -> Callable:
    """An option of words, or of whole numbers, with commas between them; ``none`` for none."""

    def read(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")] if text != "none" else []
        except ValueError:
            raise StudyError(f"--{name} {text!r}: give whole numbers with commas between them") from None

    shown = ",".join(map(str, default)) or "none"
    return option(f"--{name}", default=shown, type=read, metavar="A,B", help=told, show_default=True)


def together(*parts: Callable) -> Callable:
    """Several arguments and options as one decorator, in this order."""
    return lambda command: reduce(lambda made, part: part(made), reversed(parts), command)


runs = argument("runs", nargs=-1, metavar="[VARIANT/seedN]...")
profile = argument("profile")
of_runs = together(argument("results_dir"), runs)
target = options("a name of the study, a hub id or a model folder", target="smollm2-135m-instruct")
device, dtype = options(device="auto"), options("auto, float32 or bfloat16", dtype="auto")
prompts = options("study, human-eval, a .jsonl file or a corpus folder", prompts="study")
threads = options("of the CPU (0: PyTorch's own choice)", threads=0)
timed = together(
    options("at most, of an answer", new_tokens=64), options("timed; their median counts", repeats=3), prompts, threads
)
# What a profile's `dialogues` and `speed` may say, too.
of_dialogues = together(
    options("dialogues whose user turns are answered (default: self-generated)", user_turns=""),
    options("documents to write", train=0, validation=0, evaluation=0),
    options(max_length_tokens=512, max_user_tokens=96, temperature=1.0, top_p=0.95, batch_size=32, seed=0),
    options(thinking=False),
    options("write plain text, the first so many tokens as prompt (0: dialogues)", text_prefix_tokens=0),
    options("write many turns, up to the length, with answers of at most so many (0: one turn)", max_answer_tokens=0),
)
of_speed = together(
    timed, options("how many, from the file's start", prompts_per_category=2),
    several("chains", "their lengths", 2, 4, 6, 8, kind=int),
    several("tree", "depth, top_k and total of EAGLE's tree", 8, 10, 60, kind=int),
    options("of transformers' prompt lookup (0: not timed)", lookup_tokens=10),
)  # fmt: skip


def option_names(part: Callable) -> list[str]:
    """The options that it adds to a command."""
    return [own.name for own in command()(part(lambda **given: None)).params]


def tell(lines: Iterable) -> None:
    """Print what was written, a line each."""
    print(*lines, sep="\n")
