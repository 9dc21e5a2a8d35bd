"""The radar's closed forms."""

import numpy as np
import pytest

from mdlib.simulation import radar


@pytest.mark.parametrize("speed", [0.4, 1.11, 2.5])
def test_a_steady_scatterer_shows_at_twice_its_speed_over_the_wavelength(speed):
    one = np.ones((1, 1))
    power = np.abs(radar.short_time_spectrum(5 * one, speed * one, 0 * one, np.ones((1, 1, 1)))[0, 0]) ** 2
    doppler = 2 * speed * radar.CARRIER / radar.SPEED_OF_LIGHT
    peak = radar.BINS[power.argmax()]
    assert peak == pytest.approx(doppler / radar.PRF * radar.FFT, abs=1)
    outside = np.abs(radar.BINS - peak) > 3 * radar.FFT / radar.SAMPLES + 1  # the main lobe: three bins on either side
    assert power[outside].sum() < 1e-4 * power.sum()


def test_velocity_axis_is_half_a_wavelength_times_doppler():
    velocity = radar.velocity_axis()
    assert len(velocity) == 122 and np.abs(velocity).min() < 1e-9
    assert -np.diff(velocity) == pytest.approx(5263.2 / 256 * 299792458 / 78.5e9 / 2)
    assert velocity[0] == pytest.approx(3.85, abs=0.05) and velocity[-1] == pytest.approx(-0.90, abs=0.05)
