"""Run the study: python examples/study/study.py OUT [--smoke] [--recorded] [--only ARM ...]

Trains the source, tunes a rate for each family of arms, runs every arm of study.yaml with every seed at equal tokens
and at equal operations, measures all models on the same windows, and writes OUT/results/*.json. What is there already
is kept, and a run that was stopped goes on: give the same command again. Once OUT/tuned.json is there, the same command
in further shells shares the runs. With --recorded a new OUT begins with the source, rates and results of `recorded`
beside this script. Then: python examples/study/analyse.py OUT
"""

import argparse
import fcntl
import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

import small  # noqa: E402 - a neighbour's maker of small subjects
from measure import choice_accuracy, kept_units, window_losses  # noqa: E402

from shear_tron.checkpoint.huggingface import read_architecture  # noqa: E402
from shear_tron.files import sha256, write_atomically  # noqa: E402
from shear_tron.model.flops import flops  # noqa: E402
from shear_tron.shape import Shape  # noqa: E402
from shear_tron.train import metrics  # noqa: E402

Values = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What study.yaml says, and where its runs are."""

    said: Values
    out: Path

    @property
    def source(self) -> Path:
        return self.out / "source"

    @property
    def training(self) -> Values:
        return dict(self.said["training"])

    def operations(self, model: Path, batches: float) -> float:
        """Of so many dense batches, forward and backward."""
        architecture, tokens = read_architecture(model), self.training["batch"] * small.SEQUENCE
        return batches * flops(architecture, range(architecture.shape.layers), True, tokens, small.SEQUENCE)


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    study: Study
    name: str  # of its folder
    arm: Values
    seed: int
    rate: float
    steps: int  # of pruning and continued pre-training together
    budget: float | None = None  # operations; steps then are those of the cosine's first guess

    @property
    def folder(self) -> Path:
        return self.study.out / "runs" / self.name

    def train(self) -> Path:
        """Every step of the arm; what is made already is kept. Returns the folder of its model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "final").exists():
            return self.folder / "final"
        before = self._pruned_steps()
        model, spent = self._start(before), self._spent()
        after = self.steps - before
        if self.budget is not None:
            teacher = self.study.operations(self.study.source, 1 / 3) if "distill" in self.arm else 0.0
            after = max(1, round((self.budget - spent) / (self.study.operations(model, 1) + teacher)))
        one = self.arm.get("one_schedule", False)
        values = self._settings("continue", model, after, before if one else 0, before + after)
        values["train"]["seed"] = self.seed + 1000  # samples that pruning did not see
        if one and before:
            values["optimizer"]["moments"] = str(self.folder / "prune")
        small.run("-m", "shear_tron", "train", small.write(self.folder / "continue.yaml", values))
        small.run("-m", "shear_tron", "export", self.folder / "continue", self.folder / "final")
        return self.folder / "final"

    def _pruned_steps(self) -> int:
        share = self.arm.get("share", 0) if "prune" in self.arm else 0
        return max(2, round(share * self.steps)) if share else 0

    def _start(self, before: int) -> Path:
        """The model that continued pre-training starts from."""
        model = self.folder / "small"
        if model.exists():
            return model
        if "prune" not in self.arm:  # from scratch
            subject = self.study.said["subject"]
            torch.manual_seed(self.seed)
            small._random_model(model, Shape(**{**subject["source"], **subject["target"]}))
            for file in ("tokenizer.json", "tokenizer_config.json"):
                if (self.study.source / file).exists():
                    (model / file).write_bytes((self.study.source / file).read_bytes())
            return model
        one = self.arm.get("one_schedule", False)
        values = self._settings("prune", self.study.source, before, 0, self.steps if one else before)
        prune = {"target": self.arm.get("target", self.study.said["subject"]["target"]), **self.arm["prune"]}
        prune.setdefault("warmup_steps", max(1, round(self.arm.get("ramp", 1.0) * before)))
        prune["calibration_batches"] = self.study.training["calibration_batches"]
        values["prune"] = prune
        small.run("-m", "shear_tron", "train", small.write(self.folder / "prune.yaml", values))
        small.run("-m", "shear_tron", "extract", self.folder / "prune", model)
        return model

    def _settings(self, name: str, model: Path, steps: int, begun: int, of: int) -> Values:
        """A training run of ``steps`` after ``begun`` of a schedule of ``of``."""
        training, mixture = self.study.training, self.arm.get("mixture")
        every = max(1, self.steps // training["evaluations"])
        tokens = str(self.study.out / "tokens")
        data: Values = {"folder": tokens, "evaluate_windows": 32, "evaluate_every": every}
        data["weights"] = dict.fromkeys(self._domains(), 1)
        if mixture:
            data |= {"mixture": mixture, "update_every": every, "reference_losses": self._references()}
        values = small.training(self.folder, name, model, steps, training["batch"], self.rate, **data)
        values["train"] |= {"seed": self.seed}
        if name == "prune":
            values["train"]["micro_batch"] = training["micro_batch"]
        values["optimizer"] |= {
            "warmup_steps": max(1, round(training["warmup"] * of)),
            "min_learning_rate": training["min_learning_rate"],
        }
        if "distill" in self.arm:
            values["distill"] = {"teacher": str(self.study.source), **self.arm["distill"]}
        if begun or of > steps:
            values["optimizer"]["schedule"] = {"steps": of, "before": begun}
        return values

    def _domains(self) -> list[str]:
        return sorted(json.loads((self.study.out / "tokens" / "domains.json").read_text())["domains"])

    def _references(self) -> dict[str, float]:
        losses = json.loads((self.study.out / "results" / "source.json").read_text())["losses"]
        return {domain: _mean(each) for domain, each in losses.items()}

    def _spent(self) -> float:
        """Operations of pruning, calibration included."""
        if "prune" not in self.arm:
            return 0.0
        lines = metrics.read(self.folder / "prune")
        spent = sum(line["flops"] for line in lines if line["step"])
        batches = self.study.training["calibration_batches"]
        forward = (self.arm["prune"]["method"] == "activation") + bool(self.arm["prune"].get("rotate"))
        seen = batches * (self.arm["prune"]["method"] == "fisher") + batches / 3 * forward
        return float(spent + self.study.operations(self.study.source, seen))

    def result(self, arm: str, table: str) -> Values:
        """What the analysis needs to know of the run."""
        final, said = self.train(), self.study.said
        lines = metrics.read(self.folder / "continue")
        spent = self._spent()
        parts = [folder for folder in ("prune", "continue") if (self.folder / folder).exists()]
        return {
            "arm": arm, "table": table, "seed": self.seed, "rate": self.rate,
            "tokens": sum(metrics.read(self.folder / part)[-1]["tokens"] for part in parts),
            "operations": spent + sum(line["flops"] for line in lines),
            "curve": [[spent + sum(each["flops"] for each in lines[: place + 1]), _mean(line["held_out"].values())]
                      for place, line in enumerate(lines) if "held_out" in line],
            "losses": window_losses(final, self.study.out / "tokens", small.SEQUENCE, said["windows"]),
            "choice": choice_accuracy(final, self.study.out / "tokens", said["choice_items"]),
            "kept": kept_units(self.folder / "prune") if "prune" in self.arm else {},
        }  # fmt: skip


def _mean(losses: Collection[float]) -> float:
    return sum(losses) / len(losses)


def tuned(study: Study) -> Values:
    """The best rate of each family, and share of the paper's: OUT/tuned.json, with everything that was tried."""
    file = study.out / "tuned.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    said, steps = study.said["tuning"], max(4, study.training["steps"] // 3)
    tried: list[Values] = []
    for family, arm in representatives(study.said["arms"]).items():
        shares = said["paper_shares"] if family == "paper" else [arm.get("share", 0)]
        for share in shares:
            for rate in said["rates"]:
                name = f"tuning-{family}-{share:g}-{rate:g}"
                run = Run(study, name, arm | {"share": share}, said["seed"], rate, steps)
                losses = window_losses(run.train(), study.out / "tokens", small.SEQUENCE, study.said["windows"])
                loss = _mean([_mean(each) for each in losses.values()])
                tried.append({"family": family, "share": share, "rate": rate, "loss": loss})
    best = {family: min((t for t in tried if t["family"] == family), key=lambda t: t["loss"])
            for family in {t["family"] for t in tried}}  # fmt: skip
    write_atomically(file, json.dumps({"best": best, "tried": tried}, indent=1) + "\n")
    return {"best": best}


def representatives(arms: Values) -> dict[str, Values]:
    """For each family the first arm of it whose share is to be tuned, or the first."""
    found: dict[str, Values] = {}
    for arm in arms.values():
        if "waits_for" not in arm and (arm["family"] not in found or arm.get("share") == "tuned"):
            found[arm["family"]] = arm
    return found


def runs(study: Study, best: Values) -> Iterator[tuple[str, str, Run]]:
    """(arm, table, run) in the order in which they are worth having; equal operations are those of the reference."""
    said, steps = study.said, study.training["steps"]
    for table in ("tokens", "operations"):
        for name, arm in said["arms"].items():
            if table not in arm.get("tables", ()) or (table == "operations" and name == said["reference"]):
                continue
            chosen = best[arm["family"]]
            share = chosen["share"] if arm.get("share") == "tuned" else arm.get("share", 0)
            for seed in said["random_seeds"] if name == "random" else said["seeds"]:
                run = Run(study, f"{table}-{name}-{seed}", arm | {"share": share}, seed, chosen["rate"], steps)
                yield name, table, run


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether this process has the run of ``folder`` for itself; the claim ends with the process, whatever ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "claimed").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def begin_with(recorded: Path, out: Path) -> None:
    """Copy what ``out`` lacks of a recorded study. SystemExit where ``out`` has another source."""
    sources = [place / "source" / "model.safetensors" for place in (recorded, out)]
    if all(map(Path.exists, sources)) and sha256(sources[0]) != sha256(sources[1]):
        raise SystemExit(f"{out} has a source of its own; give --recorded a new folder")
    for file in filter(Path.is_file, recorded.rglob("*")):
        here = out / file.relative_to(recorded)
        if not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(here, file.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="everything once, in minutes")
    parser.add_argument("--recorded", action="store_true", help="begin with what is recorded: only the rest is run")
    parser.add_argument("--only", nargs="*", metavar="ARM", help="these arms only")
    arguments = parser.parse_args()
    said = yaml.safe_load((HERE / "study.yaml").read_text())
    if arguments.smoke:
        for key, value in said["smoke"].items():
            said[key] = said[key] | value if isinstance(value, dict) else value
    study = Study(said, arguments.out.absolute())
    if arguments.recorded:
        begin_with(HERE / "recorded", study.out)
    (study.out / "results").mkdir(parents=True, exist_ok=True)
    subject = said["subject"]
    small.trained_source(study.out, Shape(**subject["source"]), subject["source_steps"], study.training["batch"])
    (study.out / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    for name, arm in said["arms"].items():
        if "waits_for" in arm:
            print(f"arm {name} is left out: it waits for {arm['waits_for']}")
    source = study.out / "results" / "source.json"
    if not source.exists():
        losses = window_losses(study.source, study.out / "tokens", small.SEQUENCE, said["windows"])
        choice = choice_accuracy(study.source, study.out / "tokens", said["choice_items"])
        spent = study.operations(study.source, subject["source_steps"])
        write_atomically(source, json.dumps({"losses": losses, "choice": choice, "operations": spent}))
    best = tuned(study)["best"]
    for name, table, run in runs(study, best):
        file = study.out / "results" / f"{table}-{name}-{run.seed}.json"
        if file.exists() or (arguments.only and name not in arguments.only):
            continue
        with claimed(run.folder) as mine:
            if not mine or file.exists():  # another process has it, or had
                continue
            if table == "operations":
                reference = study.out / "results" / f"tokens-{said['reference']}-{said['seeds'][0]}.json"
                if not reference.exists():
                    raise SystemExit(f"{file.name} wants {reference.name}, not there yet: give this again when it is")
                run = replace(run, budget=json.loads(reference.read_text())["operations"])
            write_atomically(file, json.dumps(run.result(name, table)))
            print(f"done: {file}", flush=True)


if __name__ == "__main__":
    main()
