"""The command line: one function a verb."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

VERBS = {
    "prepare": "tokenise text domains into shards (datatrove)",
    "train": "prune (with a `prune` section in the config) or pre-train; under torchrun or alone",
    "extract": "cut the dense small model out of a pruning run, as a Hugging Face folder",
    "export": "write a training run's weights as a Hugging Face folder",
    "show": "dry run: shapes, counts, what each rank holds, whether everything divides",
    "reference-loss": "reference losses of domains: predicted by scaling curves, or measured",
    "bench": "the kernel benchmark; without a GPU its rooflines and what the compiler made",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Bad input is one line on stderr, said once by all ranks together, and exit status 2."""
    parser = argparse.ArgumentParser(prog="shear-tron", description="Shear a LLaMA model to a target shape.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text)
        if verb in ("prepare", "train", "show", "reference-loss"):
            sub.add_argument("config", help="YAML file")
            sub.add_argument("overrides", nargs="*", metavar="section.key=value")
        if verb == "show":
            sub.add_argument("--world", type=int, default=None, help="ranks to plan for; default: the fewest that fit")
        if verb == "prepare":
            sub.add_argument("--stats", nargs="?", const="", metavar="PNG", help="tell about the prepared domains")
        if verb in ("extract", "export"):
            sub.add_argument("run", help="folder of the run")
            sub.add_argument("output", help="Hugging Face folder to write; must not exist")
            sub.add_argument("--step", type=int, default=None, help="checkpoint to take; default: the newest")
            sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.verb != "bench":  # bench hands its options to kernels/bench/run.py
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.options = options
    try:
        function = globals()[arguments.verb.replace("-", "_")]
        return int(function(arguments) or 0)
    except (ValueError, FileNotFoundError) as error:
        from shear_tron.parallel.topology import is_main_process

        if is_main_process():
            print(f"shear-tron {arguments.verb}: {error}", file=sys.stderr)
        return 2


def prepare(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.data.prepare import PrepareConfig
    from shear_tron.data.prepare import prepare as run
    from shear_tron.data.stats import stats

    config = load(PrepareConfig, arguments.config, arguments.overrides)
    if arguments.stats is None:
        run(config)
    print(stats(config.output, arguments.stats or None))


def train(arguments: argparse.Namespace) -> int:
    from shear_tron.config import load
    from shear_tron.parallel import topology
    from shear_tron.parallel.agree import AgreedError
    from shear_tron.train.config import RunConfig
    from shear_tron.train.loop import Trainer
    from shear_tron.train.plan import claim_run_folder, inputs, plan, precision

    config = load(RunConfig, arguments.config, arguments.overrides)
    planned = plan(config, topology.world_size())
    device, compute = precision(config)
    opened = inputs(planned)
    claim_run_folder(config)
    ranks = topology.start(planned.layout, device)
    try:
        losses = Trainer(planned, opened, ranks, compute).fit()
    except AgreedError as error:
        if ranks.is_main:
            print(f"shear-tron train: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # from here on any one rank may fail: each says so itself, with its traceback
        raise RuntimeError(f"training failed: {error}") from error
    else:
        if ranks.is_main:
            print(json.dumps({"run": config.run, "held_out": losses}))
        return 0
    finally:
        topology.stop()


def extract(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import extract as run

    print(run(Path(arguments.run), arguments.output, arguments.step, arguments.dtype))


def export(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import export as run

    print(run(Path(arguments.run), arguments.output, arguments.step, arguments.dtype))


def show(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.train.config import RunConfig
    from shear_tron.train.show import show as text

    print(text(load(RunConfig, arguments.config, arguments.overrides), arguments.world))


def reference_loss(arguments: argparse.Namespace) -> None:
    from shear_tron.config import load
    from shear_tron.data.reference import ReferenceConfig, reference_losses

    losses = reference_losses(load(ReferenceConfig, arguments.config, arguments.overrides))
    print(json.dumps({name: round(loss, 4) for name, loss in losses.items()}))


def bench(arguments: argparse.Namespace) -> int:
    import shear_kernels

    script = Path(shear_kernels.__file__).parents[1] / "bench" / "run.py"
    if not script.exists():
        raise ValueError(f"{script} is not there: the benchmark comes with a checkout, not with a wheel; clone one")
    return subprocess.run([sys.executable, str(script), *arguments.options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
