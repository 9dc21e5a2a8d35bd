"""From a folder of windows to a report, through the notebooks and the command line."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from safetensors.torch import load_file

from mdlib.cli import app, main
from mdlib.data.checks import seen_beyond
from mdlib.data.splits import read_split, write_split
from mdlib.evaluation.identifier import Identifier
from mdlib.experiments.execute import execute
from mdlib.experiments.run import open_run
from mdlib.experiments.settings import NOTEBOOKS
from mdlib.experiments.steps import attach_trained_losses, codec_stage, prior_stage, train_stage
from mdlib.models.vqvae import VQVAE
from mdlib.pipeline import load_pipeline
from mdlib.reports.report import select_folder, validate_folders
from mdlib.simulation.dataset import simulate_dataset
from mdlib.systems import SYSTEMS, load_codec, make_codec, make_prior
from mdlib.training.latents import encode_all
from mdlib.training.state import State
from mdlib.utils import DataError, read_history

ROOT = NOTEBOOKS.parent


@pytest.fixture
def people(story):
    """Three simulated users of 40 windows."""
    return story.folder / "people"


@pytest.fixture
def finished(story):
    """A whole run with the smoke preset, and what it printed."""
    return story.folder / "runs" / "first", story.answers["run"]


@pytest.fixture(scope="module")
def denoised(story):
    """Whole runs of the diffusion systems with the smoke preset, everything optional switched on; two of them are a
    comparison's."""
    people, out = story.folder / "people", story.folder / "runs"
    common = ["--data", people, "--preset", "smoke"]
    extra = [
        "-p",
        "joint_steps=2",
        "-p",
        "classifier_steps=2",
        "-p",
        'prior_options={"prediction": "epsilon", "schedule": "scaled_linear"}',
    ]
    first = mdlib("run", *common, "--system", "vae-diffusion", "--out", out / "kl", *extra)
    second = mdlib("run", *common, "--system", "vavae-dit", "--out", out / "va", "-p", "user_codec=true", *extra[:2])
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    compared = {name: out / "compared" / name for name in ("vqvae-ldm", "vq-diffusion")}
    return {"vae-diffusion": out / "kl", "vavae-dit": out / "va", **compared}


