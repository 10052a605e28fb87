"""What is refused before any compute is rented: `common` for every job, one file per trainer family, `hub` for the Hugging
Face Hub, and `egress` for the URLs that a caller names.

The types and ranges of single fields do not belong here: the schema checks them.
"""

from pkgutil import resolve_name

from schema.dataset import Dataset
from schema.training import TrainingConfig
from storage import ObjectStore

# One line adds a family: its name → "module:function". The function takes the configuration, the dataset and the model store, and raises
# InvalidRequest for what cannot be trained.
FAMILY_CHECKS: dict[str, str] = {"llm": "service.core.validation.llm:check_job"}


def check_job(config: TrainingConfig, dataset: Dataset, models: ObjectStore) -> None:
    """Raise InvalidRequest when the job cannot be trained, as far as that shows before any compute is rented. Raises StorageError."""
    resolve_name(FAMILY_CHECKS[config.family])(config, dataset, models)
