"""Early stopping: finds the best evaluation of a training, and ends a training that no longer improves."""

from dataclasses import dataclass

from jobs.runtime.save_policy import TrainingControlState


@dataclass(frozen=True)
class EarlyStoppingPolicy:
    """Whether the best checkpoint is published, and when a training that no longer improves ends."""

    load_best_model_at_end: bool = False
    patience: int | None = None  # consecutive evaluations without a lower eval_loss
    threshold: float = 0.0  # nats by which eval_loss must fall to count as lower


NO_EARLY_STOPPING = EarlyStoppingPolicy()


class EarlyStopping:
    """The best evaluation of one training, and how many evaluations have followed it."""

    def __init__(self, policy: EarlyStoppingPolicy, state: TrainingControlState) -> None:
        self.best_loss = state.best_loss
        self.best_step = state.best_step
        self.evaluations_without_improvement = state.evaluations_without_improvement
        self._policy = policy

    @property
    def ends_training(self) -> bool:
        """The last `patience` evaluations did not improve."""
        return self._policy.patience is not None and self.evaluations_without_improvement >= self._policy.patience

    def record_evaluation(self, step: int, loss: float | None) -> bool:
        """Record the eval_loss of a step; True if it is the best so far."""
        if loss is not None and (self.best_loss is None or loss < self.best_loss - self._policy.threshold):
            self.best_loss, self.best_step, self.evaluations_without_improvement = loss, step, 0
            return True
        self.evaluations_without_improvement += 1
        return False
