"""A 77 GHz FMCW radar: a walker's 52 scatter centres in, the power of the micro-Doppler spectrogram out.

V. C. Chen, "The Micro-Doppler Effect in Radar", Artech House 2011. A column of the spectrogram is one frame.
"""

from typing import NamedTuple

import numpy as np
from scipy.signal import lfilter

from mdlib.simulation.walker import SEGMENTS

SPEED_OF_LIGHT = 299792458.0
CARRIER, PRF = 78.5e9, 5263.2  # Hz
SAMPLES, FFT = 192, 256  # of a frame, under a Blackman window; zero-padded
ROWS, V_MIN = 122, -0.885  # velocities shown; the lowest in m/s
SNR = 46  # dB over the 99.7th percentile of the amplitudes
GATE = 0.32  # m, range gate around the trunk
RADAR_HEIGHT = 1.2  # m
LOOKS = 4  # receive channels, summed in power
SPECKLE_TIME = 0.18  # s, correlation time
BIN_SPEED = PRF / FFT * SPEED_OF_LIGHT / CARRIER / 2  # m/s
BINS = np.floor(V_MIN / BIN_SPEED).astype(int) + np.arange(ROWS)  # FFT bins shown, lowest velocity first


class Segment(NamedTuple):
    """An ellipsoid between two joints with scatter centres at `fractions` of its length."""

    kind: str  # one of SEGMENTS
    start: str
    end: str
    fractions: tuple[float, ...]
    radius: float  # m, semi-axis across
    reflectivity: float  # relative to the torso's, dB
    specular: float  # fraction of it; a large one of thigh and shank makes the dark gaps in double support


def _segments():
    yield Segment("head", "neck", "head", (0.6,), 0.10, -10.0, 0.3)
    yield Segment("torso", "base", "neck", (0.08, 0.3, 0.5, 0.7, 0.9), 0.15, 0.0, 0.2)
    for s in "RL":
        yield Segment("shoulders", "neck", f"shoulder{s}", (0.8,), 0.06, -9.0, 0.5)
        yield Segment("upper arm", f"shoulder{s}", f"elbow{s}", (0.35, 0.8), 0.05, -9.5, 0.92)
        yield Segment("forearm", f"elbow{s}", f"hand{s}", (0.3, 0.65, 1.0), 0.04, -10.5, 0.92)
        yield Segment("hip", "base", f"hip{s}", (0.7,), 0.08, -7.5, 0.6)
        yield Segment("thigh", f"hip{s}", f"knee{s}", (0.1, 0.28, 0.46, 0.64, 0.82, 0.97), 0.075, -2.0, 0.985)
        yield Segment("shank", f"knee{s}", f"ankle{s}", (0.1, 0.25, 0.4, 0.55, 0.7, 0.85), 0.055, -10.5, 0.993)
        yield Segment("foot", f"ankle{s}", f"toe{s}", (0.0, 0.3, 0.6, 0.95), 0.045, -10.7, 0.7)


BODY = tuple(_segments())
POINTS = [f"{s.end}{i}" for s in BODY for i in range(len(s.fractions))]
CHEST = POINTS.index("neck2")  # the middle of the torso
FEET = [[POINTS.index(f"toe{s}{i}") for i in range(4)] for s in "RL"]
BAG_DB, BAG_DROP = -9.0, 0.18  # a bag in the right hand: echo in dB, metres under the hand


def velocity_axis():
    """Radial velocity of each image row in m/s, top row (highest velocity) first; positive = walking direction."""
    return (BINS * BIN_SPEED)[::-1]


def short_time_spectrum(distance, speed, acceleration, weights):
    """Complex spectrum (F, looks, rows) of moving points in every frame, lowest velocity first: the short-time Fourier
    transform of their phase histories exp(-4πi R/λ), where within a frame each distance R is a parabola in time.

    distance m, speed m/s towards the radar, acceleration m/s²: (F, P) at the frames' centres; weights: complex
    amplitudes (F, looks, P).
    """
    k = 4 * np.pi * CARRIER / SPEED_OF_LIGHT
    t = ((np.arange(SAMPLES) - (SAMPLES - 1) / 2) / PRF).astype(np.float32)
    angle = (k * speed).astype(np.float32)[..., None] * t
    angle += (0.5 * k * acceleration).astype(np.float32)[..., None] * t**2
    angle -= np.mod(k * distance, 2 * np.pi).astype(np.float32)[..., None]
    echo = np.empty(angle.shape, np.complex64)
    np.cos(angle, out=echo.real)
    np.sin(angle, out=echo.imag)
    signal = weights.astype(np.complex64) @ echo
    spectrum = np.fft.fft(signal * np.blackman(SAMPLES).astype(np.float32), FFT, axis=-1)
    return spectrum[..., BINS % FFT].astype(np.complex64)


