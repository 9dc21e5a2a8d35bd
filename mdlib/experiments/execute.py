"""Run the notebooks of a system with papermill: `execute`. `extended` prepares a run for further training."""

import ast
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import joblib
import psutil
from accelerate.utils import patch_environment
from filelock import FileLock, Timeout
from traitlets.config import Config

from mdlib.data.files import find_windows
from mdlib.evaluation.evidence import Protocol
from mdlib.experiments.run import PRODUCTS, Run, check_sampling, device_name, open_run, versions
from mdlib.experiments.settings import (
    NOTEBOOKS,
    RunSettings,
    check_request,
    defaults,
    notebook_parameters,
    order_of,
    read_record,
    write_record,
)
from mdlib.models.layers import check_choice
from mdlib.pipeline import WEIGHTS, load_pipeline
from mdlib.systems import System, get_system
from mdlib.training.distributed import python_path
from mdlib.utils import DataError, Interrupted, interrupts, read_history, remove_unfinished


def execute(
    out: str | Path, parameters: dict, first: str = "", last: str = "", extend: bool = False, **given: str
) -> Path:
    """Run the system's notebooks with papermill, their output relayed; returns the path of the run folder.

    Notebooks that are done are skipped.

    Args:
        parameters: of any notebook.
        first, last: numbers of notebooks ("03"). Those from `first` to `last` run again; the results of `first` and of
            all later ones are deleted. "01" deletes nothing, because no notebook depends on it.
        extend: continue training codec or prior to the `codec_steps` or `prior_steps` in `parameters`, see `extended`.
        given: data, system and preset; what is left out is the run's, or else the default.

    Raises:
        DataError: an unknown name, another process that uses `out`, or the reason for which a notebook stopped.
        Interrupted: Ctrl-C.
    """
    out = Path(out).absolute()
    wanted, names = check_request(out, parameters, first, last, **given)
    with locked(out):
        _check_values(out, wanted, parameters)
        if extend and first:
            raise DataError("--extend already reruns what the longer training changes: leave out --from")
        _check_done(out, get_system(wanted.system), names, parameters, "03" if extend else first)
        if extend:
            extended(out, wanted, parameters.get("max_minutes", 0))
        run = open_run(out, **wanted.to_dict())
        if first:
            _forget(run, first)
        again = "the same command" + " without --from" * bool(first) + " without --extend" * extend
        _execute_all(run, names, parameters, first, again)
    return out


@contextmanager
def locked(out: Path):
    """`with` the folder locked, until the end of this process at the latest; DataError if another one has it. On a
    disk without locks, or read-only, it stays unlocked."""
    lock, holder = FileLock(out / ".lock", timeout=0), out / ".in-use"
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')}")
        remove_unfinished(out)
    except Timeout:
        other = holder.read_text() if holder.exists() else "another process"
        raise DataError(f"{out} is in use by {other}: wait for it or end it") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        for path in (holder, out / ".lock"):
            with suppress(OSError):
                path.unlink()
        lock.release()
        with suppress(OSError):
            out.rmdir()  # nothing was written


def _execute_all(run: Run, names: tuple[str, ...], parameters: dict, first: str, again: str) -> None:
    """Execute the notebooks that are not done; `again` is the command that continues when one stops."""
    common = {**parameters, **run.settings, "out": str(run.path)}
    state = [versions(), device_name(), sys.executable]  # with these notebook 01 passes once
    passed = Path(os.environ.get("MDLIB_CACHE") or Path.home() / ".cache" / "mdlib", f"passed-{joblib.hash(state)}")
    for name in names:
        expects = name[:2] == "01" and parameters.get("expect")  # of this machine, whatever was found before
        if name in read_record(run.path)["steps"] and not expects:
            print(f"{name}: done already (--from {name[:2]} runs it again)", flush=True)
            continue
        check = name[:2] == "01" and not first and not expects
        if check and passed.exists():
            run.done(name, time.monotonic())
            print(f"{name}: passed before with these packages (--from 01 runs it again)", flush=True)
            continue
        values = {key: common[key] for key in notebook_parameters(name) if key in common}
        _execute_one(name, run.path, values, again)
        if check:
            with suppress(OSError):  # a cache: without it the next run checks again
                passed.parent.mkdir(parents=True, exist_ok=True)
                passed.touch()


