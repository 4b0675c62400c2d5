"""What KubeRay's custom resources may hold: the fields of its API reference (ray.io/v1, KubeRay 1.6), strictly.

The reference is at https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html; pods within are held to
Kubernetes' own strict schema. Here is what a manifest of ours may use; a field that is missing here is refused.
"""

import functools
import importlib.resources
import json

import jsonschema
import referencing
from referencing.jsonschema import DRAFT202012

KUBERNETES = "1.33.0"
TEXT, NUMBER, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
STRINGS = {"type": "object", "additionalProperties": TEXT}
POD = {"$ref": "_definitions.json#/$defs/io.k8s.api.core.v1.PodTemplateSpec"}
META = {"$ref": "_definitions.json#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
RESOURCES = {"$ref": "_definitions.json#/$defs/io.k8s.api.core.v1.ResourceRequirements"}
SERVICE = {"$ref": "_definitions.json#/$defs/io.k8s.api.core.v1.Service"}


def one_of(*values):
    return {"enum": list(values)}


def fields(required, **properties):
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


AUTH = fields(["mode"], mode=one_of("token", "disabled"), secretName=TEXT)
AUTOSCALER = fields(
    [],
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=NUMBER,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    resources=RESOURCES,
    image=TEXT,
)
HEAD = fields(
    ["template"],
    template=POD,
    rayStartParams=STRINGS,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    headService=SERVICE,
    enableIngress=SWITCH,
)
WORKERS = fields(
    ["groupName", "template", "minReplicas", "maxReplicas"],
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    idleTimeoutSeconds=NUMBER,
    suspend=SWITCH,
    rayStartParams=STRINGS,
    template=POD,
)
CLUSTER = fields(
    ["headGroupSpec", "rayVersion", "authOptions"],
    rayVersion=TEXT,
    suspend=SWITCH,
    authOptions=AUTH,
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS, "minItems": 1},
)
JOB = fields(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    submitterPodTemplate=POD,
    backoffLimit=NUMBER,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    ttlSecondsAfterFinished=NUMBER,
    shutdownAfterJobFinishes=SWITCH,
    suspend=SWITCH,
    entrypointNumCpus={"type": "number"},
    rayClusterSpec=CLUSTER,
)
SERVING = fields(
    ["serveConfigV2", "rayClusterConfig"],
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    serveService=SERVICE,
    excludeHeadPodFromServeSvc=SWITCH,
    upgradeStrategy=fields(["type"], type=one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None")),
)
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVING}


def validate(manifest):
    """Raises jsonschema.ValidationError where a custom resource of KubeRay is not well formed."""
    spec = SPECS[manifest["kind"]]
    whole = fields(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(*SPECS),
        metadata=META,
        spec=spec,
    )
    jsonschema.Draft202012Validator(whole, registry=_registry()).validate(manifest)


@functools.cache
def _registry():
    folder = importlib.resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    resource = referencing.Resource.from_contents(definitions, default_specification=DRAFT202012)
    return referencing.Registry().with_resource("_definitions.json", resource)
