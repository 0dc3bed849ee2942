"""Any rank but the first: it trains its share of what rank 0 trains, and writes and prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from runner.common.errors import RankLost, exit_code_of
from runner.distributed.join import JOIN_SECONDS
from runner.distributed.launch import Launch
from runner.reports.progress import SilentDisplay
from runner.runs.run_spec import RunSpec
from runner.training import epochs
from runner.training.build import build_retention, build_trainer
from runner.training.component_loader import ComponentLoader
from runner.training.components import free_frozen_weights, load_components
from runner.training.device_failures import device_errors_explained
from runner.training.finalize import finalize_share
from runner.training.memory import memory_limits
from runner.training.run_writer import DiscardingWriter
from runner.training.shared_start import receive_spec
from runner.training.signals import StopRequested, StopSignals
from runner.training.too_large import refuse_too_large
from runner.training.world import Ranks, join


def follow(
    launch: Launch,
    report_run: Callable[[Path], None] | None = None,
    *,
    seconds: float = JOIN_SECONDS,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Train as the rank that `launch` describes until rank 0 ends, and return its exit code.

    Args:
        report_run: given where this process is supervised: tells that it has joined a run, and rank 0's directory.
        seconds: how long to wait for the others.
        check: called while it waits for them; raises what makes that pointless.

    Raises:
        RankLost: rank 0 is gone, and nobody else can say so. Other failures are told to rank 0, which prints them.
    """
    world = join(launch, seconds, check)
    assert isinstance(world, Ranks)
    stops = StopSignals()
    try:
        with stops, world.connected(stops):
            try:
                spec = receive_spec(world)
                if report_run is not None:
                    report_run(spec.directory.path)
                _train_share(spec, world, stops)
            except StopRequested:  # before training
                assert stops.requested is not None
                raise SystemExit(128 + stops.requested) from None
            return world.channel.wait_for_end()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    except RankLost as error:
        if world.channel.reports_errors:
            raise
        return error.exit_code
    except Exception as error:
        return exit_code_of(error)


def _train_share(spec: RunSpec, world: Ranks, stops: StopSignals) -> None:
    with ExitStack() as stack:
        stack.enter_context(device_errors_explained(spec))
        display = stack.enter_context(SilentDisplay())
        buffer_cache = stack.enter_context(memory_limits(spec.config.train.cache_limit_gb))
        loader = stack.enter_context(closing(ComponentLoader()))
        refuse_too_large(world, spec.config)
        spec = epochs.fill_iters(spec, loader, stops.check)
        components = load_components(spec, loader, display, stops)
        stack.callback(components.adapted.remove)
        free_frozen_weights(spec.config, components, display)
        writer = DiscardingWriter(build_retention(spec))
        trainer = build_trainer(spec, None, components, writer, stops, display, buffer_cache, world)
        with closing(trainer.batches):
            stop = trainer.train()
        finalize_share(trainer, spec, stop)
