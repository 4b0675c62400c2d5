"""`python -m pipelines STAGE --flags` runs one stage without Prefect; a Ray job's entrypoint calls the same."""

import sys
from collections.abc import Sequence

from pipelines.config import (
    GenerateCommand,
    InterruptedRunError,
    PipelineError,
    TrainCommand,
    parse,
    status_of,
    stop_marker,
)
from pipelines.jobs import STAGES, print_stage, rehearse, run_stage, settle, visit
from pipelines.stops import INTERRUPTED, heeded


def main(arguments: Sequence[str]) -> int:
    """Run the stage that the first argument names; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *flags = arguments
    try:
        with visit(), heeded(stop_marker()):
            _run(name, flags)
    except InterruptedRunError as error:
        print(error, file=sys.stderr, flush=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"{name}: stopped; what was done is kept, run the same command to go on", file=sys.stderr, flush=True)
        return INTERRUPTED
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return status_of(error)
    return 0


def _run(name: str, flags: list[str]) -> None:
    """Run a stage and print its result's URI, where it makes one."""
    if name not in STAGES:
        raise PipelineError(f"no stage {name!r}; there are {', '.join(STAGES)}")
    config = parse(STAGES[name].flags, f"python -m pipelines {name}", flags)
    if isinstance(config, TrainCommand):
        config = settle(config)
    if isinstance(config, GenerateCommand) and config.dry_run:
        rehearse(config)
    elif STAGES[name].makes_result:
        print(f"{name}: {run_stage(name, config).uri}", flush=True)
    else:
        print_stage(name, config)


def usage() -> str:
    """What there is to run."""
    lines = [f"  {name:<10}{stage.flags.__doc__}" for name, stage in STAGES.items()]
    return "\n".join(["usage: python -m pipelines STAGE [--help] [--flags]", "", "stages:", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
