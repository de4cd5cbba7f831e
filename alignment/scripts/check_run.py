"""Checks that the inputs of a run's outputs are still those that the outputs were made from.

Reads   RUN_DIR/data/*.json, eval/*/*.json, models/*/settings.json, results/kl_*.json, and every file whose SHA-256
        they record: prompts, data files, models. Relative names are looked up from the current folder.
Writes  nothing. One line per output; exit code 1 where any input was changed or removed, or was never recorded.

    python alignment/scripts/check_run.py --run_dir alignment/runs/quickstart
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import provenance
from common.cli import Parser, UserError, run
from common.record_stream import read_provenance


def outputs(run_dir: Path) -> list[Path]:
    """Return the files of a run that record their inputs, by name. Raises `UserError` if there is none."""
    found = [path for path in run_dir.glob("data/*.json") if not path.name.endswith("_logps.json")]
    for pattern in ("eval/*/*.json", "models/*/settings.json", "results/kl_*.json"):
        found += run_dir.glob(pattern)
    if not found:
        raise UserError(f"{run_dir}: not a run folder: no data, eval, models or results")
    return sorted(found)


def changes(path: Path, look_up) -> list[str]:
    """Return what of an output's recorded inputs is not so any more, one text each."""
    try:
        stages = read_provenance(path)
        found = [line for record in stages.values() for line in provenance.changes(record, look_up)]
    except UserError as error:
        return [str(error)]
    return list(dict.fromkeys(found)) if stages else ["records no inputs"]


def main() -> None:
    flags = Parser(__doc__)
    flags.add("--run_dir", "folder of the run", required=True)
    run_dir = Path(flags.parse_args().run_dir)
    look_up = functools.cache(provenance.fingerprint)  # most outputs share the base model
    wrong = 0
    for path in outputs(run_dir):
        found = changes(path, look_up)
        wrong += bool(found)
        print(f"{path.relative_to(run_dir)}: {'; '.join(found) or 'ok'}", flush=True)
    print(
        f"check_run: {wrong} outputs differ from what is recorded" if wrong else "check_run: all inputs are unchanged"
    )
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
