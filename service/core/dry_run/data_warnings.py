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
    near = report.near_duplicates
    if near is not None and near.held_out_rows_with_a_near_duplicate:
        count = near.held_out_rows_with_a_near_duplicate
        yield f"{count} held-out rows nearly repeat training rows, which makes the evaluation too good", "remove the repetitions"
    for finding in report.secrets:
        yield f"{finding.rows} rows seem to contain a secret ({finding.kind}), which a model may repeat", "remove it from the rows"
    for finding in report.personal_data:
        yield f"{finding.rows} rows seem to contain personal data ({finding.kind})", "check that it may be trained on"
    for warning in report.warnings:
        yield warning, "see the report of the dataset: GET /datasets/{id}"