def mdlib(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mdlib", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture
def here(monkeypatch, capfd):
    """`mdlib` in this process: it saves the seconds that a new one takes to import torch."""

    def call(*arguments) -> SimpleNamespace:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["mdlib", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return SimpleNamespace(returncode=end.value.code or 0, **capfd.readouterr()._asdict())

    return call


def test_a_run_leaves_its_identifier(finished):
    identifier = Identifier.from_pretrained(finished[0] / "identifier")
    section = json.loads((finished[0] / "report.json").read_text())["identifier"]
    assert identifier.users == [1, 2, 3] and identifier.threshold == section["threshold"]["value"]
    assert identifier.config.reading["colormap"] == "auto" and identifier.config.image_size == 32
    split = read_split(finished[0] / "split.json")
    assert set(identifier.config.trained_on).isdisjoint(split["hashes"][path] for path in split["test"])
    assert {split["hashes"][path] for path in split["train"]} <= set(identifier.config.trained_on)


def test_one_command_leads_to_the_report(finished):
    out, answer = finished
    report = json.loads((out / "report.json").read_text())
    assert answer.stdout.rstrip().endswith(report["verdict"]["sentence"])
    assert "runs/first/report.html" in answer.stdout
    products = (
        "split.json codec/config.json codec/history.csv prior/history.csv pipeline/model_index.json "
        "generated/manifest.csv samples/contact_sheet.png report.html run.json"
    )
    assert [name for name in products.split() if not (out / name).exists()] == []
    assert len(list((out / "generated").glob("ID_*/*.png"))) == 9
    assert report["reconstruction"]["psnr_db"]["value"] > 0 and report["codebook"]["usage"]["n"] > 0


@pytest.mark.parametrize("system", ["vae-diffusion", "vqvae-ldm", "vavae-dit", "vq-diffusion"])
def test_a_diffusion_system_leads_to_the_same_report(system, denoised, finished):
    out = denoised[system]
    report, other = (json.loads((folder / "report.json").read_text()) for folder in (out, finished[0]))
    assert report["about"]["system"] == system and report.keys() == other.keys()
    for section in ("reconstruction", "identity", "augmentation", "fidelity", "memorisation"):
        assert report[section].keys() == other[section].keys()
    products = "prior/history.csv pipeline/model_index.json generated/manifest.csv samples/denoising.png report.html"
    assert [name for name in products.split() if not (out / name).exists()] == []
    if system == "vavae-dit":
        again = mdlib("run", "--out", out)
        assert again.returncode == 0 and again.stdout.count("done already") == 5


def test_joint_fine_tuning_changes_the_pipelines_codec_and_calibrates_it(denoised):
    out = denoised["vae-diffusion"]
    before, after = load_codec(out / "codec"), load_codec(out / "pipeline" / "codec")
    assert not torch.equal(before.vae.encoder.conv_in.weight, after.vae.encoder.conv_in.weight)
    latents = encode_all(after, open_run(out).parts["train"].images, "latents")
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=1e-3, atol=1e-3)
    assert open_run(out).settings["joint_steps"] == 2 and (out / "pipeline" / "classifier").exists()


def test_an_aligned_codec_is_trained_in_stages_and_told_its_users(denoised):
    out = denoised["vavae-dit"]
    codec, run = load_codec(out / "codec"), open_run(out)
    assert codec.conditional and codec.config.num_users == 3
    assert not codec.losses and not any(name.startswith("losses.") for name in codec.state_dict())
    trained = load_file(out / "codec" / "losses.safetensors")
    attach_trained_losses(run, codec)
    attached = codec.losses.state_dict()
    assert {"alignment.projection.weight", "adversary.batches"} <= trained.keys() == attached.keys()
    assert all(torch.equal(tensor, attached[name]) for name, tensor in trained.items())
    history = list(csv.DictReader((out / "codec" / "history.csv").open()))
    assert [int(row["step"]) for row in history][-1] == sum(
        max(1, round(share * run.preset.codec_training.steps)) for share, _ in run.preset.stages
    )
    assert all(float(row["align_cosine"]) > 0 and float(row["held_out_align_distance"]) >= 0 for row in history)
    report = json.loads((out / "report.json").read_text())["reconstruction"]
    assert report["psnr_db_other_label"]["value"] > 0 and report["taken_for_other_label"]["n"] > 0


def test_settings_of_the_aligned_system_are_checked_before_anything_is_made(people, tmp_path):
    options = dict(data=str(people), system="vavae-dit", preset="smoke")
    with pytest.raises(OSError, match="absent.*could not be downloaded: attach it .*foundation=none"):
        open_run(tmp_path / "one", **options, foundation=str(tmp_path / "absent"))
    with pytest.raises(DataError, match="cannot start from .*weights.pt: no weights at .*weights.pt: download"):
        open_run(tmp_path / "one", **options, codec_start=str(tmp_path / "weights.pt"))
    VQVAE(image_size=32, block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vq")
    with pytest.raises(DataError, match="cannot start from .*vq: .* does not fit this VAVAE"):
        open_run(tmp_path / "one", **options, codec_start=str(tmp_path / "vq"))
    assert not (tmp_path / "one").exists()


def test_a_run_starts_from_one_on_other_people(finished, people, tmp_path):
    simulate_dataset(tmp_path / "others", users=2, windows=40, size=64, seed=9, progress=False)
    source = finished[0] / "pipeline"
    run = open_run(tmp_path / "run", data=str(tmp_path / "others"), preset="smoke", init=str(source))
    codec = make_codec(run.preset)
    prior = make_prior("vqvae-transformer", run.preset, codec, 2)
    run.start("codec", codec)
    run.start("prior", prior)
    torch.testing.assert_close(codec.state_dict(), load_codec(source / "codec").state_dict())
    known = load_pipeline(source).prior
    assert torch.equal(prior.users.weight[2], known.users.weight[3])
    options = dict(data=str(tmp_path / "others"), preset="smoke")
    with pytest.raises(DataError, match="init: .*others holds no pipeline: give the pipeline/ folder of a run"):
        open_run(tmp_path / "one", **options, init=str(tmp_path / "others"))
    with pytest.raises(DataError, match="init sets both codec and prior: leave codec_start and prior_start empty"):
        open_run(tmp_path / "one", **options, init=str(source), codec_start=str(source / "codec"))
    with pytest.raises(DataError, match="prior holds a TokenPrior, this system's prior is a VQDiffusion"):
        open_run(tmp_path / "one", **options, system="vq-diffusion", init=str(source))
    with pytest.raises(DataError, match="pipeline/codec: "):
        open_run(tmp_path / "one", **options, system="vae-diffusion", init=str(source))
    assert not (tmp_path / "one").exists()


def test_codec_and_prior_that_start_from_other_people_train_together_too(denoised, people, tmp_path):
    simulate_dataset(tmp_path / "others", users=2, windows=40, size=64, seed=9, progress=False)
    start = ["-p", f"init={denoised['vae-diffusion'] / 'pipeline'}", "-p", "joint_steps=2"]
    common = ["--data", tmp_path / "others", "--preset", "smoke", "--out", tmp_path / "run"]
    answer = mdlib("run", "--system", "vae-diffusion", *common, *start, "--from", "02", "--to", "04")
    assert answer.returncode == 0, answer.stderr
    assert load_pipeline(tmp_path / "run" / "pipeline").prior.users.num_embeddings == 3  # two people and nobody


def test_a_notebook_of_another_system_is_refused(denoised, finished):
    with pytest.raises(DataError, match="04_train_diffusion is not a notebook of vqvae-transformer: 01_env"):
        open_run(finished[0]).expect("04_train_diffusion")
    open_run(denoised["vqvae-ldm"]).expect("04_train_diffusion")


def test_windows_of_a_generator_that_saw_the_test_are_refused(denoised, tmp_path):
    """Judged by another split a copier would shine."""
    run = denoised["vqvae-ldm"]
    split, data = read_split(run / "split.json"), json.loads((run / "run.json").read_text())["settings"]["data"]
    other = {**split, "train": split["test"], "test": split["train"]}
    write_split(other, tmp_path / "split.json")
    args = (data, run / "generated", tmp_path / "split.json", tmp_path / "out")
    assert seen_beyond(run / "generated", split, data) == 0
    assert seen_beyond(run / "generated", {**split, "train": split["train"][:-3]}, data) == 3
    told = f"generated was trained on {len(other['test'])} of the test windows: evaluate it with its own split"
    with pytest.raises(DataError, match=told):
        validate_folders(*args)
    assert not (tmp_path / "out").exists()
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    with pytest.raises(DataError, match=told):
        validate_folders(elsewhere, *args[1:])
    made = shutil.copytree(run / "generated", tmp_path / "made")
    with pytest.raises(DataError, match=told.replace("generated", "made")):
        validate_folders(elsewhere, made, *args[2:])


def test_a_run_is_found_by_the_contents_of_its_windows(people, tmp_path):
    data, out = shutil.copytree(people, tmp_path / "data"), tmp_path / "run"
    run = open_run(out, data=str(data), preset="smoke")
    assert run.split["hashes"].keys() >= set(run.parts["train"].paths)
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(DataError, match="its windows are no longer in .*data: give their new place with --data"):
        open_run(out)
    assert len(open_run(out, data=str(moved), preset="smoke").windows) == 120
    assert open_run(out).settings["data"] == str(moved)
    first, second = run.split["train"][:2]
    shutil.copyfile(moved / first, moved / second)
    with pytest.raises(DataError, match=f"no longer holds the windows that .*run began with .{second} and 0 more"):
        len(open_run(out).windows)


def test_a_folder_of_kept_windows_is_one_of_generated_ones(denoised, tmp_path):
    run = denoised["vqvae-ldm"]
    data = json.loads((run / "run.json").read_text())["settings"]["data"]
    every = {path.relative_to(run / "generated") for path in (run / "generated").glob("*/*.png")}
    words = ["select", "--real", data, "--generated", run / "generated", "--split", run / "split.json"]
    words += ["--by", "diversity", "--keep", 0.4, "--size", 32, "--out"]
    app([str(word) for word in [*words, tmp_path / "kept"]], standalone_mode=False)
    kept = {path.relative_to(tmp_path / "kept") for path in (tmp_path / "kept").glob("*/*.png")}
    assert kept < every and len(kept) == len({path.parent for path in every}), "one of three of each user"
    assert all((tmp_path / "kept" / path).read_bytes() == (run / "generated" / path).read_bytes() for path in kept)
    with open(tmp_path / "kept" / "manifest.csv", newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {path.as_posix() for path in kept}
    for wrong, says in (
        ({"by": "beauty"}, "by must be one of confidence"),
        ({"fraction": 0}, "keep must be a fraction"),
    ):
        with pytest.raises(DataError, match=says):
            select_folder(data, run / "generated", run / "split.json", tmp_path / "none", **wrong)


def test_samplers_are_chosen_by_name_and_a_grid_is_drawn(denoised, here, tmp_path):
    options = ["--per-user", 2, "-o", "scheduler=ddim", "-o", "num_inference_steps=5", "-o", "classifier_scale=1.5"]
    answer = here(
        "generate", "--pipeline", denoised["vae-diffusion"] / "pipeline", "--out", tmp_path, "--grid", *options
    )
    assert answer.returncode == 0, answer.err
    assert (tmp_path / "grid.png").exists() and len(list(tmp_path.glob("ID_*/*.png"))) == 6
    wrong = here(
        "generate", "--pipeline", denoised["vqvae-ldm"] / "pipeline", "--out", tmp_path / "x", "-o", "scheduler=lms"
    )
    assert not (tmp_path / "x").exists()
    assert wrong.returncode == 1 and "scheduler must be one of ddpm, ddim, pndm, dpm++, got 'lms'" in wrong.err


def test_tokens_are_drawn_by_either_sampler(denoised, here, tmp_path):
    pipeline = ["--pipeline", denoised["vq-diffusion"] / "pipeline", "--per-user", 2]
    options = ["-o", "sampler=mask_predict", "-o", "num_inference_steps=4", "-o", "guidance_scale=2"]
    answer = here("generate", *pipeline, "--out", tmp_path / "made", *options)
    assert answer.returncode == 0, answer.err
    assert len(list((tmp_path / "made").glob("ID_*/*.png"))) == 6
    wrong = here("generate", *pipeline, "--out", tmp_path / "x", "-o", "scheduler=ddim")
    assert wrong.returncode == 1 and "this prior has no sampling option scheduler; there are" in wrong.err
    assert not (tmp_path / "x").exists()


def test_progress_is_visible_while_it_runs(finished):
    printed = finished[1].stdout
    for name in SYSTEMS["vqvae-transformer"].notebooks:
        assert f"{name}: starts" in printed and re.search(rf"{name}: done in \d+ s", printed)
    assert "codec:" in printed and "6/6" in printed, "the training bar"


def test_run_json_tells_versions_settings_and_times(finished):
    record = json.loads((finished[0] / "run.json").read_text())
    assert record["settings"]["preset"] == "smoke" and record["versions"]["torch"]
    assert list(record["steps"]) == list(SYSTEMS["vqvae-transformer"].notebooks)
    assert all(step["seconds"] > 0 and step["peak_memory_gb"] > 0 for step in record["steps"].values())


def test_the_generator_saw_training_windows_only(finished, people):
    split = json.loads((finished[0] / "split.json").read_text())
    number = lambda path: int(re.search(r"Doppler(\d+)", path).group(1))
    for user in ("ID_1", "ID_2", "ID_3"):
        mine = {k: [number(p) for p in split[k] if p.startswith(user + "/")] for k in ("train", "val", "test")}
        assert min(mine["val"]) - max(mine["train"]) >= 4 and min(mine["test"]) - max(mine["val"]) >= 4


def test_a_second_call_skips_what_is_done_and_from_runs_it_again(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    again = mdlib("run", "--out", out)  # a run knows its own data, system and preset
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done already") == 5
    stamp = (out / "generated" / "manifest.csv").stat().st_mtime_ns
    codec = (out / "codec" / "state.pt").stat().st_mtime_ns
    other = mdlib(
        "run", "--out", out, "--from", "05", "--to", "05", "-p", "images_per_user=2", "-p", 'sampling={"top_k": 4}'
    )
    assert other.returncode == 0, other.stderr
    assert (out / "generated" / "manifest.csv").stat().st_mtime_ns > stamp
    assert len(list((out / "generated").glob("ID_*/*.png"))) == 6
    assert (out / "codec" / "state.pt").stat().st_mtime_ns == codec
    assert "06_validate" not in json.loads((out / "run.json").read_text())["steps"]
    assert not (out / "report.json").exists() and "report" not in other.stdout, "the old verdict is of other windows"


def test_from_with_other_settings_is_refused_before_anything_is_removed(finished, people, here):
    out, _ = finished
    before = sorted(out.rglob("*"))
    answer = here("run", "--data", people, "--out", out, "--preset", "demo", "--from", "03")
    assert answer.returncode == 1 and "other settings (preset was 'smoke', not 'demo')" in answer.err
    assert sorted(out.rglob("*")) == before


def test_the_seed_reaches_both_trainings(people, tmp_path):
    run = open_run(tmp_path, data=people, preset="smoke", seed=5)
    assert run.preset.codec_training.seed == 5 and run.preset.prior_training.seed == 5


def test_a_first_attempt_that_failed_may_be_corrected(people, tmp_path):
    open_run(tmp_path, data=people, preset="smoke", codec_steps=7)
    assert open_run(tmp_path, data=people, preset="smoke").settings["codec_steps"] == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(codec_steps="many"), "codec_steps must be of type int, got 'many'"),
        (dict(codec_steps=-3), "codec_steps must be -1 or more, got -3"),
        (dict(seed=-1), "seed must be 0 or more"),
        (dict(split="split.json", windows_per_user=3), "windows_per_user cannot be combined with a split file"),
        (dict(unrecorded={"normal": ["1"]}), "unrecorded names users by condition"),
        (
            dict(system="vavae-dit", prior_options={"label_dropout": 0}),
            "guidance needs a prior trained with label_dropout",
        ),
        (dict(prior_options={"ema_decay": "x"}), "TrainConfig.ema_decay must be of type float"),
        (dict(split="none.json"), "none.json"),
        (dict(preset="t4x2"), "'t4x2': training in fp16 needs a GPU; demo"),
        (dict(codec="kl"), "needs tokens, which a kl codec lacks"),
        (dict(system="vae-diffusion", prior_options={"attention": "linear"}), "attention must be one of full, window"),
        (dict(system="vae-diffusion", prior_options=3), "prior_options must be of type dict, got 3"),
        (dict(system="vae-diffusion", prior_options={"block_out_channels": 64}), "codec_options or prior_options: "),
        (dict(system="vae-diffusion", codec_options={"batch_size": "16"}), "batch_size must be of type int, got '16'"),
        (dict(system="vqvae-ldm", joint_steps=5), "needs a codec of continuous latents"),
        (dict(system="vq-diffusion", joint_steps=5), "needs a codec of continuous latents"),
        (dict(system="vq-diffusion", classifier_steps=5), "guides a prior over latents, and this one is over tokens"),
        (dict(system="vq-diffusion", prior_options={"num_heads": 3}), "16 over num_heads 3 must be a multiple of 4"),
    ],
)
def test_settings_that_cannot_be_used_leave_no_run_folder(settings, message, people, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        open_run(tmp_path / "run", **{"data": people, "preset": "smoke", **settings})
    assert not (tmp_path / "run").exists()


def test_windows_per_user_of_minus_one_keeps_all(people, tmp_path):
    run = open_run(tmp_path, data=people, preset="demo", windows_per_user=-1)
    assert run.preset.windows_per_user == 0
    assert open_run(tmp_path / "other", data=people, preset="demo").preset.windows_per_user == 10


def test_split_from_the_command_line(people, here, tmp_path):
    answer = here("split", "--data", people, "--out", tmp_path / "split.json", "--windows-per-user", 5)
    assert answer.returncode == 0 and "3 users, 120 windows: 15 train, " in answer.out
    sizes = [int(number) for number in re.findall(r"(\d+) (?:train|val|test|spare|dropped)", answer.out)]
    assert len(sizes) == 5 and sum(sizes) == 120, "every window is accounted for"
    assert len(json.loads((tmp_path / "split.json").read_text())["train"]) == 15


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--data", "{data}", "--out", "{out}", "--system", "vae"], "unknown system 'vae': choose one of"),
        (["run", "--data", "{data}", "--out", "{out}", "--preset", "huge"], "unknown preset 'huge'"),
        (
            ["run", "--data", "{data}", "--out", "{out}", "-p", "codec_step=3"],
            "no notebook has a parameter 'codec_step'; did you mean codec_steps",
        ),
        (["run", "--data", "{data}", "--out", "{out}", "--from", "04"], "no notebook '04'"),
        (["run", "--data", "{out}/none", "--out", "{out}/run"], "no such folder; give the folder that holds ID_1"),
        (["generate", "--pipeline", "{out}", "--out", "{out}/made"], "holds no pipeline"),
        (["split", "--data", "{out}", "--out", "{out}/split.json"], "no user folders in it"),
        (["compare", "--data", "{data}", "--out", "{out}", "--systems", "gan"], "unknown system 'gan'"),
        (["study", "--data", "{data}", "--out", "{out}", "--preset", "demo@a100"], "unknown preset 'demo@a100'"),
        (
            ["select", "--real", "{out}/none", "--generated", "x", "--split", "y", "--out", "{out}/x"],
            "no such file or folder",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(arguments, message, people, here, tmp_path):
    fill = lambda text: text.format(data=people, out=tmp_path)
    answer = here(*map(fill, arguments))
    assert answer.returncode == 1
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mdlib: ") and fill(message) in lines[0], answer.err
    assert "Traceback" not in answer.err
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_of_other_settings_is_refused(people, tmp_path):
    open_run(tmp_path, data=people, preset="smoke")
    (tmp_path / "codec").mkdir()  # from now on something is made
    with pytest.raises(DataError, match="other settings .seed was 0, not 1.: choose another --out"):
        open_run(tmp_path, data=people, preset="smoke", seed=1)
    assert open_run(tmp_path).settings["preset"] == "smoke"


def test_a_split_of_ones_own_is_used(people, here, tmp_path):
    answer = here("split", "--data", people, "--out", tmp_path / "mine.json", "--windows-per-user", 4)
    assert answer.returncode == 0
    run = open_run(tmp_path / "run", data=people, preset="smoke", split=tmp_path / "mine.json")
    assert len(run.parts["train"]) == 12


def test_a_notebook_that_stops_names_the_cause(people, tmp_path):
    (tmp_path / "bad.json").write_text('{"train": ["ID_1/none.png"], "val": ["a"], "test": ["b"]}')
    with pytest.raises(DataError, match="02_train_vqvae stopped: DataError: .*none.png"):
        execute(
            str(tmp_path / "run"), {"split": str(tmp_path / "bad.json")}, "02", "02", data=str(people), preset="smoke"
        )


def test_a_notebook_that_ran_out_of_time_is_not_taken_for_done(people, tmp_path, monkeypatch):
    # A notebook that leaves with exit code 0 is no error to papermill, which then runs no further cell.
    monkeypatch.setattr("papermill.execute_notebook", lambda *arguments, **options: None)
    with pytest.raises(DataError, match="01_env_check ran out of time: to resume, run the same command"):
        execute(str(tmp_path / "run"), {}, data=str(people), preset="smoke")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_thin_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    for cell in code:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 25 and not any(line.startswith("class ") for line in lines)
        assert "backward(" not in cell.source, "training loops live in mdlib.training.fit"


def test_every_notebook_of_a_system_exists():
    here = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    for system in SYSTEMS.values():
        assert set(system.notebooks) <= here


def test_the_parameters_read_as_a_manual():
    import papermill

    inferred = papermill.inspect_notebook(NOTEBOOKS / "02_train_vqvae.ipynb")
    assert (
        inferred["codec_steps"]["inferred_type_name"] == "int" and "optimizer steps" in inferred["codec_steps"]["help"]
    )


# ---- what a run refuses before it removes anything, and its further training


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--from", "05", "-p", 'sampling={"scheduler": "ddim"}'],
            "this prior has no sampling option scheduler; there are ",
        ),
        (["--from", "05", "-p", 'sampling={"top_p": 7}'], "top_p"),
        (["--from", "05", "-p", "top_p=0.9"], 'top_p is an option of sampling: give it as sampling={"top_p": '),
        (["--from", "05", "-p", "users=[9]"], "it was not trained on 9"),
        (
            ["-p", 'sampling={"top_k": 4}'],
            "05_generate does not run now and would ignore sampling: add --from 05 to run it again",
        ),
        (["--from", "06", "-p", "images_per_user=20"], "05_generate does not run now and would ignore images_per_user"),
        (["--from", "06", "-p", "max_minutes=3"], "02_train_vqvae does not run now and would ignore max_minutes"),
        (["--from", "05", "--extend", "-p", "prior_steps=9"], "already reruns what the longer training changes: "),
        (["--from", "07"], "this system has no notebook '07'"),
        (["-p", "prior_steps=9"], "prior_steps was 0, not 9): to train it further, python -m mdlib run --out "),
        (["-p", "prior_steps=6", "--extend"], "prior_steps=6: the prior has 6 steps already, give more"),
        (["-p", "seed=3", "--extend"], "--extend takes more codec_steps or prior_steps and no other change, got seed"),
        (["--extend"], "no other change, got nothing"),
    ],
)
def test_a_finished_run_loses_nothing_by_a_wrong_option(words, message, finished, here):
    before = snapshot(finished[0])
    answer = here("run", "--out", finished[0], *words)
    assert answer.returncode == 1 and message in answer.err and answer.err.count("\n") == 1, answer.err
    assert snapshot(finished[0]) == before


