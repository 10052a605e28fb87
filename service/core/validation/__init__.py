"""What is refused before any compute is rented: `common` for every job, one file per trainer family, `hub` for the Hugging
Face Hub, and `egress` for the URLs that a caller names.

The types and ranges of single fields do not belong here: the schema checks them.
"""

from collections.abc import Sequence
from pkgutil import resolve_name

from schema.dataset import EVAL_SPLIT, TRAIN_SPLIT, Dataset, WeightedDataset
from schema.job import EarlierModel, Job
from schema.mixing import count_mixed_rows
from schema.training import TrainingConfig
from service.core.errors import InvalidRequest
from service.core.problems import Problems
from storage import ObjectStore

# One line adds a family: its name → "module:function". The function takes the configuration, the dataset and the model store, and raises
# InvalidRequest for what cannot be trained.
FAMILY_CHECKS: dict[str, str] = {"llm": "service.core.validation.llm:check_job"}


# One line lets a family start from the models of earlier jobs: its name → the module with `start_from_model` and `choose_exports`.
FAMILY_CONTINUATIONS: dict[str, str] = {"llm": "service.core.validation.llm_continuation"}


def check_job(config: TrainingConfig, datasets: Sequence[WeightedDataset], models: ObjectStore) -> None:
    """Raise InvalidRequest when the job cannot be trained, as far as that shows before any compute is rented. Raises StorageError."""
    check = resolve_name(FAMILY_CHECKS[config.family])
    if len(datasets) == 1:
        check(config, datasets[0].dataset, models)
        return
    _check_mix([each.dataset for each in datasets], [each.weight for each in datasets])
    problems = Problems()
    held_out = {name: split for each in datasets for name, split in each.dataset.splits.items() if name == EVAL_SPLIT}
    for index, each in enumerate(datasets):
        # The held-out rows of one dataset are enough for all.
        dataset = each.dataset.model_copy(update={"splits": held_out | each.dataset.splits})
        try:
            check(config, dataset, models)
        except InvalidRequest as error:
            for problem in error.problems:
                if problem.param == "processed_dataset_id":
                    problem.param = f"datasets.{index}.processed_dataset_id"
            problems.add(error)
    problems.raise_found()


def _check_mix(datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
    """Raise InvalidRequest for datasets of different types, and for a weight by which no row would be taken."""
    first = datasets[0]
    problems = Problems()
    counts = count_mixed_rows([dataset.splits[TRAIN_SPLIT].rows for dataset in datasets], weights)
    for index, (dataset, count) in enumerate(zip(datasets, counts, strict=True)):
        if dataset.dataset_type != first.dataset_type:
            message = f"{dataset.processed_dataset_id} is {dataset.dataset_type}, and {first.processed_dataset_id} is {first.dataset_type}"
            hint = "mix datasets of one type; upload the rows of the other in that form"
            problems.add(InvalidRequest(message, hint=hint, param=f"datasets.{index}.processed_dataset_id"))
        if not count:
            message = f"with weight {weights[index]:g} an epoch takes no row of {dataset.processed_dataset_id}"
            problems.add(InvalidRequest(message, hint="raise its weight, or leave the dataset out", param=f"datasets.{index}.weight"))
    problems.raise_found()


def start_from_model(config: TrainingConfig, earlier: Job) -> tuple[TrainingConfig, EarlierModel]:
    """The configuration with the original base of an earlier job, and that job's model. Raises InvalidRequest for one without any."""
    return resolve_name(f"{FAMILY_CONTINUATIONS[config.family]}:start_from_model")(config, earlier)


def choose_exports(config: TrainingConfig, source: EarlierModel, path: str) -> TrainingConfig:
    """The configuration with exports that are possible for a model that started from an earlier one; `path` is where they were sent.

    Raises InvalidRequest for one that was sent and is impossible.
    """
    return resolve_name(f"{FAMILY_CONTINUATIONS[config.family]}:choose_exports")(config, source, path)
