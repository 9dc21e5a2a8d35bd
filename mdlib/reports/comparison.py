"""The comparison's figures as comparison.json, and as a page that opens offline."""

import html
import json
from functools import partial
from pathlib import Path

from mdlib.data.windows import WindowSet
from mdlib.evaluation.codec_quality import choose_codec
from mdlib.reports import plots
from mdlib.reports.report import embedded, page, table
from mdlib.utils import whole_file

# What was said of the two first designs before anything was measured, beside what is measured of them here.
CLAIMED = ("vqvae-transformer", "vae-diffusion")
CLAIMS = {
    "memory": ("about 8 GB of a GPU", "about 15 GB of a GPU"),
    "training time": ("medium", "long"),
    "generation speed": ("fast, 2 to 3 times as fast as diffusion", "slow, many denoising steps"),
}


def _number(figure: dict, digits: int) -> str:
    return "–" if figure["value"] is None else f"{figure['value']:.{digits}f}"


def _memory(gigabytes: float | None) -> str:
    return "–" if gigabytes is None else f"{gigabytes:.1f}"


def _percent(figure: dict, digits: int = 1) -> str:
    return "–" if figure["value"] is None else f"{100 * figure['value']:.{digits}f}"


def _gain(figure: dict) -> str:
    low, high = figure["ci95"]
    return f"{100 * figure['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _trained(training: dict, part: str) -> str:
    return f"{training[f'{part}_minutes']:.1f} ({training[f'{part}_steps']})"


def _ratio(figures: dict, name: str) -> str:
    found = figures["physics"][name]
    return "–" if found.get("ratio") is None else f"{found['ratio']:.2f}"


def _beside_real(figure: dict) -> str:
    return "–" if figure["value"] is None else f"{100 * figure['value']:.1f} ({100 * figure['real']:.1f})"


def _found(figures: dict, section: str, name: str) -> dict:
    """A figure that reports of earlier versions lack."""
    return figures[section].get(name, {"value": None})


ROWS = {  # what it is: how it reads in a system's figures
    "PSNR of test windows, dB": lambda f: _number(f["reconstruction"]["psnr_db"], 1),
    "SSIM of test windows": lambda f: _number(f["reconstruction"]["ssim"], 3),
    "accuracy before → after the codec, %": lambda f: " → ".join(
        _percent(f["reconstruction"][key]) for key in ("identity_accuracy_before", "identity_accuracy")
    ),
    "codes used, %": lambda f: _percent(f["codebook"]["usage"]),
    "perplexity of the codebook": lambda f: _number(f["codebook"]["perplexity"], 0),
    "distinctive codes a user, mean (least)": lambda f: (
        f"{_number(f['codebook']['distinctive_codes_per_user'], 0)} "
        f"({_number(f['codebook']['distinctive_codes_least'], 0)})"
        if f["codebook"]["usage"]["value"] is not None
        else "–"
    ),
    "identity of generated windows, % (the judges' own)": lambda f: (
        f"{_percent(f['identity']['accuracy'])} ({_percent(f['identity']['classifier_accuracy'])})"
    ),
    "equal error rate of verification, % (of real windows)": lambda f: _beside_real(
        _found(f, "identity", "verification_eer")
    ),
    "Fréchet distance over that of real windows": lambda f: _number(f["fidelity"]["fd_ratio"], 2),
    "precision; recall": lambda f: "; ".join(
        _number(_found(f, "fidelity", name), 2) for name in ("precision", "recall")
    ),
    "diversity of a user's windows over that of real ones": lambda f: _number(
        {"value": _found(f, "fidelity", "diversity").get("ratio")}, 2
    ),
    "generated only, %": lambda f: _percent(f["augmentation"]["generated_only"]),
    "real only → real + generated, %": lambda f: " → ".join(
        _percent(f["augmentation"][arm]) for arm in ("real_only", "real_plus_generated")
    ),
    "gain in points [95 % interval]": lambda f: _gain(f["augmentation"]["gain"]),
    "twice as many real windows, %": lambda f: _percent(_found(f, "augmentation", "real_x2")),
    "nearest training window, relative to real ones": lambda f: _number(f["memorisation"]["nearest_train_ratio"], 2),
    "copies, % (1 expected)": lambda f: _percent(f["memorisation"]["copies"], 0),
    **{
        f"{name.replace('_', ' ')}: distance over that of real windows": partial(_ratio, name=name)
        for name in ("torso_speed", "cadence", "step_length", "envelopes", "bandwidth", "left_right_asymmetry")
    },
    "physically plausible windows, % (of real ones)": lambda f: _beside_real(f["physics"]["plausible"]),
    "codec trained for, min (steps)": lambda f: _trained(f["training"], "codec"),
    "prior trained for, min (steps)": lambda f: _trained(f["training"], "prior"),
    "wall time of all notebooks, min": lambda f: f"{f['resources']['wall_minutes']:.1f}",
    "drawing a window, s (network calls)": lambda f: (
        f"{f['sampling']['seconds_per_window']:.3f} ({f['sampling']['network_calls']})"
    ),
    "peak memory of training; of generation, GB": lambda f: "; ".join(
        _memory(f["resources"][f"{part}_memory_gb"]) for part in ("training", "generation")
    ),
    "measured on": lambda f: f["resources"]["device"],
    "parameters of codec; of prior, million": lambda f: (
        f"{f['parameters']['codec'] / 1e6:.2f}; {f['parameters']['prior'] / 1e6:.2f}"
    ),
}


