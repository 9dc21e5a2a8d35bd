"""Do generated walkers move like the real ones? Gait physics of every window, compared user by user.

A figure is the Wasserstein-1 distance between the distributions of one metric of `gait_physics` in two sets of one
user's windows, the mean over users, in the metric's unit; beside it stand the same distance between real windows, and
how well the users' means agree. Windows on disk carry no axes, so two are taken for granted:

- velocity: `radar.velocity_axis()` over the height of the image, that of the simulator and, as far as is known, of the
  77 GHz recordings it was modelled on. Windows of another radar are read on it too: "m/s" then are units of that axis.
- time: a window is four steps of 0.58 s (see `gait_physics`). Cadence and step length are relative to that.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import wasserstein_distance

from mdlib.data.windows import WindowSet
from mdlib.evaluation import gait_physics
from mdlib.evaluation.evidence import COMPARED, bootstrapped, over_users
from mdlib.simulation.radar import velocity_axis

WINDOW_S = 4 * 0.58  # nominal length of a window, s
CHUNK = 16  # windows measured at once: at 256 px more would take gigabytes
FIGURES = {  # the metric of gait_physics.METRICS and its unit; below the envelopes lie 97 % and 3 % of a column
    "torso_speed": ("v_torso", "m/s"),
    "cadence": ("f_step", "relative steps/s"),
    "step_length": ("step_len", "relative m"),
    "foot_speed": ("v_foot", "m/s"),
    "upper_envelope": ("u97", "m/s"),
    "lower_envelope": ("l03", "m/s"),
    "bandwidth": ("bw_total", "m/s"),
    "left_right_asymmetry": ("asym_v", ""),
}
NAMES = (*list(FIGURES)[:4], "envelopes", *list(FIGURES)[4:], "plausible")
GATES = {name: bounds for name, bounds in gait_physics.GATES.items() if name not in ("f_step", "step_len", "drop")}
SHOWN = ("generated", "unseen")  # sets whose users are told apart
SPREAD = (5, 25, 50, 75, 95)  # percentiles
AVERAGED = (*COMPARED, "user_correlation", "user_correlation_real")


@dataclass(frozen=True)
class Gaits:
    """What was read off N windows."""

    values: dict[str, np.ndarray]  # name of FIGURES → float (N,), NaN where it cannot be read
    plausible: np.ndarray  # bool (N,): passes every gate that needs no time scale
    labels: np.ndarray  # int (N,)

    def select(self, rows: list[int]) -> "Gaits":
        values = {name: one[rows] for name, one in self.values.items()}
        return Gaits(values, self.plausible[rows], self.labels[rows])

    def of_user(self, name: str, label: int) -> np.ndarray:
        """The values of one figure that could be read off a user's windows."""
        mine = self.values[name][self.labels == label]
        return mine[np.isfinite(mine)]


def measure(windows: WindowSet) -> Gaits:
    """Physics of intensity windows of 8 × 8 pixels or more, the top row the highest velocity.

    Raises:
        ValueError: smaller windows, or RGB.
    """
    channels, size, columns = windows.images.shape[1:]
    if channels != 1:
        raise ValueError(f"windows of {channels} channels: physics is read off intensities, channels=1")
    axis = image_axis(size)
    parts = [
        gait_physics.measure(part[:, 0].numpy() / 255, axis, WINDOW_S / columns) for part in windows.images.split(CHUNK)
    ]
    found = {name: np.concatenate([part[name] for part in parts]) for name in gait_physics.METRICS}
    values = {name: found[metric] for name, (metric, _) in FIGURES.items()}
    values["left_right_asymmetry"] = np.abs(values["left_right_asymmetry"])  # which foot comes first is unknown
    return Gaits(values, gait_physics.plausible(found, GATES), windows.labels.numpy())


def image_axis(rows: int) -> np.ndarray:
    """Velocity (rows,) of the rows of an image that shows the whole of `radar.velocity_axis()`, highest first."""
    native = velocity_axis()
    bin_speed = native[0] - native[1]
    return native[0] + bin_speed / 2 - (np.arange(rows) + 0.5) * bin_speed * len(native) / rows


