"""Keep versions in MLflow's registry, with the adapter and all facts for a decision; find them by run key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ratchet.tracking.mlflow import KEY_TAG, mlflow_client, mlflow_errors

CHALLENGER, CHAMPION = "challenger", "champion"
ARTIFACT = "adapter"


class Version(NamedTuple):
    """A model version in MLflow; `tags` are set by Ratchet."""

    name: str
    number: int
    run_id: str
    tags: dict[str, str]
    description: str


def find_version(name: str, run_key: str) -> Version | None:
    return next((version for version in list_versions(name) if version.tags.get(KEY_TAG) == run_key), None)


def get_version(name: str, number: int) -> Version | None:
    return next((version for version in list_versions(name) if version.number == number), None)


def list_versions(name: str) -> list[Version]:
    """List the versions, the newest first."""
    found, client, token = list[Version](), mlflow_client(), None
    with mlflow_errors():
        while token != "":
            page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
            found += map(_version, page)
            token = page.token or ""
    return sorted(found, key=lambda version: -version.number)


def make_version(name: str, run_id: str, adapter: Path, tags: dict[str, str], description: str) -> Version:
    """Register a version whose artifact is the adapter's folder, stored with the run.

    If there is a version with the same run key, only its tags and description are updated.
    """
    client = mlflow_client()
    known = find_version(name, tags[KEY_TAG])
    with mlflow_errors():
        if known is None:
            _ensure_model(client, name)
            client.log_artifacts(run_id, str(adapter), ARTIFACT)
            source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
            known = _version(
                client.create_model_version(name, source, run_id=run_id, tags=tags, description=description)
            )
        for key, value in tags.items():
            if known.tags.get(key) != value:
                client.set_model_version_tag(name, str(known.number), key, value)
        if known.description != description:
            client.update_model_version(name, str(known.number), description)
    return known._replace(tags={**known.tags, **tags}, description=description)


def set_alias(name: str, alias: str, number: int) -> None:
    """Set an alias and read it back. Raises ServiceError if it points to another version.

    MLflow has no compare-and-set, so callers hold the promotion lock.
    """
    client = mlflow_client()
    with mlflow_errors():
        client.set_registered_model_alias(name, alias, str(number))
        seen = int(client.get_model_version_by_alias(name, alias).version)
    if seen != number:
        from ratchet.errors import ServiceError

        raise ServiceError(
            f"alias {alias} of {name} is v{seen} right after it was set to v{number}",
            remedy="somebody else moves it: check MLflow's UI, then run the command again",
        )


def get_alias(name: str, alias: str) -> int | None:
    client = mlflow_client()
    with mlflow_errors():
        models = client.search_registered_models(f"name = '{name}'")
        return int(models[0].aliases[alias]) if models and alias in models[0].aliases else None


def drop_alias(name: str, alias: str) -> None:
    if get_alias(name, alias) is not None:
        with mlflow_errors():
            mlflow_client().delete_registered_model_alias(name, alias)


def set_tag(name: str, number: int, key: str, value: str) -> None:
    """Set a tag of a version unless it has that value: each change in the registry triggers a look."""
    known = get_version(name, number)
    if known and known.tags.get(key) != value:
        with mlflow_errors():
            mlflow_client().set_model_version_tag(name, str(number), key, value)


def _ensure_model(client: Any, name: str) -> None:
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(
            name,
            description="Kept fresh by Ratchet. `champion` answers; `challenger` passed the gate and waits.",
        )


def _version(entry: Any) -> Version:
    return Version(
        entry.name, int(entry.version), entry.run_id or "", dict(entry.tags or {}), entry.description or ""
    )
