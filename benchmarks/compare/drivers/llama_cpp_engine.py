"""llama.cpp through its Python binding, on the file as it is.

Its repacked weights are left out: they give nothing for a Q4_1 file but on processors with AMX, and there the
pinned version ends with a segmentation fault.
"""

from __future__ import annotations

import itertools

import llama_cpp

import protocol

_default_parameters = llama_cpp.llama_model_default_params


def _without_repacking() -> llama_cpp.llama_model_params:
    parameters = _default_parameters()
    parameters.use_extra_bufts = False
    return parameters


def main() -> None:
    options = protocol.arguments()
    llama_cpp.llama_cpp.llama_model_default_params = _without_repacking
    engine = llama_cpp.Llama(
        model_path=options.gguf,
        n_ctx=options.max_model_len,
        n_batch=2048,
        n_ubatch=512,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def generate(prompts: list[list[int]], output_tokens: int) -> int:
        tokens = 0
        for prompt in prompts:
            engine.reset()
            stream = engine.generate(prompt, top_k=1, temp=0.0, reset=True)
            tokens += len(list(itertools.islice(stream, output_tokens)))
        return tokens

    protocol.serve(options.answers, generate)


if __name__ == "__main__":
    main()
