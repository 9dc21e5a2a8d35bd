"""The systems. To add one, add a file here and its name to MODULES; to remove one, delete both."""

from importlib import import_module

from mdlib.systems.system import (
    SYSTEMS,
    Preset,
    System,
    attach_losses,
    get_preset,
    get_system,
    load_codec,
    make_codec,
    make_prior,
    seeded,
    start,
)

MODULES = (
    "vqvae_transformer",
    "vae_diffusion",
    "vqvae_ldm",
    "vavae_dit",
    "vq_diffusion",
)
SYSTEMS |= {system.name: system for system in (import_module(f"{__name__}.{name}").SYSTEM for name in MODULES)}