def _complex_normal(rng, shape):
    z = rng.standard_normal((*shape, 2), dtype=np.float32) * np.float32(np.sqrt(0.5))
    return z.view(np.complex64)[..., 0]


def speckle(rng, columns, points, column_s):
    """Complex weights (columns, LOOKS, points) of mean power 1: a constant plus a Gaussian AR(1) process in time. Head
    and trunk, the first six points, are steadier than the limbs."""
    steady = np.where(np.arange(points) < 6, 0.8, 0.55)
    rho = np.exp(-column_s / SPECKLE_TIME)
    noise = _complex_normal(rng, (columns, LOOKS, points))
    noise[1:] *= np.float32(np.sqrt(1 - rho**2))
    return steady + np.sqrt(1 - steady**2) * lfilter([1.0], [1.0, -rho], noise, axis=0)


def echoes(joints, rcs, girth, carries_bag):
    """Distances (F, 3, P) of the scatter centres at three moments, and amplitudes (F, P) at the middle one.

    joints {name: (F, 3, 3)} in the radar's frame; rcs (F, 9), this walker's dB relative to `reflectivity`; girth (F,).
    Ellipsoid cross-section after Mahafza (Chen 2011, ch. 2), relative to broadside, mixed with a diffuse part.
    """
    distance, amplitude = [], []
    for s in BODY:
        start, axis = joints[s.start], joints[s.end] - joints[s.start]
        half2 = (axis[:, 1] ** 2).sum(-1) / 4
        middle = start[:, 1] + axis[:, 1] / 2
        cos2 = (middle * axis[:, 1]).sum(-1) ** 2 / ((middle**2).sum(-1) * 4 * half2)
        a2 = (s.radius * girth) ** 2
        ellipsoid = a2**2 / (a2 * (1 - cos2) + half2 * cos2) ** 2
        mixed = s.specular * np.minimum(ellipsoid, 2) + 1 - s.specular
        power = 10 ** ((s.reflectivity + rcs[:, SEGMENTS.index(s.kind)]) / 10) * mixed / len(s.fractions)
        for f in s.fractions:
            distance.append(np.linalg.norm(start + f * axis, axis=-1))
            amplitude.append(np.sqrt(power))
    if carries_bag:
        distance.append(np.linalg.norm(joints["handR"] - (0, 0, BAG_DROP), axis=-1))
        amplitude.append(np.full(len(rcs), 10 ** (BAG_DB / 20)))
    distance, amplitude = np.stack(distance, -1), np.stack(amplitude, -1)
    trunk = distance[:, 1, CHEST, None]
    gate = np.exp(-(((distance[:, 1] - trunk) / GATE) ** 2) / 4)
    return distance, amplitude * (trunk / distance[:, 1]) ** 2 * gate


def receive(rng, spectrum, snr):
    """Power (F, rows) received: static clutter removed but for a faint line, noise added, channels averaged.

    spectrum (F, looks, rows) from `short_time_spectrum`; snr (F,) in dB over the 99.7th percentile of the amplitudes.
    """
    v = BINS * BIN_SPEED
    reference = np.percentile(np.sqrt((np.abs(spectrum) ** 2).mean(1)), 99.7)
    level = reference * 10 ** (-snr / 20)
    notch = (1 - 0.55 * np.exp(-((v / 0.018) ** 2))).astype(np.float32)
    received = spectrum * notch + _complex_normal(rng, spectrum.shape) * level[:, None, None].astype(np.float32)
    power = (received.real**2 + received.imag**2).mean(1)
    clutter = reference**2 * 10 ** ((-31 + 4 * rng.standard_normal()) / 10)
    power += clutter * np.exp(-((v / 0.035) ** 2)) * rng.exponential(size=(len(power), 1))
    return power
