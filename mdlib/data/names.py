"""What file names say: which number of a name is the window's, and which recording it belongs to."""

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from statistics import median

_COPY = re.compile(
    r"[\W_]+(?:copy|kopie|copia|copie|cópia|副本|コピー|копия|복사본)(?=[\W\d_]|$)(?:[\s_-]{0,2}\(?\d+\)?)?|"
    r"^(?:copy of|kopie von|copia d[ei]) ",
    re.IGNORECASE,
)
_CHANGES = r"aug(?:mented|mentation)?|[hv]?flip(?:ped)?|mirror(?:ed)?|rot(?:ated)?|nois[ey]"
_AUGMENTED = re.compile(
    rf"[\W_]+(?:aug(?:mented|mentation)?[\W_]?\d+|(?:{_CHANGES})-?\d*)(?=[\W_]|$)|^(?:orig(?:inals?)?|{_CHANGES})\d*/",
    re.IGNORECASE,
)
_DOWNLOADED_AGAIN = re.compile(r"(.*\S)(?:\s?\(\d+\)|\s\d+)")

_CLOCK = r"(?:[01]\d|2[0-3])(?P<c{0}>{1})[0-5]\d[-_.:m]?[0-5]\ds?(?:[.,]\d{{1,6}}|(?P=c{0})\d{{3}}(?:\d{{3}})?)?(?!\d)"
_DATE = r"(?<!\d)(?:19|20)\d\d(?P<s>[-_.]?)(?:0[1-9]|1[0-2])(?P=s)(?:0[1-9]|[12]\d|3[01])"
_CLOCK_AFTER_DATE = rf"(?P<between>[T\s_.-]{{0,3}}|\sat\s)(?P<clock>{_CLOCK.format(1, '[-_.:h]?')})"
_CLOCK_ALONE = rf"(?<!\d)(?P<time>{_CLOCK.format(2, '[-.:h]')})"
_OTHER = r"(?P<uuid>[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12})|(?P<size>(?<![0-9a-z])\d{2,4}x\d{2,4}(?![0-9a-z]))"

# What a number means by the text next to it. A number with a unit or a version is a window's only if no other varies.
_WINDOW_WORD = re.compile(r"(?:doppler|(?:^|[\W_])w|win|window|frame|slice|seg|segment|chunk)[\W_]?$", re.IGNORECASE)
_RECORDING_WORD = re.compile(
    r"(?:^|[\W_]|0)(?:r|s|rec|recording|session|ses|take|trial|day|run|walk|case|seq|sequence|scene|cam|camera|radar|"
    r"sensor|antenna|rx|tx|channel|ch|record|video|clip)[\W_]?$",
    re.IGNORECASE,
)
_UNLIKELY_BEFORE = re.compile(r"(?:(?:^|[\W_])(?:v|ver|version|id|seed)|^user|^subject)[\W_]?$", re.IGNORECASE)
_UNLIKELY_AFTER = re.compile(r"\s?(?:[kmg]?hz|dbm?|px|fps|bits?|[cm]?m|m?s|sec|deg|kmh)(?![a-z])", re.IGNORECASE)


@dataclass
class _Name:
    """A name in pieces: text and separators by turns. In it every number is one digit that says what kind it is."""

    pieces: list[str]
    tokens: list[str]  # the numbers as they stand in the name
    kept: list[int] = field(default_factory=list)  # the numbers that are not part of a random piece

    @property
    def template(self) -> str:
        return "".join(self.pieces)


_INT, _UUID, _SIZE, _DAY, _TIME = "01234"


def parse_names(names: Sequence[str], pools: Sequence[Hashable]) -> list[tuple[str, int | tuple[int, ...] | None]]:
    """Recording and number of each name: the number that varies within a pool and counts fastest is the window's.

    What is random (hashes, upload ids), an image size, or the mark of a copy is left out of the recording.

    Args:
        names: paths below the folder of a user, without extension.
        pools: what each name varies in: user, condition and part.

    Returns:
        (recording, number) of each name. The number is a tuple where it is a time, which orders windows but does not
        count them, and None where the name has no number that can be trusted.
    """
    names = _originals(names, pools)
    pattern = _token_pattern(names)
    parsed = [_parse(name, pattern) for name in names]
    _drop_random_pieces(parsed, pools)
    alike = defaultdict(list)
    for row, name in enumerate(parsed):
        alike[name.template].append(row)
    found: list = [None] * len(names)
    for template, rows in alike.items():
        columns, values = _columns(template, [parsed[row] for row in rows])
        window, labels, varying = _choose(template, columns, values, [pools[row] for row in rows])
        for place, row in enumerate(rows):
            if window is None:
                found[row] = names[row], None
                continue
            gone = {token for c in varying - labels | {window} for token in columns[c]}
            found[row] = _text(parsed[row], gone), values[window][place]
    return found


