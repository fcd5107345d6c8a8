"""The manifests in docker/kubernetes: valid by Kubernetes' own schemas, and true of the service they start."""

import ast
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are not installed")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PLAIN = [path for path in sorted((FOLDER / "cpu").glob("*.yaml")) if path.name != "kustomization.yaml"]
KSERVE = FOLDER / "kserve" / "inferenceservice.yaml"
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl here")

JSON_TYPES = {"int": int, "str": str, "bool": bool, "dict(str, str)": dict}

Manifest = dict[str, Any]


def read(*paths: Path) -> list[Manifest]:
    return [entry for path in paths for entry in yaml.safe_load_all(path.read_text()) if entry]


def built(folder: Path) -> list[Manifest]:
    """What kubectl would apply for a folder with a kustomization."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [entry for entry in yaml.safe_load_all(done.stdout) if entry]


def check(manifest: Manifest) -> None:
    """Raises where a field is missing, unknown or of another type in the newest schemas there are."""
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def kserve_fields(model: str) -> dict[str, str]:
    """The fields of one of KServe's models and their types; read, as an import would take all that KServe needs."""
    try:
        files = {file.stem: file for file in metadata.files("kserve") or []}
    except metadata.PackageNotFoundError:
        pytest.skip("KServe's models are not installed (pip install --no-deps kserve)")
    (found,) = [node for node in ast.parse(files[model].read_text()).body if isinstance(node, ast.ClassDef)]
    tables = {ast.unparse(node.targets[0]): node.value for node in found.body if isinstance(node, ast.Assign)}
    types, names = (ast.literal_eval(tables[name]) for name in ("openapi_types", "attribute_map"))
    return {names[field]: kind for field, kind in types.items()}


def one(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [entry for entry in manifests if entry["kind"] == kind]
    return found


def container_of(spec: Manifest) -> Manifest:
    (found,) = spec["containers"]
    return found


def settings_of(container: Manifest) -> Settings:
    """The service's settings as its environment gives them; what the cluster fills in is the limit on cores."""
    values = {}
    for entry in container["env"]:
        if entry["name"].startswith("ENCNET_"):
            name = entry["name"].removeprefix("ENCNET_").lower()
            assert name in Settings.model_fields, entry["name"]
            reference = entry.get("valueFrom", {}).get("resourceFieldRef", {}).get("resource")
            values[name] = container["resources"]["limits"]["cpu"] if reference == "limits.cpu" else entry["value"]
    return Settings(**values)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(Settings(device="cpu", threads=1))) as client:
        yield client


def test_the_plain_manifests_are_valid_alone() -> None:
    manifests = read(*PLAIN)
    for manifest in manifests:
        check(manifest)
    assert sorted(manifest["kind"] for manifest in manifests) == [
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
    ]