def conclusions(systems: dict[str, dict], budget_minutes: float = 0.0) -> dict:
    """The answers, each a dictionary with a sentence: which codec by the rule of `quality.choose_codec`, and which
    system by gain, by Fréchet distance and by identity; and a list of claims beside what is measured."""
    measured = {name: figures for name, figures in systems.items() if "error" not in figures}
    return {"codec": _codec(measured), **_best(measured), "claims": _claims(measured, budget_minutes)}


def _codec(systems: dict[str, dict]) -> dict:
    """VQ or KL, by the codecs of one grid: those of the transformer and of the UNet over KL latents."""
    absent = [name for name in CLAIMED if name not in systems]
    if absent:
        return {"value": None, "reason": f"{' and '.join(absent)} not measured", "sentence": "VQ or KL: not measured."}
    vq, kl = (systems[name] for name in CLAIMED)
    if kl["codebook"]["usage"]["value"] is not None:
        return {"value": None, "reason": "both codecs are of one kind", "sentence": "VQ or KL: only VQ is measured."}
    choice = choose_codec(
        {"psnr_db": vq["reconstruction"]["psnr_db"]["value"], "usage": vq["codebook"]["usage"]["value"]},
        {"psnr_db": kl["reconstruction"]["psnr_db"]["value"]},
    )
    return {"value": choice["choice"], **choice}


def _best(systems: dict[str, dict]) -> dict:
    if not systems:
        return {}
    gains = {name: figures["augmentation"]["gain"] for name, figures in systems.items()}
    best = max(gains, key=lambda name: gains[name]["value"])
    apart = [name for name in gains if gains[name]["ci95"][1] < gains[best]["ci95"][0]]
    told = f"its interval lies above that of {', '.join(apart)}" if apart else "no interval lies below its own"
    found = {"gain": {"value": best, "sentence": f"Largest gain: {best}, {_gain(gains[best])} points; {told}."}}
    for key, title, pick, section, figure in (
        ("fidelity", "Nearest to real windows by Fréchet distance", min, "fidelity", "fd_ratio"),
        ("identity", "Most often taken for their user", max, "identity", "accuracy"),
    ):
        values = {name: figures[section][figure]["value"] for name, figures in systems.items()}
        values = {name: value for name, value in values.items() if value is not None}
        if values:
            best = pick(values, key=values.get)
            found[key] = {"value": best, "sentence": f"{title}: {best} ({values[best]:.3g})."}
    return found


