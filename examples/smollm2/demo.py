"""The main job on a real model, start to finish: python examples/smollm2/demo.py [parallel.pp=2 ...]

Fetches SmolLM2-135M and six domains of text, prepares them, prunes with dynamic batch loading, extracts the dense
model, continues its pre-training, exports it, and opens the result with transformers. Every step is a command that is
printed before it runs, so that you can run it alone. Overrides go to both trainings.

--recipe says how units are chosen: fisher (prune.yaml), the same with magnitude or random for its method, or paper (the
paper's algorithm and a smaller target, paper-prune.yaml). Each keeps its runs, and a row of what it reached, beside the
others'. --steps N continues the pre-training for longer, with one schedule over it all; --resume goes on with a demo
that was stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

HERE = Path("examples/smollm2")
RUNS = Path("runs/smollm2")
ROWS = HERE / "rows.jsonl"  # what recipes reached on the machine of the README
RECIPES = ("fisher", "magnitude", "random", "paper")
PROMPTS = ("The history of the English language", "The law of supply and demand says that")


def main() -> None:
    parser = argparse.ArgumentParser(description="Shear SmolLM2-135M on this machine.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for both trainings")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default 2)")
    parser.add_argument("--recipe", choices=RECIPES, default="fisher", help="how units are chosen (default fisher)")
    parser.add_argument("--steps", type=int, help="of continued pre-training (default: its config's)")
    parser.add_argument("--resume", action="store_true", help="go on with the runs that are there")
    arguments = parser.parse_args()
    began, runs = time.perf_counter(), RUNS / arguments.recipe
    if not arguments.resume:
        shutil.rmtree(runs, ignore_errors=True)  # a demo starts anew; downloads and data are kept

    threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={arguments.processes}", "-m", "shear_tron", "train"),
    ]
    shear_tron = [sys.executable, "-m", "shear_tron"]
    prune, continued = files_and_overrides(arguments.recipe, arguments.steps)
    step("1/7 fetch a real model", [sys.executable, str(HERE / "fetch_model.py"), str(RUNS / "model")])
    step("2/7 fetch real text", [sys.executable, str(HERE / "fetch_text.py"), str(RUNS / "text")])
    step("3/7 prepare domains", [*shear_tron, "prepare", str(HERE / "prepare.yaml")])
    step("4/7 prune", [*torchrun, *prune, *arguments.overrides], threads)
    if not (runs / "sheared").exists():
        step("5/7 extract", [*shear_tron, "extract", str(runs / "prune"), str(runs / "sheared")])
    step("6/7 continue pre-training", [*torchrun, *continued, *arguments.overrides], threads)
    shutil.rmtree(runs / "final", ignore_errors=True)  # of a shorter run, if this one went on
    step("7/7 export", [*shear_tron, "export", str(runs / "continue"), str(runs / "final")])
    report(arguments.recipe, None if arguments.resume else time.perf_counter() - began)


def files_and_overrides(recipe: str, steps: int | None) -> tuple[list[str], list[str]]:
    """What `train` is given to prune and to continue by a recipe, the latter for ``steps`` (None: its config's)."""
    named = "paper-" if recipe == "paper" else ""
    prune, continued = [str(HERE / f"{named}prune.yaml")], [str(HERE / f"{named}continue.yaml")]
    if steps is not None:
        schedule = yaml.safe_load(Path(continued[0]).read_text())["optimizer"].get("schedule")
        spanning = [f"optimizer.schedule.steps={schedule['before'] + steps}"] if schedule else []
        prune += spanning
        continued += [f"train.steps={steps}", *spanning]
    if recipe in ("magnitude", "random"):
        runs = RUNS / recipe
        prune += [f"run={runs}/prune", f"prune.method={recipe}"]
        continued += [f"run={runs}/continue", f"model={runs}/sheared"]
        continued += [f"data.weights={runs}/prune", f"data.after={runs}/prune"]
        continued += [f"data.reference_losses={runs}/prune/reference_losses.json", f"optimizer.moments={runs}/prune"]
    return prune, continued


def step(title: str, command: list[str], threads: int = os.cpu_count() or 1) -> None:
    shown = " ".join("python" if part == sys.executable else part for part in command)
    print(f"\n\033[1m{title}\033[0m\n$ {shown}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{title} failed with exit status {done.returncode}")


def report(recipe: str, seconds: float | None) -> None:
    """Open the result as any user would, and say what became of the model, beside what other recipes reached.
    ``seconds``: that it took, None where parts of it were there before."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from shear_tron.checkpoint.huggingface import Weights, read_architecture
    from shear_tron.model.transformer import Transformer
    from shear_tron.params import count, params
    from shear_tron.report.story import SAMPLES, mean, read
    from shear_tron.report.write import write

    disable_progress_bar()
    runs = RUNS / recipe
    tokenizer = AutoTokenizer.from_pretrained(runs / "final")
    theirs = LlamaForCausalLM.from_pretrained(runs / "final").eval()
    architecture = read_architecture(runs / "final")
    weights = Weights.open(runs / "final", architecture)
    ours = Transformer(architecture)
    ours.load_state_dict({param.name: weights.read(param.name) for param in params(architecture)})
    prompt = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (ours(prompt) - theirs(prompt).logits).abs().max().item()

    said = {"source": say(LlamaForCausalLM.from_pretrained(RUNS / "model").eval(), tokenizer)}
    said["this model"] = say(theirs, tokenizer)
    samples = [{"prompt": prompt, "text": text} for prompt, text in said["this model"].items()]
    (runs / "continue" / SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    made = [runs / "prune", runs / "continue"]
    page, *_ = write(made, [], str(runs / "report.html"), str(runs / "figures"))
    story = read(made, [])
    rows = story.table()
    print("\n\033[1mheld-out loss, nats per token\033[0m")
    print(f"{'':12}" + "".join(f"{name:>8}" for name in rows[0][1]) + f"{'mean':>8}")
    for title, losses in rows:
        print(f"{title:12}" + "".join(f"{loss:8.3f}" for loss in (*losses.values(), mean(losses))))
    before, after = count(read_architecture(RUNS / "model")), count(architecture)
    minutes = None if seconds is None else round(seconds / 60, 1)
    row = {
        "recipe": recipe, "parameters": after, "tokens": story.stages[-1].last["tokens"], "minutes": minutes,
        "loss": {title: round(mean(losses), 3) for title, losses in rows}, "says": said["this model"],
    }  # fmt: skip
    (runs / "row.json").write_text(json.dumps(row) + "\n")
    print("\n\033[1mrecipes (committed rows: examples/smollm2/rows.jsonl)\033[0m")
    committed = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    for name, each in (("this run", row), *(("committed", each) for each in committed)):
        steps = ", ".join(f"{title} {loss:.2f}" for title, loss in each["loss"].items())
        size, tokens, took = each["parameters"] / 1e6, each["tokens"] / 1e3, each["minutes"] or "-"
        print(f"{name:10} {each['recipe']:10} {size:4.0f} M  {tokens:5.0f}k tokens  {took:>5} min  {steps}")
    for prompt in PROMPTS:
        print(f"\n\033[1m{prompt} ...\033[0m")
        for name, texts in said.items():
            print(f"{name:12} {' '.join(texts[prompt].split())}")
    print(f"\nparameters   {before:,} -> {after:,} ({after / before:.1%}): {architecture.shape}")
    print(f"logits       transformers and shear-tron differ by at most {difference:.1e}")
    print(f"report       {page.resolve()}")
    print(f"model        {(runs / 'final').resolve()}")
    if minutes:
        print(f"time         {minutes} minutes")


def say(model, tokenizer) -> Mapping[str, str]:
    """Greedy continuations of the prompts, by prompt; a repetition is made a little less likely."""
    said = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=32, do_sample=False, repetition_penalty=1.2, pad_token_id=0)
        said[prompt] = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return said


if __name__ == "__main__":
    main()