def _check_values(out: Path, wanted: RunSettings, parameters: dict) -> None:
    """DataError if notebook 05 or 06 cannot use its parameters: the prior does not take an option, …"""
    least = dict.fromkeys(("images_per_user", "generation_seed", "evaluation_steps", "seeds", "max_minutes"), 0)
    for key, low in (least | {"batch_size": 1}).items():
        if parameters.get(key, low) < low:
            raise DataError(f"{key} must be {low} or more, got {parameters[key]}")
    protocol = ("seeds", "counts", "reference", "backbone", "evaluation_compile")
    Protocol(**{key: parameters[key] for key in protocol if parameters.get(key)})
    options, known = parameters.get("sampling", {}), get_system(wanted.system).sampling_options()
    if unknown := ", ".join(sorted(options.keys() - known)):
        raise DataError(f"this prior has no sampling option {unknown}; there are {', '.join(sorted(known))}")
    users, conditions, weights = (parameters.get(key) for key in ("users", "conditions", "weights"))
    check_choice("weights", weights or "", WEIGHTS)
    run = Run(out, wanted.to_dict())
    if weights == "best" and not run.ends_with_best:
        advice = 'leave weights out, or start a run with prior_options={"keep_best": true} and without joint_steps'
        raise DataError(f'weights="best": this run keeps the last weights of its prior only: {advice}')
    if (options or users or conditions or weights) and (out / "pipeline" / "model_index.json").exists():
        pipeline = load_pipeline(out / "pipeline", weights or "")
        pipeline.check_options(options)
        pipeline.plan(users or [], 1, 0, conditions or None)
    elif users or conditions or options:
        files = find_windows(wanted.data, order=order_of(wanted.reading))
        for kind, given in (("user", users), ("condition", conditions)):
            known = {getattr(file, kind) for file in files}
            if unknown := ", ".join(repr(one) for one in given or () if one not in known):
                raise DataError(f"{kind}s: {wanted.data} holds no {unknown}; there are {sorted(known)}")
        check_sampling(run, options)


