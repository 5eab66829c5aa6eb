"""What a publisher leaves beside a vocabulary: the names of special tokens, chat templates, code.

The files are carried byte for byte. What is read from them are facts; code is never run.
"""

import dataclasses
import fnmatch
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from ...errors import InputError

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
TIKTOKEN = "tiktoken.model"
CONFIG = "tokenizer_config.json"

_VOCABULARIES = (
    TOKENIZER_JSON, SENTENCEPIECE, TIKTOKEN, "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
_BESIDE = (CONFIG, _MAP, _ADDED, _TEMPLATE, "chat_template.json", "tokenization_*.py")

# The roles that `transformers` hands to chat templates, beside what they are called with.
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclasses.dataclass(frozen=True)
class Published:
    """The files beside a vocabulary, and what they say.

    Attributes:
      files: contents, by the path in the model's directory.
    """

    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @classmethod
    def beside(cls, directory: epath.PathLike, vocabularies: bool = True) -> "Published":
        """Reads the tokenizer's files of a directory; any others in it are left alone.

        Args:
          directory: of a published model, or what a tokenizer's `save` wrote.
          vocabularies: read vocabularies too, of which there may be several of the same tokenizer.
        """
        directory = epath.Path(directory)
        wanted = (*_BESIDE, *_VOCABULARIES) if vocabularies else _BESIDE
        files = {}
        for path in sorted(directory.iterdir(), key=lambda path: path.name):
            if any(fnmatch.fnmatchcase(path.name, name) for name in wanted) and path.is_file():
                files[path.name] = path.read_bytes()
        if (directory / _TEMPLATES).is_dir():
            for path in sorted((directory / _TEMPLATES).glob("*.jinja")):
                files[f"{_TEMPLATES}/{path.name}"] = path.read_bytes()
        return cls(files)

    def without(self, *names: str) -> "Published":
        """The same, these files left out."""
        return Published({n: content for n, content in self.files.items() if n not in names})

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Contents of `tokenizer_config.json`; empty if there is none."""
        return self._json(CONFIG)

    @functools.cached_property
    def names(self) -> dict[str, str | None]:
        """How special tokens are written, by role (`bos_token`, ...); None if said to be none."""
        found: dict[str, str | None] = {}
        # The older of the two files speaks where the newer one is silent.
        for source in (self._json(_MAP), self.config):
            for role in _ROLES:
                if role in source:
                    found[role] = _content(source[role])
        return found

    @functools.cached_property
    def added_tokens(self) -> dict[str, tuple[int, bool]]:
        """`(id, special)` by name, of tokens that are added to the vocabulary."""
        found = {name: (int(i), True) for name, i in self._json(_ADDED).items()}
        for i, token in self.config.get("added_tokens_decoder", {}).items():
            found[_content(token)] = (int(i), bool(token.get("special", True)))
        return found

    @functools.cached_property
    def chat_templates(self) -> dict[str, str]:
        """Sources by name. Files of their own hide those in `tokenizer_config.json`."""
        found = {"default": self._text(_TEMPLATE)} if _TEMPLATE in self.files else {}
        for path in self.files:
            if path.startswith(f"{_TEMPLATES}/"):
                found[path.partition("/")[2].removesuffix(".jinja")] = self._text(path)
        if found:
            return found
        match self.config.get("chat_template"):
            case None:
                return {}
            case str(template):
                return {"default": template}
            case [*templates] if all({"name", "template"} <= set(t) for t in templates):
                return {t["name"]: t["template"] for t in templates}
            case other:
                raise InputError(
                    f"{CONFIG}: chat_template={str(other)[:80]!r} must be a string or a list of "
                    "named templates"
                )

    @property
    def add_bos(self) -> bool | None:
        """`add_bos_token` of `tokenizer_config.json`; None if it does not say."""
        said = self.config.get("add_bos_token")
        return said if isinstance(said, bool) else None

    def special_ids(
        self, id_of: Callable[[str], int | None], otherwise: Mapping[str, int | None]
    ) -> dict[str, int | None]:
        """`{bos,eos,pad}_id` by the published names, and `otherwise` where there are none.

        Args:
          id_of: from a token's name to its id; None for a token that there is not.
          otherwise: `{bos,eos,pad}_id`.
        """
        found = dict(otherwise)
        for role in found:
            name = role.replace("_id", "_token")
            if name not in self.names:
                continue
            token = self.names[name]
            if token is None:
                found[role] = None
            elif (i := id_of(token)) is not None:
                found[role] = i
        return found

    def _text(self, name: str) -> str:
        try:
            return self.files[name].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name} is not UTF-8: {error}") from error

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        try:
            found = json.loads(self._text(name))
        except json.JSONDecodeError as error:
            raise InputError(f"{name} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{name} must hold a JSON object, not {type(found).__name__}")
        return found


def config_file(names: Mapping[str, str], **settings: Any) -> bytes:
    """A `tokenizer_config.json` for a `tokenizer.json` of ours, as `transformers` reads it."""
    config = {
        **names,
        **settings,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def roles(names: Mapping[str, str | None], ids: Iterable[tuple[str, str | None]]) -> dict[str, str]:
    """Published names, and where none are published those of the tokens that play the roles."""
    found = {role: name for role, name in ids if name is not None}
    found |= {role: name for role, name in names.items() if name is not None}
    return {role: name for role, name in found.items() if names.get(role, "") is not None}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
