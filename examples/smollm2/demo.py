"""The main job on a real model, start to finish: python examples/smollm2/demo.py [parallel.tp=3 ...]

Fetches SmolLM2-135M and six domains of text, prepares them, prunes under learned masks with dynamic batch loading,
extracts the dense model, continues its pre-training, exports it, and opens the result with transformers. Every step is
a command that is printed before it runs, so that you can run it alone. Overrides go to both trainings.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path("examples/smollm2")
RUNS = Path("runs/smollm2")
PROMPT = "The history of the English language"


def main() -> None:
    parser = argparse.ArgumentParser(description="Shear SmolLM2-135M on this machine.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for both trainings")
    parser.add_argument("--processes", type=int, default=2, help="ranks (default 2)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    for stale in ("prune", "sheared", "continue", "final"):  # a demo starts anew; downloads and data are kept
        shutil.rmtree(RUNS / stale, ignore_errors=True)

    threads = max(1, (os.cpu_count() or 1) // arguments.processes)
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={arguments.processes}", "-m", "shear_tron", "train"),
    ]
    shear_tron = [sys.executable, "-m", "shear_tron"]
    step("1/7 fetch a real model", [sys.executable, str(HERE / "fetch_model.py"), str(RUNS / "model")])
    step("2/7 fetch real text", [sys.executable, str(HERE / "fetch_text.py"), str(RUNS / "text")])
    step("3/7 prepare domains", [*shear_tron, "prepare", str(HERE / "prepare.yaml")])
    step("4/7 prune", [*torchrun, str(HERE / "prune.yaml"), *arguments.overrides], threads)
    step("5/7 extract", [*shear_tron, "extract", str(RUNS / "prune"), str(RUNS / "sheared")])
    step("6/7 continue pre-training", [*torchrun, str(HERE / "continue.yaml"), *arguments.overrides], threads)
    step("7/7 export", [*shear_tron, "export", str(RUNS / "continue"), str(RUNS / "final")])
    report(time.perf_counter() - began)


def step(title: str, command: list[str], threads: int = os.cpu_count() or 1) -> None:
    shown = " ".join("python" if part == sys.executable else part for part in command)
    print(f"\n\033[1m{title}\033[0m\n$ {shown}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{title} failed with exit status {done.returncode}")


def report(seconds: float) -> None:
    """Open the result as any user would, and say what became of the model."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from shear_tron.checkpoint.huggingface import Weights, read_architecture
    from shear_tron.model.transformer import Transformer
    from shear_tron.params import count, params
    from shear_tron.report.story import SAMPLES, mean, read
    from shear_tron.report.write import write

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(RUNS / "final")
    theirs = LlamaForCausalLM.from_pretrained(RUNS / "final").eval()
    architecture = read_architecture(RUNS / "final")
    weights = Weights.open(RUNS / "final", architecture)
    ours = Transformer(architecture)
    ours.load_state_dict({param.name: weights.read(param.name) for param in params(architecture)})
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (ours(prompt) - theirs(prompt).logits).abs().max().item()
        continued = theirs.generate(prompt, max_new_tokens=16, do_sample=False, pad_token_id=0)

    sample = {"prompt": PROMPT, "text": tokenizer.decode(continued[0, prompt.shape[1] :])}
    (RUNS / "continue" / SAMPLES).write_text(json.dumps(sample) + "\n")
    runs = [RUNS / "prune", RUNS / "continue"]
    page, *_ = write(runs, [], str(RUNS / "report.html"), str(RUNS / "figures"))
    rows = read(runs, []).table()
    print("\n\033[1mheld-out loss, nats per token\033[0m")
    print(f"{'':12}" + "".join(f"{name:>8}" for name in rows[0][1]) + f"{'mean':>8}")
    for title, losses in rows:
        print(f"{title:12}" + "".join(f"{loss:8.3f}" for loss in (*losses.values(), mean(losses))))
    before, after = count(read_architecture(RUNS / "model")), count(architecture)
    print(f"\nparameters   {before:,} -> {after:,} ({after / before:.1%}): {architecture.shape}")
    print(f"logits       transformers and shear-tron differ by at most {difference:.1e}")
    print(f"it says      {PROMPT + sample['text']!r}")
    print(f"report       {page.resolve()}")
    print(f"model        {(RUNS / 'final').resolve()}")
    print(f"time         {seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
