"""The command line: one function a verb."""

import argparse
import json
import keyword
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shear_tron.checkpoint.model_folder import Form
    from shear_tron.train.run_folder import RunFolder

VERBS = {
    "prepare": "tokenise text domains into shards (datatrove)",
    "train": "prune (with a `prune` section in the config) or pre-train; under torchrun or alone",
    "extract": "cut the dense small model out of a pruning run, as a Hugging Face folder or for nanotron",
    "export": "write a training run's weights as a Hugging Face folder or for nanotron",
    "import": "make a Hugging Face folder of a nanotron checkpoint, which can then be sheared",
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
            sub.add_argument("output", help="folder to write; must not exist")
            sub.add_argument("--step", type=int, default=None, help="checkpoint to take; default: the newest")
            sub.add_argument("--model", default=None, help="where the run's source model is; default: where it was")
            sub.add_argument("--to", choices=["huggingface", "nanotron"], default="huggingface")
            sub.add_argument("--flavour", choices=["main", "0.4"], default="main", help="of nanotron")
            sub.add_argument("--tp", type=int, default=1, help="pieces of every tensor, for nanotron; any can be read")
            sub.add_argument("--samples", type=int, default=0, help="of the run's next samples to hand to nanotron")
        if verb == "import":
            sub.add_argument("checkpoint", help="folder that nanotron saved")
            sub.add_argument("output", help="Hugging Face folder to write; must not exist")
            sub.add_argument("--tokenizer", required=True, help="folder of the model's tokenizer")
        if verb in ("extract", "export", "import"):
            default = None if verb == "import" else "float32"  # None: as it is stored
            sub.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=default)
    arguments, options = parser.parse_known_args(argv)
    if options and arguments.verb != "bench":  # bench hands its options to kernels/bench/run.py
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    arguments.options = options
    try:
        name = arguments.verb.replace("-", "_")
        function = globals()[f"{name}_" if keyword.iskeyword(name) else name]
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

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def export(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import export as run

    print(run(_run_folder(arguments), arguments.output, _form(arguments), arguments.samples))


def _run_folder(arguments: argparse.Namespace) -> "RunFolder":
    from shear_tron.train.run_folder import RunFolder

    return RunFolder.open(arguments.run, arguments.step, arguments.model)


def _form(arguments: argparse.Namespace) -> "Form":
    from shear_tron.checkpoint.model_folder import Form

    return Form(arguments.to, arguments.dtype, arguments.flavour, arguments.tp)


def import_(arguments: argparse.Namespace) -> None:
    from shear_tron.train.outputs import import_model

    print(import_model(arguments.checkpoint, arguments.output, arguments.tokenizer, arguments.dtype))


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
