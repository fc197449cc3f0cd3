"""The files of examples/launch are what Slurm, Kubeflow Trainer and SkyPilot take."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"
# Options of sbatch(1) by their long names, those that a run of several machines may need.
SBATCH = {
    *("account", "array", "chdir", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error", "exclude"),
    *("exclusive", "export", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hint", "job-name", "mail-type"),
    *("mail-user", "mem", "mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "ntasks", "ntasks-per-node", "open-mode"),
    *("output", "partition", "qos", "requeue", "no-requeue", "reservation", "signal", "switches", "time", "time-min"),
}


def read(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def test_the_batch_script_is_bash_and_its_directives_are_sbatchs() -> None:
    script = LAUNCH / "slurm.sbatch"
    lines = script.read_text(encoding="utf-8").splitlines()
    subprocess.run(["bash", "-n", str(script)], check=True)
    directives = [line for line in lines if line.startswith("#SBATCH")]
    names = [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line) for line in directives]
    assert [line for line, name in zip(directives, names, strict=True) if not name or name[1] not in SBATCH] == []
    # sbatch reads directives up to the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(line in lines[:first] for line in directives)


def test_kubeflows_own_models_take_the_train_job() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    tree = read("trainjob.yaml")
    job = models.TrainerV1alpha1TrainJob.from_dict(tree)
    assert (job.api_version, job.kind) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job.spec.runtime_ref.name == "torch-distributed"
    known = {field.alias or name for name, field in type(job.spec.trainer).model_fields.items()}
    assert tree["spec"]["trainer"].keys() <= known


def test_skypilots_own_schemas_take_the_task() -> None:
    """Its parser would also ask the network for the clouds' catalogues."""
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not installed")
    tree, check = read("skypilot.yaml"), pytest.importorskip("sky.utils.common_utils").validate_schema
    check(tree, schemas.get_task_schema(), "skypilot.yaml: ")
    check(tree["resources"], schemas.get_resources_schema(), "skypilot.yaml: ")
    with pytest.raises(ValueError, match="num_node"):
        check({**tree, "num_node": 2}, schemas.get_task_schema(), "skypilot.yaml: ")


@pytest.mark.parametrize("name", ["slurm.sbatch", "trainjob.yaml", "skypilot.yaml"])
def test_each_starts_the_same_program(name: str) -> None:
    words = re.sub(r"[\[\],\"$]", " ", (LAUNCH / name).read_text(encoding="utf-8")).split()
    assert "-m phinetune train" in " ".join(words)


def test_the_tasks_keys_are_skypilots_and_its_script_is_bash() -> None:
    """What can be seen without SkyPilot, which is too large to be installed for this alone."""
    tree = read("skypilot.yaml")
    assert tree.keys() <= {
        "name",
        "num_nodes",
        "resources",
        "workdir",
        "file_mounts",
        "envs",
        "secrets",
        "setup",
        "run",
    }
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=tree[part], text=True, check=True)
