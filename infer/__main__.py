"""``python -m jaxalope.infer --model=WORKDIR --prompt=TEXT``: continue text from the shell."""

from __future__ import annotations

import json
import pathlib
import sys

from absl import app, flags, logging

from ..errors import InputError, ReadError

_MODEL = flags.DEFINE_string("model", None, "A training workdir; required.")
_STEP = flags.DEFINE_integer("step", None, "The checkpoint's step; the newest if not given.")
_RUN = flags.DEFINE_multi_string(
    "run",
    [],
    "Change how the model runs: field=value, such as scan_layers=False (faster on a CPU or a GPU, "
    "slower to compile) or decode_implementation=pallas_gpu. May be repeated.",
)
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; repeat for a batch.")
_CHAT = flags.DEFINE_bool(
    "chat", False, "Each prompt is a message, which the model answers by its chat template."
)
_SYSTEM = flags.DEFINE_string("system", None, "The system message before each, with --chat.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Tokens each prompt may get; if not given, the model's own, or 256."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first prompt; each further one has the next.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.")
_POLICY = flags.DEFINE_string(
    "policy",
    None,
    "What tokens are drawn by, such as 'temperature=0.7,top_p=0.95' or 'greedy'; see "
    "docs/policies.md. If not given, the model's own settings, or temperature=1.",
)
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a continuation; may be repeated.")
_REMAINDER = flags.DEFINE_enum(
    "remainder",
    None,
    ["error", "left", "right", "reject"],
    "Of models that draw whole chunks, for a prompt that is no whole chunks: an error (if not "
    "given), pad tokens before or after it, or exact: draws until one begins with the rest.",
)
_STREAM = flags.DEFINE_bool("stream", False, "Print the text while it grows (one prompt).")
_REGEX = flags.DEFINE_string("regex", None, "A regular expression that the text must match.")
_JSON_SCHEMA = flags.DEFINE_string(
    "json_schema", None, "A file with the JSON schema that the text must satisfy."
)
_DRAFT = flags.DEFINE_string(
    "draft", None, "Decode speculatively, with drafts of this workdir's model; or 'lookup'."
)
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", 4, "Tokens drafted a step.")
_METHOD = flags.DEFINE_enum(
    "method",
    "sample",
    ["sample", "power", "smc", "lookahead", "beam", "denoise"],
    "How: sample from the policy; from p ** alpha by Metropolis-Hastings chains ('power'), by "
    "particles ('smc') or by look-ahead; search with beams; or, with a masked diffusion model, "
    "fill masks in ('denoise').",
)
_ALPHA = flags.DEFINE_float("alpha", 4.0, "Exponent of 'power', 'smc' and 'lookahead'.")
_BLOCK = flags.DEFINE_integer("block", None, "Tokens of a block of 'power'; 192 if not given.")
_MCMC_STEPS = flags.DEFINE_integer("mcmc_steps", 10, "Steps in every block of 'power'.")
_CUT = flags.DEFINE_string("cut", "padded", "Where 'power' cuts: padded, grid, live or entropy.")
_PARTICLES = flags.DEFINE_integer("particles", 64, "Of 'smc'.")
_BEAMS = flags.DEFINE_integer("beams", 4, "Of 'beam'.")
_GEN_LENGTH = flags.DEFINE_integer("gen_length", 128, "Tokens that 'denoise' fills in.")
_BLOCK_LENGTH = flags.DEFINE_integer(
    "block_length", None, "Tokens of a block of 'denoise'; one block if not given."
)
_STEPS = flags.DEFINE_integer(
    "steps", None, "Calls of the model for 'denoise'; one a token if not given."
)
_RULE = flags.DEFINE_string(
    "rule",
    None,
    "What a step of 'denoise' commits, such as 'threshold:0.9'; if not given, 'low_confidence', or "
    "'threshold' with an elastic cache. See docs/diffusion_sampling.md.",
)
_CACHE = flags.DEFINE_string(
    "cache",
    "none",
    "Of 'denoise': none, prefix, dual, block, or elastic, which may have settings: "
    "'elastic:gamma=0.8,window=32'; see docs/elastic_cache.md.",
)
_CFG_SCALE = flags.DEFINE_float("cfg_scale", 0.0, "Of 'denoise': guidance by the prompt.")
_LOGITS_EOS_INF = flags.DEFINE_bool(
    "logits_eos_inf", False, "'denoise' never draws the end-of-sequence token."
)
_CONFIDENCE_EOS_EOT_INF = flags.DEFINE_bool(
    "confidence_eos_eot_inf", False, "'denoise' commits stop tokens last."
)

# Flags that say something to these methods only.
_OF_SAMPLE = ("policy", "stop", "stream", "regex", "json_schema", "draft", "remainder")
_OF_METHOD = dict.fromkeys(("block", "mcmc_steps", "cut"), ("power",))
_OF_METHOD |= {"alpha": ("power", "smc", "lookahead")}
_OF_METHOD |= {"particles": ("smc",), "beams": ("beam",)}
_OF_METHOD |= dict.fromkeys(
    (
        "gen_length",
        "block_length",
        "steps",
        "rule",
        "cache",
        "cfg_scale",
        "logits_eos_inf",
        "confidence_eos_eot_inf",
    ),
    ("denoise",),
)


def main(argv: list[str]) -> None:
    """Print every prompt with its continuations."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; prompts are given by --prompt")
    logging.set_verbosity(logging.WARNING)  # Orbax reports every read.
    try:
        _check_flags()
        # After flag parsing, so that --help answers at once.
        from ..model import load

        model = load(_MODEL.value, step=_STEP.value, run=_ways())
        if _METHOD.value == "sample":
            _sample(model)
        elif _METHOD.value == "beam":
            _search(model)
        elif _METHOD.value == "denoise":
            _denoise(model)
        else:
            _power(model)
    except (InputError, ReadError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def _ways() -> dict[str, str]:
    """The changes of --run."""
    found = {}
    for setting in _RUN.value:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--run={setting}: write it as field=value")
        found[name.strip()] = text.strip()
    return found


def _check_flags() -> None:
    if _MODEL.value is None:
        raise InputError("--model is missing: the workdir of a training run")
    given = [name for name in _OF_SAMPLE if flags.FLAGS[name].present]
    if _METHOD.value in ("beam", "denoise") and given == ["policy"]:
        given = []
    if _METHOD.value != "sample" and given:
        raise InputError(f"--{given[0]} is for --method=sample, not {_METHOD.value}; leave it out")
    for name, methods in _OF_METHOD.items():
        if flags.FLAGS[name].present and _METHOD.value not in methods:
            raise InputError(
                f"--{name} is for --method={' or '.join(methods)}, not {_METHOD.value}; leave it "
                "out"
            )
    if flags.FLAGS["draft_tokens"].present and _DRAFT.value is None:
        raise InputError("--draft_tokens is for --draft; give that too")
    if _METHOD.value == "denoise" and _MAX_NEW_TOKENS.value is not None:
        raise InputError("--max_new_tokens is not for --method=denoise; give --gen_length")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise InputError("--system is for --chat; give that too")
    if _STREAM.value and len(_PROMPT.value) * _NUM_SAMPLES.value > 1:
        raise InputError("--stream prints one text; give one --prompt and one sample")


def _sample(model) -> None:
    from .defaults import stop_ids
    from .drafts import DraftModel, PromptLookup
    from .generate import generate, stream
    from .grammar import JsonSchema, Regex
    from .parse import parse_policy

    settings = {
        "max_new_tokens": _max_new_tokens(model),
        "seed": _SEED.value,
        "n": _NUM_SAMPLES.value,
        "stop": tuple(_STOP.value) or None,
        "remainder": _REMAINDER.value,
    }
    if _POLICY.value is not None:
        settings["policy"] = parse_policy(_POLICY.value, stop_ids(model))
    if _MAX_NEW_TOKENS.value is None and model.defaults.max_new_tokens is None:
        settings["max_length"] = model.defaults.max_length
    if _REGEX.value is not None and _JSON_SCHEMA.value is not None:
        raise InputError("--regex and --json_schema exclude each other; give one")
    if _REGEX.value is not None:
        settings["grammar"] = Regex(_REGEX.value)
    if _JSON_SCHEMA.value is not None:
        settings["grammar"] = JsonSchema(_read_schema(_JSON_SCHEMA.value))
    if _DRAFT.value == "lookup":
        settings["draft"] = PromptLookup(_DRAFT_TOKENS.value)
    elif _DRAFT.value is not None:
        from ..model import load

        settings["draft"] = DraftModel(load(_DRAFT.value), num_tokens=_DRAFT_TOKENS.value)

    if _STREAM.value:
        print("" if _CHAT.value else _PROMPT.value[0], end="", flush=True)
        for piece in stream(model, _prompts(model), **settings):
            print(piece.text, end="", flush=True)
        print()
        return
    generation = generate(model, _prompts(model), **settings)
    _print(generation.text)
    if generation.drafted is not None:
        counts = f"{sum(generation.accepted)} of {sum(generation.drafted)}"
        print(f"drafted tokens accepted: {counts}", file=sys.stderr)
    if generation.draws is not None:
        print(f"chunks drawn: {generation.draws}", file=sys.stderr)


def _power(model) -> None:
    import tqdm

    from .power import power_sample

    method = "mh" if _METHOD.value == "power" else _METHOD.value
    settings = {}
    bar = None
    if method == "mh":
        bar = tqdm.tqdm(unit="block", disable=None)

        def progress(done, total):
            bar.total = total
            bar.update(done - bar.n)

        settings = {
            "block": _BLOCK.value,
            "n_mcmc": _MCMC_STEPS.value,
            "cut": _CUT.value,
            "progress": progress,
        }
    if method == "smc":
        settings["num_particles"] = _PARTICLES.value
    samples = power_sample(
        model,
        _prompts(model),
        method=method,
        alpha=_ALPHA.value,
        t_max=_max_new_tokens(model),
        n=_NUM_SAMPLES.value,
        seed=_SEED.value,
        **settings,
    )
    if bar is not None:
        bar.close()
    _print(samples.text)
    report = {"tokens decoded": samples.tokens_decoded, "log p": samples.logprob.tolist()}
    if samples.acceptance is not None:
        report["acceptance of each block"] = samples.acceptance.tolist()
    if samples.effective_sample_size is not None:
        report["effective sample size"] = samples.effective_sample_size.tolist()
    for name, value in report.items():
        print(f"{name}: {value}", file=sys.stderr)


def _search(model) -> None:
    from .beam import beam_search
    from .defaults import stop_ids
    from .parse import parse_policy

    policy = None
    if flags.FLAGS["policy"].present:
        policy = parse_policy(_POLICY.value, stop_ids(model))
    found = beam_search(
        model,
        _prompts(model),
        _BEAMS.value,
        _max_new_tokens(model),
        n=_NUM_SAMPLES.value,
        policy=policy,
    )
    for prompt, texts, scores in zip(_PROMPT.value, found.text, found.scores, strict=True):
        for text in texts:
            print(text if _CHAT.value else prompt + text)
        print(f"scores: {scores}", file=sys.stderr)


def _denoise(model) -> None:
    from .defaults import stop_ids
    from .denoise import denoise, parse_cache, parse_rule
    from .parse import parse_policy

    policy = None
    if _POLICY.value is not None:
        policy = parse_policy(_POLICY.value, stop_ids(model))
    filled = denoise(
        model,
        _prompts(model),
        gen_length=_GEN_LENGTH.value,
        block_length=_BLOCK_LENGTH.value,
        steps=_STEPS.value,
        rule=None if _RULE.value is None else parse_rule(_RULE.value),
        policy=policy,
        cfg_scale=_CFG_SCALE.value,
        cache=parse_cache(_CACHE.value),
        seed=_SEED.value,
        n=_NUM_SAMPLES.value,
        logits_eos_inf=_LOGITS_EOS_INF.value,
        confidence_eos_eot_inf=_CONFIDENCE_EOS_EOT_INF.value,
    )
    _print(filled.text)
    print(f"calls of the model: {filled.nfe}", file=sys.stderr)
    if filled.update_frequency is not None:
        print(f"layers computed in full: {filled.update_frequency}", file=sys.stderr)


def _print(text: list[str]) -> None:
    for i, continuation in enumerate(text):
        prompt = "" if _CHAT.value else _PROMPT.value[i // _NUM_SAMPLES.value]
        print(prompt + continuation)


def _prompts(model):
    """The prompts; with ``--chat``, the token ids of conversations that end with each."""
    if not _CHAT.value:
        return _PROMPT.value
    from .chat import chat_prompts

    before = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
    chats = [[*before, {"role": "user", "content": prompt}] for prompt in _PROMPT.value]
    return chat_prompts(model, chats)


def _max_new_tokens(model) -> int:
    given = _MAX_NEW_TOKENS.value
    return (model.defaults.max_new_tokens or 256) if given is None else given


def _read_schema(path: str):
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--json_schema={path}: {error}") from error


if __name__ == "__main__":
    app.run(main)
