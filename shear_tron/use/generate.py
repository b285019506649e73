"""A finished model goes on with a text, or answers it."""

from collections.abc import Callable
from typing import Any

import torch

from shear_tron.checkpoint.model_folder import is_nanotron
from shear_tron.hub import located
from shear_tron.use.network import load_transformers, load_words


def generate(
    folder: str,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    tokenizer: str | None = None,
    say: Callable[[str], Any] | None = None,
) -> str:
    """What a model says after ``prompt``, up to ``tokens`` tokens or its end token.

    temperature 0 takes the likeliest token each time. chat: ``prompt`` is what a user says, put into the model's chat
    template. tokenizer: its folder or Hub id, for a nanotron checkpoint, which has none (ValueError). say: called with
    each piece of text as it comes. ValueError for ``chat`` without a template.
    """
    from transformers import TextStreamer

    if tokenizer is None and is_nanotron(folder):
        raise ValueError(f"{folder} is a nanotron checkpoint and has no tokenizer; say where it is with --tokenizer")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_transformers(folder, torch.float32 if device == "cpu" else torch.bfloat16).to(device).eval()
    place = located(tokenizer or folder)
    words = load_words(place)
    if chat:
        if words.chat_template is None:
            raise ValueError(f"{folder} has no chat template; leave --chat out, or tune it (examples/instruct)")
        said_by_user = [{"role": "user", "content": prompt}]
        prompt = str(words.apply_chat_template(said_by_user, tokenize=False, add_generation_prompt=True))
    given = words(prompt, return_tensors="pt", add_special_tokens=not chat, return_token_type_ids=False).to(device)
    if not given.input_ids.numel():
        raise ValueError("the prompt has no tokens; say something")
    streamer = None
    if say is not None:
        streamer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: say(text)  # type: ignore[method-assign]
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    with torch.inference_mode():
        pad = words.pad_token_id if words.pad_token_id is not None else 0
        said = model.generate(**given, max_new_tokens=tokens, pad_token_id=pad, streamer=streamer, **choice)
    return str(words.decode(said[0, given.input_ids.shape[1] :], skip_special_tokens=True))
