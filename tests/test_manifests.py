"""Every cluster file against its API's schema, and against what the code accepts."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from cluster.submit import parse_arguments
from models.command import load_config
from pipeline.config import TrainConfig
from tests.test_slurm import shellcheck

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
# The fields that we use of KubeRay 1.7's ray.io/v1, written down from its reference: anything else is a slip.
# Pods inside are checked as Kubernetes' own. FLOWMILL_KUBERAY_CRDS=folder checks against the real CRDs as well.
RESOURCES = {"requests": dict, "limits": dict}
GROUP = {"rayStartParams": dict, "template": dict}
RAY_CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": re.compile("token"), "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "resources": RESOURCES},
    "headGroupSpec": GROUP | {"serviceType": re.compile("ClusterIP")},
    "workerGroupSpecs": [
        GROUP | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
    ],
}
RAY_JOB = {
    "entrypoint": str,
    "submissionMode": re.compile("K8sJobMode|HTTPMode|SidecarMode"),
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": RAY_CLUSTER,
}
KUBERAY = {"RayCluster": RAY_CLUSTER, "RayJob": RAY_JOB}
SKYPILOT = {
    "name": str,
    "num_nodes": int,
    "workdir": str,
    "resources": {"accelerators": str, "use_spot": bool, "disk_size": int},
    "file_mounts": dict,
    "setup": str,
    "run": str,
}


def check(value: Any, schema: Any, where: str) -> None:
    """Types and names, to the depth that the schema goes."""
    if isinstance(schema, re.Pattern):
        assert schema.fullmatch(value), where
    elif isinstance(schema, list):
        for item in value:
            check(item, schema[0], where)
    elif isinstance(schema, dict):
        for key, item in value.items():
            assert key in schema, f"{where}.{key}: no such field"
            check(item, schema[key], f"{where}.{key}")
    else:
        assert type(value) is schema, f"{where}: {value!r}"


def documents() -> Iterator[Any]:
    for path in sorted((CLUSTER / "kuberay").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield pytest.param(document, id=f"{path.name}-{document['kind']}")


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document, at whatever depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "template" and isinstance(value, dict):
                yield value
            yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


@pytest.mark.parametrize("document", documents())
def test_a_manifest_fits_its_api(document):
    if document["apiVersion"] == "ray.io/v1":
        check(document["spec"], KUBERAY[document["kind"]], document["kind"])
        if folder := os.environ.get("FLOWMILL_KUBERAY_CRDS"):
            path = Path(folder) / f"ray.io_{document['kind'].lower()}s.yaml"
            versions = yaml.safe_load(path.read_text())["spec"]["versions"]
            (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
            jsonschema.validate(document, _closed(schema))
    else:
        kubernetes_validate.validate(document, "1.31", strict=True)
    for template in pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **template}
        kubernetes_validate.validate(pod, "1.31", strict=True)


def _closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as the API server prunes them; integers pass as quantities."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        closed["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
        closed["additionalProperties"] = False
    return closed


def test_a_slip_in_a_manifest_is_found():
    with pytest.raises(AssertionError, match="workerGroupSpec"):
        check({"workerGroupSpec": []}, RAY_CLUSTER, "RayCluster")
    job = yaml.safe_load_all((CLUSTER / "kuberay" / "torchrun-job.yaml").read_text())
    document = next(d for d in job if d["kind"] == "Job")
    document["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("document", documents())
def test_pods_are_bounded_unprivileged_and_have_shared_memory_and_the_mounts_they_name(document):
    for template in pod_templates(document):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for container in spec["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() <= volumes.keys()
            assert mounts["shm"] == "/dev/shm"
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_commands_of_the_manifests_are_commands_of_ours():
    """Their options parse, their configs load, and their sizes share the batch."""
    job = yaml.safe_load((CLUSTER / "kuberay" / "rayjob.yaml").read_text())
    python, flag, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "cluster.train_job")
    given = parse_arguments(module, arguments)
    assert given["workers"] == 8 * sum(
        group["maxReplicas"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    )
    load_config(TrainConfig, ROOT / given["config"], given["overrides"])
    documents = yaml.safe_load_all((CLUSTER / "kuberay" / "torchrun-job.yaml").read_text())
    train = next(d for d in documents if d["kind"] == "Job")
    (container,) = train["spec"]["template"]["spec"]["containers"]
    place = container["args"].index("pipeline.train")
    given = parse_arguments("pipeline.train", container["args"][place + 1 :])
    load_config(TrainConfig, ROOT / given["config"], given["overrides"])
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(container["args"])
    assert options.nnodes == str(train["spec"]["parallelism"])
    assert options.training_script == "pipeline.train"


def test_ray_up_takes_the_cluster_file():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    config = yaml.safe_load((CLUSTER / "ray" / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"max_worker": 1}, schema)


def test_skypilots_file_holds_what_skypilot_reads():
    task = yaml.safe_load((CLUSTER / "skypilot" / "train.yaml").read_text())
    check(task, SKYPILOT, "task")
    for part in ("setup", "run"):
        command = [shellcheck(), "--shell=bash", "-"]
        done = subprocess.run(command, input=task[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_image_holds_what_the_code_needs():
    lines = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER"}
    copied = [name for step, rest in steps if step == "COPY" for name in rest.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    needed = {"models", "data_prep", "pipeline", "cluster", "configs", "constraints.txt"}
    assert needed <= set(copied)
    assert steps[-1] == ["USER", "flowmill"]


@pytest.mark.parametrize("path", [p for p in CLUSTER.rglob("*") if p.is_file() and p.suffix != ".pyc"], ids=lambda p: p.name)  # fmt: skip
def test_no_cluster_file_opens_a_port_to_all_or_holds_a_secret(path):
    text = path.read_text()
    assert "0.0.0.0" not in text
    secret = r"(?i)(token|password|secret)\w*['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9+/]{20,}"
    assert not re.search(secret, text)
    assert "LoadBalancer" not in text.replace("never a LoadBalancer", "")
