import torch
from torch import nn

from vestige.models.classifiers import ConvNet
from vestige.models.cost import forward_flops, iterations_for


def test_a_forward_is_counted_as_by_hand():
    # 3x3 over 2 channels to 5 on 6x6 positions, then 5*36 to 7; a multiply-add is two.
    net = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7))
    assert forward_flops(net, (2, 6, 6)) == 2 * (9 * 2 * 5 * 36 + 180 * 7)


def test_counting_changes_nothing():
    net = ConvNet(1, 3).train()
    net.body[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    forward_flops(nn.Sequential(net, nn.Dropout()), (1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    assert not net.body[1].training


def test_dearer_iterations_are_fewer_and_a_gpu_does_more():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert iterations_for(2e9, cpu) == 2 * iterations_for(4e9, cpu)
    assert iterations_for(2e9, gpu) > 10 * iterations_for(2e9, cpu)
    assert iterations_for(1e30, cpu) == 1
    assert iterations_for(0, cpu) > 1
