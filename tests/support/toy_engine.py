"""An engine without a model, for test_scale_out.py: what it does is counted in files. Imported in Ray's actors."""

import os
import time
from pathlib import Path

from common import scale_out
from common.cli import UserError


class Squares:
    """Squares whole numbers, half a second each, and says which process did it.

    Every call is a line of `folder`/begun. The number -1 breaks the engine, -2 is a wrong input, -3 a bug.
    """

    def __init__(self, folder: Path) -> None:
        self.begun = folder / "begun"

    def __call__(self, number: int) -> tuple[int, int]:
        with open(self.begun, "a") as file:
            file.write(f"{number}\n")
        if number == -1:
            scale_out.end_actor()
            raise UserError("broken again")
        if number == -2:
            raise UserError("a wrong number")
        if number == -3:
            raise ZeroDivisionError("a bug")
        time.sleep(0.5)
        return number * number, os.getpid()


class Devices:
    """Says which GPUs Ray gave it."""

    def __call__(self, question: object) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]
