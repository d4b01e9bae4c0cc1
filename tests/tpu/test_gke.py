"""The JobSet that tpu/launch/gke.py makes, against what JobSet, Kubernetes and GKE ask of it.

Facts: JobSet API v1alpha2 (https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/), Job API
batch/v1, GKE's TPU labels and machine types ("Plan TPUs in GKE", "Deploy TPU Multislices in GKE").
"""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lm.cli.args import parse_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tpu" / "launch" / "gke.py"
BASE = ["--image", "img", "--claim", "runs"]
TRAIN = ["--", "tiny", "--steps", "100"]


@pytest.fixture(scope="module")
def gke():
    spec = importlib.util.spec_from_file_location("gke", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gke"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gke"]


@pytest.fixture
def made(gke, capsys):
    """made(words) -> the manifest as YAML readers see it."""

    def make(*words):
        gke.main(["llama", *BASE, *words, *TRAIN])
        text = capsys.readouterr().out
        assert "&id" not in text and "*id" not in text  # no anchors: people edit these files
        return yaml.safe_load(text)

    return make


def job_of(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated, replicated["template"]["spec"]


@pytest.mark.parametrize(
    ("topology", "label", "hosts", "chips"),
    [
        # hosts and chips per host as the tables of "Plan TPUs in GKE" give them
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v5e:4x8", "tpu-v5-lite-podslice", 8, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v6e:16x16", "tpu-v6e-slice", 64, 4),
        ("v6e:2x2", "tpu-v6e-slice", 1, 4),
        ("tpu7x:2x2x2", "tpu7x", 2, 4),
    ],
)
def test_one_pod_for_each_host(made, topology, label, hosts, chips):
    manifest = made("--topology", topology)
    replicated, job = job_of(manifest)
    assert replicated["replicas"] == 1
    assert job["parallelism"] == job["completions"] == hosts
    assert hosts * chips == math.prod(map(int, topology.partition(":")[2].split("x")))
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_eight_chips_on_one_node(made):
    _, job = job_of(made("--topology", "v6e:2x4", "--host-chips", "8"))
    assert job["parallelism"] == 1
    (container,) = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 8}


def test_required_fields_of_jobset_and_job(made):
    manifest = made("--topology", "v5p:4x4x4", "--slices", "2", "--queue", "q", "--namespace", "n")
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    meta, spec = manifest["metadata"], manifest["spec"]
    assert meta["name"] == "llama" and meta["namespace"] == "n"
    assert meta["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    # A slice must not be spread over node pools.
    key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert meta["annotations"][key] == "cloud.google.com/gke-nodepool"
    # The headless service that GKE builds TPU_WORKER_HOSTNAMES and MEGASCALE_* from.
    assert spec["network"] == {
        "enableDNSHostnames": True,
        "subdomain": "llama",
        "publishNotReadyAddresses": True,
    }
    replicated, job = job_of(manifest)
    assert replicated["replicas"] == 2 and replicated["name"]
    assert job["completionMode"] == "Indexed"  # else there is no TPU_WORKER_ID
    assert job["backoffLimit"] == 0  # else one pod restarts while the others hang
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # asked for by podFailurePolicy
    env = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert env["ANISO_CLUSTER"] == "tpu"
    assert not any(name.startswith(("MEGASCALE", "TPU_")) for name in env)  # GKE sets those
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def test_restarts_but_not_what_would_end_the_same_way(made):
    manifest = made("--topology", "v5p:4x4x4", "--max-restarts", "3")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    _, job = job_of(manifest)
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert rule["action"] == "FailJob" and codes["operator"] == "In"
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    assert codes["values"] == [2, 3] and 75 not in codes["values"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


def test_spot_nodes_are_asked_for_and_tolerated(made):
    _, job = job_of(made("--topology", "v5p:4x4x4", "--spot"))
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [t["key"] for t in pod["tolerations"]]


def test_the_pod_runs_a_command_that_train_takes(made):
    _, job = job_of(made("--topology", "v5p:4x4x4"))
    container = job["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "scripts/train.py"]
    config = parse_run(container["args"])
    assert (config.steps, config.out, config.resume) == (100, "/mnt/llama", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v9:2x2"], "no TPU 'v9'; known are v4, v5e, v5p, v6e, tpu7x"),
        (["--topology", "v5p:4x4"], "v5p takes 3 sizes, like 4x4x4"),
        (["--topology", "v6e:4x4x4"], "v6e takes 2 sizes"),
        (["--topology", "v5p:1x1x1"], "1 chips are not whole nodes"),
        (["--topology", "v5p:8x4x4"], "multiples of 4 that do not decrease"),
        (["--topology", "v5p:2x2x3"], "v5p comes as 1x1x1, 2x2x1"),
        (["--topology", "v6e:4x6"], "v6e comes as 1x1, 2x2"),
        (["--topology", "v5p:axb"], "takes 3 sizes"),
        (["--topology", "v6e:4x4", "--host-chips", "8"], "nodes of 8 chips form no slices"),
        (["--topology", "v6e:4x4", "--host-chips", "3"], "v6e has nodes of 4, 8, 1"),
        (["--topology", "v5p:2x2x1", "--slices", "2"], "is one host, and GKE joins"),
        (["--topology", "v5p:4x4x4", "--slices", "0"], "--slices must be 1 or more"),
    ],
)
def test_what_gke_has_no_nodes_for_is_refused(gke, capsys, words, message):
    with pytest.raises(SystemExit) as exit_:
        gke.main(["llama", *BASE, *words, *TRAIN])
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_without_recipe_or_with_a_bad_name(gke, capsys):
    for words, message in (
        (["llama", *BASE, "--topology", "v5p:4x4x4"], "no recipe"),
        (["Llama_3", *BASE, "--topology", "v5p:4x4x4", *TRAIN], "got 'Llama_3'"),
    ):
        with pytest.raises(SystemExit):
            gke.main(words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("extra", "flag"), [([], ""), (["--dry-run"], "--dry-run=server")])
def test_apply_hands_the_manifest_to_kubectl(tmp_path, extra, flag):
    program = tmp_path / "kubectl"
    program.write_text(f'#!/usr/bin/env bash\necho "$@" > {tmp_path}/words; cat > {tmp_path}/in\n')
    program.chmod(0o755)
    words = ["llama", *BASE, "--topology", "v5p:4x4x4", "--apply", *extra, *TRAIN]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env=os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words").read_text().split() == ["apply", "-f", "-", *flag.split()]
    assert yaml.safe_load((tmp_path / "in").read_text())["metadata"]["name"] == "llama"
    assert "jobset-name=llama" in done.stdout
