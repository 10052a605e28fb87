"""`/models`: the base models in the model store, and what is known of others."""

from datetime import datetime

from fastapi import APIRouter
from pydantic import BaseModel

from schema.models import ModelSource
from service.api.dependencies import PrincipalDep, ServicesDep
from service.api.route import LimitedRoute
from service.core.models.registry import ModelView
from service.core.ports import HubAccess
from service.core.validation.known_models import Images

router = APIRouter(route_class=LimitedRoute, prefix="/models", tags=["models"])


class ModelRow(BaseModel):
    """A base model. null: not known."""

    name: str
    family: str
    source: ModelSource
    revision: str | None
    precision: str | None  # of most weights
    note: str
    parameters: int | None
    size_bytes: int  # in the model store
    license: str | None
    architecture: str | None
    imported_at: datetime | None
    available: bool  # in the model store, so that jobs need no download
    hub: HubAccess | None  # of a model that is not in the model store: whether everybody may read it on the Hub
    hidden_size: int | None  # as its name tells
    images: Images | None  # likewise: whether it accepts images, and whether they can be trained


class ModelList(BaseModel):
    """The models in the model store, by name, and its URL."""

    models: list[ModelRow]
    store_url: str


@router.get("")
def list_models(services: ServicesDep, principal: PrincipalDep) -> ModelList:
    """The base models in the model store."""
    models = [_model_row(view) for view in services.models.list_models(principal)]
    return ModelList(models=models, store_url=services.models.store_url)


@router.get("/{name:path}")
def get_model(name: str, services: ServicesDep, principal: PrincipalDep) -> ModelRow:
    """One base model, by its name or by the last part of it; of a model that is not in the model store, what the Hub says."""
    return _model_row(services.models.find(principal, name))


def _model_row(view: ModelView) -> ModelRow:
    record, known = view.record, view.known
    return ModelRow(
        name=record.name,
        family=record.family,
        source=record.source,
        revision=record.revision,
        precision=record.precision,
        note=record.note,
        parameters=record.parameters,
        size_bytes=record.size_bytes,
        license=record.license,
        architecture=record.architecture,
        imported_at=record.imported_at,
        available=view.available,
        hub=view.hub,
        hidden_size=known.hidden_size if known else None,
        images=known.images if known else None,
    )
