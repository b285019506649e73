"""Supervised fine-tuning of an exported model on a ShareGPT-format file, with TRL; the loss is on answers only.

    pip install '.[instruct]'
    python examples/instruct/sft.py models/final conversations.jsonl models/chat

Each line of the file is {"conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}, ..]}.
Rate and schedule are those of the paper's released script (5e-5, cosine after 3 % of warm-up). A model that has a chat
template keeps it; one that has none gets TEMPLATE below, and it is saved with the model. On more than one GPU:
`accelerate launch examples/instruct/sft.py ..`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Plain text that any tokenizer has; an answer ends with the tokenizer's own end token.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Answer:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\n' }}{% endif %}"
)
IGNORED = -100  # label of a token without a loss


def read(file: Path) -> list[list[dict[str, str]]]:
    """Conversations as lists of {"role", "content"}. ValueError naming the line that is none."""
    found = []
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        try:
            turns = json.loads(line)["conversations"]
            found.append([{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}:{number} is no ShareGPT conversation ({error!r})") from None
    return found


def encode(tokenizer: Any, messages: list[dict[str, str]], length: int) -> dict[str, list[int]]:
    """Token ids of a conversation in the model's template, and labels: the ids of answers, everything else ignored.

    What comes before an answer is the template up to it, opened for an answer; the answer is what it then adds.
    """

    def ids(upto: int, opened: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=opened)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    tokens: list[int] = []
    labels: list[int] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = ids(place, True), ids(place + 1, False)
        if before[: len(tokens)] != tokens or after[: len(before)] != before:
            raise ValueError("the chat template changes earlier turns as a conversation goes on; use another template")
        labels += [IGNORED] * (len(before) - len(tokens)) + after[len(before) :]
        tokens = after
    return {"input_ids": tokens[:length], "labels": labels[:length]}


def tune(model: str, data: str, output: str, length: int = 2048, **options: Any) -> None:
    """Fine-tune ``model`` on ``data`` and save it, its tokenizer and its template to ``output``."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.eos_token is None:
        raise ValueError(f"{model} has no end token, with which an answer could end; set eos_token")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = TEMPLATE
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encoded = [encode(tokenizer, messages, length) for messages in read(Path(data))]
    encoded = [each for each in encoded if any(label != IGNORED for label in each["labels"])]
    if not encoded:
        raise ValueError(f"{data} has no answer within {length} tokens; give conversations with turns from gpt")
    settings = SFTConfig(
        output_dir=f"{output}/checkpoints",
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        **options,
    )
    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    trainer = SFTTrainer(network, settings, train_dataset=Dataset.from_list(encoded), processing_class=tokenizer)
    trainer.train()
    trainer.save_model(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=4)
    given = parser.parse_args()
    tune(
        given.model,
        given.data,
        given.output,
        given.length,
        num_train_epochs=given.epochs,
        learning_rate=given.rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,  # of all
        per_device_train_batch_size=given.micro_batch,
        gradient_accumulation_steps=given.batch // given.micro_batch,
    )


if __name__ == "__main__":
    main()
