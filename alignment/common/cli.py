"""How every script of the pipeline reads its flags and fails: one clear line, exit code 2, no stack trace.

Usage in a script::

    def main() -> None:
        args = parser().parse_args()
        ...

    if __name__ == "__main__":
        run(main)
"""

import argparse
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

# Nothing the pipeline starts reports home; a user's own setting wins. The libraries read this when they are imported,
# so every script imports this module before them.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # of the hub's client, transformers, datasets, trl
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# Python looks for garbage a hundred times more rarely than by default. Imports make a million objects and none of it:
# that saves a second of each start. It stays so for the whole run.
gc.set_threshold(100_000, 20, 20)
# On a CPU it warns, wherever it is installed, of a kernel that nothing here uses; standard error is for errors.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class UserError(Exception):
    """A wrong input. Its text is one line that says what is wrong and where."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line and whose help shows each default."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add(self, flag: str, text: str, **options) -> None:
        """Add a flag; its help is `text` followed by the default, where there is one."""
        default = options.get("default")
        if default is not None and default is not False:
            text += f" (default: {default})"
        self.add_argument(flag, help=text.replace("%", "%%"), **options)

    def error(self, message: str) -> None:
        fail(message, self.prog)


def fail(message: str, program: str | None = None) -> None:
    """Print one line on standard error and exits with code 2."""
    line = " ".join(str(message).split())
    print(f"{program or os.path.basename(sys.argv[0])}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`: a `UserError` becomes one line and exit code 2, Ctrl-C and SIGTERM exit code 130."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        _say_stopped()
        raise SystemExit(130) from None


def command_lines(parser: Parser) -> Iterator[argparse.Namespace]:
    """Yield the flags of each command line of `FLAGS --then FLAGS ...`: the libraries are imported once for all.

    Their `is_last` says whether another one follows. All are parsed before the first one's turn. What else is wrong
    with a later one is found when its turn comes; what the earlier ones wrote stays. Number and size of engines
    should be the same in all.
    """
    lines: list[list[str]] = [[]]
    for word in sys.argv[1:]:
        if word == "--then":
            lines.append([])
        else:
            lines[-1].append(word)
    for number, args in enumerate([parser.parse_args(line) for line in lines], 1):
        if len(lines) > 1:
            print(f"[{number} of {len(lines)}]", flush=True)
        args.is_last = number == len(lines)
        yield args


def _say_stopped() -> None:
    print("\nstopped; the same command continues from here", file=sys.stderr, flush=True)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _excepthook(kind: type[BaseException], error: BaseException, trace: object) -> None:
    if issubclass(kind, KeyboardInterrupt):
        _say_stopped()
    else:
        sys.__excepthook__(kind, error, trace)


# From here on, not only inside `run`: the imports that follow take seconds, and a stop may come there too.
sys.excepthook = _excepthook
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, _interrupt)


def checked(kind: Callable, test: Callable[[float], bool], wanted: str) -> Callable:
    """Return an argparse type: `kind(text)` if it passes `test`, else an error that says what is wanted."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not test(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return convert


positive_int = checked(int, lambda v: v > 0, "a whole number above 0")
natural = checked(int, lambda v: v >= 0, "a whole number, 0 or more")
positive = checked(float, lambda v: 0 < v < float("inf"), "a number above 0")
non_negative = checked(float, lambda v: 0 <= v < float("inf"), "a number, 0 or more")
fraction = checked(float, lambda v: 0 <= v < 1, "a number from 0 up to (not including) 1")
