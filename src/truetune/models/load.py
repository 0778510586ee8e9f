"""A checkpoint -> a causal language model with our attention, its weights as bf16, fp16, fp32, NF4 or FP8.

What can be refused from the configuration alone is refused by `check_model`, before any weight is read.
"""

import importlib.util
import logging
import os
import textwrap
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from truetune.models.attention import use_varlen_attention, why_not_packable
from truetune.models.errors import ModelError
from truetune.models.fp8 import replace_linears_with_fp8
from truetune.ops.fp8 import why_not_fp8

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("auto", *DTYPES, "nf4", "fp8")
_HUB_ARGUMENTS = ("revision", "trust_remote_code", "subfolder", "token", "cache_dir", "local_files_only")


def load_model(name_or_path: str | os.PathLike, precision: str = "auto", **from_pretrained_kwargs) -> PreTrainedModel:
    """A Hub name or a directory -> a causal language model on this process's GPU, or on the CPU where there is none.

    `precision` is the weights': "auto" (bf16 on a GPU, fp32 on a CPU, a quantized checkpoint as it is), "bf16", "fp16",
    "fp32", "nf4" (4-bit NormalFloat with double quantization; Dettmers et al., "QLoRA", 2023), or "fp8" (frozen E4M3
    for GEMMs of twice the rate, in as much memory as bf16; what cannot be FP8 is logged and in `model.fp8_report`;
    `models/fp8.py`). Attention is ours unless `attn_implementation` is given or `why_not_packable` has a reason, which
    is logged. Other keyword arguments go to `from_pretrained`. Raises `ModelError` for what cannot be loaded.
    """
    kwargs = {"trust_remote_code": False, "use_safetensors": True, **from_pretrained_kwargs}
    hub_kwargs = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
    config = check_model(name_or_path, precision=precision, **hub_kwargs)
    if kwargs["use_safetensors"]:
        _refuse_pickled_weights(Path(name_or_path, kwargs.get("subfolder") or ""))
    weights = _weights(config, precision)
    if clash := sorted(({"torch_dtype"} | weights.keys()) & kwargs.keys()):
        raise ModelError(f"{' and '.join(clash)} cannot be given, because precision={precision!r} decides it.")
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
        kwargs.setdefault("device_map", {"": torch.device("cuda", index)})
    model = _from_pretrained(name_or_path, {**kwargs, **weights})
    if precision == "fp8":
        report = replace_linears_with_fp8(model)
        if report.left:
            logger.warning("precision fp8 has %s (%s).", report.in_effect, "; ".join(report.reasons))
    keep_4bit_layout(model)
    if "attn_implementation" not in kwargs:
        if reason := why_not_packable(model):
            logger.warning("The model keeps its own attention: %s", reason)
        else:
            use_varlen_attention(model)
    return model


def keep_4bit_layout(model: torch.nn.Module) -> None:
    """Keeps 4-bit weights as they were quantized, where bitsandbytes would repack them for inference on a CPU.

    On CPUs with AVX512-BF16 its linears repack themselves in place at the first call in eval mode, for good: scales
    are rounded to bf16, shapes that are no multiples of 32 by 64 crash, and the kernel has no gradient, so that one
    evaluation would end the training of everything below in silence. Raises `ModelError` if that has happened.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    f"the 4-bit weights of {name} were repacked for inference by a call in eval mode, and have no "
                    "gradient any more: load the model anew, or with truetune.models.load.load_model."
                )
            module.support_avx512bf16_for_cpu = False


def check_model(
    name_or_path: str | os.PathLike, revision: str | None = None, *, precision: str = "auto", **hub_kwargs
) -> PreTrainedConfig:
    """The checkpoint's configuration, if `load_model` would take it; reads no weights.

    `hub_kwargs`: `trust_remote_code`, `subfolder`, `token`... as for `from_pretrained`. Raises `ModelError`.
    """
    if precision == "fp8" and (reason := why_not_fp8("cuda" if torch.cuda.is_available() else "cpu")):
        raise ModelError(reason)
    if precision not in PRECISIONS:
        raise ModelError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}.")
    config = _load_config(name_or_path, {"trust_remote_code": False, "revision": revision, **hub_kwargs})
    _refuse_other_models(name_or_path, config)
    _refuse_other_quantization(name_or_path, config, precision)
    return config


def load_tokenizer(name_or_path: str | os.PathLike, revision: str | None = None, **hub_kwargs) -> Any:
    """The checkpoint's tokenizer. `hub_kwargs` as for `check_model`. Raises `ModelError` where there is none."""
    _check_path(Path(name_or_path, hub_kwargs.get("subfolder") or ""), "tokenizer_config.json")
    hub_kwargs = {"trust_remote_code": False, "revision": revision, **hub_kwargs}
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **hub_kwargs)
    except Exception as error:  # tokenizers are code of their own, and fail in their own ways
        raise _model_error(name_or_path, "tokenizer", error) from error


