"""Run notebooks on Kaggle with its official client: upload data, push, follow the log, fetch the output.

python kaggle/push.py dataset wheelhouse --name mdlib-wheels
python kaggle/push.py dataset people --name mdlib-windows
python kaggle/push.py kernel 02 -p windows_per_user=20
python kaggle/push.py kernel 02 --resume
"""

import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import requests
import typer
import urllib3
from metadata import (
    ROOT,
    T4X2,
    WHEELS,
    WINDOWS,
    Kernel,
    Stop,
    dataset_metadata,
    notebook_named,
    pins,
    write_json,
    write_kernel,
)

from mdlib.cli import pair

app = typer.Typer(
    help="Run notebooks on Kaggle.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
DROPPED = (
    requests.exceptions.ConnectionError,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.Timeout,
    urllib3.exceptions.ProtocolError,
)
POLL = 10  # seconds between two requests
FAILURES = 20  # dropped connections or 5xx answers in a row before giving up
ALL_BUT_CHECKPOINTS = r"^(?!.*state\.pt$)"


@app.command()
def kernel(
    notebook: Annotated[str, typer.Argument(help="02, or 02_train_vqvae")],
    parameter: Annotated[list[str], typer.Option("--parameter", "-p", help="notebook parameter as NAME=VALUE")] = [],  # noqa: B006
    internet: Annotated[bool, typer.Option("--internet/--no-internet")] = False,
    accelerator: Annotated[str, typer.Option(help="one of Kaggle's names, or none")] = T4X2,
    dataset: Annotated[list[str], typer.Option(help="instead of mdlib-windows; name or owner/name")] = [WINDOWS],  # noqa: B006
    wheels: Annotated[str, typer.Option(help="data set of the wheels")] = WHEELS,
    model: Annotated[list[str], typer.Option(help="owner/model/framework/variation/version")] = [],  # noqa: B006
    after: Annotated[str, typer.Option(help="notebook whose output it continues from; for 05 the default is 03")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="continue from the output of its last version")] = False,
    tag: Annotated[str, typer.Option(help="end of the notebooks' names on Kaggle, to distinguish runs")] = "",
    owner: Annotated[str, typer.Option(help="Kaggle user name; default: yours")] = "",
    out: Annotated[Path, typer.Option(help="folder for the pushed notebook and its output")] = ROOT / "runs" / "kaggle",
    files: Annotated[str, typer.Option(help="regular expression of the outputs to fetch")] = ALL_BUT_CHECKPOINTS,
    prepare: Annotated[bool, typer.Option("--prepare", help="only write the folder")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="show the log, fetch the output")] = True,
):
    """Push a notebook, follow its log and fetch its output."""
    api = None if prepare and owner else connect()
    what = Kernel(
        notebook_named(notebook),
        owner or user(api),
        tag,
        "" if accelerator == "none" else accelerator,
        internet,
        (wheels, *dataset),
        tuple(model),
        notebook_named(after) if after else "",
        resume,
    )
    folder = out / what.id.split("/")[1]
    write_kernel(what, folder / "kernel", dict(map(pair, parameter)))
    if prepare:
        print(folder / "kernel")
        return
    push(api, folder / "kernel")
    if not wait:
        return
    status, reason = follow(api, what.id)
    fetched, _ = api.kernels_output(what.id, str(folder / "output"), file_pattern=files, force=True, page_size=200)
    print(f"{what.id}: {status.lower()}; {len(fetched)} files in {folder / 'output'}")
    if status != "COMPLETE":
        raise Stop(f"{what.id} ended with {status}" + (f": {' '.join(reason.split())}" if reason else ""))