def _check_done(out: Path, system: System, names: tuple[str, ...], parameters: dict, first: str) -> None:
    """DataError if a parameter would be ignored, because the notebooks that take it do not run now, or where a
    notebook before `first` is not done."""
    done = read_record(out)["steps"]
    if missing := [name for name in system.notebooks if "01" < name[:2] < first and name not in done]:
        raise DataError(f"{', '.join(missing)} is not done yet: leave out --from and --extend")
    unused = parameters.keys() - defaults().keys()
    for name in (name for name in names if first or name not in done):
        unused -= notebook_parameters(name).keys()
    for name in system.notebooks if unused else ():
        known = notebook_parameters(name)
        ran = {key: ast.literal_eval(default) for key, (default, _) in known.items()}
        try:
            page = json.loads((out / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
            ran |= page["metadata"]["papermill"]["parameters"]
        except (OSError, ValueError, KeyError):  # there is no page, or it was not written in full
            if name in done:
                continue
        if ignored := ", ".join(sorted(key for key in unused & known.keys() if ran[key] != parameters[key])):
            advice = f"add --from {name[:2]} to run it again" if name in done else f"leave it out, or run to {name[:2]}"
            raise DataError(f"{name} does not run now and would ignore {ignored}: {advice}")


def extended(out: Path, wanted: RunSettings, max_minutes: float = 0) -> None:
    """Prepare a run for the further training of its codec or prior, to more optimizer steps.

    Training resumes at its last step, with the learning rate of the longer schedule at that step. What depends on it
    is removed: if the codec trains further, the prior starts over, and so do all codec stages but the first.
    """
    if not (out / "run.json").exists():
        raise DataError(f"{out} holds no run to extend: leave out --extend")
    run = open_run(out)
    given = {key: value for key, value in wanted.to_dict().items() if key != "data" and value != "auto"}
    changed = {key: value for key, value in given.items() if value != run.settings[key]}
    if not changed or changed.keys() - {"codec_steps", "prior_steps"}:
        names = ", ".join(changed) or "nothing"
        raise DataError(f"--extend takes more codec_steps or prior_steps and no other change, got {names}")
    if run.settings["joint_steps"]:
        raise DataError(f"{out} ends with joint_steps, after which codec and prior cannot train alone: start a new run")
    part = "codec" if "codec_steps" in changed else "prior"
    if part == "codec" and run.finished_codec:
        raise DataError(f"{out} uses the codec in {run.finished_codec} as it is: start a new run to train it further")
    if not (out / part / "history.csv").exists():
        raise DataError(f"{out} has no trained {part} yet: run the command without {part}_steps and --extend first")
    last = read_history(out / part)[-1]
    if changed[f"{part}_steps"] <= (done := int(last["step"])):
        raise DataError(f"{part}_steps={changed[f'{part}_steps']}: the {part} has {done} steps already, give more")
    if 0 < max_minutes <= (spent := last["seconds"] / 60):
        raise DataError(f"max_minutes={max_minutes:g}: the {part} has trained for {spent:.1f} minutes, give more")
    for stage in sorted((out / part).glob("stage-*"))[1:]:
        shutil.rmtree(stage)
    _forget(run, "02" if part == "codec" else "03", keep=(part, "split.json", f"samples/{part}-*.png"))
    write_record(out, read_record(out) | {"settings": run.settings | changed})


def _execute_one(name: str, out: Path, values: dict, again: str) -> None:
    import papermill

    print(f"{name}: starts", flush=True)
    started, stops, reached = time.monotonic(), [], "interrupted"
    target = out / "notebooks" / f"{name}.ipynb"

    def stop_between_cells(**_) -> None:  # where the kernel does not heed an interrupt
        if stops:
            raise RuntimeError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _kernel() as options, interrupts(_interrupt_kernel) as stops:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                target,
                parameters=values,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                on_cell_start=stop_between_cells,
                **options,
            )
    except KeyboardInterrupt:
        stops.append(True)
    except papermill.PapermillExecutionError as error:
        reached = " ".join(str(error.evalue).split()) or reached
        if error.ename in (KeyboardInterrupt.__name__, Interrupted.__name__):
            stops.append(True)
        elif not stops:
            raise DataError(f"{name} stopped: {error.ename}: {reached} (see {target})") from error
    except OSError as error:
        raise OSError(f"{name} stopped: {error} (writing {target})") from error
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        if not stops:
            raise DataError(
                f"{name} stopped: {error}: most likely out of memory: choose a smaller preset, or run {again} to resume"
            ) from error
    if stops:
        raise Interrupted(f"{name}: {reached}; to resume, run {again}")
    if name not in read_record(out)["steps"]:
        raise DataError(f"{name} ran out of time: to resume, run {again} (see {target})")
    print(f"{name}: done in {time.monotonic() - started:.0f} s", flush=True)


@contextmanager
def _kernel():
    """`with` papermill's options for a kernel of this interpreter, whatever kernels are installed. On POSIX, its
    sockets are files in a temporary folder, out of the network's reach."""
    with tempfile.TemporaryDirectory(prefix="mdlib-", ignore_cleanup_errors=True) as folder:
        # A kernel logs its shutdown interrupt as an error, and would write to the user's history.
        quiet = ["--log-level=CRITICAL", "--HistoryManager.hist_file=:memory:"]
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *quiet]
        spec = Path(folder, "kernels", "mdlib", "kernel.json")
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps(dict(argv=command, display_name="mdlib", language="python")))
        sockets = {"transport": "ipc", "ip": str(Path(folder) / "kernel")} if os.name == "posix" else {}
        found = os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))
        with patch_environment(MDLIB_BATCH="1", PYTHONPATH=python_path(), JUPYTER_PATH=found):
            # papermill gives a kernel 60 s to start and the last output of a cell 4 s: too little on a busy machine.
            waits = dict(start_timeout=600, iopub_timeout=60)
            yield dict(kernel_name="mdlib", config=Config(KernelManager=sockets), **waits)


def _interrupt_kernel(first: bool) -> None:
    """Stop the kernel's cell at the `first` interrupt of this process (Ctrl-C), and the kernel at the next one."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            if "ipykernel_launcher" in child.cmdline():
                child.send_signal(signal.SIGINT) if first and os.name == "posix" else child.kill()


def _forget(run: Run, first: str, keep: tuple[str, ...] = ()) -> None:
    """Delete the products of the notebooks from `first` on, except `keep`, and mark these notebooks as not done.
    Nothing depends on 01."""
    names = [name for name in run.system.notebooks if name[:2] >= first]
    names = names[:1] if first == "01" else names
    patterns = [product for name in names for product in PRODUCTS[name[:2]] if product not in keep]
    for path in [path for pattern in patterns for path in run.path.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    record = read_record(run.path)
    record["steps"] = {name: step for name, step in record["steps"].items() if name not in names}
    write_record(run.path, record)
