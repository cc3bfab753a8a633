import torch

from vestige.core.federation import Ask
from vestige.federated.latents import GeneratedFeatures
from vestige.models.latent_generators import LatentGenerator


def generator(seed: int) -> LatentGenerator:
    torch.manual_seed(seed)
    return LatentGenerator(4, 3, 5, hidden_dim=8)


def noise(rows: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(rows, 4, generator=rng)


def test_what_the_server_sends_is_what_the_client_draws_from():
    server, form = generator(0), generator(1)
    server.train()(torch.rand(9, 4), torch.zeros(9, dtype=torch.long))  # moves its statistics
    arrays, settings = GeneratedFeatures.message(server, [0, 2])
    ask = Ask("train", 1, 0, arrays, settings, 5)
    told = GeneratedFeatures.received(ask, form, noise)
    assert told is not None
    labels = torch.tensor([0, 1, 2, 2])
    expected = server.eval()(noise(4, ask.rng("latent")), labels)
    found = told.of(labels)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert set(told.labels(40, torch.device("cpu")).tolist()) == {0, 2}
    # The form stays as it was.
    before = generator(1).state_dict()
    assert all(torch.equal(before[name], value) for name, value in form.state_dict().items())
    assert form.training


def test_nothing_is_sent_as_long_as_no_class_is_known():
    assert GeneratedFeatures.message(generator(0), []) == ({}, {})
    assert GeneratedFeatures.received(Ask("train", 0, 0, {}, {}, 5), generator(0), noise) is None