def test_the_schemas_would_notice_a_slip() -> None:
    deployment = one(read(*PLAIN), "Deployment")
    container_of(deployment["spec"]["template"]["spec"])["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        check(deployment)


@needs_kubectl
def test_every_folder_of_the_readme_builds_to_valid_manifests() -> None:
    folders = re.findall(r"kubectl apply -k (docker/kubernetes/\w+)", README)
    assert {"docker/kubernetes/cpu", "docker/kubernetes/gpu"} <= set(folders)
    for folder in folders:
        for manifest in built(ROOT / folder):
            check(manifest)
    assert all((ROOT / path).exists() for path in re.findall(r"kubectl apply -f (\S+)", README))


@needs_kubectl
def test_the_readmes_own_kustomization_changes_the_image_and_adds_the_components(tmp_path: Path) -> None:
    text = re.search(r"(?:^    (?:resources|components|images): .*\n){3}", README, re.MULTILINE)
    assert text, "the README shows a kustomization"
    shutil.copytree(FOLDER, tmp_path / "docker" / "kubernetes")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(textwrap.dedent(text[0]))
    manifests = built(tmp_path / "mine")
    monitor = one(manifests, "PodMonitor")
    for manifest in manifests:
        if manifest is not monitor:
            check(manifest)
    pod = one(manifests, "Deployment")["spec"]["template"]
    assert container_of(pod["spec"])["image"] == "registry.example/encnet-serve:2026-11"
    (metric,) = one(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["type"] == "Pods"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in container_of(pod["spec"])["ports"]]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_metric_that_scales_is_one_that_the_service_has(client: TestClient) -> None:
    component = read(FOLDER / "queue" / "kustomization.yaml")[0]
    (change,) = yaml.safe_load(component["patches"][0]["patch"])
    (metric,) = change["value"]
    assert f"\n{metric['pods']['metric']['name']}{{" in client.get("/metrics").text


def test_services_policies_and_autoscaler_mean_the_pods_of_the_deployment() -> None:
    manifests = read(*PLAIN)
    deployment = one(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert one(manifests, "Service")["spec"]["selector"] == labels
    assert one(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert one(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    target = one(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    names = [port["name"] for port in container_of(deployment["spec"]["template"]["spec"])["ports"]]
    assert one(manifests, "Service")["spec"]["ports"][0]["targetPort"] in names
    assert "replicas" not in deployment["spec"], "or every apply would undo what the autoscaler did"


def test_the_environment_is_one_that_the_service_takes() -> None:
    pod = one(read(*PLAIN), "Deployment")["spec"]["template"]["spec"]
    for container in (container_of(pod), container_of(read(KSERVE)[0]["spec"]["predictor"])):
        settings = settings_of(container)
        assert settings.host == "0.0.0.0"
        assert [settings.port] == [port["containerPort"] for port in container["ports"]]
        assert str(settings.threads) == container["resources"]["limits"]["cpu"]
    assert pod["enableServiceLinks"] is False


def test_a_pod_is_not_killed_before_it_has_drained() -> None:
    pod = one(read(*PLAIN), "Deployment")["spec"]["template"]["spec"]
    container = container_of(pod)
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= waits + settings_of(container).grace_seconds + 5
    predictor = read(KSERVE)[0]["spec"]["predictor"]
    assert "terminationGracePeriodSeconds" not in predictor, "Knative refuses it"
    kubernetes_own = 30
    assert kubernetes_own >= settings_of(container_of(predictor)).grace_seconds + 5


def test_probes_ask_what_the_service_answers(client: TestClient) -> None:
    deployment = container_of(one(read(*PLAIN), "Deployment")["spec"]["template"]["spec"])
    assert deployment["livenessProbe"]["httpGet"]["path"] == "/livez"
    for container in (deployment, container_of(read(KSERVE)[0]["spec"]["predictor"])):
        probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
        assert len(probes) >= 2
        for probe in probes:
            assert client.get(probe["httpGet"]["path"]).status_code == 200
            ports = [port.get("name") for port in container["ports"]] + [settings_of(container).port]
            assert probe["httpGet"]["port"] in ports


def test_containers_have_no_more_rights_than_they_need() -> None:
    pod = one(read(*PLAIN), "Deployment")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container, context in (
        (container_of(pod), pod["securityContext"]),
        (container_of(read(KSERVE)[0]["spec"]["predictor"]), {}),
    ):
        rights = {**context, **container["securityContext"]}
        assert rights["runAsNonRoot"] is True
        assert rights["runAsUser"] > 0
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])


@needs_kubectl
def test_the_gpu_variant_asks_for_one_gpu_and_serves_from_it() -> None:
    manifests = built(FOLDER / "gpu")
    pod = one(manifests, "Deployment")["spec"]["template"]["spec"]
    container = container_of(pod)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["image"] == "encnet-serve:gpu"
    settings = settings_of(container)
    assert (settings.device, settings.threads) == ("cuda", 8)
    assert settings.max_batch > 1
    assert container["securityContext"]["readOnlyRootFilesystem"] is True, "what the CPU variant has stays"
    assert one(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_inference_service_is_one_by_kserves_models_and_its_pod_by_kubernetes() -> None:
    (service,) = read(KSERVE)
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service.keys() <= kserve_fields("v1beta1_inference_service").keys()
    assert service["spec"].keys() <= kserve_fields("v1beta1_inference_service_spec").keys()
    predictor = service["spec"]["predictor"]
    assert predictor.keys() <= kserve_fields("v1beta1_predictor_spec").keys()
    beside_the_pods = kserve_fields("v1beta1_component_extension_spec")
    own = predictor.keys() & beside_the_pods.keys()
    assert {"minReplicas", "maxReplicas", "timeout"} <= own
    for name in own:
        assert isinstance(predictor[name], JSON_TYPES[beside_the_pods[name]])
    pod = {name: value for name, value in predictor.items() if name not in own}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": pod})


def test_kserve_finds_the_container_and_gives_it_its_time() -> None:
    (service,) = read(KSERVE)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", service["metadata"]["name"])
    predictor = service["spec"]["predictor"]
    container = container_of(predictor)
    assert container["name"] == "kserve-container"
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]
    assert predictor["timeout"] * 1000 >= settings_of(container).max_timeout_ms


def test_the_inference_service_is_named_after_a_model_that_is_served(client: TestClient) -> None:
    (service,) = read(KSERVE)
    answer = client.get(f"/v2/models/{service['metadata']['name']}")
    assert answer.status_code == 200
    assert [entry["name"] for entry in answer.json()["inputs"]] == ["image", "scales", "flip"]
