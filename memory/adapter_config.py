"""``adapter_config.json``: what PEFT writes into it, checked, and reduced to what matters at inference."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from loraplex.memory.adapter_errors import AdapterFileError, shown
from loraplex.memory.tensor_file import read_regular_file

CONFIG_NAME = "adapter_config.json"
CONFIG_MAX_BYTES = 4 << 20
MAX_RANK = 65_536
MAX_INVOCATION_TOKENS = 1024

RawConfig = Mapping[str, object]

_REFUSED = {
    "modules_to_save": "fully trained modules are not served yet; train LoRA on them and leave this empty",
    "trainable_token_indices": "trained token embeddings are not served yet",
    "lora_bias": "a bias on lora_B is not served yet",
    "layer_replication": "replicated layers are not served",
    "target_parameters": "LoRA on parameters is not served; target the modules that hold them",
    "megatron_config": "Megatron layers are not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA is not served",
}
_IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "velora_config",
    }
)
"""Of no effect at inference: what chose the modules, losses, initialisation, training."""
_EFFECTIVE = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "alora_invocation_tokens",
        "bias",
    }
)

_PATH_LENGTH = 45.0
_MAX_MATCH_STEPS = 2e6
_MAX_STEPS_IN_ALL = 2e8

_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
_SUBTRACTED_INITS = ("pissa", "olora", "corda", "lora_ga")


def read_config(folder: Path) -> RawConfig:
    """The configuration of an adapter folder, as it stands.

    Errors: AdapterFileError if the file is absent, larger than 4 MiB, no JSON, or no object.
    """
    return parse_config(read_config_file(folder))


def read_config_file(folder: Path) -> bytes:
    """The bytes of the configuration of an adapter folder.

    Errors: AdapterFileError if the file is absent or larger than 4 MiB.
    """
    return read_regular_file(folder, CONFIG_NAME, CONFIG_MAX_BYTES)


def parse_config(data: bytes) -> RawConfig:
    """A configuration from its bytes.

    Errors: AdapterFileError if they are no JSON, or no object.
    """
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{CONFIG_NAME}: not valid JSON: {shown(str(error))}", key=CONFIG_NAME) from error
    if not isinstance(raw, dict):
        raise AdapterFileError(f"{CONFIG_NAME}: expected a JSON object, got {shown(raw)}", key=CONFIG_NAME)
    return raw


def text_or_none(raw: RawConfig, key: str) -> str | None:
    """An optional string of a configuration."""
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong_value(key, value, "a string or null")
    return value


@dataclass(frozen=True, slots=True)
class ModulePattern:
    """A key of ``rank_pattern`` or ``alpha_pattern`` with its value.

    It fits a module whose dotted path, or the end of it after a dot, matches the key as a regular expression, as in
    PEFT.
    """

    key: str
    value: float
    regex: re.Pattern[str]
    ending: str
    """What a fitting path must end with; spares most of the regular expressions where there is a key per module."""

    def fits(self, module: str) -> bool:
        return module.endswith(self.ending) and self.regex.match(module) is not None


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How the low-rank pairs of a PEFT LoRA are to be computed.

    Attributes:
        rank: of modules that no key of ``rank_pattern`` fits.
        alpha: likewise for ``alpha_pattern``.
        use_rslora: whether the scale is alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023).
        use_dora: whether outputs are scaled by learned magnitudes (https://arxiv.org/abs/2402.09353).
        invocation: tokens from which on an activated LoRA acts; empty for one that always does.
        rank_pattern, alpha_pattern: in the order of the file; the first that fits counts.
        target_modules: where it is a list and nothing is excluded, else empty. The tensors decide what is adapted.
        base_model: name or path of the model it was trained on.
        warnings: settings that were met and have no effect here.
    """

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    invocation: tuple[int, ...]
    rank_pattern: tuple[ModulePattern, ...]
    alpha_pattern: tuple[ModulePattern, ...]
    target_modules: tuple[str, ...]
    base_model: str | None
    warnings: tuple[str, ...]

    @classmethod
    def parse(cls, raw: RawConfig, *, also_known: Collection[str] = ()) -> LoraConfig:
        """Check the part of a configuration that all families share.

        Args:
            raw: as it stands in the file.
            also_known: keys that the family knows beyond these.

        Errors: AdapterFileError naming the key that has a wrong type or value, or asks for what is not served.
        """
        _refuse_unserved(raw)
        _check_init(raw.get("init_lora_weights"))
        _check_selectors(raw)
        return cls(
            rank=_rank("r", raw.get("r", 8)),
            alpha=read_number("lora_alpha", raw.get("lora_alpha", 8)),
            use_rslora=read_flag(raw, "use_rslora"),
            use_dora=read_flag(raw, "use_dora"),
            invocation=_invocation(raw),
            rank_pattern=_patterns(raw, "rank_pattern", _rank),
            alpha_pattern=_patterns(raw, "alpha_pattern", read_number),
            target_modules=() if raw.get("exclude_modules") else _listed(raw.get("target_modules")),
            base_model=text_or_none(raw, "base_model_name_or_path"),
            warnings=_without_effect(raw, also_known),
        )

    def rank_of(self, module: str, expert: int | None = None) -> int:
        """Configured rank of a module, by its dotted path in the base model.

        An expert's pair is also found under that path with ``.experts.E`` behind it.
        """
        return int(_first_fit(self.rank_pattern, module, expert, self.rank))

    def scale_of(self, module: str, expert: int | None = None) -> float:
        """Factor on ``b @ a`` of a module, or of an expert's pair on it."""
        rank = self.rank_of(module, expert)
        alpha = _first_fit(self.alpha_pattern, module, expert, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def check_cost(self, num_modules: int) -> None:
        """Refuse patterns that would take long to match with so many modules: a mixture has one for each expert."""
        for key, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if sum(_match_steps(pattern.key) for pattern in patterns) * num_modules > _MAX_STEPS_IN_ALL:
                raise _too_costly(key)

    @property
    def max_rank(self) -> int:
        return int(max([self.rank, *(pattern.value for pattern in self.rank_pattern)]))

    @property
    def settings(self) -> dict[str, object]:
        """What matters at inference, ready for JSON: see ``adapter_identity``."""
        variants: dict[str, object] = {"use_dora": True} if self.use_dora else {}
        if self.invocation:
            variants["alora_invocation_tokens"] = list(self.invocation)
        return {
            **variants,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": [[pattern.key, pattern.value] for pattern in self.rank_pattern],
            "alpha_pattern": [[pattern.key, pattern.value] for pattern in self.alpha_pattern],
        }


def _first_fit(patterns: tuple[ModulePattern, ...], module: str, expert: int | None, default: float) -> float:
    paths = (module,) if expert is None else (module, f"{module}.experts.{expert}")
    return next((pattern.value for pattern in patterns if any(map(pattern.fits, paths))), default)


def wrong_value(key: str, value: object, expected: str) -> AdapterFileError:
    """The error for a key of the configuration, and what it may be."""
    return AdapterFileError(f"{key} in {CONFIG_NAME}: expected {expected}, got {shown(value)}", key=key)


def _refuse_unserved(raw: RawConfig) -> None:
    for key, sentence in _REFUSED.items():
        if raw.get(key):
            raise AdapterFileError(f"{key} in {CONFIG_NAME}: {sentence}", key=key)
    if raw.get("bias", "none") not in ("none", None):
        raise AdapterFileError(f'bias in {CONFIG_NAME}: trained biases are not served yet; expected "none"', key="bias")
    for key, value in raw.items():
        # PEFT switches its variants on by such flags; one that is unknown here may change the arithmetic.
        if key.startswith("use_") and value and key not in _EFFECTIVE:
            raise AdapterFileError(f"{shown(key)} in {CONFIG_NAME}: this variant is not served", key=key)


def _check_init(init: object) -> None:
    """Refuse initialisations that changed the base's weights: their pairs do not fit the unchanged base."""
    key = "init_lora_weights"
    if init is None or isinstance(init, bool):
        return
    if not isinstance(init, str):
        raise wrong_value(key, init, "true, false or a string")
    name = init.lower()
    if name == "loftq":
        raise AdapterFileError(
            f"{key} in {CONFIG_NAME}: a LoftQ adapter fits only the base that LoftQ quantised. Merge it with PEFT's "
            "merge_and_unload() and serve the result as a base, or serve the quantised base and set this key to true",
            key=key,
        )
    if name.startswith(_SUBTRACTED_INITS):
        raise AdapterFileError(
            f"{key} in {CONFIG_NAME}: {shown(init)} changed the base's weights. Convert the adapter to plain LoRA: "
            "loraplex adapters convert PATH OUT --base MODEL (or --initial FOLDER, the adapter as it was initialised)",
            key=key,
        )
    if name not in _PLAIN_INITS:
        raise wrong_value(key, init, f"true, false or one of {', '.join(sorted(_PLAIN_INITS))}")


def _check_selectors(raw: RawConfig) -> None:
    """Types of the keys that chose the modules in training. The tensors say the same, so the values do not matter."""
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = raw.get(key)
        chosen = _is_list_of(value, str) or (key == "target_modules" and _is_choice(value))
        if not (value is None or isinstance(value, str) or chosen):
            raise wrong_value(key, value, "a string, a list of strings or null")
    layers = raw.get("layers_to_transform")
    if not (layers is None or _is_a(layers, int) or _is_list_of(layers, int)):
        raise wrong_value("layers_to_transform", layers, "an integer, a list of integers or null")
    read_flag(raw, "fan_in_fan_out")


def _is_a(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(_is_a(item, kind) for item in value)


def _is_choice(value: object) -> bool:
    """Whether ``target_modules`` says yes or no to each name, as early MixLoRA files do."""
    return isinstance(value, dict) and bool(value) and all(isinstance(chosen, bool) for chosen in value.values())


def _listed(value: object) -> tuple[str, ...]:
    if isinstance(value, dict):
        return tuple(name for name, chosen in value.items() if chosen)
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def _invocation(raw: RawConfig) -> tuple[int, ...]:
    key = "alora_invocation_tokens"
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_INVOCATION_TOKENS or not _is_list_of(value, int):
        raise wrong_value(key, value, f"null or a list of 1 to {MAX_INVOCATION_TOKENS} token ids")
    if min(value) < 0:
        raise wrong_value(key, min(value), "token ids from 0 on")
    return tuple(value)


def read_flag(raw: RawConfig, key: str) -> bool:
    """An optional true or false of a configuration; absent is false."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong_value(key, value, "true or false")
    return bool(value)


def read_integer(key: str, value: object, low: int, high: int) -> int:
    """An integer of a configuration within bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise wrong_value(key, value, f"an integer from {low} to {high}")
    return value


def _rank(key: str, value: object) -> int:
    return read_integer(key, value, 1, MAX_RANK)


def read_number(key: str, value: object) -> float:
    """A finite number of a configuration."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30:
        return float(value)
    raise wrong_value(key, value, "a finite number")


def _patterns(raw: RawConfig, key: str, check: Callable[[str, object], float]) -> tuple[ModulePattern, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise wrong_value(key, value, "an object of module patterns")
    if sum(map(_match_steps, value)) > _MAX_MATCH_STEPS:
        raise _too_costly(key)
    return tuple(_compile(key, pattern, check(f"{key}[{shown(pattern)}]", number)) for pattern, number in value.items())


def _too_costly(key: str) -> AdapterFileError:
    return AdapterFileError(
        f"{key} in {CONFIG_NAME}: its patterns are too costly to match; use fewer wildcards and alternatives, and "
        "repeat no group",
        key=key,
    )


def _compile(key: str, pattern: str, value: float) -> ModulePattern:
    try:
        regex = re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, Warning, OverflowError, RecursionError) as error:
        raise AdapterFileError(
            f"{key} in {CONFIG_NAME}: {shown(pattern)} is no regular expression: {error}", key=key
        ) from error
    # In a key of names and dots every character but the dot stands for itself.
    ending = pattern.rsplit(".", 1)[-1] if re.fullmatch(r"[\w.]*", pattern) else ""
    return ModulePattern(pattern, value, regex, ending)


def _match_steps(pattern: str) -> float:
    """About how many steps the worst path makes a pattern take: adapters come from strangers, and ``re`` backtracks
    while it holds the interpreter."""
    wildcards = len(re.findall(r"[*+?{]", pattern))
    groups = max(pattern.count("("), 1)
    if wildcards > 16 or groups > 16 or re.search(r"\)[*+{]", pattern):
        return math.inf
    places = _PATH_LENGTH**wildcards / math.factorial(wildcards)
    return places * (pattern.count("|") / groups + 1) ** groups


def _without_effect(raw: RawConfig, also_known: Collection[str]) -> tuple[str, ...]:
    known = _IGNORED | _EFFECTIVE | _REFUSED.keys() | set(also_known)
    strange = sorted(key for key, value in raw.items() if value and key not in known)
    return tuple(f"{shown(key)} in {CONFIG_NAME} is not known to this server and has no effect" for key in strange)
