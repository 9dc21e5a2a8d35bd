"""Generative models for micro-Doppler spectrograms of walking people, user by user."""

__version__ = "0.1.0"
