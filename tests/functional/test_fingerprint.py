import torch

from functional.fingerprint import weights_sha256


def test_equal_weights_have_one_hash_whatever_the_order_of_their_names():
    a, b = torch.arange(4.0), torch.ones(2, 3)
    assert weights_sha256({"a": a, "b": b}) == weights_sha256({"b": b.clone(), "a": a.clone()})


def test_a_changed_value_name_shape_or_type_changes_the_hash():
    base = {"a": torch.zeros(4)}
    others = [{"a": torch.tensor([0.0, 0, 0, 1e-7])}, {"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)},
              {"a": torch.zeros(4, dtype=torch.int32)}]  # fmt: skip
    assert weights_sha256(base) not in {weights_sha256(other) for other in others}


def test_a_module_is_hashed_by_its_state():
    layer = torch.nn.Linear(2, 2)
    assert weights_sha256(layer) == weights_sha256(layer.state_dict())
