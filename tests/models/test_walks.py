"""What is remembered of a model's modules is what PyTorch would find."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from small_models import make, with_lora
from torch import nn

from truetune.models.fuse import fuse, unfuse


@pytest.fixture
def model():
    peft = with_lora(make("qwen3"))
    fuse(peft)
    peft.train()  # the first walk, which is remembered
    return peft


def add_adapter(peft):
    peft.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))


def delete_adapter(peft):
    peft.delete_adapter("default")


def replace_child(peft):
    mlp = peft.get_base_model().model.layers[0].mlp
    mlp.down_proj = nn.Linear(mlp.down_proj.in_features, mlp.down_proj.out_features)


def child_of_a_leaf(peft):
    peft.get_base_model().model.embed_tokens.scale = nn.Linear(1, 1)


def remove_child(peft):
    del peft.get_base_model().model.norm


def share(peft):
    layers = peft.get_base_model().model.layers
    layers[1].mlp = layers[0].mlp


def delete_nothing_and_append(peft):
    layers = peft.get_base_model().model.layers
    del layers[len(layers) :]  # PyTorch gives the list another dict, and leaves the old one as it is
    layers.append(copy.deepcopy(layers[0]).eval())


def move_to_the_sibling(peft):
    mlp = peft.get_base_model().model.layers[0].mlp
    mlp.first, mlp.second = nn.Sequential(nn.Linear(1, 1), nn.Linear(2, 2)), nn.Sequential(nn.Linear(3, 3))
    mlp.second.own = nn.Parameter(torch.zeros(9))
    peft.train()
    mlp.second._modules = {"moved": mlp.first._modules.pop("1"), **mlp.second._modules}


def scripted(peft):
    peft.get_base_model().model.scripted = torch.jit.script(nn.Sequential(nn.Linear(1, 1)))


def insert_layer(peft):
    layers = peft.get_base_model().model.layers
    layers.insert(0, copy.deepcopy(layers[0]))


def cut_layers(peft):
    del peft.get_base_model().model.layers[0]


@pytest.mark.parametrize(
    "change",
    [
        add_adapter,
        delete_adapter,
        replace_child,
        child_of_a_leaf,
        remove_child,
        share,
        insert_layer,
        cut_layers,
        delete_nothing_and_append,
        move_to_the_sibling,
        scripted,
    ],
    ids=lambda change: change.__name__,
)
def test_changes_are_seen(model, change):
    change(model)
    by_class = list(type(model).parameters(model))
    assert list(map(id, model.parameters())) == list(map(id, by_class))
    for module in list(nn.Module.modules(model)):
        module.training = False
        assert all(part.training for part in nn.Module.modules(model.train()))
    for parameter in by_class:
        parameter.grad = torch.zeros_like(parameter)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in by_class)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_a_copy_has_its_own_modules(model, copied):
    other = copied(model)
    other.eval()
    assert not any(module.training for module in other.modules()) and all(module.training for module in model.modules())
    assert not {id(x) for x in other.parameters()} & {id(x) for x in model.parameters()}


def test_nothing_of_it_is_left_behind(model):
    unfuse(model)
    fuse(plain := with_lora(make("qwen3")))
    unfuse(plain)
    assert set(vars(model)) == set(vars(plain))
