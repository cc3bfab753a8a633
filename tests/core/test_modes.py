import pytest
import torch
from torch import nn

from vestige.core.modes import evaluating, flags, set_flags, statistics_kept, train_mode


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def test_train_mode_trains_everything_that_is_not_frozen():
    net = network().eval()
    train_mode(net)
    assert all(flags(net).values())


def test_a_frozen_layer_stays_frozen():
    net = network().eval()
    net[1].requires_grad_(False)
    train_mode(net)
    assert flags(net) == {"": True, "0": True, "1": False, "2": True, "3": True}


def test_a_layer_in_train_mode_without_gradient_is_not_frozen():
    # Statistics that move although the weights do not: the user's choice, left as it is.
    net = network()
    net[1].requires_grad_(False)
    train_mode(net)
    assert net[1].training


def test_batchnorm_without_weights_of_its_own_is_trained():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)).eval()
    train_mode(net)
    assert net[1].training


def test_a_layer_below_a_frozen_container_is_judged_on_its_own():
    inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    net = nn.Sequential(nn.Linear(2, 3), inner).eval()
    inner.requires_grad_(False)
    train_mode(net)
    assert flags(net) == {"": True, "0": True, "1": True, "1.0": False, "1.1": True}


def test_flags_come_back_one_by_one():
    net = network()
    net[1].eval()
    saved = flags(net)
    net.eval()
    set_flags(net, saved)
    assert flags(net) == {"": True, "0": True, "1": False, "2": True, "3": True}


@pytest.mark.parametrize("error", [False, True])
def test_evaluating_restores_each_flag_also_after_an_error(error):
    net = network()
    net[1].eval()
    before, inputs = flags(net), torch.randn(4, 2)
    statistics = net[1].running_mean.clone()
    try:
        with evaluating(net):
            assert not any(flags(net).values())
            assert torch.equal(net(inputs), net(inputs)), "dropout was active"
            if error:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert flags(net) == before
    assert torch.equal(net[1].running_mean, statistics)


def test_statistics_that_are_kept_do_not_move_and_normalise_by_the_batch_all_the_same():
    net, inputs = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), torch.randn(9, 2) + 3
    net[1].eval()
    expected = net(inputs).detach()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with statistics_kept(net):
        found = net(inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert [layer.track_running_stats for layer in net] == [True, True]
    net(inputs)
    assert not torch.equal(net[0].running_mean, before["0.running_mean"])


def test_statistics_move_again_after_an_error():
    net = nn.BatchNorm1d(2)
    with pytest.raises(ZeroDivisionError), statistics_kept(net):
        raise ZeroDivisionError
    assert net.track_running_stats