def natural_key(name: str) -> tuple:
    """Sorts names as people do: w2 before w10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)), name


def _originals(names: Sequence[str], pools: Sequence[Hashable]) -> list[str]:
    """Names without the marks of copies and augmentation, as long as a number remains."""
    stripped = list(names)
    for mark in (_COPY, _AUGMENTED):
        stripped = [rest if re.search(r"\d", rest := mark.sub("", name)) else name for name in stripped]
    # "x (1)" is a copy of x if x exists and is one of several windows; else (1), (2), ... may be the windows' numbers.
    everything = set(zip(pools, stripped, strict=True))
    kinds = Counter((pool, re.sub(r"\d+", "0", name)) for pool, name in everything)
    for row, (pool, name) in enumerate(zip(pools, stripped, strict=True)):
        match = _DOWNLOADED_AGAIN.fullmatch(name)
        if match and (pool, match[1]) in everything and kinds[pool, re.sub(r"\d+", "0", match[1])] > 1:
            stripped[row] = match[1]
    return stripped


def _token_pattern(names: Sequence[str]) -> re.Pattern:
    """Times of day count only if every name (with a date) has one: 000059 may be a time, 000060 cannot."""
    dated = [name for name in names if re.search(_DATE, name)]
    clocks = [m["clock"] for name in dated if (m := re.search(_DATE + _CLOCK_AFTER_DATE, name, re.IGNORECASE))]
    timed = len(clocks) == len(dated) and not all(clock.startswith("0000") for clock in clocks)
    day = rf"(?P<date>{_DATE})" + (_CLOCK_AFTER_DATE if timed else r"(?!\d)")
    alone = not dated and all(re.search(_CLOCK_ALONE, name) for name in names)
    return re.compile("|".join([_OTHER, day, *([_CLOCK_ALONE] if alone else []), r"\d+"]), re.IGNORECASE)


def _parse(name: str, pattern: re.Pattern) -> _Name:
    text, tokens, end = "", [], 0
    for match in pattern.finditer(name):
        groups = match.groupdict()
        text, end = text + name[end : match.start()], match.end()
        if groups["date"]:
            text += _DAY + (groups.get("between") or "") + (_TIME if groups.get("clock") else "")
            tokens += [groups["date"], *filter(None, [groups.get("clock")])]
        else:
            text += _UUID if groups["uuid"] else _SIZE if groups["size"] else _TIME if groups.get("time") else _INT
            tokens.append(match[0])
    return _Name(re.split(r"([\W_]+)", text + name[end:]), tokens)


def _drop_random_pieces(parsed: Sequence[_Name], pools: Sequence[Hashable]) -> None:
    """Empty the pieces whose text differs from name to name within a pool, and note the numbers that are left."""
    groups = defaultdict(list)
    for row, name in enumerate(parsed):
        groups[len(name.pieces)].append(row)
    for length, rows in groups.items():
        size = len(rows) - len({pools[row] for row in rows})
        texts = [len({(pools[row], parsed[row].pieces[place]) for row in rows}) for place in range(length)]
        random = {place for place in range(0, length, 2) if 2 * (texts[place] - (len(rows) - size)) > size}
        for row in rows:
            name = parsed[row]
            ends = [*accumulate(len(re.findall(r"\d", piece)) for piece in name.pieces)]
            for place in random:
                name.pieces[max(place - 1, 0)] = name.pieces[place] = ""
            starts = [0, *ends]
            name.kept = [t for p in range(length) if p not in random for t in range(starts[p], ends[p])]


def _columns(template: str, names: Sequence[_Name]) -> tuple[list[tuple[int, ...]], list[list]]:
    """The numbers of a template, as places among a name's kept ones, and their values in each name. A decimal number
    whose two halves vary is one."""
    kinds = re.findall(r"\d", template)
    raw = [[int("".join(re.findall(r"\d", n.tokens[n.kept[c]]))) if k != _UUID else n.tokens[n.kept[c]] for n in names]
           for c, k in enumerate(kinds)]  # fmt: skip
    columns, values = [], []
    gaps = re.split(r"\d", template)[1:]
    for c, kind in enumerate(kinds):
        decimal = c and kind == kinds[c - 1] == _INT and gaps[c - 1] == "." and len(columns[-1]) == 1
        if decimal and len(set(raw[c])) > 1 and len(set(raw[c - 1])) > 1:
            columns[-1], values[-1] = (c - 1, c), [*zip(raw[c - 1], raw[c], strict=True)]
            continue
        columns.append((c,))
        values.append([(value,) for value in raw[c]] if kind in (_DAY, _TIME) else raw[c])
    return columns, values


def _choose(template: str, columns: list, values: list[list], pools: list) -> tuple[int | None, set[int], set[int]]:
    """The column of the window number (None: there is none), those that tell recordings apart, and all that vary."""
    places = [match.start() for match in re.finditer(r"\d", template)]
    kind = {c: template[places[column[0]]] for c, column in enumerate(columns)}
    around = {
        c: (template[: places[column[0]]], template[places[column[-1]] + 1 :]) for c, column in enumerate(columns)
    }

    def level(c: int) -> int:
        before, after = around[c]
        if _UNLIKELY_BEFORE.search(before) or _UNLIKELY_AFTER.match(after):
            return 3
        return 2 if "/" in after else 1 if kind[c] == _DAY or _RECORDING_WORD.search(before) else 0

    sizes = Counter(pools)
    rows = [row for row, pool in enumerate(pools) if sizes[pool] > 1]
    if not rows:
        usable = [c for c in kind if kind[c] not in (_UUID, _SIZE) and level(c) < 3]
        return (usable[-1] if usable else None), set(), set()
    within = {c: defaultdict(set) for c in kind}
    for c in kind:
        for row in rows:
            within[c][pools[row]].add(values[c][row])
    varying = [c for c in kind if max(map(len, within[c].values())) > 1]
    count = {c: max(map(len, within[c].values())) for c in varying}

    def keys(some) -> Counter:
        return Counter((pools[row], *(values[c][row] for c in some)) for row in rows)

    def sparse(c: int) -> int:
        if kind[c] == _TIME or isinstance(values[c][0], tuple):
            return 1
        most = max(within[c].values(), key=len)
        return 2 * (max(most) - min(most) >= 16 * len(most))

    usable = [c for c in varying if kind[c] not in (_UUID, _SIZE)]
    candidates = [c for c in usable if not _random(max(within[c].values(), key=len))]
    scores = []
    for c in candidates:
        labels = sorted((d for d in varying if d != c and kind[d] != _SIZE), key=count.get)
        # What only repeats the window number, such as its time, tells no recordings apart.
        while labels and len(rows) < 2 * len(keys(labels)):
            spare = next((d for d in labels[::-1] if len(keys({c, *labels} - {d})) == len(keys({c, *labels}))), None)
            if spare is None:
                break
            labels.remove(spare)
        recordings, most = keys(labels), max(count[d] for d in candidates if sparse(d) == sparse(c))
        alone = 2 * sum(n == 1 for n in recordings.values()) > len(recordings)
        short = len(rows) < 3 * len(recordings)
        named = not _WINDOW_WORD.search(around[c][0])
        doubled = len(rows) - len(keys({c, *labels}))
        score = (doubled, alone, level(c), short, sparse(c), 4 * count[c] < most, named, -c)
        scores.append((score, c, set(labels)))
    if not scores:
        return None, set(), set(varying)
    return *min(scores)[1:], set(varying)


def _random(values: set) -> bool:
    """Whether numbers are ids without an order: large, spread over their whole range, and with irregular steps."""
    if len(values) < 8 or isinstance(next(iter(values)), tuple) or max(values) < 10**5:
        return False
    steps = [b - a for a, b in pairwise(sorted(values))]
    usual, extent = median(steps), max(values) - min(values)
    regular = sum(0.75 * usual <= step <= 1.33 * usual for step in steps)
    return 2 * extent > max(values) and extent >= 16 * len(values) and 2 * regular < len(steps)


def _text(name: _Name, gone: set[int]) -> str:
    """The name as it was, without its random pieces and without the kept numbers in `gone`."""
    kept = iter((place, name.tokens[token]) for place, token in enumerate(name.kept))
    texts = ("" if place in gone else token for place, token in kept)
    return re.sub(r"\d", lambda _: next(texts), name.template)
