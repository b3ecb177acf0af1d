"""The network of the tasks so far, and how the next one is merged into it; knows no Trainer."""

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lit_rebasin.alignment import check_same_architecture
from lit_rebasin.callbacks.correction import correct
from lit_rebasin.callbacks.measured import Draw, Known, check_measurable, copied, first_batches
from lit_rebasin.callbacks.merge import MergeOutcome, merge_task
from lit_rebasin.callbacks.merge_state import check_merge_state
from lit_rebasin.callbacks.refusal import Refusal, WorseMergeError, check_loss, is_of_numbers, reason_of
from lit_rebasin.callbacks.settings import MergeSettings
from lit_rebasin.callbacks.start import begin, check_resettable
from lit_rebasin.callbacks.step_features import check_readable
from lit_rebasin.callbacks.step_loss import NoLossError, StepLoss
from lit_rebasin.callbacks.step_spec import step_spec
from lit_rebasin.merging import NoFiniteLossError, has_batch_norm
from lit_rebasin.merging.path import weights_of, write_weights
from lit_rebasin.symmetry import PermutationSpec, join

Broadcast = Callable[[Any], Any]


class TaskMerger:
    """Remembers the network of the tasks so far, and merges what was trained next into it.

    Args:
        settings: The arguments of whoever merges.

    Attributes:
        previous: Parameters and buffers of the network after the last task, on the CPU; ``None`` before the first.
        n_tasks: How many tasks are finished.
        history: One entry a merge: its task and numbers, or why it was refused.
        spec: The permutation symmetries of the network; ``None`` before its first batch.
    """

    def __init__(self, settings: MergeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.previous: dict[str, Tensor] | None = None
        self.n_tasks = 0
        self.history: list[dict[str, Any]] = []
        self.spec: PermutationSpec | None = None
        self._trained: set[str] = set()  # parameters that some finished task has changed
        self._initial: dict[str, Tensor] = {}
        self._known = Known()  # in the frame of the previous model
        self._begun = -1  # the task that began last
        self._traced = False  # whether the spec takes account of the present task

    def state_dict(self) -> dict[str, Any]:
        """Return the previous weights, the counters and the history, as tensors and plain types."""
        return {
            "previous": self.previous or {},
            "n_tasks": self.n_tasks,
            "history": self.history,
            "trained": sorted(self._trained),
            "begun": self._begun,
            "initial": self._initial if self.previous is None else {},
            "spec": self.spec.to_json() if self.spec is not None else None,
            "known": self._known.means,
            "known_tasks": self._known.tasks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds.

        Raises:
            ValueError: If it is damaged.
        """
        check_merge_state(type(self).__name__, state_dict)
        self.previous = dict(state_dict["previous"]) or None
        self.n_tasks = state_dict["n_tasks"]
        self.history = list(state_dict["history"])
        self._trained = set(state_dict["trained"])
        # States of older versions lack what they did not know.
        self._begun = state_dict.get("begun", self.n_tasks)
        self._initial = dict(state_dict.get("initial", {}))
        self._known = Known(dict(state_dict.get("known", {})), state_dict.get("known_tasks", 0))
        self.spec = PermutationSpec.from_json(state_dict["spec"]) if state_dict["spec"] is not None else None

    def _check(self, module: nn.Module) -> None:
        """Refuse what a merge cannot work with, before a network is trained.

        Raises:
            ValueError: If the network and the one that is remembered are of different architectures.
            MisconfigurationException: If the network or the state lacks what the settings need.
        """
        if self.settings.statistics == "data-free" and not has_batch_norm(module):
            raise MisconfigurationException(
                f'{type(self).__name__}(statistics="data-free") is for BatchNorm, of which {_name(module)} has none.'
            )
        if self.settings.start != "previous":
            check_resettable(module)
        if self.previous is None:
            return
        check_same_architecture(weights_of(module), self.previous)
        if self.settings.measured and not self._known.tasks:
            raise MisconfigurationException(
                f"{type(self).__name__}(alpha={self.settings.alpha!r}, combine={self.settings.combine!r}) needs the {self.settings.measured} "
                "of the tasks so far, which this state lacks, for it was saved with other settings."
            )

    def _begin_task(self, module: nn.Module) -> bool:
        """Write the weights that a task begins with, and note what is not trained yet; return False for one that has begun before."""
        self._traced = False
        begins = self._begun < self.n_tasks
        if self.previous is None:
            self.spec = None
            if begins or not self._initial:
                self._initial = {name: tensor.cpu().clone() for name, tensor in weights_of(module).items()}
        elif begins:
            begin(module, self.settings.start, self.settings.seed + self.n_tasks)
        self._begun = self.n_tasks
        return begins

    def _look_at(self, step: StepLoss, batch: Any) -> None:
        """Find the permutation groups on the first batch of a task, so that a network without any fails at once."""
        if self._traced:
            return
        check_measurable(self.settings.measured, step, batch)
        if self.settings.method == "identity":
            self._traced = True
            return
        try:
            found = step_spec(step, batch)
        except NoLossError:  # the training skips this batch too
            return
        # A task may run other parts than those before it, such as a head of its own; what moves must move in all of them.
        self.spec = join([self.spec, found]) if self.spec is not None else found
        self._traced = True
        if self.spec.groups and self.settings.reads_features:
            check_readable(step, self.spec, batch)
        if not self.spec.groups:
            reasons = sorted(set(self.spec.fixed.values()))
            raise MisconfigurationException(
                f"{_name(step.module)} has no permutable group, so there is nothing to align. Why its axes are fixed: "
                f"{'; '.join(reasons) or 'its training_step calls no module with weights'}. "
                f'{type(self).__name__}(method="identity") merges without aligning.'
            )

    def _finish_task(
        self, step: StepLoss, draw: Draw, broadcast: Broadcast = lambda found: found, decides: bool = True
    ) -> MergeOutcome | None:
        """Merge what was trained into the previous network, in place, and remember the result.

        Args:
            step: The training step of the trained network.
            draw: Begins a pass over the training batches that the merge may use.
            broadcast: Returns what the process that decides has, in all of them.
            decides: Whether this process merges; the others wait for what it comes to.

        Returns:
            How the merge came about; ``None`` after the first task, where it is refused, and where another process has decided.
        """
        module, task = step.module, self.n_tasks
        if not self._traced and self.settings.method != "identity":
            raise ValueError(
                f"{_name(module)}.training_step returned None on every batch of task {task}, but the merge needs its loss: "
                "return a tensor, or a dict with the key 'loss'."
            )
        outcome, refusal = self._decide(step, draw) if decides else (None, None)
        entry = None if outcome is None else {**outcome.numbers, "displacement": outcome.alignment.displacement}
        weights, refusal, entry, known = broadcast((weights_of(module), refusal, entry, self._known.tasks))
        write_weights(module, weights)
        if refusal is not None:
            self._refuse(refusal)
        elif entry is not None:
            self.history.append({"task": task, **entry})
        self._known.tasks = known  # what is known itself is with the process that decides
        self._traced = False
        self.n_tasks = task + 1
        self._remember(module)
        return outcome

    def _decide(self, step: StepLoss, draw: Draw) -> tuple[MergeOutcome | None, Refusal | None]:
        """Write the merge into the network; or leave it as it was, if that fails, and say why."""
        module = step.module
        broken = self._not_finite(module)
        if self.previous is None:
            if broken:
                raise ValueError(
                    f"Training left NaN or infinity in {broken!r}, and there is no previous model to go back to."
                )
            self._known.begin(self.settings, step, draw)
            return None, None
        # What prunes or quantizes while it trains may have renamed its weights.
        check_same_architecture(weights_of(module), self.previous, ("trained network", "previous network"))
        if broken:
            write_weights(module, self.previous)
            return None, Refusal(f"training left NaN or infinity in {broken!r}", "previous")
        trained: dict[str, Tensor] = {}
        try:
            trained = copied(module)
            outcome = self._merge(step, draw, trained)
        except BaseException as error:
            if trained:
                write_weights(module, trained)
            reason = reason_of(error)
            if reason is None:
                raise
            asks = is_of_numbers(error) or isinstance(error, WorseMergeError)
            if not asks or self._has_loss(step, draw, trained):
                self._known.begin_anew(self.settings, step, draw, self.n_tasks)
                return None, Refusal(reason, "trained")
            write_weights(module, self.previous)
            return None, Refusal(reason, "previous")
        self._known.add(outcome.measured, self._share_of_new)
        return outcome, None

    def _not_finite(self, module: nn.Module) -> str | None:
        """Return a tensor that training has broken; one that was not finite before, such as a mask, is none."""
        before = self.previous if self.previous is not None else self._initial
        for name, tensor in weights_of(module).items():
            if not tensor.isfinite().all() and (name not in before or before[name].isfinite().all()):
                return name
        return None

    def _refuse(self, refusal: Refusal) -> None:
        """Say that there was no merge."""
        task = self.n_tasks
        rank_zero_warn(f"The merge after task {task} is refused: {refusal.reason}. The {refusal.kept} model is kept.")
        self.history.append({"task": task, "refused": refusal.reason, "kept": refusal.kept})

    def _has_loss(self, step: StepLoss, draw: Draw, weights: Mapping[str, Tensor]) -> bool:
        """Return whether the loss of a network on the batches of a merge is a number."""
        with step.quiet():
            return isfinite(step.mean(weights, first_batches(step, draw, self.settings.batches))[0])

    def _merge(self, step: StepLoss, draw: Draw, trained: Mapping[str, Tensor]) -> MergeOutcome:
        """Write the merge into the network, if it is none that is to be undone."""
        module, task = step.module, self.n_tasks
        previous = {name: tensor.to(trained[name].device) for name, tensor in (self.previous or {}).items()}
        spec = self.spec if self.spec is not None else PermutationSpec()  # plain averaging needs none
        with step.quiet():
            torch.manual_seed(self.settings.seed + task)
            held = self._untouched(module, trained, previous)
            shared = self._shared(module, trained, previous) - held
            known = self._known.means
            outcome = merge_task(step, draw, trained, previous, spec, shared, self.settings, task, known, held)
            numbers = outcome.numbers
            ends = numbers["loss_previous"], numbers["loss_before"]
            write_weights(module, outcome.weights)
            correct(module, step, outcome, self.settings.statistics)
            check_loss(numbers["loss_after"], *ends, self.settings.margin)
            if broken := self._not_finite(module):
                raise NoFiniteLossError(f"the merged model has NaN or infinity in {broken!r}")
        rank_zero_info(
            f"Task {task}: merged with alpha {numbers['alpha']:.2f}, {numbers['moved']} neurons moved, "
            f"loss on training batches {numbers['loss_before']:.4f} -> {numbers['loss_after']:.4f}."
        )
        return outcome

    @property
    def _share_of_new(self) -> float | None:
        """How much of what is known of all tasks the last one is; ``None`` for as much as any other."""
        if self.settings.combine == "average" or isinstance(self.settings.alpha, str):
            return None
        return 1 - self.settings.alpha  # as it counts in the regression that the merged layers come of

    def _shared(self, module: nn.Module, trained: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> set[str]:
        """Return the parameters that both models have trained."""
        trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        fresh = {name for name in trainable - self._trained if not torch.equal(trained[name], previous[name])}
        return trainable - fresh

    def _untouched(self, module: nn.Module, trained: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> set[str]:
        """Return the parameters that a task began anew and did not train, such as heads of other tasks: the previous ones are still good."""
        if self.settings.start == "previous":
            return set()
        write_weights(module, previous)
        started = begin(module, self.settings.start, self.settings.seed + self.n_tasks)
        write_weights(module, trained)
        return {name for name, _ in module.named_parameters() if torch.equal(started[name], trained[name])}

    def _remember(self, module: nn.Module) -> None:
        """Keep the model as the reference of the next task."""
        now = {name: tensor.cpu().clone() for name, tensor in weights_of(module).items()}
        before = self.previous if self.previous is not None else self._initial
        parameters = {name for name, _ in module.named_parameters()}
        self._trained |= {name for name in parameters if name not in before or not torch.equal(now[name], before[name])}
        self.previous = now


def _name(module: nn.Module) -> str:
    return type(module).__name__