def _claims(systems: dict[str, dict], budget_minutes: float) -> list[dict]:
    rows = []
    for what, claims in CLAIMS.items():
        row = {"what": what}
        for name, claim in zip(CLAIMED, claims, strict=True):
            measured = _measured(what, systems[name], budget_minutes) if name in systems else None
            row[name] = {"claimed": claim, "measured": measured}
        rows.append(row)
    return rows


def _measured(what: str, figures: dict, budget_minutes: float) -> str:
    if what == "memory":
        return f"{_memory(figures['resources']['training_memory_gb'])} GB ({figures['resources']['device']})"
    if what == "training time":
        minutes = sum(figures["training"][f"{part}_minutes"] for part in ("codec", "prior"))
        return f"{minutes:.1f} min" + (", set by the budget" if budget_minutes else "")
    return f"{1 / figures['sampling']['seconds_per_window']:.1f} windows/s"


def write_comparison(result: dict, windows: dict[str, WindowSet], out: Path) -> None:
    """Write comparison.json and comparison.html; windows: "real" and those of each measured system."""
    with whole_file(out / "comparison.json") as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with whole_file(out / "comparison.html") as path:
        path.write_text(_page(result, windows), encoding="utf-8")


def _page(result: dict, windows: dict[str, WindowSet]) -> str:
    systems, answers = result["systems"], result["conclusions"]
    measured = {name: figures for name, figures in systems.items() if "error" not in figures}
    failed = {name: figures["error"] for name, figures in systems.items() if "error" in figures}
    sentences = [answer["sentence"] for answer in answers.values() if isinstance(answer, dict)]
    parts = [
        "<h1>mdlib comparison</h1>",
        f"<p class=verdict>{'<br>'.join(map(html.escape, sentences))}</p>",
        table([[key, str(value)] for key, value in result["settings"].items()]),
        *(f"<p>{html.escape(f'{name} failed: {why}')}</p>" for name, why in failed.items()),
        f"<h2>Figures</h2><p class=note>As defined in each system's report; all on the same split, by the same judges. "
        f"{_effort(result['terms']['budget_minutes'])} Wall time and memory are those of the sitting that finished "
        "each notebook.</p>",
        table([[what, *map(read, measured.values())] for what, read in ROWS.items()], ["", *measured]),
    ]
    if measured:
        parts += [
            "<h2>Quality against training time</h2><p class=note>Ten windows a user drawn from the prior as it was on "
            "the way, the last point from the pipeline's; time of the codec included. Dotted: the judges' own accuracy "
            "on real windows.</p>",
            embedded("curves", plots.to_png(plots.learning(measured))),
            "<h2>Gain against the number of generated windows</h2><p class=note>Bars: 95 % intervals.</p>",
            embedded("gains", plots.to_png(plots.gains(measured))),
            "<h2>What was claimed, and what is measured</h2><p class=note>The claims are rough figures of the designs "
            "these two systems come from, told before anything was built, for a GPU; memory on a CPU is the "
            "process's.</p>",
            _claims_table(answers["claims"]),
        ]
    if windows:
        parts += ["<h2>A look</h2>", embedded("windows", plots.to_png(plots.side_by_side(windows)))]
    parts.append(f"<p class=note>mdlib {result['mdlib']}, {result['created']}. All figures are in comparison.json.</p>")
    return page("mdlib comparison", parts)


def _effort(budget_minutes: float) -> str:
    if not budget_minutes:
        return "Each system trained for its preset's steps, which are not the same number: see the training times."
    return f"Each system trained for {budget_minutes:g} minutes, half of them the codec, half the prior."


def _claims_table(claims: list[dict]) -> str:
    columns = [(name, what) for name in CLAIMED for what in ("claimed", "measured")]
    head = ["", *(f"{name}, {what}" for name, what in columns)]
    return table([[row["what"], *(row[name][what] or "–" for name, what in columns)] for row in claims], head)