def test_a_setting_that_would_be_ignored_is_an_error(finished):
    """As in a notebook whose parameters were edited: `data` is empty, and everything else a default but one."""
    with pytest.raises(DataError, match="prior_steps was 0, not 60.: to train it further, python -m mdlib run --out /"):
        open_run(finished[0], prior_steps=60)
    with pytest.raises(DataError, match="other settings .windows_per_user was 0, not 3.: choose another --out"):
        open_run(finished[0], windows_per_user=3)
    assert open_run(finished[0], preset="smoke", prior_steps=0).settings["preset"] == "smoke"


def test_a_prior_trains_further_in_its_own_run(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "run")
    ran, before = [], read_history(out / "prior")
    monkeypatch.setattr("mdlib.experiments.execute._execute_one", lambda name, *_: ran.append(name))
    with pytest.raises(DataError, match=r"max_minutes=0.0001: the prior has trained for \d+\.\d minutes, give more"):
        execute(out, {"prior_steps": 10, "max_minutes": 0.0001}, extend=True)
    execute(out, {"prior_steps": 10}, extend=True)
    assert ran == ["03_train_prior", "05_generate", "06_validate"], "what depends on the prior, and nothing else"
    assert not any((out / name).exists() for name in ("pipeline", "generated", "report.json"))
    run = open_run(out)
    assert run.settings["prior_steps"] == run.preset.prior_training.steps == 10
    after = train_stage(prior_stage(run))
    assert after[: len(before)] == before and after[-1]["step"] == 10
    shutil.rmtree(out / "prior")
    with pytest.raises(DataError, match="has no trained prior yet: run the command without prior_steps and --extend"):
        execute(out, {"prior_steps": 12}, extend=True)


