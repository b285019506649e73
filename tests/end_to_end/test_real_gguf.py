"""A real model as a GGUF file: llama.cpp says what transformers says, token by token."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROMPTS = ["The three largest cities of Italy are", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"]
NEW = 48


@pytest.mark.rehearsal
def test_llama_cpp_goes_on_as_transformers_does(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: it builds for 6 minutes; pip install '.[llama-cpp]'"
    )
    sys.path.insert(0, str(ROOT / "examples/smollm2"))
    from fetch_model import fetch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shear_tron.checkpoint.model_folder import Form, open_model, write_model

    fetch(tmp_path / "hf", torch.float32)
    ours = open_model(tmp_path / "hf")
    tensors = ((name, ours.read(name)) for name in ours.names())
    write_model(tmp_path / "model.gguf", ours.architecture, tensors, Form("gguf", "float32"), tmp_path / "hf")
    here = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, verbose=False)
    model, words = (each.from_pretrained(tmp_path / "hf") for each in (AutoModelForCausalLM, AutoTokenizer))
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt").input_ids
        assert here.tokenize(prompt.encode(), add_bos=False) == ids[0].tolist()
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        here.reset()
        stream = here.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in range(NEW)] == out[0, ids.shape[1] :].tolist(), prompt
