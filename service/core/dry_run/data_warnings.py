"""What the reports of the datasets warn of, as warnings of a job that would train on them."""

from collections.abc import Iterator, Sequence

from schema.dataset import EVAL_SPLIT, Dataset, WeightedDataset
from schema.dry_run import DryRunWarning


def find_data_warnings(datasets: Sequence[WeightedDataset]) -> tuple[DryRunWarning, ...]:
    """Every warning, dataset by dataset."""
    mixed = len(datasets) > 1
    return tuple(
        DryRunWarning(param=f"datasets.{index}" if mixed else "processed_dataset_id", message=f"{name}: {message}", hint=hint)
        for index, each in enumerate(datasets)
        for name in (each.dataset.processed_dataset_id,)
        for message, hint in _iter_warnings(each.dataset)
    )


def _iter_warnings(dataset: Dataset) -> Iterator[tuple[str, str]]:
    if EVAL_SPLIT not in dataset.splits:
        yield "no rows are held out, so the trained model is not measured", "upload it with eval_fraction above 0"
    report = dataset.report
    if report is None:
        return
    for finding in report.personal_data:
        yield f"{finding.rows} rows seem to contain personal data ({finding.kind})", "check that it may be trained on"
    for warning in report.warnings:  # which say what would help
        yield warning, f"GET /datasets/{dataset.processed_dataset_id} has the whole report"
