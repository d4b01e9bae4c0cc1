"""Train on TPU slices of a GKE cluster: prints, or applies, the JobSet of a run.

    python tpu/launch/gke.py llama --topology v5p:4x4x4 --slices 2 --image IMAGE --claim runs \\
        --apply -- llama3_1b --data.source parquet --data.path /mnt/corpus --mesh.fsdp 64

The cluster needs the JobSet controller and one TPU node pool of that topology for each slice
(docs/clusters.md). All pods run scripts/train.py, which finds its coordinator by what GKE puts
into their environment: TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, and MEGASCALE_* with several slices.
Facts about JobSet and about GKE's labels: https://jobset.sigs.k8s.io/docs/reference,
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and .../how-to/tpu-multislice.
"""

import argparse
import dataclasses
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lm import exit_codes

MOUNT = "/mnt"
GRACE_SECONDS = 300
"""Between SIGTERM and SIGKILL, for the run to save; spot nodes give about 30 s in any case."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of TPU as GKE knows it."""

    label: str
    """Value of the node label cloud.google.com/gke-tpu-accelerator."""
    axes: int
    host_chips: tuple[int, ...]
    """Chips of one node, for the machine types there are; the first is what slices are made of."""


KINDS = {
    "v4": Kind("tpu-v4-podslice", 3, (4,)),
    "v5e": Kind("tpu-v5-lite-podslice", 2, (4, 8, 1)),
    "v5p": Kind("tpu-v5p-slice", 3, (4,)),
    "v6e": Kind("tpu-v6e-slice", 2, (4, 8, 1)),
    "tpu7x": Kind("tpu7x", 3, (4, 1)),
}
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
PARTS_OF_A_CUBE = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")


@dataclasses.dataclass(frozen=True)
class Slice:
    """What one replica of the JobSet runs on: `hosts` nodes of `host_chips` chips each."""

    kind: Kind
    topology: str
    hosts: int
    host_chips: int


