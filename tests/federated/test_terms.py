import torch

from vestige.federated.terms import Terms


def test_terms_add_up_and_count_labels():
    terms = Terms(3, "cpu")
    weight = torch.tensor(2.0, requires_grad=True)
    total = terms.add(torch.tensor([0, 2, 2]), {"one": weight * 3, "other": weight**2})
    assert total.item() == 10
    total.backward()
    assert weight.grad.item() == 3 + 4
    terms.add(torch.tensor([1]), {"one": torch.tensor(4.0)})
    assert terms.counts.tolist() == [1, 1, 2]
    assert terms.means() == {"one": 5.0, "other": 2.0}