@app.command()
def dataset(
    folder: Annotated[Path, typer.Argument(help="a wheelhouse, or a folder of ID_k/ folders")],
    name: Annotated[str, typer.Option(help="name of the data set, 6 to 50 characters")],
    owner: Annotated[str, typer.Option(help="Kaggle user name; default: yours")] = "",
    message: Annotated[str, typer.Option(help="message of a new version")] = "new version",
):
    """Upload a folder as a private data set, or as a new version of it, and wait until Kaggle has unpacked it.

    dataset-metadata.json is written into the folder if it is missing; edit it to change licence or title.
    """
    if not folder.is_dir():
        raise Stop(f"{folder}: no such folder")
    api = connect()
    file = folder / "dataset-metadata.json"
    if not file.exists():
        write_json(dataset_metadata(owner or user(api), name), file)
    ref = json.loads(file.read_text(encoding="utf-8"))["id"]
    if ref != f"{owner or user(api)}/{name}":
        raise Stop(f"{file} belongs to {ref}: give that name, or delete the file")
    if status_of(api, ref) is None:
        response = api.dataset_create_new(str(folder), dir_mode="zip")
    else:
        response = api.dataset_create_version(str(folder), message, dir_mode="zip")
    if response.error or response.status.lower() != "ok":
        raise Stop(f"{ref}: {response.error or response.status}")
    while (status := status_of(api, ref)) != "ready":
        if status in ("failed", "deleted"):
            raise Stop(f"{ref}: Kaggle could not unpack it ({status})")
        time.sleep(POLL)
    print(f"{ref}: ready")


def connect():
    """Return the authenticated client."""
    try:
        with redirect_stdout(io.StringIO()):  # it prints a page of help where credentials are missing
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            api.authenticate()
    except ModuleNotFoundError as error:
        wanted = " ".join(f"{name}=={pins()[name]}" for name in ("kaggle", "six"))
        raise Stop(f"Kaggle's client is missing ({error}): {sys.executable} -m pip install {wanted}") from error
    except SystemExit as error:
        raise Stop("no Kaggle credentials: run kaggle auth login, or set KAGGLE_API_TOKEN") from error
    return api


def user(api) -> str:
    return api.get_config_value(api.CONFIG_NAME_USER)


def push(api, folder: Path) -> None:
    """Save and run a new version of the folder's notebook."""
    answer = api.kernels_push(str(folder))
    if answer.error:
        raise Stop(f"Kaggle refused the notebook: {answer.error}")
    refused = [*answer.invalid_dataset_sources, *answer.invalid_kernel_sources, *answer.invalid_model_sources]
    if refused:
        missing = ", ".join(refused)
        raise Stop(f"version {answer.version_number} was started without {missing}: these inputs are not on Kaggle")
    print(f"version {answer.version_number}: {answer.url}", flush=True)


def follow(api, kernel: str) -> tuple[str, str]:
    """Print the log until the run has ended; returns its last status and the reason of a failure.

    Every connection replays the log from its beginning; events that were printed are skipped.
    """
    printed = failures = 0
    while True:
        try:
            answer = api.kernels_status(kernel)
            # Before the log is read: a run that is over has its whole log.
            over = answer.status.name in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
            if over or answer.status.name == "RUNNING":
                for number, event in enumerate(api.kernels_logs_stream(kernel), 1):
                    if number > printed:
                        printed, text = number, event.get("data") or ""
                        print(text, end="" if text.endswith("\n") else "\n", flush=True)
            if over:
                return answer.status.name, answer.failure_message or ""
            failures = 0
        except (*DROPPED, requests.exceptions.HTTPError) as error:
            temporary = not isinstance(error, requests.exceptions.HTTPError) or error.response.status_code >= 500
            failures += 1
            if not temporary or failures > FAILURES:
                raise Stop(f"lost contact with {kernel}, which keeps running on Kaggle: {error}") from error
        time.sleep(POLL)


def status_of(api, ref: str) -> str | None:
    """Kaggle's status of a data set; None if it does not exist."""
    try:
        return api.dataset_status(ref)
    except requests.exceptions.HTTPError as error:
        if error.response.status_code in (403, 404):
            return None
        raise


def main() -> None:
    try:
        app()
    except (Stop, ValueError, OSError) as error:  # requests' errors are OSErrors
        print(f"push: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
