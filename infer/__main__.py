"""``python -m jaxalope.infer --model=WORKDIR --prompt=TEXT``: continue text from the shell."""

from __future__ import annotations

import sys

from absl import app, flags, logging

from ..errors import InputError

_MODEL = flags.DEFINE_string("model", None, "A training workdir; required.")
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; repeat for a batch.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Tokens each prompt may get.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the most likely token.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first prompt; each further one has the next.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint's step; the newest if not given.")
_DRAFT = flags.DEFINE_string(
    "draft", None, "Decode speculatively, with drafts of this workdir's model; or 'lookup'."
)
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "Tokens drafted a step.")


def main(argv: list[str]) -> None:
    """Print every prompt with its continuation."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; prompts are given by --prompt")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read.
    # After flag parsing, so that --help answers at once.
    from .. import DraftModel, PromptLookup, generate, load
    from .policy import Greedy, Temperature

    try:
        if _MODEL.value is None:
            raise InputError("--model is missing: the workdir of a training run")
        policy = Temperature(_TEMPERATURE.value) if _TEMPERATURE.value else Greedy()
        model = load(_MODEL.value, step=_STEP.value)
        draft = None
        if _DRAFT.value == "lookup":
            draft = PromptLookup(_DRAFT_TOKENS.value)
        elif _DRAFT.value is not None:
            draft = DraftModel(load(_DRAFT.value), num_tokens=_DRAFT_TOKENS.value)
        generation = generate(
            model,
            _PROMPT.value,
            policy,
            _MAX_NEW_TOKENS.value,
            seed=_SEED.value,
            draft=draft,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for prompt, text in zip(_PROMPT.value, generation.text, strict=True):
        print(prompt + text)
    if generation.drafted is not None:
        counts = f"{sum(generation.accepted)} of {sum(generation.drafted)}"
        print(f"drafted tokens accepted: {counts}", file=sys.stderr)


if __name__ == "__main__":
    app.run(main)
