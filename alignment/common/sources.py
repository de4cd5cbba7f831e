"""Rows of a data set as people have it: a file, a folder, or a name on a hub.

JSON and JSONL are read here, so that an error names the file and the line. `datasets` reads all else, one row after
the other: Parquet, Arrow, CSV, compressed JSONL, folders that it saved, folders of such files, and the hub's names.
"""

import glob
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from common.cli import UserError, first_line
from common.provenance import folder_sha256
from common.record_stream import NO_ROWS, members
from common.records import not_json, sha256

# What `datasets` calls the reader of a file, by the end of the file's name.
READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


def read_rows(source: str, split: str) -> Iterator[tuple[str, object]]:
    """Yield (where, row) for every row of a source; `where` is for error messages. Raises `UserError`."""
    path = Path(source)
    if path.is_dir():
        yield from _numbered(source, _folder_rows(source, split))
    elif _is_hub_name(path):
        yield from _numbered(source, _hub_data(source, split))
    elif _reader(path) is not None:
        yield from _numbered(source, _table_rows(source))
    elif path.suffix == ".jsonl":
        yield from _lines(path)
    else:
        yield from _json_rows(path)


def content_of(source: str, split: str) -> dict:
    """Return what a result knows a source by: of files and folders a hash, of a hub's name `datasets`' fingerprint.

    Raises `UserError` if it cannot be read.
    """
    path = Path(source)
    if _is_hub_name(path):
        return {"split": split, "fingerprint": _hub_data(source, split)._fingerprint}
    if path.is_dir():
        # A saved folder's JSON files hold times and random names: its Arrow files are what it holds.
        arrow = sorted(path.rglob("*.arrow")) if _is_saved(path) else []
        whole = (
            hashlib.sha256("".join(map(sha256, arrow)).encode()).hexdigest()
            if arrow
            else folder_sha256(path, is_model=False)
        )
        return {"split": split, "sha256": whole}
    return {"sha256": sha256(path)}


def _is_hub_name(path: Path) -> bool:
    """Return whether it can only be a hub's. Raises `UserError` for a file's name that no file has."""
    if path.exists():
        return False
    if path.suffix in (".json", ".jsonl", *READERS, *COMPRESSED):
        raise UserError(f"{path}: no such file")
    return True


def _reader(path: Path) -> str | None:
    if path.suffix in COMPRESSED:
        return READERS.get(Path(path.stem).suffix, "json")
    return READERS.get(path.suffix)


def _numbered(source: str, rows) -> Iterator[tuple[str, object]]:
    rows, number = iter(rows), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:  # Arrow's, pandas' and the decompressors' own kinds
            raise UserError(f"{source}: row {number}: cannot be read ({first_line(error)})") from None
        yield f"{source}: row {number}", row
        number += 1


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    if _holds_lines(path):
        yield from _lines(path)
        return
    has_rows = False
    for key, value in members(path, list_alone=True):
        has_rows |= key == "instances"
        if isinstance(key, int):
            yield f"{path}: row {key}", value
    if not has_rows:
        raise UserError(f"{path}: {NO_ROWS}")


def _holds_lines(path: Path) -> bool:
    """Return whether a .json file is JSONL: its first two lines are an object each."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            first, second = (json.loads(file.readline()) for _ in range(2))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(second, dict)


def _lines(path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        # Only \n ends a line: JSON's texts may hold U+2028 and the like.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {number}", json.loads(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text (byte {_first_bad_byte(path)})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: {not_json(error)}") from None


def _first_bad_byte(path: Path) -> int:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def _folder_rows(folder: str, split: str):
    from datasets import DatasetDict, load_from_disk

    if not _is_saved(Path(folder)):
        return _load(f"{folder}: not a folder of a data set", folder, split=split, streaming=True)
    try:
        data = load_from_disk(folder)
    except Exception as error:  # files that are missing, torn, of another format: each is another kind
        raise UserError(f"{folder}: not a folder saved by datasets ({first_line(error)})") from None
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    return data


def _table_rows(source: str):
    path = Path(source)
    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    # Streamed: the reader's cache would know a file by its name and time only.
    return _load(
        f"{source}: cannot be read",
        _reader(path),
        data_files=glob.escape(source),
        split="train",
        streaming=True,
        **options,
    )


def _hub_data(name: str, split: str):
    return _load(f"{name}: no such file, and not to be had from the hub", name, split=split)


def _load(refusal: str, name: str, **options):
    from datasets import load_dataset
    from datasets.utils import logging

    logging.set_verbosity(logging.CRITICAL)  # it logs errors that it raises as well
    logging.disable_progress_bar()
    try:
        return load_dataset(name, **options)
    except Exception as error:  # the readers and the hub's client raise many kinds; each means "cannot be had"
        raise UserError(f"{refusal} ({first_line(error)})") from None
