"""A recipe's tokenizer, model and adapter, made ready to train.

V: rows of the embedding, H: hidden size.
"""

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from truetune import demo
from truetune.data.templates import BUILTIN_TEMPLATES, template_text
from truetune.models import load
from truetune.models.attention import why_not_packable
from truetune.recipe import Recipe
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError

_REFUSED = (TypeError, ValueError, IndexError, ImportError, re.error)  # by PEFT


def model_path(recipe: Recipe) -> str:
    """What the recipe's `model` is called in files: a Hub name, or a directory's absolute path."""
    path = demo.resolve_model(recipe.model)
    return os.path.abspath(path) if os.path.isdir(path) else path


def model_precision(recipe: Recipe) -> str:
    """The recipe's `precision`, where `auto` for full fine-tuning means fp32 master weights."""
    return "fp32" if recipe.method == "full" and recipe.precision == "auto" else recipe.precision


def hub_arguments(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.revision, "trust_remote_code": recipe.training.get("trust_remote_code", False)}


def load_tokenizer(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer with the recipe's chat template, and the ids of the tokens that the template needed and it lacked.

    An adapter to go on training brings its own tokenizer. Raises `ModelError` where there is none, `DataError` for a
    template that cannot be read, and `TrainError` for new tokens beside an adapter that cannot learn them.
    """
    path = model_path(recipe)
    if recipe.adapter is not None and (Path(recipe.adapter) / "tokenizer_config.json").is_file():
        path = recipe.adapter
    tokenizer = load.load_tokenizer(path, **hub_arguments(recipe))
    name, own = recipe.chat_template, tokenizer.chat_template
    if name is None:
        return tokenizer, []
    if isinstance(own, dict) and name in own:
        tokenizer.chat_template = own[name]
        return tokenizer, []
    tokenizer.chat_template = template_text(name)
    builtin = BUILTIN_TEMPLATES.get(name)
    if builtin is None:
        return tokenizer, []
    before = len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in builtin.special_tokens])
    if builtin.stop_token is not None:
        tokenizer.eos_token = builtin.stop_token
    new_ids = list(range(before, len(tokenizer)))
    if new_ids and recipe.adapter is not None:
        raise TrainError(
            f"chat_template {name} needs {len(new_ids)} special tokens that the adapter {recipe.adapter} was not made "
            "with: remove chat_template, or start a new adapter."
        )
    return tokenizer, new_ids


def without_weights(config: PreTrainedConfig, recipe: Recipe) -> Any:
    """The recipe's model on the meta device, in the dtype that it would have, without an adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=recipe.training.get("trust_remote_code", False)
        )
    return model.to(load.DTYPES.get(model_precision(recipe), torch.bfloat16))


def check_architecture(model: PreTrainedModel, recipe: Recipe, args: SFTConfig) -> None:
    """Refuses a batch whose documents would see each other. `model` needs no weights. Raises `TrainError`."""
    reason = why_not_packable(model)
    alone = not recipe.packing and args.per_device_train_batch_size == args.per_device_eval_batch_size == 1
    if reason and not alone and "unpackable_model" not in recipe.allow:
        raise TrainError(
            f"documents of a batch would see each other, because {reason.rstrip('.')}: set packing: false and "
            "training.per_device_train_batch_size: 1, or accept it with allow: [unpackable_model]."
        )


def with_adapter(model: PreTrainedModel, recipe: Recipe) -> Any:
    """A model `without_weights` with the recipe's adapter as it will be trained, without its values.

    Raises `TrainError` where the adapter does not fit the model's layers.
    """
    if recipe.adapter is not None:
        try:
            config: Any = PeftConfig.from_pretrained(recipe.adapter)
            config.init_lora_weights = config.inference_mode = False
            return _trained_in_fp32(get_peft_model(model, config))
        except _REFUSED as error:
            raise _does_not_fit(recipe.adapter, error) from error
    if recipe.lora:
        return add_lora(model, replace(recipe, lora={**recipe.lora, "init_lora_weights": False}), [])
    return model


def fit_embeddings(model: Any, num_tokens: int, new_ids: Sequence[int]) -> None:
    """Grows input and output embeddings to `num_tokens` rows and starts the new tokens at the mean of the old rows.

    A model with spare rows keeps its size. The mean is the choice that changes the old tokens' probabilities least
    (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
    """
    embedding = model.get_input_embeddings()
    if num_tokens > embedding.weight.shape[0]:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if not new_ids:
        return
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights_VH = {id(module.weight): module.weight for module in modules if module is not None}
    first = min(new_ids)
    with torch.no_grad():
        for weight_VH in weights_VH.values():
            weight_VH[list(new_ids)] = weight_VH[:first].float().mean(0).to(weight_VH.dtype)


