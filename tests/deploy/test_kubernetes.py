"""deploy/kubernetes.yaml against the schema that Kubernetes publishes, and in itself."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from inference.shards import parse_shard

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


# backoffLimitPerIndex has been there by default since 1.29.
@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_it_follows_the_published_schema_to_the_last_key(documents, version):
    assert [document["kind"] for document in documents] == ["Job", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)
    documents[0]["spec"]["completionmode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[0], version, strict=True)
    del documents[0]["spec"]["completionmode"]


def test_the_parts_are_as_many_as_the_tasks(documents):
    job = documents[0]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    shard = container["args"][container["args"].index("--shard") + 1]
    assert parse_shard(shard, {"JOB_COMPLETION_INDEX": "0"}) == (0, job["completions"])
    for rule in job["podFailurePolicy"]["rules"]:
        named = rule.get("onExitCodes", {}).get("containerName", container["name"])
        assert named == container["name"]
    (codes,) = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"][:1]]
    assert (codes["operator"], codes["values"]) == ("In", [1, 2])  # what could not start goes on
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {"/workspace/inputs", "/workspace/outputs", "/workspace/records", "/tmp"} == mounts
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    chosen = documents[1]["spec"]["podSelector"]["matchLabels"]
    assert chosen == job["template"]["metadata"]["labels"]


def test_the_slurm_script_is_bash():
    assert subprocess.run(["bash", "-n", DEPLOY / "slurm.sbatch"], check=False).returncode == 0