def parse_slice(text: str, host_chips: int | None = None) -> Slice:
    """ "v5p:4x4x4" as a `Slice`; `ValueError` for what GKE has no nodes for."""
    name, _, topology = text.partition(":")
    if name not in KINDS:
        raise ValueError(f"--topology {text!r}: no TPU {name!r}; known are {', '.join(KINDS)}")
    kind = KINDS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology) or topology.count("x") != kind.axes - 1:
        example = "4x4x4" if kind.axes == 3 else "4x8"
        raise ValueError(f"--topology {text!r}: {name} takes {kind.axes} sizes, like {example}")
    sizes = [int(size) for size in topology.split("x")]
    if kind.axes == 2 and topology not in PLANES:
        raise ValueError(f"--topology {text!r}: {name} comes as {', '.join(PLANES)}")
    whole_cubes = sizes == sorted(sizes) and all(size % 4 == 0 for size in sizes)
    if kind.axes == 3 and topology not in PARTS_OF_A_CUBE and not whole_cubes:
        raise ValueError(
            f"--topology {text!r}: {name} comes as {', '.join(PARTS_OF_A_CUBE)}, or in cubes: "
            "multiples of 4 that do not decrease"
        )
    chips = math.prod(sizes)
    if host_chips is None:
        fitting = [n for n in kind.host_chips if chips % n == 0]
        host_chips = fitting[0] if fitting else 0
    if host_chips not in kind.host_chips or chips % host_chips:
        known = ", ".join(map(str, kind.host_chips))
        raise ValueError(
            f"--topology {text!r}: {chips} chips are not whole nodes ({name} has nodes of {known})"
        )
    if host_chips != kind.host_chips[0] and chips != host_chips:
        raise ValueError(f"nodes of {host_chips} chips form no slices; {text} needs several")
    return Slice(kind, topology, chips // host_chips, host_chips)


def manifest(
    name: str,
    where: Slice,
    *,
    slices: int,
    image: str,
    claim: str,
    train_words: Sequence[str],
    namespace: str = "default",
    spot: bool = False,
    queue: str = "",
    max_restarts: int = 10,
) -> dict[str, Any]:
    """The JobSet as a dictionary.

    One Job for each slice, one pod for each host of it; a pod has all chips of its node. When a pod
    fails all are started again, up to `max_restarts` times, and continue from the last checkpoint.
    """
    selector = {
        "cloud.google.com/gke-tpu-accelerator": where.kind.label,
        "cloud.google.com/gke-tpu-topology": where.topology,
    }
    if spot:
        selector["cloud.google.com/gke-spot"] = "true"
    chips = {"google.com/tpu": where.host_chips}
    container = {
        "name": "train",
        "image": image,
        "command": ["python", "scripts/train.py"],
        "args": [*train_words, "--out", f"{MOUNT}/{name}", "--resume"],
        "env": [
            # Said outright: pods that do not find each other must fail, not train alone.
            {"name": "ANISO_CLUSTER", "value": "tpu" if slices * where.hosts > 1 else "none"},
            {"name": "ANISO_CACHE", "value": f"{MOUNT}/.aniso-cache"},
        ],
        # The TPU runtime, JAX's coordinator (jax/_src/clusters), and traffic between slices.
        "ports": [{"containerPort": port} for port in (8471, 8482, 8080)],
        "resources": {"requests": chips, "limits": dict(chips)},
        "volumeMounts": [
            {"name": "runs", "mountPath": MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "hostNetwork": True,  # full bandwidth between slices
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": selector,
        "tolerations": [
            {"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"},
            *(
                [{"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"}]
                if spot
                else []
            ),
        ],
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    final = [exit_codes.USAGE, exit_codes.DIVERGED]
    job = {
        "parallelism": where.hosts,
        "completions": where.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one failed pod fails the Job, and JobSet restarts all of them
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": final},
                }
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": namespace,
            # One slice on one node pool: its hosts must be those that are wired together.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
            **({"labels": {"kueue.x-k8s.io/queue-name": queue}} if queue else {}),
        },
        "spec": {
            # The headless service by which pods know each other; JobSet makes it.
            "network": {
                "enableDNSHostnames": True,
                "subdomain": name,
                "publishNotReadyAddresses": True,
            },
            "failurePolicy": {
                "maxRestarts": max_restarts,
                "rules": [
                    # A diverged run or a wrong flag would end the same way again.
                    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the manifest; with --apply hand it to kubectl."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, train = (
        (words[: words.index("--")], words[words.index("--") + 1 :])
        if ("--" in words)
        else (words, [])
    )
    parser = argparse.ArgumentParser(
        prog="gke.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="gke.py NAME --topology KIND:SIZES --image I --claim C [options] -- RECIPE ...",
    )
    parser.add_argument("name", help=f"of the JobSet, and of the run folder {MOUNT}/NAME")
    parser.add_argument("--topology", required=True, help="of one slice, as v5p:4x4x4 or v6e:16x16")
    parser.add_argument("--slices", type=int, default=1, help="how many slices (1)")
    parser.add_argument("--host-chips", type=int, help="chips of a node, where GKE has a choice")
    parser.add_argument("--image", required=True, help="made from tpu/launch/Dockerfile")
    parser.add_argument(
        "--claim", required=True, help=f"PersistentVolumeClaim (ReadWriteMany), mounted at {MOUNT}"
    )
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--spot", action="store_true", help="on spot nodes")
    parser.add_argument("--queue", default="", help="LocalQueue of Kueue that admits the JobSet")
    parser.add_argument("--max-restarts", type=int, default=10)
    parser.add_argument("--apply", action="store_true", help="kubectl apply instead of printing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --apply: only let the cluster check the manifest (kubectl's --dry-run=server)",
    )
    options = parser.parse_args(own)
    if not train:
        refuse("no recipe: end with -- RECIPE --dotted.field value ...")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        refuse(f"NAME must be lower-case letters, digits and dashes, got {options.name!r}")
    if options.slices < 1 or options.max_restarts < 0:
        refuse("--slices must be 1 or more, --max-restarts 0 or more")
    try:
        where = parse_slice(options.topology, options.host_chips)
    except ValueError as error:
        refuse(str(error))
    if options.slices > 1 and where.hosts == 1:
        refuse(f"{options.topology} is one host, and GKE joins slices of several hosts only")
    text = render(
        manifest(
            options.name,
            where,
            slices=options.slices,
            image=options.image,
            claim=options.claim,
            train_words=train,
            namespace=options.namespace,
            spot=options.spot,
            queue=options.queue,
            max_restarts=options.max_restarts,
        )
    )
    if not options.apply:
        print(text, end="")
        return
    if not shutil.which("kubectl"):
        refuse("--apply needs kubectl (see docs/clusters.md)")
    command = ["kubectl", "apply", "-f", "-", *(["--dry-run=server"] if options.dry_run else [])]
    code = subprocess.run(command, input=text, text=True, check=False).returncode
    if code == 0:
        pods = f"jobset.sigs.k8s.io/jobset-name={options.name}"
        namespace = shlex.quote(options.namespace)
        print(f"logs: kubectl logs -f -n {namespace} -l {pods} --prefix --max-log-requests 100")
    raise SystemExit(code)


def render(value: dict[str, Any]) -> str:
    """YAML, in the order given."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, width=100)


def refuse(message: str) -> NoReturn:
    print(f"gke.py: error: {message}", file=sys.stderr)
    raise SystemExit(exit_codes.USAGE)


if __name__ == "__main__":
    main()