def check_adapter(recipe: Recipe) -> None:
    """Raises `TrainError` where the recipe's `adapter` is none of LoRA's, or was made on another model."""
    if recipe.adapter is None:
        return
    try:
        config = PeftConfig.from_pretrained(recipe.adapter)
    except (OSError, ValueError) as error:
        raise TrainError(f"no adapter can be loaded from {recipe.adapter}: {_one_line(error)}") from error
    if config.peft_type != "LORA":
        raise TrainError(f"the adapter {recipe.adapter} is {config.peft_type.value}: only LORA can be trained on.")
    if not _has_safetensors(recipe.adapter):
        raise TrainError(
            f"{recipe.adapter} has no adapter_model.safetensors, and pickled weights, which can run code, are not "
            "read: convert them to safetensors."
        )
    made_on, base = config.base_model_name_or_path, model_path(recipe)
    if made_on != base and "adapter_base" not in recipe.allow:
        raise TrainError(
            f"the adapter {recipe.adapter} was made on {made_on}, but the recipe's model is {base}: name that model, "
            "or, where they are the same weights, accept it with allow: [adapter_base]."
        )


def _has_safetensors(adapter: str) -> bool:
    """Of a directory, or on the Hub, where PEFT would take pickled weights instead."""
    if os.path.isdir(adapter):
        return (Path(adapter) / SAFETENSORS_WEIGHTS_NAME).is_file()
    try:
        hf_hub_download(adapter, SAFETENSORS_WEIGHTS_NAME)
    except EntryNotFoundError:
        return False
    except OSError as error:
        raise TrainError(f"no adapter can be loaded from {adapter}: {_one_line(error)}") from error
    return True


def load_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """`model` with the adapter in `path`, to go on training, in fp32. Raises `TrainError` where it does not fit."""
    try:
        adapted = PeftModel.from_pretrained(model, path, is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except (*_REFUSED, RuntimeError) as error:  # of tensors of other sizes
        raise _does_not_fit(path, error) from error
    return _trained_in_fp32(adapted)


def _does_not_fit(path: str, error: Exception) -> TrainError:
    return TrainError(f"the adapter {path} does not fit the recipe's model: {_one_line(error)}")


def add_lora(model: PreTrainedModel, recipe: Recipe, new_ids: Sequence[int]) -> PeftModel:
    """`model` with the recipe's LoRA adapter; the embedding rows of `new_ids` are trained and saved with it.

    Adapter parameters are fp32. Raises `TrainError` where PEFT refuses.
    """
    try:
        config = LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
        if new_ids:
            config.trainable_token_indices = _with_new_rows(model, config, new_ids)
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        adapted = get_peft_model(model, config, revision=None if recipe.revision == "main" else recipe.revision)
    except _REFUSED as error:
        raise TrainError(f"PEFT refuses the recipe's lora: {_one_line(error)}") from error
    for field in ("target_modules", "modules_to_save", "target_parameters"):
        asked = recipe.lora.get(field)
        for part in asked if isinstance(asked, list) else ():
            if not any(name == part or name.endswith(f".{part}") for name in names):  # PEFT leaves it out in silence
                raise TrainError(f"lora.{field} names {part}, which the model does not have: correct or remove it.")
    return _trained_in_fp32(adapted)


def _trained_in_fp32(adapted: PeftModel) -> PeftModel:
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if getattr(adapted.active_peft_config, "trainable_token_indices", None):
        # PEFT would save resized embeddings whole, where the trained rows are all that is not in the base model.
        vars(adapted)["save_pretrained"] = functools.partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _with_new_rows(model: PreTrainedModel, config: LoraConfig, new_ids: Sequence[int]) -> dict[str, list[int]]:
    """`trainable_token_indices` for the new rows of input embedding and head, beside what the recipe named itself.

    A module that the recipe trains whole already (`modules_to_save`) is left out, as PEFT asks for.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (names[id(m)] for m in (model.get_input_embeddings(), model.get_output_embeddings()))
    asked = config.trainable_token_indices or {}
    asked = asked if isinstance(asked, dict) else {embedding: asked}
    whole = config.modules_to_save or []
    rows = {}
    for module in (embedding, head):
        if not any(module.endswith(name) for name in whole):
            named = [i for name, ids in asked.items() if module.endswith(name) for i in ids]
            rows[module] = sorted({*named, *new_ids})
    others = {name: ids for name, ids in asked.items() if not any(module.endswith(name) for module in rows)}
    return rows | others


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
