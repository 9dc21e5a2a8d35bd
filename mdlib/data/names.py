"""Window numbers from file names: which number in them counts the windows, and what labels their recordings."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

# What may stand in a name and differ from window to window, apart from plain numbers.
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_HASH = r"(?<![0-9a-z])(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{8,}(?![0-9a-z])"  # with letters and digits
_SIZE = r"(?<![0-9a-z])\d{2,4}x\d{2,4}(?![0-9a-z])"  # 256x256
_DATE = r"(?<!\d)(?:19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d"  # 2024-01-05, 20240105
_AFTER_DATE = r"[T\s_.-]?(?!00)[0-2]\d[-_.:h]?[0-5]\d[-_.:m]?[0-5]\d(?!\d)"  # 123007, 12-30-07; 000012 is a number
_CLOCK = r"(?<!\d)[0-2]\d[-.:h][0-5]\d[-.:m][0-5]\d(?!\d)"  # 12-30-07

# Words before a number that counts windows, or recordings.
_WINDOW_WORD = re.compile(r"(?:doppler|win|window|frame|slice|segment|(?:^|[\W_])w)[\W_]?$", re.IGNORECASE)
_RECORDING_WORD = re.compile(r"(?:rec|recording|session|take|trial|day|run|case|seq|cam|seed)[\W_]?$", re.IGNORECASE)


class _Column:
    """The texts at one position of names with the same pattern."""

    def __init__(self, kind: str, place: int, around: Sequence[str], texts: list[str]) -> None:
        self.kind, self.texts = kind, texts
        self.values = texts if kind in ("id", "size") else [int(re.sub(r"\D", "", text)) for text in texts]
        self.count = len(set(self.values))
        word = bool(_WINDOW_WORD.search(around[place])) - bool(kind == "date" or _RECORDING_WORD.search(around[place]))
        self.hint = -2 if "/" in "".join(around[place + 1 :]) else word  # the higher, the more likely it counts windows
        self.steps = [b - a for a, b in pairwise(sorted(set(self.values)))] if self.values is not texts else []

    def fast(self) -> bool:
        """Whether it is a time or a sample rather than a count."""
        fast = 8 if len(self.values) >= 12 else 1000  # few windows may have been chosen far apart
        return self.kind == "time" or max(self.values) >= 10**8 or median(self.steps or [0]) >= fast

    def random(self) -> bool:
        """Whether it is an id without an order: large, spread over the whole range, in irregular steps."""
        large = self.kind == "number" and self.count >= 8 and max(self.values) >= 10**5
        usual = median(self.steps or [1])
        regular = sum(0.75 * usual <= step <= 1.33 * usual for step in self.steps)
        return large and 2 * sum(self.steps) >= max(self.values) and 2 * regular < len(self.steps)


def parse_names(names: Sequence[str]) -> list[tuple[str, int]]:
    """Recording and window number of each name: of the paths below one user's folder, without extension.

    Among names that differ only in numbers, one that varies is the window's; others label recordings if they repeat. A
    time, or a number that grows fast, is replaced by the position in its recording. A name without a number that can
    be trusted is a recording of its own.
    """
    pattern, alike, found = _pattern(names), defaultdict(list), {}
    for name in dict.fromkeys(names):
        alike[tuple(pattern.sub(lambda match: f"\0{match.lastgroup}\0", name).split("\0"))].append(name)
    for pieces, some in alike.items():
        found |= dict(zip(some, _parse_alike(some, pieces, pattern), strict=True))
    return [found[name] for name in names]


def _pattern(names: Sequence[str]) -> re.Pattern:
    """Finds what may vary in a name. Hashes of digits only are known by the length of the others."""
    lengths = sorted({len(text) for name in names for text in re.findall(_HASH, name, re.IGNORECASE)}, reverse=True)
    ids = "|".join([_UUID, *(rf"(?<![0-9a-z])[0-9a-f]{{{length}}}(?![0-9a-z])" for length in lengths)])
    times = rf"(?P<time>{_DATE}{_AFTER_DATE}|{_CLOCK})|(?P<date>{_DATE}(?!\d))"
    return re.compile(rf"(?P<id>{ids})|(?P<size>{_SIZE})|{times}|(?P<number>\d+)", re.IGNORECASE)


def _parse_alike(names: Sequence[str], pieces: Sequence[str], pattern: re.Pattern) -> list[tuple[str, int]]:
    """Recording and number of names that are alike: of the same `pieces`, texts and kinds of columns by turns."""
    texts, kinds = pieces[::2], pieces[1::2]
    found = [[match[0] for match in pattern.finditer(name)] for name in names]
    columns = [_Column(kind, i, texts, [row[i] for row in found]) for i, kind in enumerate(kinds)]
    window = _window_column(columns)
    if not window or window.random():
        return [(name, 0) for name in names]
    labels = _labels(columns, window)
    kept = [i for i, c in enumerate(columns) if c is not window and (c.count == 1 or c in labels)]
    recordings = [
        "".join(text + (row[i] if i in kept else "") for i, text in enumerate(texts[:-1])) + texts[-1] for row in found
    ]
    keys = list(zip(recordings, window.values, strict=True))
    if not window.fast():
        return keys
    first: dict[str, int] = {}
    places = {key: place - first.setdefault(key[0], place) for place, key in enumerate(sorted(set(keys)))}
    return [(recording, places[recording, number]) for recording, number in keys]


def _window_column(columns: Sequence[_Column]) -> _Column | None:
    """The column that counts the windows, the last of equals."""
    varying = [c for c in columns if c.count > 1] or columns
    ranks = {
        (_different_rows(c, *_labels(columns, c)), not c.random(), c.hint, c.count, not c.fast(), place): c
        for place, c in enumerate(varying)
        if c.kind not in ("id", "size") and (c.hint > -2 or c.count in (1, len(c.texts)))  # else of folders
    }
    return ranks[max(ranks)] if ranks else None


def _labels(columns: Sequence[_Column], window: _Column) -> list[_Column]:
    """The columns that repeat and so tell recordings apart."""
    labels = [c for c in columns if c is not window and c.kind != "size" and 1 < c.count <= len(c.texts) / 2]
    if len(window.texts) < 4 * _different_rows(*labels):
        # In recordings this short, what follows from the window's number is a property of the window, like its time.
        labels = [c for c in labels if _different_rows(c, window) > window.count]
    return labels


def _different_rows(*columns: _Column) -> int:
    return len(set(zip(*(column.values for column in columns), strict=True)))
