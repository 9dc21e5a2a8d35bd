"""Kaggle's metadata of notebooks and data sets: plain dicts, and the folders that its client pushes."""

import json
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
# The notebook whose output each continues from.
BEFORE = {
    "01_env_check": "",
    "02_train_vqvae": "",
    "03_train_prior": "02_train_vqvae",
    "04_train_diffusion": "02_train_vqvae",
    "05_generate": "03_train_prior",
    "06_validate": "05_generate",
}
WHEELS, WINDOWS = "mdlib-wheels", "mdlib-windows"  # default names of the data sets
T4X2 = "NvidiaTeslaT4"  # Kaggle's name of two T4


class Stop(Exception):
    """Ends the program with its text, one line."""


def pins() -> dict[str, str]:
    """Name → pinned version, from pyproject.toml."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return dict(line.split("==") for line in extras["pinned"] + extras["test"])


def notebook_named(text: str) -> str:
    """The notebook of a name or number: "02", "02_train_vqvae"."""
    for name in BEFORE:
        if text in (name, name[:2], f"{name}.ipynb"):
            return name
    raise Stop(f"there is no notebook {text!r}: choose one of {', '.join(BEFORE)}")


@dataclass(frozen=True)
class Kernel:
    """A notebook as Kaggle runs it."""

    notebook: str
    owner: str
    tag: str = ""  # distinguishes several runs
    accelerator: str = T4X2  # one of Kaggle's names; "" runs on the CPU
    internet: bool = False
    datasets: tuple[str, ...] = ()  # owner/name; a name alone is the owner's
    models: tuple[str, ...] = ()  # owner/model/framework/variation/version
    after: str = ""  # the notebook whose output it continues from; "": that of BEFORE
    resume: bool = False  # continue from the output of its own last version

    def __post_init__(self):
        # Kaggle derives the id of a notebook from its title.
        if not re.fullmatch(r"([a-z0-9]+(-[a-z0-9]+)*)?", self.tag) or len(self.tag) > 20:
            raise Stop(
                f"tag {self.tag!r}: use up to 20 lower-case letters and digits, with single hyphens between them"
            )

    @property
    def id(self) -> str:
        return f"{self.owner}/{_slug(self.notebook, self.tag)}"

    @property
    def metadata(self) -> dict:
        """The content of kernel-metadata.json, without relying on Kaggle's defaults."""
        before = self.after or BEFORE[self.notebook]
        sources = [_slug(name, self.tag) for name in (before, self.notebook if self.resume else "") if name]
        return {
            "id": self.id,
            "title": _slug(self.notebook, self.tag).replace("-", " "),
            "code_file": f"{self.notebook}.ipynb",
            "language": "python",
            "kernel_type": "notebook",
            "is_private": True,
            "enable_gpu": bool(self.accelerator),
            "enable_internet": self.internet,
            "machine_shape": self.accelerator,
            "dataset_sources": [name if "/" in name else f"{self.owner}/{name}" for name in self.datasets],
            "competition_sources": [],
            "kernel_sources": [f"{self.owner}/{slug}" for slug in sources],
            "model_sources": list(self.models),
        }


def write_kernel(kernel: Kernel, folder: Path, parameters: dict) -> Path:
    """Write kernel-metadata.json and the notebook with `parameters` set to `folder`, ready to push."""
    import nbformat
    from papermill.inspection import inspect_notebook
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    source = NOTEBOOKS / f"{kernel.notebook}.ipynb"
    _check_parameters(kernel, parameters, set(inspect_notebook(source)))
    notebook = load_notebook_node(str(source))
    if parameters:
        notebook = parameterize_notebook(notebook, parameters)
    if kernel.accelerator:
        source = (
            f'import os\n\nos.environ["MDLIB_ACCELERATOR"] = "{kernel.accelerator}"  # a session without a GPU stops'
        )
        notebook.cells.insert(1, nbformat.v4.new_code_cell(source, id="accelerator"))
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{kernel.notebook}.ipynb")
    write_json(kernel.metadata, folder / "kernel-metadata.json")
    return folder


def _check_parameters(kernel: Kernel, parameters: dict, known: set[str]) -> None:
    """Refuse parameters that would be ignored, or that the run could not use: its settings are given to notebook 02,
    when it starts."""
    from mdlib.experiments.settings import RunSettings, settings_of
    from mdlib.systems import get_system
    from mdlib.utils import DataError

    settings = ", ".join(sorted(parameters.keys() & {one.name for one in fields(RunSettings)}))
    if settings and kernel.notebook[:2] in ("03", "04"):
        raise Stop(f"{settings}: settings of a run are given to notebook 02")
    for key in parameters:
        if key not in known:
            raise Stop(f"{kernel.notebook} has no parameter {key!r}; there are {', '.join(sorted(known))}")
    if settings and kernel.resume and kernel.notebook[:2] == "02":
        raise Stop(f"a resumed run keeps its settings: leave out {settings}, or --resume")
    try:
        run = RunSettings(**settings_of(parameters))
        system = get_system(run.system)
        if run.preset != "auto":
            system.table(run.preset)
    except DataError as error:
        raise Stop(str(error)) from error


def dataset_metadata(owner: str, name: str) -> dict:
    """The content of dataset-metadata.json."""
    if not 6 <= len(name) <= 50:
        raise Stop(f"a data set's name has 6 to 50 characters: {name!r} has {len(name)}")
    return {"title": name.replace("-", " "), "id": f"{owner}/{name}", "licenses": [{"name": "other"}]}


def write_json(content: dict, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _slug(notebook: str, tag: str) -> str:
    return "-".join(filter(None, ["mdlib", notebook.replace("_", "-"), tag]))
