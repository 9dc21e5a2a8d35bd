"""Generative models for micro-Doppler spectrograms of walking people, user by user."""

from importlib import import_module

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
