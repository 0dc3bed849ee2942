"""The retention policy of a run, applied to its checkpoints on disk."""

from __future__ import annotations

from dataclasses import dataclass

from runner.checkpoints.manifest import CheckpointManifest
from runner.checkpoints.retention import (
    RetentionPolicy,
    RetentionReason,
    best_checkpoint,
    select_mirrored,
    select_retained,
)
from runner.checkpoints.save_policy import is_end
from runner.checkpoints.store import CheckpointStore


@dataclass(frozen=True)
class RunRetention:
    """Which checkpoints of a run are retained, which of them its backup holds, and which becomes the result."""

    store: CheckpointStore
    policy: RetentionPolicy
    source_step: int | None = None
    """The checkpoint that this process resumed from; it is retained while the process lives."""

    def retained_steps(self) -> dict[int, list[RetentionReason]]:
        """Return the steps whose checkpoints are retained, each with the reasons."""
        return select_retained(self._manifests(), self.policy, source=self.source_step)

    def mirrored_steps(self) -> list[int]:
        """Return the steps whose checkpoints the backup holds."""
        ends = {manifest.step for manifest in self._manifests() if is_end(manifest.save_reasons)}
        return select_mirrored(self.retained_steps(), ends)

    def result_step(self, which: str) -> int | None:
        """Return the step of the checkpoint that becomes the result: the best (`which` is best), else the last."""
        manifests = self._manifests()
        if not manifests:
            return None
        best = best_checkpoint(manifests) if which == "best" else None
        return best.step if best else max(manifest.step for manifest in manifests)

    def _manifests(self) -> list[CheckpointManifest]:
        """Return the manifests of this run's checkpoints; the folder may hold those of another run too."""
        manifests = [checkpoint.manifest for checkpoint in self.store.checkpoints()]
        return [manifest for manifest in manifests if manifest.run_id == self.store.run_id]
