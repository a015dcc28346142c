"""A cache with room holds the keys and values of the one that grows, in memory that each layer takes once."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from esfast.bench.architectures import tiny_model
from esfast.rollout.cache import LayerWithRoom, Room, cache_with_room
from esfast.tasks import embedded

TOKENIZER = embedded.make_tokenizer()


def test_the_same_keys_and_values(same_bits):
    """Also with values of another width, and after rows have left."""
    torch.manual_seed(0)
    room, grows, places = LayerWithRoom(Room(12)), DynamicLayer(), []
    for tokens, kept in ((5, None), (1, None), (1, [4, 1, 2]), (1, None), (3, [2]), (1, None)):
        rows = grows.keys.shape[0] if places else 6
        new = torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 8)
        assert same_bits(room.update(*new), grows.update(*new))
        assert room.get_seq_length() == grows.get_seq_length()
        places.append((room.keys.data_ptr(), room.values.data_ptr()))
        if kept:
            for layer in (room, grows):
                layer.reorder_cache(torch.tensor(kept))
    assert room.get_seq_length() == 12
    assert len(set(places)) == 1, "a token copies no others, and those that stay move within the memory"


@pytest.mark.parametrize(
    "name, has", [("qwen2", True), ("gpt2", True), ("gemma3_text", False), ("mamba", False), ("jamba", False)]
)
def test_only_of_models_whose_layers_hold_all_tokens(name, has):
    assert (cache_with_room(tiny_model(name, TOKENIZER), Room(9)) is not None) == has
