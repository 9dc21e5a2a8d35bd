"""Generative models for micro-Doppler spectrograms of walking people, conditioned on the user."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder

__version__ = "0.1.0"

_HOME = {
    "Identifier": "evaluation.identifier",
    "MicroDopplerPipeline": "pipeline",
    "Protocol": "evaluation.evidence",
    "RunSettings": "experiments.settings",
    "SYSTEMS": "systems",
    "TrainConfig": "training.fit",
    "check_codec_folder": "experiments.codec_check",
    "compare": "experiments.compare",
    "contact_sheet": "reports.plots",
    "evaluate": "evaluation.protocol",
    "execute": "experiments.execute",
    "fetch_weights": "models.fetch",
    "find_windows": "data.files",
    "fit": "training.fit",
    "get_preset": "systems",
    "identify_folder": "evaluation.identifier",
    "inspect_folder": "reports.inspection",
    "load_pipeline": "pipeline",
    "load_windows": "data.windows",
    "make_split": "data.splits",
    "open_run": "experiments.run",
    "parse_users": "data.files",
    "pretrain": "experiments.pretrain",
    "select_folder": "reports.report",
    "simulate_dataset": "simulation.dataset",
    "split_folder": "data.checks",
    "split_summary": "data.splits",
    "study": "experiments.study",
    "validate_folders": "reports.report",
    "write_split": "data.splits",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    """Import a public name at first use, so that `import mdlib` is quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'mdlib' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


def _announce(diffusers) -> None:
    """Let `DiffusionPipeline.from_pretrained` find the pipeline's class in diffusers, where access imports it."""
    found = {"MicroDopplerPipeline": property(lambda _: __getattr__("MicroDopplerPipeline"))}
    diffusers.__class__ = type("Diffusers", (type(diffusers),), found)


class _Announcer:
    """An import hook in `sys.meta_path` for the import of diffusers, so that `import mdlib` itself stays quick."""

    def find_spec(self, name: str, *arguments):
        spec = PathFinder.find_spec(name, *arguments) if name == "diffusers" else None
        if spec:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), _announce(sys.modules[name]))
        return spec


if "diffusers" in sys.modules:
    _announce(sys.modules["diffusers"])
else:
    sys.meta_path.insert(0, _Announcer())