def test_a_codec_trains_further_and_the_prior_again(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "run")
    split, weights = (out / "split.json").read_bytes(), load_codec(out / "codec").state_dict()
    ran = []
    monkeypatch.setattr("mdlib.experiments.execute._execute_one", lambda name, *_: ran.append(name))
    execute(out, {"codec_steps": 8}, extend=True)
    assert ran == ["02_train_vqvae", "03_train_prior", "05_generate", "06_validate"]
    assert not (out / "prior").exists() and (out / "split.json").read_bytes() == split
    run = open_run(out)
    assert run.preset.codec_training.steps == 8 and run.preset.prior_training.steps == 6
    stage = codec_stage(run)
    state = State(stage.model, stage.config, out / "codec")
    assert state.step == 6 and state.unfinished
    state.load_final_weights()
    learned = stage.model.encoder.state_dict()
    assert all(torch.equal(learned[key], weights[f"encoder.{key}"]) for key in learned)


def test_the_machine_is_checked_once(people, tmp_path, monkeypatch, capsys):
    def executed(name, out, *_):
        ran.append(name)
        open_run(out).done(name, 0)

    ran = []
    monkeypatch.setattr("mdlib.experiments.execute._execute_one", executed)
    for name in ("one", "two", "two"):
        execute(tmp_path / name, {}, last="01", data=str(people), preset="smoke")
    assert ran == ["01_env_check"] and "01_env_check: passed before" in capsys.readouterr().out
    assert "01_env_check" in json.loads((tmp_path / "two" / "run.json").read_text())["steps"]
    execute(tmp_path / "two", {}, "01", "01")
    assert len(ran) == 2, "--from 01 asks for it"


def test_an_interrupt_is_one_line(here, people, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("papermill.execute_notebook", interrupted)
    answer = here("run", "--data", people, "--out", tmp_path, "--preset", "smoke")
    assert answer.returncode == 130
    assert answer.err == "mdlib: 01_env_check: interrupted; to resume, run the same command\n"


def test_a_notebook_opened_in_jupyter_finds_the_run(monkeypatch):
    from mdlib.experiments import kaggle_session

    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delenv("MDLIB_BATCH", raising=False)
    monkeypatch.chdir(NOTEBOOKS)
    kaggle_session.begin("runs/demo")
    assert Path.cwd() == ROOT
    monkeypatch.chdir(ROOT)  # so that it goes back at the end
