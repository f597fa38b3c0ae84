"""Holds deploy/kubernetes against the Kubernetes API's schemas and against what every pod and role of ours must have.

    kubernetes.py FOLDER    each mistake is a line on standard error; 1 where there was one
"""

import pathlib
import sys

import kubernetes_validate
import yaml

API = "1.31"
ROLES = {"gateway": 8000, "orders": 8082, "payments": 8080, "relay": 8083}


def documents(folder):
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    there = sorted(path.name for path in folder.glob("*.yaml") if path.name != "kustomization.yaml")
    if sorted(listed) != there:
        yield None, f"kustomization.yaml lists {sorted(listed)}, the folder holds {there}"
    for name in there:
        for document in yaml.safe_load_all((folder / name).read_text()):
            yield document, name


def pod_mistakes(pod, component):
    spec = pod["spec"]
    if not spec.get("securityContext", {}).get("runAsNonRoot"):
        yield "runs as root"
    if spec.get("automountServiceAccountToken") is not False:
        yield "has a token of the cluster's"
    for container in spec["containers"]:
        security = container.get("securityContext", {})
        if not security.get("readOnlyRootFilesystem") or security.get("allowPrivilegeEscalation") is not False:
            yield "may write to its root or gain privileges"
        if security.get("capabilities") != {"drop": ["ALL"]}:
            yield "keeps capabilities"
        if "memory" not in container.get("resources", {}).get("limits", {}):
            yield "has no limit of memory"
        for variable in container.get("env", []):
            if variable["name"].endswith("DATABASE_URL"):
                yield "has a secret in its environment"
        if component in ROLES:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                if probe not in container:
                    yield f"has no {probe}"
            if [port["containerPort"] for port in container["ports"]] != [ROLES[component]]:
                yield f"does not serve {ROLES[component]}"


def main(folder):
    mistakes, kinds = [], {}
    for document, name in documents(folder):
        if document is None:
            mistakes.append(name)
            continue
        kind, metadata = document["kind"], document["metadata"]
        where = f"{name}: {kind} {metadata['name']}"
        kinds.setdefault(kind, set()).add(metadata["name"])
        try:
            kubernetes_validate.validate(document, API, strict=True)
        except kubernetes_validate.ValidationError as error:
            mistakes.append(f"{where}: {'.'.join(map(str, error.path))}: {error.message}")
        except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
            mistakes.append(f"{where}: {error}")
        if kind in ("Deployment", "Job"):
            pod = document["spec"]["template"]
            mistakes += [f"{where} {mistake}" for mistake in pod_mistakes(pod, metadata["name"])]
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        if kinds.get(kind) != set(ROLES):
            mistakes.append(f"{kind}: {sorted(kinds.get(kind, ()))}, not one for each role")
    for kind in ("Job", "NetworkPolicy", "HorizontalPodAutoscaler"):
        if kind not in kinds:
            mistakes.append(f"there is no {kind}")
    for mistake in mistakes:
        print(f"kubernetes: {mistake}", file=sys.stderr)
    if not mistakes:
        print(f"kubernetes: {sum(map(len, kinds.values()))} objects are what the API {API} takes", file=sys.stderr)
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
