import torch
from torch import nn

from vestige.models.ensembles import MemberEnsemble


def network(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def test_members_that_were_filled_in_sum_their_logits():
    ensemble, inputs = MemberEnsemble(network(0), 3), torch.randn(5, 4)
    torch.testing.assert_close(ensemble(inputs), 3 * network(0)(inputs))
    ensemble.fill(2, network(2).state_dict())
    torch.testing.assert_close(ensemble(inputs), network(2)(inputs))
    ensemble.fill(0, network(1).state_dict())
    torch.testing.assert_close(ensemble(inputs), network(1)(inputs) + network(2)(inputs))


def test_its_state_tells_who_was_filled_in():
    ensemble, other, inputs = (
        MemberEnsemble(network(0), 2),
        MemberEnsemble(network(5), 2),
        torch.randn(5, 4),
    )
    ensemble.fill(1, network(1).state_dict())
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(inputs), ensemble(inputs))


def test_members_share_nothing_with_what_they_were_copied_from():
    net = network(0)
    ensemble = MemberEnsemble(net, 2)
    nn.init.zeros_(net.weight)
    assert all(member.weight.any() for member in ensemble.members)
    assert not any(weight.requires_grad for weight in ensemble.parameters())
