"""Base models that no attempt could find: misspelled names, and names that an offline deployment does not have.

A model that the Hub has is accepted, however similar its name is to that of a stored one.
"""

from schema.training import TrainingConfig
from service.core.errors import InvalidRequest
from service.core.models.names import describe_suggestions, find_meant, suggest
from service.core.models.stored import describe_stored, list_stored_names
from service.core.ports import Hub
from service.core.validation.common import is_stored
from service.core.validation.hub import HUB_TIMEOUT_S, NoHub
from storage import ObjectStore, StorageError
from storage.deadline import deadline

BASE_PARAM = "training_config.base_model_id"


def check_base_model(config: TrainingConfig, token: str | None, hub: Hub, models: ObjectStore, *, reads_base: bool = True) -> None:
    """Raise InvalidRequest for a base that is not in the model store and is a stored one misspelled, or cannot be downloaded.

    `reads_base` is false for a job whose base is the whole model of an earlier job. A store that does not answer refuses nothing: the
    attempt looks again.
    """
    name = config.hub_model_id if reads_base else None
    if not name:
        return
    try:
        if is_stored(models, name):
            return
        stored = list_stored_names(models)
    except StorageError:
        return
    if isinstance(hub, NoHub) and hub.is_unreachable_for_attempts(name):
        message = f"base model {name} is not in the model store, and this deployment is offline; {describe_stored(stored)}"
        suggestion = describe_suggestions(suggest(name, stored))
        raise InvalidRequest(message, hint=suggestion or _hint_import(name), param=BASE_PARAM)
    meant = find_meant(name, stored)
    similar = meant or suggest(name, stored)
    if not similar:
        return
    with deadline(HUB_TIMEOUT_S):
        access = hub.check_read_access(name, token)
    # A merely similar name is another model until the Hub says that there is none of that name.
    if access == "absent" or (access == "unknown" and meant):
        reason = "the Hub does not have it" if access == "absent" else "whether the Hub has it is not known"
        message = f"base model {name} is not in the model store, and {reason}"
        raise InvalidRequest(message, hint=describe_suggestions(similar), param=BASE_PARAM)


def _hint_import(name: str) -> str:
    return (
        f"`tunesmith models import FOLDER --name {name}` puts a model of this machine there, `tunesmith models pull {name}` one of the Hub"
    )
