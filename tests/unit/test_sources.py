"""Data sets in every form that people have them in: the same rows, and errors that name the file."""

import bz2
import gzip
import json
import lzma
import shutil

import pytest
from datasets import Dataset, DatasetDict, load_dataset

from common.cli import UserError
from common.provenance import fingerprint
from common.sources import content_of, read_rows

ROWS = [{"prompt": "how are\u2028you? "}, {"prompt": "schön, 你好"}, {"prompt": "third"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def save(folder, form):
    """Write the rows in one of the forms; return the path."""
    path = folder / form
    plain = {"rows.jsonl": LINES, "bom.jsonl": "\ufeff" + LINES, "crlf.jsonl": LINES.replace("\n", "\r\n")}
    plain |= {"rows.json": json.dumps(ROWS), "bom.json": "\ufeff" + json.dumps(ROWS), "lines.json": LINES}
    plain["instances.json"] = json.dumps({"type": "text_only", "instances": ROWS})
    data, packed = Dataset.from_list(ROWS), {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    if form in plain:
        path.write_bytes(plain[form].encode())
    elif path.suffix in packed:
        path.write_bytes(packed[path.suffix].compress(LINES.encode()))
    elif form == "rows.parquet":
        data.to_parquet(path)
    elif form == "rows.csv":
        data.to_csv(path)
    elif form == "rows.arrow":
        data.save_to_disk(folder / "for_arrow")
        shutil.copy(next((folder / "for_arrow").glob("*.arrow")), path)
    elif form == "saved":
        data.save_to_disk(path)
    elif form == "saved_splits":
        DatasetDict(train=data, test=data.select([0])).save_to_disk(path)
    elif form == "folder_of_parquet":
        path.mkdir()
        data.to_parquet(path / "train-00000-of-00001.parquet")
    return path


FORMS = [
    *("rows.jsonl", "bom.jsonl", "crlf.jsonl", "rows.json", "bom.json", "lines.json", "instances.json"),
    *("rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.xz", "rows.parquet", "rows.csv", "rows.arrow"),
    *("saved", "saved_splits", "folder_of_parquet"),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    path = save(tmp_path, form)
    found = list(read_rows(str(path), "train"))
    assert [row for _, row in found] == ROWS
    assert all(where.startswith(f"{path}: ") for where, _ in found)


@pytest.mark.parametrize("form", FORMS)
def test_changed_content_is_known_and_equal_content_too(tmp_path, form, monkeypatch):
    for folder in ("first", "again", "other"):
        (tmp_path / folder).mkdir()
    first, again = save(tmp_path / "first", form), save(tmp_path / "again", form)
    monkeypatch.setitem(ROWS[1], "prompt", "another")
    monkeypatch.setitem(globals(), "LINES", LINES.replace("schön, 你好", "another"))
    other = save(tmp_path / "other", form)
    known = [content_of(str(path), "train") for path in (first, again, other)]
    assert known[0] == known[1] != known[2]


@pytest.mark.parametrize("form", ["rows.parquet", "rows.arrow", "rows.jsonl.gz"])
def test_torn_files_are_named(tmp_path, form):
    path = save(tmp_path, form)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError) as error:
        list(read_rows(str(path), "train"))
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_name_with_wildcards_is_one_file(tmp_path):
    path = tmp_path / "rows[1]*.parquet"
    Dataset.from_list(ROWS).to_parquet(path)
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows1.parquet")
    assert [row for _, row in read_rows(str(path), "train")] == ROWS


@pytest.mark.parametrize("name", ["absent.json", "absent.jsonl", "absent.parquet", "absent.jsonl.gz"])
def test_a_file_that_is_not_there_is_not_looked_for_on_a_hub(name):
    for look in (lambda: list(read_rows(name, "train")), lambda: content_of(name, "train")):
        with pytest.raises(UserError, match=f"{name}: no such file$"):
            look()


def put_into_the_hubs_cache(cache, rows, commit):
    """Make what `datasets` keeps of owner/name as it was at a commit, from which it serves the name offline."""
    Dataset.from_list(rows).to_parquet(cache / f"{commit}.parquet")
    made = cache / "made" / commit
    load_dataset("parquet", data_files=str(cache / f"{commit}.parquet"), cache_dir=str(made))
    folder = cache / "owner___name" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    for file in next(made.glob("parquet/*/*/*/")).iterdir():
        shutil.copy(file, folder / file.name.replace("parquet-", "name-"))
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "name"}))


def test_a_hubs_name_is_known_by_what_it_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    known = []
    for rows, commit in ((ROWS, "a" * 40), (ROWS[:1], "b" * 40)):
        put_into_the_hubs_cache(tmp_path, rows, commit)
        for _ in range(2):
            known.append(content_of("owner/name", "train"))
            assert [row for _, row in read_rows("owner/name", "train")] == rows
    assert known[0] == known[1] != known[2] == known[3]


def test_a_folder_of_data_is_known_by_all_of_its_files_whatever_they_are_called(tmp_path):
    """Of a folder with a config.json only a model's files would be looked at."""
    folder = save(tmp_path, "folder_of_parquet")
    (folder / "config.json").write_text("{}")
    before = content_of(str(folder), "train"), fingerprint(str(folder), "data")
    Dataset.from_list(ROWS[:1]).to_parquet(folder / "train-00000-of-00001.parquet")
    after = content_of(str(folder), "train"), fingerprint(str(folder), "data")
    assert all(one != other for one, other in zip(before, after, strict=True))
