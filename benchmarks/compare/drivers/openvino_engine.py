"""OpenVINO GenAI, reading the file as it is."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino_genai as genai

import protocol


def main() -> None:
    options = protocol.arguments()
    engine = genai.LLMPipeline(options.gguf, "CPU", INFERENCE_NUM_THREADS=options.threads)

    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        wanted = genai.GenerationConfig(
            max_new_tokens=output_tokens, min_new_tokens=output_tokens, ignore_eos=True, do_sample=False
        )
        tokens = 0
        for prompt in prompts:
            ids = ov.Tensor(np.asarray([prompt], np.int64))
            mask = ov.Tensor(np.ones((1, len(prompt)), np.int64))
            tokens += len(engine.generate(genai.TokenizedInputs(ids, mask), wanted).tokens[0])
        return tokens

    protocol.serve(options.answers, generate)


if __name__ == "__main__":
    main()
