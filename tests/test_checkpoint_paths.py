"""Every command takes a run, a checkpoint, a copied or linked one, an exported and an imported model, or says why not.

What a checkpoint says is in its manifest: its directory may be called and lie as its owner likes.
"""

import json
import re
import shutil

import pytest
from run_data import shared_run

from ldt.checkpoint.checkpoint import Checkpoint, results_of, run_of, saved_config
from ldt.cli import main

FAST = ["steps=2", "block=30", "images=30"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in every form, by the name of the form."""
    root = tmp_path_factory.mktemp("models")
    run = shutil.copytree(shared_run(tmp_path_factory), root / "run")
    newest = run / "checkpoints" / "000000002000"
    shutil.copytree(newest, root / "best")
    (root / "linked").symlink_to(newest)
    shutil.copytree(run, root / "moved")
    assert main(["export", str(run), "--to", str(root / "exported")]) == 0
    shutil.copytree(root / "exported", root / "imported")
    facts = json.loads((root / "imported" / "model.json").read_text())
    facts |= {"samples_seen": 0, "weights": "imported", "made_from": {"x.pt": "DiT"}}
    facts["config"] = {key: facts["config"][key] for key in ("model", "objective")}
    (root / "imported" / "model.json").write_text(json.dumps(facts))
    inside = {"run": run, "checkpoint": newest}
    return inside | {form: root / form for form in ("best", "linked", "moved", "exported", "imported")}


FORMS = ("run", "checkpoint", "best", "linked", "moved", "exported", "imported")
REFUSALS = {
    ("evaluate", "imported"): "give evaluate.reference",
    ("export", "exported"): "is an exported model and no checkpoint",
    ("export", "imported"): "is an exported model and no checkpoint",
}
ARGUMENTS = {
    "sample": FAST,
    "evaluate": [],
    "inspect": [],
    "export": ["--to", "out/model"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", ["sample", "evaluate", "inspect", "export"])
def test_a_command_takes_every_form_or_says_what_is_missing(command, form, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = main([command, str(models[form]), *ARGUMENTS[command]])
    out, error = capsys.readouterr()
    refusal = REFUSALS.get((command, form))
    assert code == (2 if refusal else 0), error
    assert refusal is None or refusal in error
    assert "Traceback" not in error
    if command == "inspect":
        assert re.findall(r"samples seen +([\d,]+)", out)[-1] == ("0" if form == "imported" else "2,000")


@pytest.mark.parametrize("form", ["checkpoint", "best", "exported", "imported"])
@pytest.mark.parametrize("command", ["status", "report"])
def test_a_command_about_runs_refuses_what_is_none(command, form, models, capsys):
    assert main([command, str(models[form])]) == 2
    error = capsys.readouterr().err
    assert "give the run_dir of" in error and "Traceback" not in error


def test_a_copied_checkpoint_is_evaluated_by_its_own_config_and_beside_the_caller(models, tmp_path, monkeypatch):
    """Not by the defaults, 50,000 images; and its results do not depend on how the path is spelt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").symlink_to(models["best"])
    for spelling in (str(models["best"]), "best", "./best/"):
        assert main(["evaluate", spelling]) == 0
    (line,) = (tmp_path / "best-results" / "evaluations.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert (result["samples_seen"], result["images"], result["steps"]) == (2000, 60, 2)


def test_results_of_a_checkpoint_in_a_run_go_to_the_run_however_the_path_is_spelt(models, monkeypatch):
    run = models["run"]
    monkeypatch.chdir(run / "checkpoints")
    for spelling in (models["checkpoint"], models["linked"], type(run)("000000002000")):
        assert results_of(spelling).resolve() == run.resolve() and run_of(spelling) is not None
        assert saved_config(spelling)["evaluate"]["images"] == 60
    assert run_of(models["best"]) is None and results_of(models["exported"]) == models["exported"]
    assert saved_config(models["best"])["evaluate"]["steps"] == 2


def test_a_renamed_checkpoint_of_a_run_is_known_by_its_clock(models, tmp_path, capsys):
    run = shutil.copytree(models["run"], tmp_path / "run")
    (run / "checkpoints" / "000000001000").rename(run / "checkpoints" / "000000009999")
    assert Checkpoint.read(run / "checkpoints" / "000000009999").samples_seen == 1000
    assert main(["evaluate", str(run), "evaluate.checkpoint=1000"]) == 0
    assert json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])["samples_seen"] == 1000
    assert main(["evaluate", str(run), "evaluate.checkpoint=9999"]) == 2
    assert sorted(re.findall(r"[12]000", capsys.readouterr().err)) == ["1000", "2000"]
