import json
import re
import shutil

import jsonschema
import kubernetes_validate
import pytest
from conftest import ROOT
from support import manifests
from support.manifests import CHECKS, SECRETS, compose

INFRA = ROOT / "infra"
REFUSED = (AssertionError, jsonschema.ValidationError, kubernetes_validate.ValidationError, ValueError)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """infra/ where the slips are made, too."""
    return shutil.copytree(INFRA, tmp_path_factory.mktemp("copied") / "infra")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_stands_in_infra_is_well_formed_and_true_to_the_code(check, copied):
    check(copied)


MUTATIONS = [
    ("compose", "compose.yaml", "depends_on:", "depend_on:"),
    ("commands", "compose.yaml", "serve --store", "serve --stoer"),
    ("commands", "compose.yaml", "prefect worker start --pool", "prefect worker start --poll"),
    ("commands", "compose.yaml", "--dashboard-host 0.0.0.0", "--dashbord-host 0.0.0.0"),
    ("commands", "compose.yaml", "serve deploy --address", "serve deploy --adress"),
    ("environment", "compose.yaml", "PREFECT_API_URL:", "PREFECT_API_URI:"),
    ("environment", "compose.yaml", "RAY_AUTH_TOKEN: ${RAY_AUTH_TOKEN:?a long random word that all parts of Ray share}",
     "RAY_AUTH_TOKEN: secret"),
    ("compose", "compose.yaml", "127.0.0.1:8265:8265", "8265:8265"),
    ("ports", "compose.yaml", "127.0.0.1:3000:3000", "127.0.0.1:3000:3001"),
    ("addresses", "compose.yaml", "http://ray-head:8265", "http://ray_head:8265"),
    ("addresses", "compose.yaml", "/api/gcs_healthz", "/api/gcs_health"),
    ("compose", "compose.yaml", "./grafana/bulk.json", "./grafana/bulc.json"),
    ("compose", "compose.yaml", "seaweedfs:4.48", "seaweedfs:latest"),
    ("networks", "compose.yaml", "--node-ip-address 10.231.5.10", "--node-ip-address 10.231.5.11"),
    ("networks", "compose.yaml", "--address 10.231.5.10:6379", "--address ray-head:6379"),
    ("networks", "compose.yaml", "subnet: 10.231.5.0/24", "subnet: 10.231.6.0/24"),
    ("networks", "compose.yaml", "ip_range: 10.231.5.128/25", "ip_range: 10.231.5.0/25"),
    ("networks", "compose.yaml", "networks: [store, cluster]\n    depends_on:\n      ray-head",
     "networks: [store]\n    depends_on:\n      ray-head"),
    ("networks", "compose.yaml", "networks: [store, cluster, flows]", "networks: [store, cluster]"),
    ("store", "compose.yaml", "-webdav=false", "-webdav=true"),
    ("ports", "prometheus.yaml", "port: 8080", "port: 8081"),
    ("addresses", "prometheus.yaml", "ray-worker", "ray-wroker"),
    ("dockerfile", "Dockerfile", "debian:12.12-slim", "debian:latest"),
    ("dockerfile", "Dockerfile", "COPY pipelines", "COPY pipeline"),
    ("dockerfile", "Dockerfile", "/etc/profile.d/venv.sh", "/etc/profile.d/venv"),
    ("dockerfile", "Dockerfile", "wget rsync openssh-client", "wget openssh-client"),
    ("dockerfile", "Dockerfile", "USER 1000:1000", "USER root"),
    ("environment", "Dockerfile", "RAY_AUTH_MODE", "RAY_AUTHMODE"),
    ("ports", "Dockerfile", "52365", "52356"),
    ("launcher", "ray-cluster.yaml", "head_node_type: head", "head_node_type: haed"),
    ("launcher", "ray-cluster.yaml", "max_workers: 8\nupscaling", "max_worker: 8\nupscaling"),
    ("launcher", "ray-cluster.yaml", "ImageId: *machine", "EbsOptimized: true"),
    ("launcher", "ray-cluster.yaml", "worker_run_options", "head_run_options"),
    ("launcher", "ray-cluster.yaml", "--region eu-central-1", "--region eu-west-1"),
    ("launcher", "ray-cluster.yaml", "amazonaws.com/images:cuda", "amazonaws.com.example.org/images:cuda"),
    ("commands", "ray-cluster.yaml", "--autoscaling-config", "--autoscaler-config"),
    ("launcher", "ray-cluster.yaml", "MarketType: spot", "MarketType: on-demand"),
    ("kubernetes", "kuberay/cluster.yaml", "headGroupSpec", "headGroupSpecs"),
    ("kubernetes", "kuberay/cluster.yaml", "secretKeyRef: {name: images-store, key: secret-key}",
     "secretRef: {name: images-store}"),
    ("kubernetes", "kuberay/cluster.yaml", "maxReplicas", "maxReplica"),
    ("versions", "kuberay/cluster.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"'),
    ("environment", "kuberay/cluster.yaml", "AWS_DEFAULT_REGION", "AWS_DEFAULT_REGOIN"),
    ("commands", "kuberay/cluster.yaml", "dashboard-host", "dashboards-host"),
    ("ports", "kuberay/cluster.yaml", "containerPort: 8265", "containerPort: 8625"),
    ("kubernetes", "kuberay/cluster.yaml", "runAsNonRoot", "runAsNotRoot"),
    ("commands", "kuberay/train.yaml", "--checkpoint-every", "--checkpoints-every"),
    ("commands", "kuberay/train.yaml", "--resolution 32", "--resolution 4"),
    ("commands", "kuberay/train.yaml", "python -m pipelines train", "python -m pipelines trian"),
    ("kubernetes", "kuberay/train.yaml", "backoffLimit: 3", "backofLimit: 3"),
    ("commands", "ray-cluster.yaml", "infra/spot_notice.py", "infra/spot_notices.py"),
    ("pools", "kuberay/prefect-worker.yaml", "image-diffusion", "image-difusion"),
    ("environment", "compose.yaml", "MODEL_NAME", "MODEL_NAMES"),
    ("commands", "compose.yaml", "infra/automations.py", "infra/automation.py"),
    ("commands", "compose.yaml", "--prefect-file", "--prefect-files"),
    ("commands", "kuberay/bulk.yaml", "--count", "--counts"),
    ("service", "kuberay/service.yaml", "max_replicas: 4", "max_replicas: 5"),
    ("service", "kuberay/service.yaml", "pipelines.serve:build", "pipelines.serve:built"),
    ("commands", "kuberay/prefect-worker.yaml", "--with-healthcheck", "--with-healthchecks"),
    ("kubernetes", "kuberay/prefect-worker.yaml", "livenessProbe", "livelinessProbe"),
    ("environment", "kuberay/prefect-worker.yaml", "PREFECT_API_KEY", "PREFECT_APIKEY"),
    ("ports", "kuberay/network.yaml", "port: 8265", "port: 8256"),
    ("kubernetes", "kuberay/network.yaml", "policyTypes", "policyType"),
    ("submitters", "kuberay/network.yaml", "[images-train, images-bulk]", "[images-train]"),
    ("submitters", "kuberay/network.yaml", "batch.kubernetes.io/job-name", "app.kubernetes.io/created-by"),
    ("submitters", "kuberay/bulk.yaml", "name: images-bulk", "name: images-nightly"),
    ("dashboards", "grafana/training.json", "ray_diffusion_train_loss", "ray_diffusion_train_los"),
    ("dashboards", "grafana/bulk.json", "ray_diffusion_bulk_rows_rejected", "ray_diffusion_bulk_rows_left"),
    ("dashboards", "grafana/serving.json", "ray_diffusion_pictures_total", "ray_diffusion_pictures"),
    ("policy", "bucket-policy.json", '"arn:aws:s3:::BUCKET/store/*"', '"*"'),
    ("policy", "bucket-policy.json", '"Action": ["s3:GetObject"]', '"Action": ["s3:PutObject"]'),
    ("least", "bucket-policy.json", '"ReadTheStore",\n   "Effect": "Allow",\n   "Action": ["s3:GetObject"',
     '"ReadTheStore",\n   "Effect": "Allow",\n   "Action": ["s3:GetObject", "s3:PutObject"'),
    ("least", "bucket-policy.json", "StringLikeIfExists", "StringLike"),
    ("least", "bucket-policy.json", '"store", "store/*"', '"*"'),
    ("least", "bucket-policy.json", "BUCKET/store/*", "BUCKET/*"),
    ("least", "compose.yaml", "--key-file s3://images/store/keys.json", "--key-file s3://images/keys.json"),
    ("least", "kuberay/service.yaml", "--key-file s3://images/store/keys.json", "--key-file s3://images/keys.json"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "file", "right", "wrong"), MUTATIONS, ids=lambda text: text[:40])
def test_a_slip_in_any_file_is_noticed(check, file, right, wrong, tmp_path):
    infra = tmp_path / "infra"
    shutil.copytree(INFRA, infra)
    text = (infra / file).read_text()
    assert right in text
    (infra / file).write_text(text.replace(right, wrong))
    with pytest.raises(REFUSED):
        getattr(manifests, f"check_{check}")(infra)


def test_every_port_that_listens_is_told():
    page = (ROOT / "docs/security.md").read_text()
    told = {int(port) for cell in re.findall(r"^\| ([\d, ]+)", page, flags=re.M) for port in re.findall(r"\d+", cell)}
    of_others = {53, 443, 6443}
    assert {port for _, port in manifests.ports(INFRA)} - of_others - told == set()
    for flag, port in (("-webdav=false", 7333), ("-s3.port.iceberg=0", 8181), ("-s3.port.lance=0", 9101)):
        assert flag in manifests.STORE_FLAGS
        assert port not in told
        assert str(port) in page


@pytest.mark.parametrize("secret", SECRETS)
def test_without_a_secret_nothing_starts(secret):
    told, trouble = compose(INFRA, without=[secret])
    assert (told, secret in trouble) == ("", True)


def test_all_pods_are_of_the_network_policy_and_no_root():
    for _, document in manifests.kubernetes_objects(INFRA):
        for group in manifests.ray_groups(document):
            assert group["template"]["metadata"]["labels"]["app"] == "images"
            assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        for container in manifests.containers(document):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip


# What a request of S3 needs, by AWS' table of actions.
ACTIONS = {
    "ListObjectsV2": "s3:ListBucket", "HeadBucket": "s3:ListBucket", "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject", "PutObject": "s3:PutObject", "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject", "CompleteMultipartUpload": "s3:PutObject", "AbortMultipartUpload":
    "s3:AbortMultipartUpload", "DeleteObject": "s3:DeleteObject", "DeleteObjects": "s3:DeleteObject",
}  # fmt: skip


def needed(name, arguments):
    """What a request of S3 needs, of a bucket that the policy calls BUCKET."""
    if "Delete" in arguments:
        return {manifests.Asked(ACTIONS[name], f"BUCKET/{each['Key']}") for each in arguments["Delete"]["Objects"]}
    if "Key" not in arguments:
        return {manifests.Asked(ACTIONS[name], "BUCKET", arguments.get("Prefix"))}
    return {manifests.Asked(ACTIONS[name], f"BUCKET/{arguments['Key']}")}


def test_the_bucket_policy_allows_what_the_store_asks_for_and_no_more(bucket, monkeypatch):
    from aiobotocore.client import AioBaseClient

    from pipelines import storage

    asked = set()
    request = AioBaseClient._make_api_call

    async def noted(self, name, arguments):
        asked.update(needed(name, arguments))
        return await request(self, name, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", noted)
    folder = f"{bucket}/store/datasets/a"
    storage.write_bytes(f"{folder}/large", bytes(60 * 2**20))
    storage.write_bytes(f"{folder}/small", b"small")
    assert storage.publish(folder, {"kind": "test"}) == "created"
    assert storage.publish(folder, {"kind": "other"}) == "other"
    assert storage.is_published(folder)
    assert storage.list_folders(f"{bucket}/store/datasets") == ["a"]
    (large, _, small) = sorted(storage.list_objects(folder), key=lambda info: info.uri)
    assert storage.read_bytes(small.uri) == b"small"
    with storage.local_copy(large) as path:
        assert path
    assert not storage.exists(f"{folder}/nothing")
    storage.remove_folder(folder)
    policy = json.loads((INFRA / "bucket-policy.json").read_text())
    assert [each for each in asked if not manifests.allows(policy, each)] == []
    of_the_store = [each for each in policy["Statement"] if "BUCKET" in str(each["Resource"])]
    allowed = {action for statement in of_the_store for action in statement["Action"]}
    # Only a multipart upload that breaks off is aborted: nothing broke off here.
    assert allowed - {each.action for each in asked} <= {"s3:AbortMultipartUpload"}