# -- the configuration -------------------------------------------------------------------------------------------------


def _load_config(name_or_path: str | os.PathLike, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    _check_path(Path(name_or_path, hub_kwargs.get("subfolder") or ""), "config.json")
    try:
        return AutoConfig.from_pretrained(name_or_path, **hub_kwargs)
    except Exception as error:  # configurations are code of their own, and fail in their own ways
        if "does not recognize this architecture" in str(error):
            raise ModelError(
                f"{name_or_path} has a model type that Transformers {transformers.__version__} does not know: "
                "update Transformers, or take another model."
            ) from error
        raise _model_error(name_or_path, "config.json", error) from error


def _check_path(path: Path, file_name: str) -> None:
    """Says what is wrong with a directory; a name of the form that the Hub uses passes."""
    if path.is_file():
        raise ModelError(f"{path} is a file: give the directory that it is in.")
    if path.is_dir() and not (path / file_name).is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{path} is an adapter: give its base model as the model, and it as the adapter.")
        raise ModelError(f"{path} has no {file_name}: give a directory written by save_pretrained.")
    if not path.exists() and (path.is_absolute() or path.parts[:1] == ("..",) or len(path.parts) > 2):
        raise ModelError(f"{path} does not exist: give a directory, or a Hub name like Qwen/Qwen3-8B.")


def _refuse_other_models(name_or_path: str | os.PathLike, config: PreTrainedConfig) -> None:
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{name_or_path} is a {config.model_type} model, which is no causal language model.")
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for saved in config.architectures or []:
        # A name that Transformers does not have may be an old spelling of the right one.
        if saved not in causal and hasattr(transformers, saved):
            raise ModelError(f"{name_or_path} was saved as {saved}, which is no causal language model with its head.")


def _refuse_other_quantization(name_or_path: str | os.PathLike, config: PreTrainedConfig, precision: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if (method := quantization.get("quant_method")) != "bitsandbytes":
        raise ModelError(f"{name_or_path} is quantized by {method}, which cannot be trained: give a plain checkpoint.")
    bits = 4 if quantization.get("load_in_4bit") else 8
    if precision != "auto" and (precision, bits) != ("nf4", 4):
        raise ModelError(
            f"{name_or_path} is already quantized to {bits} bits, and cannot be had as {precision}: "
            "use precision auto, or give a plain checkpoint."
        )


# -- the weights -------------------------------------------------------------------------------------------------------


def _weights(config: PreTrainedConfig, precision: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that give weights in this precision."""
    if getattr(config, "quantization_config", None) is not None:
        return {"dtype": "auto"}
    default = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if precision != "nf4":
        return {"dtype": DTYPES.get(precision, default)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("precision nf4 needs bitsandbytes: pip install bitsandbytes.")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=default,
    )
    return {"dtype": default, "quantization_config": quantization}


def _refuse_pickled_weights(path: Path) -> None:
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")):
        raise ModelError(
            f"{path} has only pickled weights, which can run code when they are read: "
            "convert them to safetensors, or pass use_safetensors=False (in a recipe "
            "training.model_init_kwargs: {use_safetensors: false})."
        )
    raise ModelError(f"{path} has no weights (*.safetensors): give a whole checkpoint.")


def _from_pretrained(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise _model_error(name_or_path, "weights", error) from error
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"{name_or_path} lacks {len(missing)} of the model's tensors, {missing[0]} first, which would start at "
            "random: give a whole checkpoint of a causal language model."
        )
    return model


def _model_error(name_or_path: str | os.PathLike, part: str, error: Exception) -> ModelError:
    """The one sentence for what the Hub or Transformers raised."""
    origin = error.__cause__ or error.__context__ or error
    if "trust_remote_code" in str(error):
        message = (
            f"{name_or_path} brings code of its own: allow it with trust_remote_code=True (in a recipe "
            "training.trust_remote_code: true)."
        )
    elif isinstance(origin, GatedRepoError):
        message = f"{name_or_path} is gated on the Hub: accept its terms there, and log in with `hf auth login`."
    elif isinstance(origin, RevisionNotFoundError):
        message = f"{name_or_path} has no such revision on the Hub: see its branches and tags there."
    elif isinstance(origin, LocalEntryNotFoundError):
        message = f"{name_or_path} is neither a directory nor in the Hub's cache, and the Hub cannot be reached."
    elif isinstance(origin, RepositoryNotFoundError | HFValidationError):
        message = f"{name_or_path} is neither a directory nor on the Hub (a private model needs `hf auth login`)."
    else:
        cause = textwrap.shorten(str(error) or type(error).__name__, 300).rstrip(".")
        message = f"the {part} of {name_or_path} cannot be used ({cause}): mend it, or give another checkpoint."
    return ModelError(message)
