"""One start of a run on one rank, from the process group's start to its stop."""

from collections.abc import Sequence

from vitscale.config import Config
from vitscale.errors import ExitStatus, VitscaleError
from vitscale.ranks import groups as process_group
from vitscale.train.build import Blueprint, draw_blueprint
from vitscale.train.loop import Trainer
from vitscale.train.run_directory import RunDirectory, refusals_told
from vitscale.train.stop import StopRequest
from vitscale.train.together import on_main
from vitscale.train.watchdog import Watchdog


def run_training(config: Config, allow_change: Sequence[str] = (), fresh: bool = False) -> ExitStatus:
    """Train until the run's end or a stop request, going on where the run directory left off.

    What it says goes through `logging`, its records too where standard error is no terminal.

    Args:
        config: the run.
        allow_change: dotted config keys that may differ from those the run directory was started with.
        fresh: begin at step 0 although the run directory has lost the checkpoints that it once had.

    Returns:
        FINISHED or RUN_AGAIN; every other end is an exception. RUN/exit.json records each of them.

    Raises:
        VitscaleError: with the exit status it stands for.
    """
    stop = StopRequest()
    stop.install()
    ranks = process_group.start()
    watchdog: Watchdog | None = None
    try:
        with refusals_told(ranks):
            # Rank 0 looks first, so that a mistake is told once and not by every rank.
            drawn: list[Blueprint] = []
            on_main(ranks, lambda: drawn.append(draw_blueprint(config, ranks)))
            blueprint = drawn[0] if drawn else draw_blueprint(config, ranks, check_files=False)
            directory = RunDirectory.open(config, ranks, allow_change, fresh)
        trainer: Trainer | None = None
        status, reason = ExitStatus.TRANSIENT, ""
        try:
            watchdog = Watchdog(config.watchdog, ranks, directory, stop).start()
            trainer = Trainer(blueprint, ranks, stop, directory, watchdog)
            status = trainer.run()
            reason = stop.reason or "finished"
        except VitscaleError as error:
            status, reason = error.status, str(error)
            if not error.told:  # a rank's own, such as of its data: the others only see that it is gone
                directory.record_end(status, reason, trainer.progress.step if trainer else 0)
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            directory.close(status, reason, trainer.progress.step if trainer else 0)
        return status
    finally:
        process_group.stop()
        if watchdog is not None:
            watchdog.close()