def compare(sets: dict[str, Gaits], num_users: int) -> dict:
    """The figures NAMES from the sets generated, unseen, train, first and second (the halves of the unseen).

    per_user: the distance between a user's generated and unseen windows.
    value, real_vs_real, train: mean over users of that distance, of the one between the two
    halves, and between training and unseen windows, which a perfect copier would get; as many windows of a user in
    each set, because the distance grows when they are fewer. The windows of a half are neighbours that share steps,
    fewer than they seem: training windows can come nearer. ratio: value over real_vs_real; n: windows a side, all
    users together; ci95 redraws users. user_correlation: Pearson's r over users of the means of all generated and of
    all unseen windows, user_correlation_real that of the halves' means; None with fewer than three users.

    envelopes is the mean of the upper and the lower one. plausible: share of generated windows that pass GATES, real:
    that of unseen ones. The rest is not gated, asymmetry least of all: four steps of a healthy walker do not show it.
    """
    found = {name: _figure(name, sets, num_users) for name in FIGURES}
    found["envelopes"] = _mean(found["upper_envelope"], found["lower_envelope"])
    found["plausible"] = _plausible(sets["generated"].plausible, sets["unseen"].plausible)
    return {name: found[name] for name in NAMES}


def _plausible(generated: np.ndarray, unseen: np.ndarray) -> dict:
    each = np.arange(len(generated))  # generated windows are drawn one by one: each is its own block
    return {**bootstrapped(generated.astype(float), each), "real": float(unseen.mean()), "gates": list(GATES)}


def _figure(name: str, sets: dict[str, Gaits], num_users: int) -> dict:
    own = [{part: gaits.of_user(name, label) for part, gaits in sets.items()} for label in range(num_users)]
    least = [min(len(values) for values in user.values()) for user in own]
    if not any(least):
        return {"value": None, "reason": "no user has windows in every set off which it can be read"}
    each = np.array([_distances(user, n) for user, n in zip(own, least, strict=True) if n])  # (users, comparisons)
    means = {part: [_mean_or_none(user[part]) for user in own] for part in sets}
    found = dict(zip(COMPARED, each.mean(0).tolist(), strict=True))
    return {
        **over_users(each[:, 0]),
        **found,
        "unit": FIGURES[name][1],
        "n": sum(least),
        "ratio": _ratio(found),
        "user_correlation": _correlation(means["generated"], means["unseen"]),
        "user_correlation_real": _correlation(means["first"], means["second"]),
        "per_user": _by_user(each[:, 0], least),
        **{f"{part}_means": means[part] for part in SHOWN},
        **{f"{part}_spread": [_spread(user[part]) for user in own] for part in SHOWN},
    }


def _by_user(distances: np.ndarray, windows: list[int]) -> list[float | None]:
    """The distance of every user, None where there was none to measure."""
    rest = iter(distances.tolist())
    return [next(rest) if n else None for n in windows]


def _distances(own: dict[str, np.ndarray], n: int, draws: int = 8) -> np.ndarray:
    """One user's distances, in the order of COMPARED: n windows drawn from each set, mean over draws."""
    total = np.zeros(len(COMPARED))
    for seed in range(draws):
        rngs = np.random.default_rng(seed).spawn(len(own))  # one a set: what is generated leaves the others' draw alone
        drawn = {part: rng.choice(own[part], n, replace=False) for part, rng in zip(sorted(own), rngs, strict=True)}
        total += [wasserstein_distance(drawn[one], drawn[other]) for one, other in COMPARED.values()]
    return total / draws


def _mean(upper: dict, lower: dict) -> dict:
    """Two figures of one unit as one."""
    if None in (upper["value"], lower["value"]):
        return upper if upper["value"] is None else lower
    pairs = {key: (upper[key], lower[key]) for key in AVERAGED}
    found = {key: None if None in pair else sum(pair) / 2 for key, pair in pairs.items()}
    return {**found, "unit": upper["unit"], "n": min(upper["n"], lower["n"]), "ratio": _ratio(found)}


def _ratio(found: dict) -> float | None:
    return found["value"] / found["real_vs_real"] if found["real_vs_real"] else None


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _spread(values: np.ndarray) -> list[float] | None:
    return np.percentile(values, SPREAD).tolist() if len(values) else None


def _correlation(first: list, second: list) -> float | None:
    """Pearson's r over users who have both; None with fewer than three of them or without any spread."""
    pairs = [pair for pair in zip(first, second, strict=True) if None not in pair]
    if len(pairs) < 3 or not np.ptp(pairs, axis=0).all():
        return None
    return float(np.corrcoef(np.array(pairs).T)[0, 1])
