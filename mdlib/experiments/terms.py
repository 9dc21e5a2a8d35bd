"""What the runs of one folder have in common; a study and a comparison keep it beside them."""

import json
from pathlib import Path

from mdlib.data.windows import DataError
from mdlib.utils import whole_file


def claim(out: Path, terms: dict, what: str) -> None:
    """Note the terms in out/terms.json, or refuse other ones than those of the runs that are there.

    what: the folder holds, as the message calls it.

    Raises:
        DataError: runs on other terms are there.
    """
    note = out / "terms.json"
    terms = json.loads(json.dumps(terms))  # as it reads back: a tuple is a list
    if note.exists() and any(out.glob("*/run.json")):
        before = json.loads(note.read_text())
        changed = [key for key in {**before, **terms} if before.get(key) != terms.get(key)]
        if changed:
            told = ", ".join(f"{key}: {before.get(key)!r} is not {terms.get(key)!r}" for key in changed)
            raise DataError(f"{out} holds {what} on other terms ({told}): choose another --out or those terms")
    with whole_file(note) as path:
        path.write_text(json.dumps(terms, indent=1) + "\n")
