"""comparison.json and comparison.html: systems side by side, and what follows from their figures."""

from pathlib import Path

from mdlib.data.windows import WindowSet
from mdlib.evaluation.codec_quality import choose_codec
from mdlib.reports import charts, pages, plots


def conclusions(systems: dict[str, dict]) -> dict:
    """Answers, each a dictionary with value and sentence: which system by gain, by Fréchet distance and by identity,
    and which kind of codec by the rule of `codec_quality.choose_codec`."""
    measured = {name: figures for name, figures in systems.items() if "error" not in figures}
    return {**_best(measured), "codec": _codec(measured)}


def _codec(systems: dict[str, dict]) -> dict:
    """VQ or KL: the codecs of best PSNR with and without a codebook."""
    best = {}
    for name, figures in systems.items():
        psnr, usage = figures["reconstruction"]["psnr_db"]["value"], figures["codebook"]["usage"]["value"]
        kind = "kl" if usage is None else "vq"
        if psnr is not None and psnr > best.get(kind, {"psnr_db": 0.0})["psnr_db"]:
            best[kind] = {"psnr_db": psnr, "usage": usage, "system": name}
    if len(best) < 2:
        reason = "it takes a codec with a codebook and one without"
        return {"value": None, "reason": reason, "sentence": f"VQ or KL codec: not measured ({reason})."}
    choice, names = choose_codec(best["vq"], best["kl"]), {kind: one["system"] for kind, one in best.items()}
    sentence = f"{choice['sentence']} (VQ: {names['vq']}, KL: {names['kl']}.)"
    return {"value": choice["choice"], **choice, "systems": names, "sentence": sentence}


def _best(systems: dict[str, dict]) -> dict:
    if not systems:
        return {}
    gains = {name: figures["augmentation"]["gain"] for name, figures in systems.items()}
    best = max(gains, key=lambda name: gains[name]["value"])
    apart = [name for name in gains if gains[name]["ci95"][1] < gains[best]["ci95"][0]]
    how = f"its interval lies above that of {', '.join(apart)}" if apart else "but the intervals of all systems overlap"
    sentence = f"Largest gain: {best}, {pages.written(gains[best], 'points')}; {how}."
    if gains[best]["ci95"][0] <= 0:
        sentence = f"No system's generated windows help for certain. {sentence}"
    found = {"gain": {"value": best, "sentence": sentence}}
    for key, title, pick, section, name in (
        ("fidelity", "Nearest to real windows by Fréchet distance", min, "fidelity", "fd_ratio"),
        ("identity", "Most often recognised as their user", max, "identity", "accuracy"),
    ):
        values = {system: figures[section][name]["value"] for system, figures in systems.items()}
        values = {system: value for system, value in values.items() if value is not None}
        if values:
            best = pick(values, key=values.get)
            figure = pages.written(values[best], pages.describe(section, name)["unit"])
            found[key] = {"value": best, "sentence": f"{title}: {best} ({figure})."}
    return found


def write_comparison(result: dict, windows: dict[str, WindowSet], out: str | Path) -> None:
    """Write comparison.json and comparison.html into `out`.

    Args:
        result: settings, conclusions and systems (figures, or an error, by name), with mdlib and created.
        windows: "real" and those of each measured system, for a look; may be empty.
    """
    measured = {name: figures for name, figures in result["systems"].items() if "error" not in figures}
    shown = {"gains": charts.gains(measured), "learning": charts.learning(measured)} if measured else {}
    if windows:
        shown["windows"] = plots.side_by_side(windows)
    pages.write(result, Path(out), "comparison", shown, systems=measured)
