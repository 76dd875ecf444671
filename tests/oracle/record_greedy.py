"""Records what transformers generates greedily in float32, for `test_models_greedy.py` to compare with.

    python tests/oracle/record_greedy.py

reads the imported demo models (pulling them when they are missing) and writes `fixtures/greedy_NAME.json`:
for each prompt its token ids, the 64 tokens that follow, and at each of them how far the second-best logit
lay below the best. One prompt at a time, without padding, two threads; a few minutes in all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from headrace.store import pull

MODELS = ("smollm2-135m", "gemma3-270m")
TOKENS = 64
FIXTURES = Path(__file__).parent / "fixtures"

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "def fibonacci(n):\n    ",
    "Q: What is the boiling point of water at sea level?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three laws of thermodynamics state that",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\ndef softmax(x):",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n-",
    "Der schnelle braune Fuchs",
    "La revolución francesa comenzó en",
    "日本の首都は",
    "SELECT name, age FROM users WHERE",
    '{"name": "Alice", "age": 30, "city":',
    "To be, or not to be, that is the question:",
    "Photosynthesis is the process by which",
    "<html>\n<head>\n<title>",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "User: How do I reverse a list in Python?\nAssistant:",
    # Longer than Gemma's window of 512 tokens.
    " ".join(f"Item {number} weighs {number * 37 % 101} kg." for number in range(1, 75)),
)


def fixture_path(name: str) -> Path:
    return FIXTURES / f"greedy_{name}.json"


@torch.inference_mode()
def continue_greedily(model: torch.nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    """(tokens, gaps to the second-best logit)."""
    tokens: list[int] = []
    gaps: list[float] = []
    ids, cache = torch.tensor([prompt]), None
    for _ in range(TOKENS):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        best = output.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(f"{best.values[0] - best.values[1]:.3g}"))
        ids = best.indices[:1][None]
    return tokens, gaps


def record(name: str) -> None:
    directory = pull(name)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    lines = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text).ids
        tokens, gaps = continue_greedily(model, prompt)
        lines.append(json.dumps({"prompt": prompt, "tokens": tokens, "gaps": gaps}))
        print(f"{name}: {tokenizer.decode(tokens)[:70]!r}", flush=True)
    head = {
        "gguf_sha256": json.loads((directory / "headrace.json").read_text())["sha256"],
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    body = ",\n  ".join(lines)
    fixture_path(name).write_text(f'{{"made_by": {json.dumps(head)}, "runs": [\n  {body}\n]}}\n')


if __name__ == "__main__":
    torch.set_num_threads(2)
    for model_name in MODELS:
        record(model_name)
